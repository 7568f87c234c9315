"""Hugging Face datasets on the Hub or on disk, streamed.

A dataset is written as `hf://user/name?split=test&column=image&name=CONFIG&revision=REVISION`, or as the path of a
`.parquet` or `.arrow` file, of a folder of those, or of a folder that `save_to_disk` wrote. A path takes `?split=`,
`&column=` and `&name=` too. Options may be left out where there is only one choice.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from itertools import count
from urllib.parse import parse_qsl

from .images import SUFFIXES
from .picture import Picture, cause

_SCHEME = "hf://"
_OPTIONS = ("split", "column", "name", "revision")
_TABLES = (".parquet", ".arrow")
_SAVED = ("state.json", "dataset_dict.json")
_ON_HUB = re.compile(r"((zip|tar)://[^:]*::)?hf://")
_BINARY = ("binary", "large_binary")


class StreamedDataset:
    """Reads the pictures of a Hugging Face dataset from beginning to end, and keeps none.

    Args:
        given: the dataset, see the top of this module.

    Raises:
        ValueError: the package `datasets` is missing, or the dataset, its split or its column cannot be found; the
            sentence lists the choices.
    """

    def __init__(self, given: str):
        self.given = given
        path, options = _parse(given)
        self.remote = path.startswith(_SCHEME)
        splits = _load(given, path, options)
        split = options.get("split") or (next(iter(splits)) if len(splits) == 1 else None)
        if split not in splits:
            known = ", ".join(splits)
            raise ValueError(
                f"`source` '{given}' must name one of its splits ({known}); add '?split={next(iter(splits))}'."
                if split is None
                else f"`source` '{given}' has no split '{split}', only {known}; give one of these."
            )
        self.column, cast = _choose_column(given, splits[split].features, options.get("column"))
        dataset = splits[split].select_columns([self.column])
        self._dataset = dataset.cast_column(self.column, cast) if cast is not None else dataset
        self.shards = dataset.num_shards
        plain = re.sub(r"[^\w.-]+", "_", f"{path.removeprefix(_SCHEME).rstrip('/')[-60:]}-{split}").strip("._")
        # The hash keeps two datasets apart that differ in a column or a revision.
        self._folder = f"{plain}-{hashlib.sha256(given.encode()).hexdigest()[:6]}"

    def pictures(self, shard: int) -> Iterator[Picture]:
        """Yields the pictures of one shard.

        Raises:
            ValueError: the storage cannot be read any further.
        """
        part = self._dataset.shard(self.shards, shard) if self.shards > 1 else self._dataset
        rows = iter(part)
        for row in count():
            place = f"{shard}/{row}" if self.shards > 1 else str(row)
            try:
                found = next(rows, None)
            except Exception as error:  # readers and connections all fail in their own ways
                raise ValueError(
                    f"`source` '{self.given}' could not be read from its picture {place} on ({cause(error)}); try "
                    "again later."
                ) from error
            if found is None:
                return
            yield self._picture(found[self.column], shard, row, place)

    def _picture(self, cell: bytes | dict | None, shard: int, row: int, place: str) -> Picture:
        cell = cell if isinstance(cell, dict) else {"bytes": cell, "path": None}
        content, path = cell["bytes"], cell["path"] or ""
        if content is None and path:
            # A row of a stranger's dataset may name any file or address; only those on the Hub are opened for it.
            content = path if (_ON_HUB.match(path) if self.remote else "://" not in path) else None
        known = re.split(r"[/\\]", path.split("::")[0])[-1]
        stem = re.sub(r"[^\w.-]+", "_", os.path.splitext(known)[0])[:80]
        name = f"{self._folder}/{shard:05d}-{row:06d}{f'-{stem}' if stem else ''}"
        file = f"{self.given}#{place}{f':{known}' if known.isprintable() and known else ''}"
        return Picture(file, name, self.given, shard, row, content)


def is_dataset(given: str) -> bool:
    """Tells a Hugging Face dataset by its form, or by tables without pictures in a folder."""
    if given.startswith(_SCHEME):
        return True
    if os.path.isfile(given):
        return given.lower().endswith(_TABLES)
    if not os.path.isdir(given):
        path, options, _ = given.partition("?")
        return bool(options) and os.path.exists(path)
    tables = False
    for _, folders, files in os.walk(given):
        folders[:] = [name for name in folders if not name.startswith(".")]
        shown = [name.lower() for name in files if not name.startswith(".")]
        if any(name.endswith(SUFFIXES) for name in shown):
            return False
        tables = tables or any(name.endswith(_TABLES) for name in shown)
    return tables


def _parse(given: str) -> tuple[str, dict[str, str]]:
    """Splits a source into its path, with the scheme, and its options."""
    path, _, query = (given, "", "") if os.path.exists(given) else given.partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    known = _OPTIONS if path.startswith(_SCHEME) else _OPTIONS[:-1]
    wrong = [key for key in options if key not in known]
    if wrong or (query and not options):
        raise ValueError(
            f"`source` '{given}' has the unknown option '{(wrong or [query])[0]}'; those of a dataset are "
            f"{', '.join(known)}, as in '{path}?split=test&column=image'."
        )
    if path.startswith(_SCHEME):
        path = _SCHEME + path.removeprefix(_SCHEME).removeprefix("datasets/").strip("/")
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path.removeprefix(_SCHEME)):
            raise ValueError(f"`source` '{given}' must have the form 'hf://user/name?split=test'.")
    return path, options


def _load(given: str, path: str, options: Mapping[str, str]) -> dict:
    """Opens the dataset; returns name of a split to streamed dataset."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"`source` '{given}' is a Hugging Face dataset, which needs a package that is not installed; run "
            "`pip install 'anomalysd-pipeline[datasets]'`."
        ) from error
    try:
        if any(os.path.isfile(os.path.join(path, name)) for name in _SAVED):
            saved = datasets.load_from_disk(path)
            splits = saved if isinstance(saved, datasets.DatasetDict) else {str(saved.split or "train"): saved}
            return {str(split): found.to_iterable_dataset() for split, found in splits.items()}
        if os.path.isfile(path):
            kind = os.path.splitext(path)[1][1:].lower()
            return dict(datasets.load_dataset(kind, data_files=path, streaming=True))
        where = {"path": path}
        if path.startswith(_SCHEME):
            where = {"path": path.removeprefix(_SCHEME), "revision": options.get("revision")}
            if os.path.exists(where["path"]):
                raise ValueError(
                    f"a folder of that name is here and would be read instead of the Hub: {where['path']}"
                )
        return dict(datasets.load_dataset(**where, name=options.get("name"), streaming=True))
    except Exception as error:  # the package and the Hub's client have many kinds of errors
        raise ValueError(
            f"`source` '{given}' cannot be opened as a dataset ({cause(error)}); check its name and its files, and "
            "for a private one on the Hub log in with `hf auth login`."
        ) from error


def _choose_column(given: str, features: Mapping | None, column: str | None):
    """Chooses the column of pictures, and the feature to cast it to; None where it holds plain bytes."""
    import datasets

    images = [name for name, kind in (features or {}).items() if isinstance(kind, datasets.Image)]
    binary = [name for name, kind in (features or {}).items() if getattr(kind, "dtype", None) in _BINARY]
    if column is None:
        column = "image" if "image" in images else images[0] if len(images) == 1 else None
    if column in images:
        return column, datasets.Image(decode=False)  # decoded by `load_image`, which trusts less
    if column in binary:
        return column, None
    there = ", ".join([*images, *binary]) or f"none; its columns: {', '.join(features or {}) or 'unknown'}"
    if column is None:
        raise ValueError(
            f"`source` '{given}' must name a column of pictures ({there}); add 'column=NAME' after the split, as in "
            "'?split=test&column=NAME'."
        )
    raise ValueError(f"`source` '{given}' has no column '{column}' of pictures ({there}); give another.")
