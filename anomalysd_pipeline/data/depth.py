"""Find how many bits of gray are in use where 16 are stored: cameras give 10, 12 or 14, and few files tell."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Sequence

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import BITSPERSAMPLE, IMAGEDESCRIPTION

logger = logging.getLogger(__name__)

DEPTHS = (8, 10, 12, 14, 16)
"""Bits that a largest value is taken for where no file tells."""

KEY = "bit_depth"
"""Key of a PIL image's `info` that holds the bits in use: of its file by its tags, or as they were read."""


def check_bit_depth(bit_depth: int | None) -> None:
    """Raises ValueError for anything but None and a whole number from 8 to 16."""
    if bit_depth is not None and (type(bit_depth) is not int or not 8 <= bit_depth <= 16):
        raise ValueError(f"`bit_depth` must be a whole number from 8 to 16, got {bit_depth!r}.")


def is_deep(image: Image.Image) -> bool:
    """Tells whether an image holds gray of 16 bits or more in whole numbers."""
    return image.mode == "I" or image.mode.startswith("I;16")


def tagged_depth(image: Image.Image) -> int | None:
    """Reads the bits in use from the tags of an open file: TIFF's BitsPerSample below 16, OME-TIFF's SignificantBits,
    PNG's sBIT. None where there is none, and for values beyond it, as of a PNG that is scaled to 16 bits."""
    depth = None
    if isinstance(image, PngImageFile):
        depth = _significant_bits(image)
    elif hasattr(image, "tag_v2"):
        with contextlib.suppress(TypeError, ValueError):  # tags of another form than they should have
            stored = image.tag_v2.get(BITSPERSAMPLE, (16,))[0]
            told = re.search(r'<Pixels\b[^>]*\bSignificantBits="(\d+)"', str(image.tag_v2.get(IMAGEDESCRIPTION, "")))
            depth = stored if stored < 16 else int(told[1]) if told else None
    if depth is None or not 8 <= depth < 16 or not is_deep(image):
        return None
    return depth if np.asarray(image).max() < 2**depth else None


def depth_of(highest: float) -> int:
    """Guesses the bits in use from a largest value, with a warning where it looks like 10, 12 or 14."""
    depth = next(depth for depth in DEPTHS if highest < 2**depth or depth == 16)
    if 8 < depth < 16:
        logger.warning(
            f"16-bit gray with values up to {highest:g} looks like {depth} bits and is read as such; if it has "
            "others, give `bit_depth` (in the shell --bit-depth)."
        )
    return depth


def settle(depths: Sequence[int], highest: Sequence[float]) -> int | None:
    """Settles on one depth for several pictures.

    Args:
        depths: bits in use of the pictures whose files tell.
        highest: largest values of the others.

    Returns:
        The most that a file tells, else what the largest value of all looks like; None without pictures.
    """
    return max(depths, default=None) or (depth_of(max(highest)) if highest else None)


def scale_of(lowest: float, highest: float, name: str, bit_depth: int | None) -> tuple[float, int]:
    """Finds the factor from gray or colors of whole numbers to 8 bits.

    Args:
        lowest, highest: of the values, from 0 to 65535.
        name: of the picture, for errors.
        bit_depth: bits in use; None: by `depth_of`.

    Returns:
        The factor and the depth.

    Raises:
        ValueError: for values beyond the depth.
    """
    if lowest < 0 or highest > 65535:
        raise ValueError(f"{name} has gray values from {lowest:g} to {highest:g}; scale them to [0, 65535].")
    depth = bit_depth or depth_of(highest)
    if highest >= 2**depth:
        raise ValueError(
            f"{name} has gray values up to {highest:g}, but its {depth} bits end at {2**depth - 1}; give the "
            "`bit_depth` of the camera."
        )
    return 255 / (2**depth - 1), depth


def _significant_bits(image: PngImageFile) -> int | None:
    """Reads the chunk sBIT, which Pillow skips, of a file that is still open."""
    if image.fp is None:
        return None
    place = image.fp.tell()
    try:
        image.fp.seek(8)
        while len(head := image.fp.read(8)) == 8 and head[4:] != b"IDAT":
            content = image.fp.read(int.from_bytes(head[:4], "big") + 4)
            if head[4:] == b"sBIT" and content:
                return content[0]
        return None
    finally:
        image.fp.seek(place)
