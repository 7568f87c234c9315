"""Sources of pictures: files, folders and Hugging Face datasets, and their division among processes."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Protocol

from PIL import Image

from .images import common_depth
from .listing import list_images
from .picture import Picture
from .streamed import StreamedDataset, is_dataset

MAX_NORMALS = 64
"""Most normal pictures from a dataset; folders are a person's choice and count in full."""


class Source(Protocol):
    """Gives pictures in a fixed order.

    Attributes:
        given: the source as a person wrote it.
        shards: number of parts that can be read on their own.
    """

    given: str
    shards: int

    def pictures(self, shard: int) -> Iterator[Picture]: ...


class Files:
    """Gives the picture files of a folder, with the names of their outputs."""

    shards = 1

    def __init__(self, given: str, paths: Sequence[str], names: Sequence[str]):
        self.given, self.paths, self.names = given, paths, names

    def pictures(self, shard: int) -> Iterator[Picture]:
        for row, (path, name) in enumerate(zip(self.paths, self.names, strict=True)):
            yield Picture(path, name, self.given, shard, row, path)


class Listing:
    """Lists the sources to inspect, in the order in which they were given.

    Attributes:
        sources: number of a source to the source.
        errors: number of a source without pictures to the source as it was given, and the sentence with the reason.
    """

    def __init__(self, sources: Mapping[int, Source], errors: Mapping[int, tuple[str, str]]):
        self.sources, self.errors = dict(sources), dict(errors)

    @property
    def total(self) -> int | None:
        """Number of pictures; None where a dataset does not tell it before it is read."""
        if not all(isinstance(source, Files) for source in self.sources.values()):
            return None
        return sum(len(source.paths) for source in self.sources.values())

    def deal(
        self,
        rank: int = 0,
        world: int = 1,
        part: int = 0,
        parts: int = 1,
        done: Callable[[Picture], bool] = lambda picture: False,
        read: Callable[[str, int], bool] = lambda source, shard: False,
        at_end: Callable[[str, int, int], None] = lambda source, shard, pictures: None,
    ) -> Iterator[Picture]:
        """Yields the pictures that this one of several processes is to inspect.

        Where a dataset has a data file for every process, each process reads files of its own. Otherwise every process
        takes each `world`-th of the remaining pictures.

        Args:
            rank, world: number of the process, and number of processes.
            part, parts: number of the machine, and number of machines, each with a folder of results of its own. What
                falls to a machine does not depend on `done`; it is divided among the machine's processes.
            done: tells whether to leave out a picture.
            read: tells whether to leave out a shard, by source and number, unread.
            at_end: called with source, shard and number of pictures after the last picture of a shard.

        Folders have no shards in the sense of `read` and `at_end`.
        """
        # Both go on from one source to the next, so that small ones do not all fall to the first process.
        turn = listed = 0
        for source in self.sources.values():
            # A folder may have got more pictures since; a data file does not change.
            settled = not isinstance(source, Files)
            in_files = 1 < source.shards >= parts
            shards = range(source.shards)[part::parts] if in_files else range(source.shards)
            left = [shard for shard in shards if not (settled and read(source.given, shard))]
            apart = 1 < len(shards) >= world
            for shard in left[rank::world] if apart else left:
                pictures = 0
                for picture in source.pictures(shard):
                    if not in_files and (listed + picture.row) % parts != part:
                        continue
                    pictures += 1
                    if done(picture):
                        continue
                    own = apart or turn % world == rank
                    turn += not apart
                    if own:
                        yield picture
                if settled and (in_files or parts == 1):  # all of it
                    at_end(source.given, shard, pictures)
            listed += 0 if settled else len(source.paths)

    def places(self) -> Callable[[Mapping], tuple[int, int, int] | None]:
        """Returns a function from a row of a result folder to its place in this listing.

        A place is source, shard and row; None for a picture that is not listed.
        """
        files, numbers = {}, {}
        for number, source in self.sources.items():
            if isinstance(source, Files):
                files.update((path, (number, 0, row)) for row, path in enumerate(source.paths))
            else:
                numbers.setdefault(source.given, number)

        def place(row: Mapping) -> tuple[int, int, int] | None:
            if row.get("source") in numbers:
                return numbers[row["source"]], row["shard"], row["row"]
            return files.get(row["file"])

        return place


def gather(
    given: Sequence[str | os.PathLike],
    skip: Path,
    names: Mapping[str, str] | None = None,
    report: Callable[[str], None] | None = None,
) -> Listing:
    """Lists the pictures of folders, files and datasets, and names the outputs of each.

    Args:
        given: folders, searched with their subfolders; files; datasets.
        skip: a folder whose pictures are left out: the folder of results, which may lie in a given folder.
        names: file to name for pictures that have outputs already; no other picture gets such a name.
        report: see `list_images`.

    Returns:
        The listing, without repetition. The name of a file starts below its source; a suffix, then a number is added
        where it would equal another name.

    Raises:
        ValueError: a dataset cannot be opened.
    """
    skip, names = skip.resolve(), names or {}
    sources: dict[int, Source] = {}
    errors: dict[int, tuple[str, str]] = {}
    below: dict[int, tuple[str, dict[str, str]]] = {}
    listed: set[str] = set()
    resolve = functools.cache(Path.resolve)  # once for each folder: it asks the disk
    for number, source in enumerate(dict.fromkeys(map(os.fspath, given))):
        if is_dataset(source):
            sources[number] = StreamedDataset(source)
            continue
        try:
            found = list_images(source, report, skip)
        except ValueError as error:
            errors[number] = (source, str(error))
            continue
        below[number] = source, {}
        for path in found:
            folder = resolve(path.parent)
            if str(path) not in listed and skip != folder and skip not in folder.parents:
                listed.add(str(path))
                relative = path.relative_to(source) if path != Path(source) else Path(path.name)
                below[number][1][str(path)] = relative.as_posix()

    # Compared without case, because some file systems do not tell "A" from "a".
    taken = {name.casefold(): file for file, name in names.items()}
    for number, (source, relatives) in below.items():
        chosen = []
        for path, relative in relatives.items():
            plain = os.path.splitext(relative)[0]
            for name in _candidates(names.get(path), plain, relative):
                if taken.setdefault(name.casefold(), path) == path:
                    chosen.append(name)
                    break
        if chosen:
            sources[number] = Files(source, list(relatives), chosen)
    return Listing(dict(sorted(sources.items())), errors)


def _candidates(given: str | None, plain: str, relative: str) -> Iterator[str]:
    yield from [given] if given else []
    yield from (plain, relative)
    yield from (f"{plain}_{number}" for number in count(2))


def read_normals(
    given: Sequence[str | os.PathLike], report: Callable[[str], None], bit_depth: int | None = None
) -> list[Image.Image]:
    """Reads the normal pictures of folders, files and datasets as RGB, and skips unreadable ones.

    Args:
        given: as in `gather`.
        report: called with a sentence about each picture that cannot be read, what `list_images` leaves out, and each
            dataset with more than `MAX_NORMALS` pictures, of which the first are taken.
        bit_depth: see `load_image`; None: one for all, see `common_depth`.

    Raises:
        ValueError: a source does not exist, or no picture can be read.
    """
    given = [os.fspath(source) for source in given]
    plain = [source for source in given if not is_dataset(source)]
    paths = list_images(plain, report) if plain else []
    pictures = [Picture(str(path), path.stem, str(path), 0, row, str(path)) for row, path in enumerate(paths)]
    for source in given:
        if source in plain:
            continue
        found = list(islice(Listing({0: StreamedDataset(source)}, {}).deal(), MAX_NORMALS + 1))
        if len(found) > MAX_NORMALS:
            report(f"of `source` '{source}' the first {MAX_NORMALS} pictures are taken.")
        pictures += found[:MAX_NORMALS]
    if bit_depth is None:
        opened = []
        for picture in pictures:
            with contextlib.suppress(ValueError):  # told below
                opened.append(picture.open())
        bit_depth = common_depth(opened)
    loaded = []
    for picture in pictures:
        try:
            loaded.append(picture.load(bit_depth))
        except ValueError as error:
            report(str(error))
    if not loaded:
        raise ValueError("`source` holds no picture that can be read; give at least one, or leave the option out.")
    return loaded
