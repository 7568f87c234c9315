"""Merge the results of several machines, each with a folder of its own, into one folder."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from ..common.files import SoleWriter, disk_errors
from .folder import PART, PICTURES, ROWS, ResultFolder, read_facts
from .rows import read_all
from .summary import summary


def run(args: argparse.Namespace) -> int:
    """Runs the command `merge`.

    Returns:
        The exit status: 0, or 1 where a picture could be read and has no score.

    Raises:
        ValueError: for folders that hold no results, that rest on different settings, or that give one name to
            different pictures; in one sentence.
    """
    if args.out.resolve() in [path.resolve() for path in args.folders]:
        raise ValueError(f"`--out` '{args.out}' is one of the folders to merge; give another.")
    with SoleWriter("--out", args.out) as writer:
        folder = ResultFolder(args.out, args.overwrite)
        first, *others = [read_facts("DIR", path) for path in args.folders]
        for path, other in zip(args.folders[1:], others, strict=True):
            for option in {**first["facts"], **other["facts"]}:
                if first["facts"].get(option) != other["facts"].get(option):
                    raise ValueError(
                        f"`DIR` '{path}' rests on another `{option}` than '{args.folders[0]}'; inspect with the same "
                        "settings everywhere, or merge them into folders of their own."
                    )
        check_names(args.folders)
        writer.keep()
        folder.begin(first["facts"], first["given"])
        with disk_errors("--out", args.out):
            for path in args.folders:
                take(path, args.out)
        counts = folder.finish(Order([source for one in (first, *others) for source in one["given"].get("test", ())]))
    if counts is None:
        raise ValueError(f"`DIR` '{args.folders[0]}' holds no result yet; merge when pictures have been inspected.")
    print(summary(folder, counts))
    return 1 if counts.unscored else 0


class Order:
    """Orders rows as the listing did that they are from: by source, data file and row.

    Args:
        sources: as they were given, in order; others come after them.
    """

    def __init__(self, sources: list[str]):
        self.errors: dict[int, tuple[str, str]] = {}
        self._numbers = {source: number for number, source in enumerate(dict.fromkeys(sources))}

    def places(self) -> Callable[[Mapping], tuple[int, int, int]]:
        """Returns a function from a row to its place, see `sources.Listing.places`."""
        return lambda row: (self._numbers.setdefault(row["source"], len(self._numbers)), row["shard"], row["row"])


def check_names(folders: list[Path]) -> None:
    """Raises ValueError where pictures that differ share a name or a place, as in runs without `--shard`."""
    names: dict[object, str] = {}
    for path in folders:
        for _, _, row in read_all(path / ROWS):
            if "pictures" in row:
                continue
            for key in (row.get("name"), (row["source"], row["shard"], row["row"])):
                if key is not None and names.setdefault(key, row["file"]) != row["file"]:
                    raise ValueError(
                        f"`DIR` '{path}' has '{row['file']}' where another folder has '{names[key]}'; inspect with "
                        "the same `--test` everywhere and `--shard`, which divides it."
                    )


def take(source: Path, target: Path) -> None:
    """Takes over a folder's pictures and rows, the rows last; files are linked where the disk can, and those that are
    there already stay."""
    for name in (*PICTURES, ROWS):
        # Rows are copied: a run may still be adding some.
        for root, _, files in os.walk(source / name):
            for file in sorted(file for file in files if not file.startswith(".")):
                to = target / Path(root).relative_to(source) / file
                to.parent.mkdir(parents=True, exist_ok=True)
                if not to.exists():
                    link(Path(root, file), to, copied=file.endswith(".jsonl"))
    if (source / PART).exists() and not (target / PART).exists():
        link(source / PART, target / PART)


def link(source: Path, target: Path, copied: bool = False) -> None:
    """Links a file, or copies it where that is wanted or the disk cannot link."""
    if not copied:
        with contextlib.suppress(OSError):
            os.link(source, target)
            return
    shutil.copyfile(source, target)
