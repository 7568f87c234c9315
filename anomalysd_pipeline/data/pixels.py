"""Conversion of decoded pictures of any mode, depth and transparency to 8-bit RGB, some rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
from PIL import Image

from .depth import KEY, is_deep, scale_of

RESAVE = "open it in an image viewer and save it again as an 8-bit PNG or JPEG"
"""The remedy for a damaged picture, as the end of a sentence."""
_AT_ONCE = 2**20
"""Pixels that are converted together."""


def flatten(image: Image.Image, name: str, background: str, bit_depth: int | None = None) -> Image.Image:
    """Converts an image of any mode and depth to RGB; transparent pixels show the `background` color.

    Args:
        image: decoded.
        name: of the picture, for errors.
        background: a color.
        bit_depth: see `load_image`.

    Raises:
        ValueError: gray values are not finite or out of range, or the image cannot be converted; the sentence starts
            with `name`.
    """
    try:
        if is_deep(image):
            lowest, highest = extremes((np.asarray(strip) for strip, _ in _strips(image)), name)
            factor, depth = scale_of(lowest, highest, name, image.info.get(KEY) or bit_depth)
            converted = _scaled(image, factor)
            converted.info[KEY] = depth
            return converted
        if image.mode == "F":
            return _from_float(image, name)
        if not image.has_transparency_data:
            return image.convert("RGB")
        return _by_strips(image, lambda strip: _laid_over(strip, background))
    except Exception as error:  # a color outside its palette, or facts about transparency that are none
        if isinstance(error, ValueError) and str(error).startswith(name):
            raise
        raise ValueError(f"{name} is damaged and has no colors ({error}); copy it anew, or {RESAVE}.") from error


def _laid_over(image: Image.Image, background: str) -> Image.Image:
    image = image.convert("LA") if image.mode == "La" else image  # which knows no other way
    image = image.convert("RGBA")
    canvas = Image.new("RGBA", image.size, background)
    canvas.alpha_composite(image)
    return canvas.convert("RGB")


def _from_float(image: Image.Image, name: str) -> Image.Image:
    """Converts gray of uncertain range, to 1 or to 255, by the largest value."""
    lowest, highest = extremes((np.asarray(strip) for strip, _ in _strips(image)), name)
    if lowest < 0 or highest > 255:
        raise ValueError(f"{name} has gray values from {lowest:g} to {highest:g}; scale them to [0, 255].")
    return _scaled(image, 255 / (1 if highest <= 1 else 255))


def _scaled(image: Image.Image, factor: float) -> Image.Image:
    """Converts gray of any depth to RGB, times a factor."""
    return _by_strips(image, lambda strip: to_bytes(np.asarray(strip), lambda rows: rows.astype(np.float64) * factor))


def _by_strips(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Converts an image to RGB, some rows at a time: copies of all of it would take gigabytes."""
    result = Image.new("RGB", image.size)
    for strip, top in _strips(image):
        result.paste(convert(strip), (0, top))
    return result


def _strips(image: Image.Image) -> Iterator[tuple[Image.Image, int]]:
    """Cuts an image into strips of some rows, each with the number of its first row."""
    rows = max(1, _AT_ONCE // image.width)
    for top in range(0, image.height, rows):
        yield image.crop((0, top, image.width, min(top + rows, image.height))), top


def extremes(parts: Iterable[np.ndarray], name: str) -> tuple[float, float]:
    """Finds the lowest and the highest of all values. Raises ValueError if any is not finite."""
    found = np.array([(part.min(), part.max()) for part in parts], dtype=np.float64)  # NaN stays NaN
    if not np.isfinite(found).all():
        raise ValueError(f"{name} holds NaN or infinite values; replace them before loading.")
    return float(found.min()), float(found.max())


def to_bytes(values: np.ndarray, scale: Callable[[np.ndarray], np.ndarray]) -> Image.Image:
    """Rounds scaled values `[H, W]` or `[H, W, C]` to 8 bits, some rows at a time."""
    result, rows = np.empty(values.shape, np.uint8), max(1, _AT_ONCE // max(1, values[0].size))
    for top in range(0, len(values), rows):
        result[top : top + rows] = np.rint(scale(values[top : top + rows]))
    return Image.fromarray(result)
