"""Read the pictures and prompts that the options of a fine-tuning name."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from PIL import Image

from ..common.console import renamed
from ..data.datasets import draw_shots, read_dataset
from ..data.images import common_depth, load_image
from ..data.listing import list_images
from ..method.prompts import PromptBook, check_category
from ..synthetic import normal_images
from .options import DEFAULT_SHOTS

Shots = dict[str, list[tuple[str, Image.Image]]]
"""Category to its pictures: where each comes from, and the picture, RGB."""


def read_shots(args: argparse.Namespace, report: Callable[[str], None]) -> Shots:
    """Reads the pictures that `--data`, `--normal` or `--synthetic` name.

    Args:
        args: parsed options, see `training.options.add_arguments`.
        report: called with a sentence about each picture that cannot be read and is left out.

    Raises:
        ValueError: for options that do not go together, a bad name, or a category with too few pictures.
    """
    if args.shots is not None and args.shots < 1:
        raise ValueError(
            f"`--shots` is {args.shots}, but training needs at least one normal picture of each category; give 1 or "
            "more."
        )
    if args.categories and not args.data:
        raise ValueError("`--categories` chooses among the folders of `--data`; give both, or neither.")
    if args.category is not None and not args.normal:
        raise ValueError("`--category` names the part in the pictures of `--normal`; give both, or neither.")
    if args.synthetic:
        count = args.shots or DEFAULT_SHOTS
        return {
            family: [
                (f"synthetic {family}, seed {args.seed}, number {index}", image)
                for index, image in enumerate(normal_images(family, count, args.seed))
            ]
            for family in args.synthetic
        }
    if args.normal:
        if args.category is None:
            raise ValueError("`--normal` needs `--category`; give the name of the part in the pictures.")
        _check_name(args.category, "--category")
        try:
            paths = list_images(args.normal, lambda told: report(renamed(told, {"source": "--normal"})))
        except ValueError as error:
            raise ValueError(str(error).replace("`source`", "`--normal`")) from error
        return {args.category: _load(args.category, paths, args, args.shots, "--normal", report)}
    for name in args.categories or ():
        _check_name(name, "--categories")
    try:
        found = read_dataset(args.data, args.categories)
    except ValueError as error:
        sentence = str(error).replace("`root`", "`--data`").replace("`category`", "`--categories`")
        raise ValueError(sentence.replace("`categories`", "`--categories`")) from error
    shots: Shots = {}
    for name, category in found.items():
        _check_name(name, "--data")
        count = min(DEFAULT_SHOTS, len(category.train)) if args.shots is None else args.shots
        shots[name] = _load(name, category.train, args, count, "--data", report)
    return shots


def read_prompts(path: Path | None, categories: Collection[str]) -> dict | None:
    """Reads the prompts of a file, as far as they are for `categories`; None where there is no file.

    Raises:
        ValueError: for a file that is no such file, prompts that `PromptBook.add` would refuse, or none that fit.
    """
    if path is None:
        return None
    try:
        prompts = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        cause = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise ValueError(f"`--prompts` '{path}' cannot be read as JSON ({cause}); give another file.") from error
    if not isinstance(prompts, dict):
        raise ValueError(
            f'`--prompts` \'{path}\' must hold {{"NAME": {{"coarse": [...], "fine": [...]}}}}, but it holds a '
            f"{type(prompts).__name__}."
        )
    chosen = {category: value for category, value in prompts.items() if category in categories}
    if not chosen:
        raise ValueError(
            f"`--prompts` '{path}' has prompts for {', '.join(map(repr, prompts)) or 'no category'}, but what is "
            f"trained is {', '.join(map(repr, categories))}; name one of these."
        )
    book = PromptBook.default()
    for category, value in chosen.items():
        try:
            book.add(category, value)
        except ValueError as error:
            raise ValueError(f"`--prompts` '{path}' does not fit for {category!r}: {error}") from error
    return chosen


def _check_name(category: str, option: str) -> None:
    try:
        check_category(category)
    except ValueError as error:
        raise ValueError(str(error).replace("`category`", f"`{option}`")) from error


def _load(
    category: str,
    paths: Sequence[Path],
    args: argparse.Namespace,
    count: int | None,
    option: str,
    report: Callable[[str], None],
) -> list[tuple[str, Image.Image]]:
    """Loads the first `count` readable pictures of a seeded draw; None: all, in order."""
    ordered = paths if count is None else draw_shots(paths, len(paths), args.seed)
    bit_depth = args.bit_depth or common_depth(paths)
    loaded = []
    for path in ordered:
        if len(loaded) == count:
            break
        try:
            loaded.append((str(path), load_image(path, bit_depth)))
        except ValueError as error:
            report(renamed(error, {"source": option, "bit_depth": "--bit-depth"}))
    if not loaded:
        raise ValueError(f"`{option}` holds no picture of {category!r} that can be read; give at least one.")
    if count is not None and len(loaded) < count:
        raise ValueError(
            f"`--shots` is {count}, but `{option}` holds only {len(loaded)} readable pictures of {category!r}; give "
            "more pictures or fewer shots."
        )
    return loaded
