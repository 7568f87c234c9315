"""Write training checkpoints complete or not at all: a run killed at any moment finds its last complete one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..common.files import disk_errors, flush, flush_folder, remove

_PREFIX = "checkpoint-"
_FACTS = "training.json"


def list_checkpoints(folder: Path) -> list[Path]:
    """Lists the complete checkpoints of a folder, oldest first; none if the folder is missing."""
    found = [path for path in folder.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdecimal()]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(path: Path) -> int:
    """Reads the number of steps of a checkpoint from its name."""
    return int(path.name.removeprefix(_PREFIX))


def save_checkpoint(accelerator, folder: Path, step: int, facts: Mapping, total_limit: int | None = None) -> None:
    """Writes `folder/checkpoint-<step>`, which appears when all of it is on disk; called by every process.

    Args:
        accelerator: its `save_state` writes weights, optimizer, schedule and averages.
        facts: JSON-serializable settings that a run must share to go on from here; see `check_checkpoint`.
        total_limit: number of checkpoints to keep, this one included; None: all.

    Raises:
        ValueError: the disk is full or may not be written. The checkpoints that were there stay.
    """
    partial, final = folder / f".{_PREFIX}{step}.partial", folder / f"{_PREFIX}{step}"
    with disk_errors("output_dir", folder, "go on with `--resume_from_checkpoint latest`"):
        if accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob(f".{_PREFIX}*"):  # of a run that was killed while writing or deleting
                shutil.rmtree(leftover, ignore_errors=True)
        accelerator.wait_for_everyone()
        try:
            accelerator.save_state(str(partial))
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                (partial / _FACTS).write_text(json.dumps(dict(facts), indent=2) + "\n", encoding="utf-8")
                flush(partial)
                remove(final)
                os.replace(partial, final)
                flush_folder(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    if accelerator.is_main_process and total_limit is not None:
        for old in list_checkpoints(folder)[:-total_limit]:
            remove(old)
    accelerator.wait_for_everyone()


def find_checkpoints(folders: Sequence[Path], resume_from: str | None) -> list[Path | None]:
    """Finds the checkpoint of each stage to go on from.

    Args:
        folders: one for each stage.
        resume_from: None: start anew; "latest": the last complete one of each folder (None where there is none yet);
            or a name such as "checkpoint-500". A folder without that name gives its last one: all lead to the same
            weights, because a run with other settings is refused.

    Raises:
        ValueError: no folder has that name; or a new run would mix with the checkpoints that are there.
    """
    found = [list_checkpoints(folder) for folder in folders]
    if resume_from is None:
        if any(found):
            raise ValueError(
                f"`output_dir` '{folders[0].parent}' holds checkpoints of an earlier run; go on with "
                "`resume_from_checkpoint` 'latest', or give another folder."
            )
        return [None] * len(folders)
    name = Path(resume_from).name
    names = sorted({path.name for paths in found for path in paths})
    if resume_from != "latest" and name not in names:
        raise ValueError(
            f"`resume_from_checkpoint` must be 'latest' or a checkpoint of '{folders[0].parent}' "
            f"({', '.join(names) or 'none'}), got {resume_from!r}."
        )
    return [next((path for path in reversed(paths) if path.name == name), (paths or [None])[-1]) for paths in found]


def check_checkpoint(path: Path, facts: Mapping, steps: int) -> None:
    """Checks that a run of `steps` steps may go on from a checkpoint.

    Raises:
        ValueError: it was written with other `facts`, and going on would give neither run's result; or after more
            than `steps` steps.
    """
    written = json.loads((path / _FACTS).read_text(encoding="utf-8"))
    ours = json.loads(json.dumps(dict(facts)))
    # In the order of our own facts: a person's choices come before their consequences.
    for key in [*ours, *(key for key in written if key not in ours)]:
        if written.get(key) != ours.get(key):
            raise ValueError(
                f"`{key}` is {ours.get(key)!r}, but '{path}' was written with {written.get(key)!r}; give the same "
                "value, or start anew in another `output_dir`."
            )
    if checkpoint_step(path) > steps:
        raise ValueError(
            f"`steps` leads to {steps} steps, but '{path}' was written after more; give at least "
            f"{checkpoint_step(path)}, or start anew in another `output_dir`."
        )
