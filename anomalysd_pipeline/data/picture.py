"""A picture before decoding: the path, the bytes or the address of a file."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

from PIL import Image, UnidentifiedImageError

from .images import FORMATS, load_image, unidentified


@dataclass(frozen=True)
class Picture:
    """Describes a picture of a source, not decoded yet.

    Attributes:
        file: its name in a table of results, unique within a listing.
        name: name of its outputs: a relative path without suffix, "/" between its parts, that never leaves its folder.
        source: the source as it was given.
        shard, row: place in the source; a shard is a data file of a dataset.
        content: bytes of a file, a path, an address (`hf://...`), or None where a dataset has an empty cell.
    """

    file: str
    name: str
    source: str
    shard: int
    row: int
    content: bytes | str | None

    def load(self, bit_depth: int | None = None) -> Image.Image:
        """Reads the picture as RGB.

        Args:
            bit_depth: see `load_image`.

        Raises:
            ValueError: it cannot be read; the sentence names it and the remedy.
        """
        try:
            return load_image(self.open(), bit_depth)
        except ValueError as error:
            raise ValueError(str(error).replace("`source`, a PIL image,", f"`source` '{self.file}'")) from error

    def open(self) -> str | Image.Image:
        """Gives what `load_image` takes: the path of a file, or an image that is not decoded yet.

        Raises:
            ValueError: as `load`.
        """
        if self.content is None:
            raise ValueError(
                f"`source` '{self.file}' is an empty cell, or names a file elsewhere; put pictures into the dataset."
            )
        if isinstance(self.content, str) and "://" not in self.content:
            return self.content
        data = self.content if isinstance(self.content, bytes) else _fetch(self.content, self.file)
        return _from_bytes(data, self.file)


def _fetch(address: str, name: str) -> bytes:
    import fsspec

    try:
        with fsspec.open(address, "rb") as file:
            return file.read()
    except Exception as error:  # every kind of storage raises its own
        raise ValueError(f"`source` '{name}' cannot be fetched ({cause(error)}); try again later.") from error


def _from_bytes(data: bytes, name: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise ValueError(unidentified(f"`source` '{name}'", data[:12])) from error
    # Decoders raise nearly every kind of exception over damaged bytes.
    except Exception as error:
        raise ValueError(f"`source` '{name}' is damaged or too large ({cause(error)}); replace it.") from error


def cause(error: Exception) -> str:
    """Puts an error into part of a sentence."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
