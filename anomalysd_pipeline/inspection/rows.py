"""The rows of a folder of results: a line for each picture, found again by its file and its place in it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..common.files import read_rows
from ..data.picture import Picture
from .result import table_values

_PLACE = {"source": str, "shard": int}
_END = {**_PLACE, "pictures": int}
_FAILURE = {**_PLACE, "row": int, "file": str, "error": str}
_NUMBER = (int, float)
_RESULT = {
    **_PLACE,
    "row": int,
    "file": str,
    "name": str,
    "score": _NUMBER,
    "threshold": (*_NUMBER, type(None)),
    "seconds": _NUMBER,
    "width": int,
    "height": int,
    "boxes": list,
}


@dataclass(frozen=True, slots=True)
class Entry:
    """Remembers of a row what an order of rows needs, and where the rest of it is.

    Attributes:
        place: source, shard and row of the picture.
        path, offset: where the row is.
        score, defective: None where there is none.
        read: whether a picture without a score could be read.
    """

    place: tuple[int, int, int]
    path: Path
    offset: int
    score: float | None
    defective: bool | None
    read: bool


def read_all(folder: Path) -> Iterator[tuple[Path, int, dict]]:
    """Yields every row with its file and its place in it, those of earlier runs first."""
    paths = [(path.stat().st_mtime_ns, path) for path in folder.glob("*.jsonl")]
    for _, path in sorted(paths):
        for offset, row in read_rows(path, _END, _FAILURE, _RESULT):
            if "score" not in row or _is_usable(row):
                yield path, offset, row


def read_again(index: Iterable[Entry]) -> Iterator[tuple[tuple[int, int, int], dict]]:
    """Yields the place and the row of each entry."""
    files = {}
    try:
        for entry in index:
            if entry.path not in files:
                files[entry.path] = open(entry.path, "rb")  # noqa: SIM115
            files[entry.path].seek(entry.offset)
            yield entry.place, json.loads(files[entry.path].readline())
    finally:
        for file in files.values():
            file.close()


def place_of(picture: Picture) -> dict[str, object]:
    """Gives the part of a row that tells which picture it is of."""
    return {"file": picture.file, "source": picture.source, "shard": picture.shard, "row": picture.row}


def cells(row: Mapping) -> dict[str, object]:
    """Words a row for the table of results."""
    if "error" in row:
        return {"file": row["file"], "error": row["error"]}
    return {"file": row["file"], **table_values(row["score"], row["threshold"], row["seconds"])}


def _is_usable(row: Mapping) -> bool:
    """Tells whether a row has finite numbers, and names of files that lie where results do."""
    boxes = row["boxes"]
    if not all(isinstance(box, list) and len(box) == 6 and all(isinstance(n, _NUMBER) for n in box) for box in boxes):
        return False
    numbers = (row["score"], row["threshold"] or 0.0, row["seconds"], *(number for box in boxes for number in box))
    names = (row["name"], row.get("shown", "x"))
    return all(map(math.isfinite, numbers)) and all(
        isinstance(name, str) and name and "\0" not in name and not {"", ".."} & set(name.split("/")) for name in names
    )
