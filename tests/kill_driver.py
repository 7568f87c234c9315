"""Fine-tunings that are killed with SIGKILL and resumed, for `test_sigkill.py`.

    OMP_NUM_THREADS=1 python -m tests.kill_driver WORK [--kills N] [--states]

Prints what happened as JSON. The parent imports everything, makes the pipeline and forks a child for each run, because
importing takes longer than all runs together. It must have one thread alone: others would not survive a fork.
"""

import argparse
import gc
import json
import os
import random
import select
import shutil
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import peft  # noqa: F401
from accelerate import Accelerator
from safetensors.torch import save_file

from anomalysd_pipeline.adaptation import loop as adaptation
from anomalysd_pipeline.adaptation.checkpoints import list_checkpoints
from anomalysd_pipeline.synthetic import normal_images

from .conftest import make_tiny_pipeline
from .tiny_training import tiny_settings

STEPS = 5
# What a child tells on its pipe.
BEGIN, STEP, WRITING, WRITTEN = b"b", b".", b"[", b"]"
RESULT = "weights.safetensors"


@dataclass
class Ended:
    """A run: whether it was killed, the marks it made, and the time of each as the parent read it."""

    killed: bool
    marks: bytes
    times: list[float]

    @property
    def writing(self) -> bool:
        return self.marks.rfind(WRITING) > self.marks.rfind(WRITTEN)


class DiskStates:
    """A trace function that tells apart the states a folder goes through: its files, and which of them are empty.

    Python calls it before every line of the modules that write or delete, so that no state between two of their
    operations is missed.
    """

    modules = ("checkpoints.py", "stages.py", "checkpointing.py", "serialization.py", "pathlib.py", "shutil.py")
    loops = ("_save", "persistent_id")
    """PyTorch's over the tensors of one file: thousands of lines that lead from one state to the next."""

    def __init__(self, folder: Path, kill_in: int | None):
        self.folder, self.kill_in, self.states = folder, kill_in, []

    def __call__(self, frame, event, argument):
        if not frame.f_code.co_filename.endswith(self.modules) or frame.f_code.co_name in self.loops:
            return None
        state = []
        for entry in sorted(os.scandir(self.folder), key=lambda entry: entry.name):
            state.append(entry.name)
            for file in sorted(os.scandir(entry.path), key=lambda file: file.name):
                state.append(f"{entry.name}/{file.name}{'' if file.stat().st_size else ' (empty)'}")
        if not self.states or state != self.states[-1]:
            self.states.append(state)
            if len(self.states) - 1 == self.kill_in:
                os.kill(os.getpid(), signal.SIGKILL)
        return self


def child(pipe, folder: Path, pipe_end: int, decoder: bool, watched: int | None, kill_in: int | None) -> None:
    """One fine-tuning that goes on from what is in `folder`.

    watched: step whose checkpoint is written under `DiskStates`; the states go to `states.json`.
    """
    write_checkpoint = adaptation.save_checkpoint

    def save_checkpoint(accelerator, at, step, *rest):
        os.write(pipe_end, WRITING)
        if step == watched:
            states = DiskStates(at, kill_in)
            sys.settrace(states)
        write_checkpoint(accelerator, at, step, *rest)
        if step == watched:
            sys.settrace(None)
            (folder / "states.json").write_text(json.dumps(states.states))
        os.write(pipe_end, WRITTEN)

    adaptation.save_checkpoint = save_checkpoint
    settings = tiny_settings(
        steps=STEPS,
        decoder_steps=STEPS,
        train_decoder=decoder,
        decoder_latents="repainted",
        learning_rate=1e-3,
        lr_scheduler="cosine",
        lr_warmup_steps=1,
        use_ema=True,
    )
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    os.write(pipe_end, BEGIN)
    weights = adaptation.fine_tune(
        pipe.base,
        {"hex_nut": normal_images("hex_nut", 3, seed=5, size=64)},
        settings,
        accelerator,
        output_dir=folder,
        checkpointing_steps=1,
        checkpoints_total_limit=2,
        resume_from_checkpoint="latest",
        callback=lambda progress: os.write(pipe_end, STEP),
    )
    parts = {"denoiser": weights.denoiser, "decoder": weights.decoder or {}}
    save_file(
        {f"{part}.{name}": value for part, state in parts.items() for name, value in state.items()}, folder / RESULT
    )


def run(
    pipe,
    folder: Path,
    after: tuple[int, float] | None = None,
    decoder: bool = True,
    watched: int | None = None,
    kill_in: int | None = None,
) -> Ended:
    """Runs a child to its end, or kills it `after` (marks, seconds): seconds after it made so many marks."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        status = 1
        try:
            os.close(reading)
            child(pipe, folder, writing, decoder, watched, kill_in)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writing)
    marks, times, deadline = b"", [], None
    while True:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        if not select.select([reading], [], [], left)[0]:
            os.kill(process, signal.SIGKILL)
            deadline = None
            continue
        new = os.read(reading, 64)
        if not new:
            break
        marks += new
        times += [time.monotonic()] * len(new)
        if after is not None and len(marks) >= after[0]:
            deadline, after = time.monotonic() + after[1], None
    os.close(reading)
    status = os.waitpid(process, 0)[1]
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    if status and not killed:
        raise RuntimeError(f"a fine-tuning in {folder} failed")
    return Ended(killed, marks, times)


def kill_at_random(pipe, work: Path, kills: int, chance: random.Random) -> dict:
    """Runs that are killed once at a random time and once, where enough of them is left, while they write; then
    resumed to their end."""
    whole = run(pipe, work / "whole")
    expected = (work / "whole" / RESULT).read_bytes()
    times = [moment - whole.times[0] for moment in whole.times]
    starts, ends = (
        [t for mark, t in zip(whole.marks, times, strict=True) if mark == kind[0]] for kind in (WRITING, WRITTEN)
    )
    writing = (sum(ends) - sum(starts)) / len(starts)
    told, equal, number = [], [], 0
    while len(told) < kills:
        folder, moment = work / f"run-{number}", (number * 7 % 10 + chance.random()) / 10 * times[-1]
        number += 1
        # Counted from the last mark before it, so that a busy machine shifts it by little.
        marks = sum(time <= moment for time in times)
        first = run(pipe, folder, (marks, moment - times[marks - 1]))
        if not first.killed:
            continue
        ended = [first]
        left = 2 * STEPS - first.marks.count(WRITTEN)
        if left > 1 and len(told) + 1 < kills:
            # A run makes one mark as it begins and three in each step, the first of them before it writes.
            ended.append(run(pipe, folder, (2 + 3 * chance.randrange(left - 1), chance.random() * writing)))
        done = 0
        for one in ended:
            done += one.marks.count(WRITTEN)
            if one.killed:
                told.append({"writing": one.writing, "step": done})
        last = ended[-1] if not ended[-1].killed else run(pipe, folder)
        assert not last.killed
        equal.append((folder / RESULT).read_bytes() == expected)
        shutil.rmtree(folder)
    return {"kills": told, "equal": equal}


def kill_in_each_state(pipe, work: Path) -> list[dict]:
    """One kill in every state the folder goes through while the third checkpoint is written and the first removed."""
    run(pipe, work / "whole", decoder=False)
    expected = (work / "whole" / RESULT).read_bytes()
    prepared = work / "prepared"
    run(pipe, prepared, decoder=False, watched=3, kill_in=0)
    shutil.copytree(prepared, work / "watched")
    run(pipe, work / "watched", decoder=False, watched=3)
    states = json.loads((work / "watched" / "states.json").read_text())
    told = []
    for number, state in enumerate(states):
        folder = work / f"state-{number}"
        shutil.copytree(prepared, folder)
        killed = run(pipe, folder, decoder=False, watched=3, kill_in=number).killed
        there = [path.name for path in list_checkpoints(folder / "denoiser")]
        rest = run(pipe, folder, decoder=False)
        equal = (folder / RESULT).read_bytes() == expected
        left = sorted(path.name for path in (folder / "denoiser").iterdir())
        told.append(
            {
                "state": state,
                "killed": killed,
                "there": there,
                "steps": rest.marks.count(STEP),
                "equal": equal,
                "left": left,
            }
        )
        shutil.rmtree(folder)
    return told


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--states", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    pipe, told = make_tiny_pipeline(), {}
    gc.freeze()  # spares the children from looking through what they inherit
    if args.kills:
        told["random"] = kill_at_random(pipe, args.work / "random", args.kills, random.Random(args.seed))
    if args.states:
        told["states"] = kill_in_each_state(pipe, args.work / "states")
    print(json.dumps(told))


if __name__ == "__main__":
    main()
