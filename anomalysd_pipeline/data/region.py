"""The region of interest of a part: outside of it nothing counts. Kept as text, which any settings file can hold."""

from __future__ import annotations

import base64
import functools
import io
import re
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from ..common.checks import shown
from .images import load_image

LONGEST = 1024
"""Pixels along the longer side of a region that is kept; larger mask pictures are scaled down."""
MOST_POINTS = 1000
_MOST_LETTERS = 2 * LONGEST**2 // 8


def pack_region(mask) -> str:
    """Reads a region and packs it: a PNG of one bit, in base64.

    Args:
        mask: a picture, anything `load_image` takes, or a bool array `[H, W]`: inside is what is brighter than half of
            its brightest pixel. Or a polygon: 3 or more points (x, y), as shares of width and height in [0, 1].

    Raises:
        ValueError: for a mask that cannot be read, points out of range, or a region without a pixel.
    """
    if isinstance(mask, (list, tuple)):
        image = _drawn(mask)
    else:
        if isinstance(mask, (np.ndarray, Tensor)) and str(mask.dtype).endswith("bool"):
            mask = np.asarray(mask).astype(np.uint8) * 255
        try:
            image = load_image(mask).convert("L")
        except ValueError as error:
            raise ValueError(str(error).replace("`source`", "`mask`")) from error
        image = image.point([255 * (level > image.getextrema()[1] / 2) for level in range(256)])
        if max(image.size) > LONGEST:
            share = LONGEST / max(image.size)
            size = tuple(max(1, round(length * share)) for length in image.size)
            image = image.resize(size, Image.Resampling.BOX).point([255 * (level > 127) for level in range(256)])
    if image.getbbox() is None:
        raise ValueError("`mask` must mark some of the picture, but nothing of it is bright.")
    file = io.BytesIO()
    image.convert("1").save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def _drawn(points: Sequence) -> Image.Image:
    try:
        corners = np.array(points, dtype=np.float64)
    except (TypeError, ValueError):
        corners = np.zeros(0)
    if corners.ndim != 2 or not 3 <= len(corners) <= MOST_POINTS or corners.shape[1] != 2:
        raise ValueError(
            f"`mask` must be a picture, or a polygon of 3 to {MOST_POINTS} points (x, y), got {shown(points)}."
        )
    if not ((corners >= 0) & (corners <= 1)).all():
        raise ValueError("`mask` must have points (x, y) that are shares of width and height, from 0 to 1.")
    image = Image.new("L", (LONGEST, LONGEST))
    ImageDraw.Draw(image).polygon([tuple(corner) for corner in corners * LONGEST], fill=255)
    return image


@functools.lru_cache(maxsize=16)
def unpack_region(text: str) -> Tensor:
    """Unpacks what `pack_region` gave: bool `[h, w]`, True inside; not to be changed.

    Raises:
        ValueError: for anything else; a file may hold what it likes.
    """
    fault = ValueError("`region` is no picture of one bit")
    if not isinstance(text, str) or len(text) > _MOST_LETTERS or not re.fullmatch(r"[A-Za-z0-9+/]+={0,2}", text):
        raise fault
    try:
        image = Image.open(io.BytesIO(base64.b64decode(text)), formats=["PNG"])
        if image.mode != "1" or max(image.size) > LONGEST:
            raise fault
        inside = torch.from_numpy(np.array(image))
    except Exception as error:  # decoders raise nearly every kind of exception over damaged bytes
        raise fault from error
    if not inside.any():
        raise fault
    return inside


def inside(region: Tensor, size: tuple[int, int]) -> Tensor:
    """Brings a region `[h, w]` to another size, bool `[H, W]`: a cell counts where any of it lies inside."""
    if tuple(region.shape) == tuple(size):
        return region
    return F.adaptive_max_pool2d(region[None].float(), size)[0] > 0
