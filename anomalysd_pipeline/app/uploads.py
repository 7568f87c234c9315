"""Uploads of visitors: pictures, zips of pictures and texts, none of them trusted."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import threading
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from .limits import Limits
from .zips import Budget, entry_fault, is_incidental, is_zip, open_zip, read_entry

_PACKED = (".7z", ".bz2", ".gz", ".rar", ".tar", ".tgz", ".xz", ".zip")
_SMALLEST_SIDE = 8
_LARGE = 16_000_000
_ONE_LARGE = threading.Lock()
"""Pictures of more pixels than `_LARGE` are decoded one at a time: each takes up to a gigabyte."""
_RESERVED = re.compile(r"(CON|PRN|AUX|NUL|COM\d|LPT\d)", re.IGNORECASE)


class Missing(ValueError):
    """Tells that a value was not given at all, from one that cannot be used."""


@dataclass(frozen=True)
class Upload:
    """Describes one row of a batch: a picture, or the reason why it cannot be read.

    Attributes:
        shown_name: the visitor's name for it, fit to be shown; unique within a batch.
        opener: reads the picture, at a `bit_depth`; None where `error` is set.
        error: a sentence, or None.
    """

    shown_name: str
    opener: Callable[[], Image.Image] | None
    error: str | None = None

    def load(self, bit_depth: int | None = None) -> Image.Image:
        """Reads the picture, RGB; see `read_picture`.

        Raises:
            ValueError: it cannot be read; the sentence names it as the visitor does.
        """
        if self.opener is None:
            raise ValueError(self.error)
        return self.opener() if bit_depth is None else self.opener(bit_depth=bit_depth)


def kept_size(picture: Image.Image, resolution: int) -> Image.Image:
    """Shrinks a picture that a session keeps, in its own shape, to sides of at most twice the model's resolution.

    Several large photographs of each visitor must not stay in memory, and the model sees no more in them.
    """
    from PIL import Image

    kept = picture.copy()
    kept.thumbnail((2 * resolution, 2 * resolution), Image.Resampling.LANCZOS)
    return kept


def read_picture(
    path: str | os.PathLike,
    shown_name: str | None = None,
    limits: Limits | None = None,
    bit_depth: int | None = None,
) -> Image.Image:
    """Reads an uploaded picture, see `data.load_image`, and scales it down to `limits.side` pixels a side.

    Args:
        path: its place on the server, which no error tells.
        shown_name: the visitor's name for it; None: the file's own name.
        limits: bounds; None: the defaults.
        bit_depth: bits in use where 16-bit gray is stored; None: as `data.load_image`.

    Returns:
        An RGB picture.

    Raises:
        ValueError: it is missing, too large, damaged or no picture, or has values beyond its depth.
    """
    from ..data.images import open_image
    from ..data.pixels import flatten

    limits = limits or Limits()
    name, is_large = _checked(path, shown_name, limits)
    try:
        with _ONE_LARGE if is_large else contextlib.nullcontext():
            return _within(flatten(open_image(path, name), name, "white", bit_depth), limits.side)
    except ValueError as error:
        raise ValueError(str(error).replace(os.fspath(path), name.strip("'"))) from error


def common_depth(paths: Sequence[str | os.PathLike], limits: Limits | None = None) -> int | None:
    """Finds one depth for the 16-bit gray of all pictures of a part, see `data.images.common_depth`.

    Pictures that cannot be read say nothing.
    """
    from ..data import images

    readable, large = [], False
    for path in paths:
        with contextlib.suppress(ValueError):  # told when it is read
            large |= _checked(path, None, limits or Limits())[1]
            readable.append(path)
    with _ONE_LARGE if large else contextlib.nullcontext():
        return images.common_depth(readable)


def _checked(path: str | os.PathLike, shown_name: str | None, limits: Limits) -> tuple[str, bool]:
    """Checks the size of a picture by its header; returns its name for errors, and whether it is a large one."""
    name = f"'{visible_name(Path(path).name if shown_name is None else shown_name)}'"
    if not os.path.isfile(path):
        raise ValueError(f"{name} is not there anymore; upload it again.")
    if os.path.getsize(path) > limits.upload_bytes:
        raise ValueError(f"{name} is larger than {limits.upload_bytes / 1e6:.3g} MB; give a smaller file.")
    pixels = _pixels(path)
    if pixels > limits.pixels:
        raise ValueError(f"{name} has more than {limits.pixels / 1e6:.3g} megapixels; scale it down.")
    return name, pixels > _LARGE


def expand(paths: Sequence[str | os.PathLike], limits: Limits | None = None) -> list[Upload]:
    """Lists the pictures of a batch, files themselves and those in zips, in the given order.

    Nothing is unpacked to a name from a zip, and sizes are counted while reading. A file that cannot be read becomes a
    row with a sentence; folders and hidden files in zips are left out silently. With more than `limits.pictures`, the
    last row tells the number left out.

    Raises:
        ValueError: `paths` is empty.
    """
    limits = limits or Limits()
    if not paths:
        raise ValueError("`files` is empty; give pictures, or a zip of pictures.")
    budget = Budget(
        limits.unpacked_bytes,
        f"The pictures of this batch take more than {limits.unpacked_bytes / 1e6:.3g} MB unpacked; give the others "
        "in a second batch.",
    )
    rows: list[Upload] = []
    taken: set[str] = set()
    sources: dict[str, Path] = {}
    more = 0
    for path in map(Path, paths):
        for name, opener, error in _rows_of(path, limits, budget):
            if len(rows) == limits.pictures:
                more += 1
                continue
            shown = visible_name(name)
            if sources.setdefault(shown, path) != path and name != visible_name(path.name):
                shown = visible_name(f"{path.name}/{name}")  # as in another zip
            shown = _unique(shown, taken)
            rows.append(Upload(shown, partial(opener, shown) if opener else None, error))
    if more:
        sentence = f"At most {limits.pictures} pictures are inspected at once; give the others in a second batch."
        rows.append(Upload(_unique(f"{more} more", taken), None, sentence))
    return rows


def visible_name(name: str | os.PathLike, length: int = 80) -> str:
    """Makes a file's name fit to be shown: no invisible characters, no "<" and ">", cut in its middle."""
    text = os.fspath(name)
    if len(text) > 4 * length:
        text = text[: 2 * length] + text[-2 * length :]
    text = _visible(text).replace("<", "‹").replace(">", "›") or "file"
    if len(text) > length:
        tail = length // 2 - 1
        text = f"{text[: length - tail - 1]}…{text[-tail:]}"
    return text


def safe_name(text: str, fallback: str = "part") -> str:
    """Makes a file name without suffix of any text, valid on every system.

    It has letters, digits, "-" and "_", and at most 100 bytes.
    """
    kept = unicodedata.normalize("NFKC", text[:200])
    kept = "".join(c if c.isalnum() or c in "-_" or unicodedata.category(c) in ("Mn", "Mc") else "_" for c in kept)
    kept = re.sub("_+", "_", kept).encode("utf-8", "ignore")[:100].decode("utf-8", "ignore").strip("_-")
    # Windows takes these for devices, with any suffix.
    return f"{kept}_" if _RESERVED.fullmatch(kept) else kept or fallback


def clean_text(text: str | None, field: str, limit: int, required: bool = False) -> str:
    """Cleans a line of text from a visitor: no invisible characters, white space as single spaces.

    Args:
        text: the text; None counts as empty.
        field: its name in errors.
        limit: most characters.
        required: whether it must not be empty.

    Raises:
        ValueError: it is no text, too long, or, as `Missing`, empty though it is required.
    """
    if text is not None and not isinstance(text, str):
        raise ValueError(f"`{field}` must be a text, but {type(text).__name__} was given.")
    text = text or ""
    if len(text) > limit:
        raise ValueError(f"`{field}` has {len(text)} characters; give at most {limit}.")
    cleaned = _visible(text)
    if required and not cleaned:
        raise Missing(f"`{field}` is empty; fill it in.")
    return cleaned


def _visible(text: str) -> str:
    """Removes control characters, surrogates, and marks that reorder or hide the text after them."""
    spaced = "".join(" " if c.isspace() else c for c in unicodedata.normalize("NFC", text))
    return " ".join("".join(c for c in spaced if c.isprintable()).split())


def _pixels(path: str | os.PathLike) -> int:
    """Counts the pixels that a picture's header claims; 0 for other files."""
    from ..data.images import FORMATS

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=FORMATS) as image:
                return image.width * image.height
    # `open_image` meets the fault again and tells it.
    except Exception:
        return 0


def _within(image: Image.Image, side: int) -> Image.Image:
    if max(image.size) <= side:
        return image
    ratio = side / max(image.size)
    size = tuple(max(_SMALLEST_SIDE, round(length * ratio)) for length in image.size)
    return image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)


def _unique(name: str, taken: set[str]) -> str:
    candidate, count = name, 1
    while candidate in taken:
        count += 1
        candidate = f"{name} ({count})"
    taken.add(candidate)
    return candidate


def _rows_of(path: Path, limits: Limits, budget: Budget) -> Iterator[tuple[str, Callable | None, str | None]]:
    """Yields name, opener (called with the name to show) and error of each picture in a file."""
    name = visible_name(path.name)
    if not path.is_file():
        yield name, None, f"'{name}' is not there anymore; upload it again."
    elif path.stat().st_size > limits.upload_bytes:
        yield name, None, f"'{name}' is larger than {limits.upload_bytes / 1e6:.3g} MB; give a smaller file."
    elif not is_zip(path, path.name):
        yield name, partial(_open_file, path, limits), None
    else:
        try:
            with open_zip(path, name, limits.zip_entries) as archive:
                entries = [(index, info) for index, info in enumerate(archive.infolist())]
        except ValueError as error:
            yield name, None, str(error)
            return
        found, seen = False, set()
        for index, info in entries:
            if not is_incidental(info):
                found = True
                yield _row_of(path, index, info, limits, budget, seen)
        if not found:
            yield name, None, f"'{name}' holds no pictures; put some into it."


def _row_of(path: Path, index: int, info, limits: Limits, budget: Budget, seen: set[str]):
    from ..data.images import SUFFIXES

    shown = visible_name(info.orig_filename)
    fault = entry_fault(info, limits.upload_bytes)
    if fault is None and info.filename in seen:
        fault = "occurs twice in the zip; only the first is read"
    elif fault is None and info.filename.lower().endswith(_PACKED):
        fault = "is an archive within the zip; give its pictures themselves"
    elif fault is None and not info.filename.lower().endswith(SUFFIXES):
        fault = f"is no picture by its name, which must end in {', '.join(SUFFIXES)}"
    seen.add(info.filename)
    if fault is not None:
        return shown, None, f"'{shown}' {fault}."
    return shown, partial(_open_entry, path, index, limits, budget), None


def _open_file(path: Path, limits: Limits, shown: str, bit_depth: int | None = None) -> Image.Image:
    return read_picture(path, shown, limits, bit_depth)


def _open_entry(
    path: Path, index: int, limits: Limits, budget: Budget, shown: str, bit_depth: int | None = None
) -> Image.Image:
    if not path.is_file():
        raise ValueError(f"'{shown}' is not there anymore; upload its zip again.")
    with open_zip(path, shown, limits.zip_entries) as archive:
        data = read_entry(archive, archive.infolist()[index], shown, limits.upload_bytes, budget.spend)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "picture")
        copy.write_bytes(data)
        return read_picture(copy, shown, limits, bit_depth)
