"""Write and read the table of an evaluation, a row for each picture and draw, as CSV."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..inspection.result import write_table
from .store import EARLIER_RESULTS, RESULTS

# Column to the function that reads its cells.
_COLUMNS = {
    "shots": int,
    "seed": int,
    "category": str,
    "image": str,
    "defect": str,
    "label": "True".__eq__,
    "score": float,
    "threshold": lambda cell: float(cell) if cell else None,
    "seconds": float,
}


def write_results(folder: Path, rows: Sequence[Mapping]) -> None:
    """Writes `results.csv`, complete or not at all.

    Args:
        folder: of the evaluation.
        rows: draw by draw, each with `shots`, `seed`, `category`, `image` (path below the data set), `defect`, `label`
            (true for defective), `score`, `threshold` (None: not calibrated) and `seconds`; other keys are left out.
    """
    write_table(folder / RESULTS, ({name: row[name] for name in _COLUMNS} for row in rows), list(_COLUMNS))


def read_results(folder: str | os.PathLike) -> list[dict]:
    """Reads the table of an evaluation, also `results.parquet`, which earlier versions wrote.

    Args:
        folder: of the evaluation, its `--out`.

    Returns:
        The rows that were written, with the same types.

    Raises:
        ValueError: if the folder holds no table, or one of an earlier version and pyarrow is not installed.
    """
    path, earlier = Path(folder) / RESULTS, Path(folder) / EARLIER_RESULTS
    if path.is_file():
        with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
            return [{name: read(row[name]) for name, read in _COLUMNS.items()} for row in csv.DictReader(file)]
    if not earlier.is_file():
        raise ValueError(f"`folder` must hold the '{RESULTS}' of an evaluation, got '{folder}'.")
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(
            f"`folder` '{folder}' holds the '{EARLIER_RESULTS}' of an earlier version, which only pyarrow reads; run "
            "`pip install pyarrow`."
        ) from error
    return pyarrow.parquet.read_table(earlier).to_pylist()
