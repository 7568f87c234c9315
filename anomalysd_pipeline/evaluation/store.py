"""Store an evaluation in a folder that survives interruptions and is shared by processes.

    run.json                     facts of the evaluation; a run goes on only with the same
    shots.json                   normal pictures that each category was learned from
    pictures/                    drawn parts, if the evaluation is on these
    prepared/k1-s0/              learned states, for the other processes and for a later run
    rows/<process>.jsonl         one line per inspected picture, appended
    maps/k1-s0/<n>/<index>.npy   anomaly maps, until the metrics of the draw are known
    classes/k1-s0/<n>.json       metrics and curves of a category
    cases/<n>-<kind>-<i>.npz     maps of the pictures in the report
    costs/<process>.jsonl        time and memory, which differ from run to run
    results.csv, summary.json, report.md, figures/

All processes, on however many machines, must see the same folder, and after a barrier every file that was closed
before it. The file system needs no locks, and no two processes append to the same file. Every file but the `.jsonl` is
complete or not there; a last line of a `.jsonl` that was cut short counts as not written.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..common.files import disk_errors, read_rows, write_names, write_whole

RUN, SHOTS, SUMMARY, RESULTS, REPORT = "run.json", "shots.json", "summary.json", "results.csv", "report.md"
EARLIER_RESULTS = "results.parquet"  # of versions that wrote it in place of `RESULTS`
ROWS, MAPS, CLASSES, CASES, PREPARED, COSTS = "rows", "maps", "classes", "cases", "prepared", "costs"
FIGURES, PICTURES = "figures", "pictures"
_KEY = "evaluation"
_REMEDY = "give the same command to go on"
_FIGURES = ("curves_*.png", "cases.png")
_WORK = (ROWS, MAPS, CLASSES, CASES, PREPARED, COSTS)
_OUTCOME = (SUMMARY, RESULTS, EARLIER_RESULTS, REPORT)

_KEYS = dict.fromkeys(("shots", "seed", "number", "index"), int)

# Fact to its option, for the sentence that names a difference between two evaluations.
_OPTIONS = {
    "system.name": "--peer",
    "system.adaptation": "--adaptation",
    "system.base": "--base",
    "system.weights": "--base",
    "system.model_resolution": "--resolution",
    "dataset.name": "--data",
    "dataset.categories": "--categories",
    "protocol.shots": "--shots",
    "protocol.seeds": "--seeds",
    "protocol.resolution": "--map_resolution",
    "protocol.fpr_limit": "--fpr_limit",
    "protocol.connectivity": "--connectivity",
}
_PICTURES = {"dataset.test_pictures": "test pictures", "protocol.drawn_pictures": "normal pictures to learn from"}


@dataclass(frozen=True, order=True)
class Draw:
    """Names a draw of normal pictures: `shots` of each category, chosen by `seed`."""

    shots: int
    seed: int

    def __str__(self) -> str:
        return f"k{self.shots}-s{self.seed}"


class Store:
    """Reads and writes the folder of an evaluation.

    Args:
        folder: made if missing, with the first write.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        # A number that no other process has, on any machine, so that no two write to the same file.
        self._own = f"{uuid.uuid4().hex}.jsonl"
        self._rows_file = None

    # Facts

    def claim(self) -> None:
        """Marks the folder as that of an evaluation, by one process before anything else is written.

        Raises:
            ValueError: if it is a file, cannot be written, or holds files of something else that an evaluation would
                overwrite.
        """
        with disk_errors("--out", self.folder, _REMEDY):
            if self.folder.exists() and not self.folder.is_dir():
                raise ValueError(f"`--out` '{self.folder}' is a file; give a folder.")
            if self._record() is None:
                names = (RUN, SHOTS, *_OUTCOME, *_WORK, FIGURES, PICTURES)
                found = [name for name in names if (self.folder / name).exists()]
                if found:
                    raise ValueError(
                        f"`--out` '{self.folder}' holds {', '.join(map(repr, found))} of something else, which an "
                        "evaluation would write over; give a new or empty folder."
                    )
                self.write_json(RUN, {_KEY: None})

    def is_begun(self) -> bool:
        """Tells whether the folder holds an evaluation to go on with."""
        return bool((self._record() or {}).get(_KEY))

    def check_facts(self, facts: Mapping) -> None:
        """Checks that a run with `facts` may go on in this folder.

        Raises:
            ValueError: if the folder holds an evaluation of something else, naming the first difference.
        """
        written, asked = (self._record() or {}).get(_KEY), json.loads(json.dumps(facts))
        if not written or written == asked:
            return
        name, before, now = _first_difference("", written, asked)
        what = f"{_OPTIONS.get(name, name)} = {before!r}, but {now!r} is asked for now"
        if name in _PICTURES:
            what = f"other {_PICTURES[name]} than are asked for now"
        raise ValueError(
            f"`--out` '{self.folder}' holds an evaluation with {what}; give the same options to go on with it, "
            "--overwrite to start anew, or another folder."
        )

    def begin(self, facts: Mapping) -> None:
        """Writes the facts of the evaluation."""
        self.write_json(RUN, {_KEY: facts})

    def discard(self) -> None:
        """Removes an earlier evaluation, and nothing else in the folder; drawn parts stay."""
        with disk_errors("--out", self.folder, _REMEDY):
            self.write_json(RUN, {_KEY: None})  # first, so that whatever is left belongs to no evaluation
            for name in _WORK:
                if (self.folder / name).exists():
                    shutil.rmtree(self.folder / name)
            for name in (SHOTS, *_OUTCOME):
                (self.folder / name).unlink(missing_ok=True)
            figures = self.folder / FIGURES
            for path in [path for pattern in _FIGURES for path in figures.glob(pattern)]:
                path.unlink()
            if figures.exists() and not any(figures.iterdir()):
                figures.rmdir()

    def _record(self) -> dict | None:
        try:
            record = json.loads((self.folder / RUN).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (UnicodeDecodeError, json.JSONDecodeError):
            return None  # not ours, which is always complete
        return record if isinstance(record, dict) and _KEY in record else None

    # Pictures

    def add(self, row: dict, anomaly_map: np.ndarray) -> None:
        """Stores the row and the map of a picture, the map first.

        Args:
            row: JSON-serializable, with `shots`, `seed`, `category`, `number` (of the category) and `index`.
            anomaly_map: float32 [h, w].
        """
        path = self.map_path(Draw(row["shots"], row["seed"]), row["number"], row["index"])
        with disk_errors("--out", self.folder, _REMEDY):
            # A name of its own: looking for what killed processes left would take longer with every picture.
            unfinished = path.with_name(f".{uuid.uuid4().hex}")
            write_whole(path, lambda partial: _save_map(partial, anomaly_map), unfinished, flushed=False)
            if self._rows_file is None:
                rows = self.folder / ROWS / self._own
                rows.parent.mkdir(parents=True, exist_ok=True)
                self._rows_file = open(rows, "a", encoding="utf-8")  # noqa: SIM115 (open for the whole run)
            self._rows_file.write(json.dumps(row) + "\n")
            self._rows_file.flush()

    def rows(self, draw: Draw | None = None) -> dict[tuple[int, int, int, int], dict]:
        """Reads the rows of a draw or of all, by `(shots, seed, number, index)` and in this order.

        A line that a killed process left unfinished, or that is damaged, is skipped.
        """
        found = {}
        for row in self._lines(ROWS, _KEYS):
            if draw is None or (row["shots"], row["seed"]) == (draw.shots, draw.seed):
                found[row["shots"], row["seed"], row["number"], row["index"]] = row
        return dict(sorted(found.items()))

    def map_path(self, draw: Draw, number: int, index: int) -> Path:
        """Returns the path of a picture's map, named by numbers: a category may have any name."""
        return self.folder / MAPS / str(draw) / str(number) / f"{index:06d}.npy"

    def prepared(self, draw: Draw) -> Path:
        """Returns the folder for the learned states of a draw."""
        return self.folder / PREPARED / str(draw)

    def clear(self, draw: Draw, maps: bool) -> None:
        """Removes the learned states of a draw, and with `maps` its maps, once its metrics are known."""
        for folder in (self.prepared(draw), *([self.folder / MAPS / str(draw)] if maps else [])):
            if folder.exists():
                # Renamed first, so that an interrupted removal does not look like maps that are kept.
                doomed = folder.with_name(f".{uuid.uuid4().hex}")
                os.replace(folder, doomed)
                shutil.rmtree(doomed, ignore_errors=True)

    def tidy(self) -> None:
        """Removes unfinished files of killed processes, by one process when all are done."""
        names = (RUN, SHOTS, *_OUTCOME)
        unfinished = [path for name in names for path in self.folder.glob(f".{name}.*")]
        unfinished += [path for name in (MAPS, CLASSES, PREPARED) for path in (self.folder / name).rglob(".*")]
        for path in [*unfinished, *(self.folder / PICTURES).glob(".*")]:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        for name in (MAPS, PREPARED):  # empty, unless maps are kept
            if (self.folder / name).exists() and not any((self.folder / name).iterdir()):
                (self.folder / name).rmdir()

    # Categories

    def class_path(self, draw: Draw, number: int) -> str:
        """Returns the path of a category's metrics, relative to the folder."""
        return f"{CLASSES}/{draw}/{number}.json"

    def has(self, name: str) -> bool:
        """Tells whether a file has been written."""
        return (self.folder / name).exists()

    def write_json(self, name: str, content) -> None:
        """Writes a file, complete or not at all."""
        path = self.folder / name
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        with disk_errors("--out", self.folder, _REMEDY):
            write_whole(path, lambda partial: write_names(partial, text))

    def read_json(self, name: str):
        """Reads a file that `write_json` wrote."""
        return json.loads((self.folder / name).read_text(encoding="utf-8"))

    # Costs

    def add_costs(self, costs: Mapping) -> None:
        """Appends the costs of this process."""
        with disk_errors("--out", self.folder, _REMEDY):
            path = self.folder / COSTS / self._own
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(costs) + "\n")

    def costs(self) -> list[dict]:
        """Reads the costs of all processes."""
        return list(self._lines(COSTS, {}))

    def _lines(self, name: str, form: Mapping) -> Iterator[dict]:
        for path in sorted((self.folder / name).glob("*.jsonl")):
            for _, row in read_rows(path, form):
                yield row


def _save_map(path: Path, anomaly_map: np.ndarray) -> None:
    with open(path, "wb") as file:  # given a path, NumPy would add a suffix
        np.save(file, anomaly_map)


def _first_difference(name: str, before, now) -> tuple[str, object, object]:
    """Finds the innermost key that differs, and both values."""
    while isinstance(before, dict) and isinstance(now, dict):
        if name == "dataset.categories" and list(before) != list(now):
            return name, list(before), list(now)
        key = next(k for k in [*now, *before] if before.get(k) != now.get(k))
        name, before, now = f"{name}.{key}".lstrip("."), before.get(key), now.get(key)
    return name, before, now
