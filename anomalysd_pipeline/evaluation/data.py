"""Choose the pictures of an evaluation from its options: those to test, and those to learn from."""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ..data.datasets import (
    GOOD,
    Category,
    Shots,
    TestImage,
    draw_all,
    read_dataset,
    read_folder,
    read_shots,
)
from ..data.ground_truth import shrink_mask
from ..data.images import load_image
from .options import DEFAULT_SEEDS, DEFAULT_SHOTS, named
from .store import PICTURES, Draw

_SYNTHETIC = {"train": 16, "good": 12, "defective": 12}
# Names that people give to good pictures, without case and whatever stands between the words.
_GOOD_TOO = ("clean", "correct", "defectfree", "fine", "flawless", "healthy", "intact", "nodefect", "nodefects")
_GOOD_TOO += ("nondefect", "nondefective", "pass", "passed", "perfect", "undamaged")
_FOLDERS = ("normal_dir", "abnormal_dir", "mask_dir", "normal_test_dir")


def check_data_options(args: argparse.Namespace) -> None:
    """Raises ValueError for options about pictures that do not go together."""
    if args.categories and not args.data:
        raise ValueError("`--categories` chooses among the folders of `--data`; give both, or neither.")
    if args.normal_dir and args.category is None:
        raise ValueError("`--normal_dir` needs `--category`; give the name of the part in the pictures.")
    for name in ("category", "abnormal_dir", "mask_dir", "normal_test_dir"):
        if getattr(args, name) is not None and not args.normal_dir:
            raise ValueError(f"`--{name}` goes with `--normal_dir`; give both, or neither.")
    if args.shots_file and (tuple(args.shots) != DEFAULT_SHOTS or tuple(args.seeds) != DEFAULT_SEEDS):
        raise ValueError("`--shots_file` has the numbers of shots and the seeds; leave out `--shots` and `--seeds`.")
    if args.synthetic:
        from ..synthetic import FAMILIES

        unknown = next((family for family in args.synthetic if family not in FAMILIES), None)
        if unknown is not None:
            raise ValueError(f"`--synthetic` has {unknown!r}; choose among {', '.join(FAMILIES)}.")


def read_categories(args: argparse.Namespace) -> tuple[Path, dict[str, Category]]:
    """Lists the data set that the options name, and the folder that holds all of its paths.

    Categories are sorted by name, whatever their order in the options. Drawn parts are written to `pictures` in the
    folder of the evaluation.

    Raises:
        ValueError: as the readers in `datasets`.
    """
    if args.synthetic:
        root, families = args.out / PICTURES, sorted(set(args.synthetic))
        for family in families:
            if not (root / family).exists():
                _draw(root, family)
        return root, read_dataset(root, families)
    if args.normal_dir:
        # Absolute, because a relative path has no folder in common with an absolute one.
        folders = {name: path and Path(os.path.abspath(path)) for name in _FOLDERS for path in [getattr(args, name)]}
        with named(**{name: name for name in _FOLDERS}):
            category = read_folder(args.category, **folders)
        given = [folder for folder in folders.values() if folder is not None]
        return Path(os.path.commonpath(given)), {args.category: category}
    with named(root="data", categories="categories"):
        found = read_dataset(args.data, args.categories)
    return args.data, dict(sorted(found.items()))


def limited(categories: Mapping[str, Category], limit: int | None) -> dict[str, Category]:
    """Keeps at most `limit` normal and `limit` defective test pictures of each category, evenly spread."""
    if limit is None:
        return dict(categories)
    chosen = {}
    for name, category in categories.items():
        kept = []
        for label in (False, True):
            own = [test for test in category.test if test.label == label]
            places = sorted({round(place) for place in np.linspace(0, len(own) - 1, min(limit, len(own)))})
            kept += [own[place] for place in places]
        chosen[name] = Category(name, category.train, kept)
    return chosen


def choose_shots(args: argparse.Namespace, root: Path, categories: Mapping[str, Category]) -> Shots:
    """Reads the draws from the file that the options name, or draws them.

    Zero shots have a single draw, since there is nothing to choose.

    Args:
        categories: with all of their test pictures, so that none is learned from.

    Raises:
        ValueError: as `datasets.draw_all` and `datasets.read_shots`.
    """
    if args.shots_file is None:
        with named(shots="shots"):
            shots = draw_all(categories, sorted(set(args.shots)), sorted(set(args.seeds)))
    else:
        with named(path="shots_file"):
            shots = read_shots(args.shots_file, root, categories)
    in_order = {count: dict(sorted(by_seed.items())) for count, by_seed in sorted(shots.items())}
    return {count: dict(list(by_seed.items())[:1]) if count == 0 else by_seed for count, by_seed in in_order.items()}


def load_picture(path: Path, bit_depth: int | None = None) -> Image.Image:
    """Loads a picture of the data set, RGB; `bit_depth` as in `load_image`.

    Raises:
        ValueError: as `load_image`, in the words of a person who gave a folder.
    """
    try:
        return load_image(path, bit_depth)
    except ValueError as error:
        raise ValueError(str(error).replace("`source`", "the picture")) from error


def load_truth(test: TestImage, size: tuple[int, int] | None = None) -> np.ndarray | None:
    """Loads the mask of a test picture, bool [H, W], at `size` (H, W) or its own; None where it has none.

    Raises:
        ValueError: as `datasets.load_mask`, in the words of a person who gave a folder.
    """
    try:
        return test.mask(size)
    except ValueError as error:
        raise ValueError(str(error).replace("`path`", "the mask")) from error


def check_pictures(categories: Mapping[str, Category], root: Path, map_resolution: int | str) -> list[str]:
    """Looks for what makes figures wrong without a word: labels by odd names, empty masks and thin defects.

    Args:
        categories: the data set, with the pictures to test.
        root: its folder.
        map_resolution: side at which maps and masks are compared, or "original".

    Returns:
        Sentences to be told.

    Raises:
        ValueError: a mask cannot be read, or has another size than its picture.
    """
    notes, empty, thin = [], [], []
    for name, category in categories.items():
        kinds = sorted({test.defect for test in category.test})
        if "good" not in kinds:
            notes.append(
                f"{name!r} has no good test picture, but only {', '.join(map(repr, kinds))}; a folder of good "
                f"pictures is called {', '.join(map(repr, GOOD))}."
            )
        for kind in (kind for kind in kinds if re.sub(r"[^a-z]", "", kind.casefold()) in _GOOD_TOO):
            notes.append(f"{name!r} has a defect called {kind!r}; if its pictures are good, call the folder 'good'.")
        for test in category.test:
            mask = load_truth(test)
            if mask is not None and not mask.any():
                empty.append(test.path.relative_to(root).as_posix())
            elif (
                mask is not None
                and map_resolution != "original"
                # Parts of a thin line may lie so that they fill pixels of the smaller mask.
                and shrink_mask(mask, map_resolution).mean() < mask.mean() / 2
            ):
                thin.append(test.path.relative_to(root).as_posix())
    if empty:
        notes.append(f"The masks of {_some(empty)}, filed as defective, are empty; they count as good pixels.")
    if thin:
        notes.append(
            f"Of the defects in {_some(thin)} more than half vanishes at {map_resolution} x {map_resolution} pixels; "
            "give `--map_resolution original` to keep them."
        )
    return notes


def _some(pictures: Sequence[str]) -> str:
    """Names a few pictures."""
    few = ", ".join(map(repr, pictures[:3]))
    return few if len(pictures) <= 3 else f"{len(pictures)} pictures such as {few}"


def describe_pictures(
    args: argparse.Namespace, root: Path, categories: Mapping[str, Category], shots: Shots, draws: Sequence[Draw]
) -> tuple[dict, dict]:
    """Describes the data set, and the part of the protocol that is about pictures; JSON-serializable.

    Pictures are told apart by name and label only, so that a damaged file may be replaced.
    """
    counts = {
        name: {
            "normal": sum(not test.label for test in category.test),
            "defective": sum(test.label for test in category.test),
            "masks": sum(test.mask_path is not None for test in category.test),
        }
        for name, category in categories.items()
    }
    tested = [
        f"{name} {test.path.relative_to(root).as_posix()} {test.label} {test.defect}"
        for name, category in categories.items()
        for test in category.test
    ]
    drawn = [
        f"{draw} {name} {path.relative_to(root).as_posix()}"
        for draw in draws
        for name, paths in shots[draw.shots][draw.seed].items()
        for path in paths
    ]
    name = "synthetic" if args.synthetic else args.category if args.normal_dir else root.resolve().name
    dataset = {"name": name, "categories": counts, "test_pictures": _digest(tested)}
    protocol = {
        "shots": list(shots),
        "seeds": sorted({draw.seed for draw in draws}),
        "drawn_pictures": _digest(drawn),
    }
    return dataset, protocol


def _draw(root: Path, family: str) -> None:
    """Draws a family into its folder, complete or not at all."""
    from ..synthetic import write_dataset

    partial = root / f".{uuid.uuid4().hex}"
    try:
        write_dataset(partial, [family], seed=0, **_SYNTHETIC)
        os.replace(partial / family, root / family)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _digest(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
