"""Cut a large picture into overlapping tiles, and blend what was found in them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.checks import require_whole

TILES_AT_ONCE = 16
"""Tiles of a picture whose maps are in memory together."""
MOST = 2**15
"""Pixels of a tile's side."""

Box = tuple[int, int, int, int]
"""Left, top, right and bottom of a tile, in pixels, as of `PIL.Image.crop`."""


def check_tiles(size: object, overlap: object) -> None:
    """Raises ValueError for a `tile_size` or `tile_overlap` out of its range."""
    require_whole("tile_size", size, 0, MOST)
    require_whole("tile_overlap", overlap, 0, MOST)
    if 0 < size < 32:
        raise ValueError(f"`tile_size` must be at least 32 pixels, or 0 for none, got {size}.")
    if overlap > size // 2:
        raise ValueError(f"`tile_overlap` must be at most half of `tile_size` ({size}), got {overlap}.")


def cut(height: int, width: int, size: int, overlap: int) -> list[Box]:
    """Spreads tiles evenly over a picture, neighbors overlapping by at least `overlap`; a side shorter than `size` is
    not cut, and a `size` of 0 cuts nothing."""
    rows, columns = (_starts(length, size or length, overlap) for length in (height, width))
    return [
        (left, top, min(left + (size or width), width), min(top + (size or height), height))
        for top in rows
        for left in columns
    ]


def _starts(length: int, size: int, overlap: int) -> list[int]:
    if length <= size:
        return [0]
    count = -(-(length - overlap) // (size - overlap))
    return [round(index * (length - size) / (count - 1)) for index in range(count)]


def blend(parts: Sequence[Tensor], boxes: Sequence[Box], size: tuple[int, int], overlap: int) -> Tensor:
    """Puts tiles together, the weight of each falling off over the overlap so that no seam shows.

    Args:
        parts: float `[..., h, w]`, each of its box's size.
        boxes: of `cut`, or some of these.
        size: (H, W) of the picture.
        overlap: as of `cut`.

    Returns:
        `[..., H, W]`, 0 where there is no tile.
    """
    total = parts[0].new_zeros(*parts[0].shape[:-2], *size)
    weights = parts[0].new_zeros(size)
    for part, (left, top, right, bottom) in zip(parts, boxes, strict=True):
        down, across = (_ramp(length, overlap).to(part) for length in part.shape[-2:])
        weight = down[:, None] * across
        total[..., top:bottom, left:right] += part * weight
        weights[top:bottom, left:right] += weight
    return total / weights.clamp(min=torch.finfo(weights.dtype).tiny)


def _ramp(length: int, overlap: int) -> Tensor:
    place = torch.arange(length)
    return torch.minimum(place, length - 1 - place).clamp(max=overlap).add(1.0) / (overlap + 1)
