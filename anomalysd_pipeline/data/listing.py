"""List the pictures of folders, and tell what is left out."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from .images import SUFFIXES, count_pages

logger = logging.getLogger(__name__)

RESULTS = "run.json"
"""File by which a folder of results is known, see `inspection.folder`."""
_HEIC = (".heic", ".heif")
_TIFF = (".tif", ".tiff")


def list_images(
    source: str | os.PathLike | Iterable[str | os.PathLike],
    report: Callable[[str], None] | None = None,
    skip: Path | None = None,
) -> list[Path]:
    """Lists the pictures of a folder, a file, or several of either.

    Args:
        source: a folder (searched with its subfolders and, once each, linked folders), a picture file, or an iterable
            of those. In folders, files count by their suffix, see `SUFFIXES`, in upper or lower case, and hidden files
            and folders are skipped; a file given by name is taken as it is.
        report: called with a sentence about what each folder holds beside the pictures, by count and reason; None: a
            warning is logged.
        skip: a folder that is left out without a word.

    Returns:
        Paths without repetition, those of each folder sorted by their relative path as text.

    Raises:
        ValueError: a path does not exist or holds the results of an inspection, or there is no picture at all.
    """
    report = report or logger.warning
    sources = [source] if isinstance(source, (str, os.PathLike)) else list(source)
    found: dict[Path, None] = {}
    for entry in map(Path, sources):
        if os.path.isdir(entry):
            if _holds_results(entry):
                raise ValueError(
                    f"`source` '{entry}' holds results of an inspection; give the folder of the pictures."
                )
            paths, left_out = _walk(entry, skip)
        elif os.path.isfile(entry):
            paths, left_out = [entry], []
        else:
            raise ValueError(f"`source` '{entry}' does not exist; give a folder of pictures or a picture file.")
        left_out += _further_pages([path for path in paths if path not in found])
        found.update(dict.fromkeys(paths))
        if left_out:
            report(f"`source` '{entry}': left out {'; '.join(left_out)}.")
    if not found:
        where = ", ".join(f"'{entry}'" for entry in sources) or "an empty list"
        raise ValueError(f"`source` {where} holds no pictures; put files in it that end in {', '.join(SUFFIXES)}.")
    return list(found)


def list_folder(folder: str | os.PathLike, argument: str) -> list[Path]:
    """Lists the pictures of a folder as [`list_images`], with the name of the argument that gave it in sentences."""

    def named(sentence: object) -> str:
        return str(sentence).replace("`source`", f"`{argument}`")

    try:
        return list_images(folder, lambda sentence: logger.warning(named(sentence)))
    except ValueError as error:
        raise ValueError(named(error)) from error


def _walk(folder: Path, skip: Path | None) -> tuple[list[Path], list[str]]:
    """Lists the pictures of a folder, and words what is left out."""
    paths, others, results, visited = [], Counter(), 0, set()
    pending = [os.fspath(folder)]
    while pending:  # linked folders come last: in their own place they have the shorter name
        for root, folders, files in os.walk(pending.pop(0)):
            real = os.path.realpath(root)
            kept = real not in visited and (skip is None or real != os.path.realpath(skip))
            if kept and _holds_results(root):
                kept, results = False, results + 1
            visited.add(real)
            if not kept:
                folders.clear()
                continue
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            pending += [path for name in folders if os.path.islink(path := os.path.join(root, name))]
            for name in files:
                if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                    paths.append(Path(root, name))
                elif not name.startswith("."):
                    others[os.path.splitext(name)[1].lower() or "without suffix"] += 1
    left_out = []
    if others:
        kinds = ", ".join(f"{count} {kind}" for kind, count in others.most_common(8))
        remedy = ", of which HEIC is read after `pip install pillow-heif`" if set(others) & set(_HEIC) else ""
        left_out.append(f"files of other types ({kinds}){remedy}")
    if results:
        left_out.append(f"results of an inspection in folders ({results})")
    return sorted(paths, key=lambda path: path.relative_to(folder).as_posix()), left_out


def _holds_results(folder: str | os.PathLike) -> bool:
    try:
        with open(os.path.join(folder, RESULTS), encoding="utf-8") as file:
            return {"facts", "given"} <= set(json.load(file))
    except (OSError, ValueError, TypeError):
        return False


def _further_pages(paths: Iterable[Path]) -> list[str]:
    counts = [count for path in paths if path.suffix.lower() in _TIFF and (count := count_pages(path)) > 1]
    if not counts:
        return []
    return [f"further pages ({sum(counts) - len(counts)}) of TIFF files ({len(counts)}), whose first pages are read"]
