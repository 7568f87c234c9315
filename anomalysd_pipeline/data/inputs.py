"""Pictures in the sizes at which the networks take them."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .region import inside
from .tensors import augment, to_tensor
from .tiles import Box, cut

COPY_DIFFERENCE = 1.5
"""Mean difference, of 255 levels, of the averages in 8 x 8 cells of a picture and its copy."""
COPY_CORRELATION = 0.5
"""Correlation of what is finer: even surfaces differ as little under one lamp, but not in their texture."""
_CELLS, _DIRECTIONS = 8 * 8 * 3, 512


@dataclass(frozen=True)
class Inputs:
    """Holds N pictures as the networks see them.

    Attributes:
        squares: what is repainted, float32 `[N, 3, R, R]` in [-1, 1], R the pipeline's resolution.
        shaped: what the extractor describes, N of float32 `[3, h, w]` in [-1, 1]; sizes may differ.
        regions: what of `squares` counts, bool `[N, 1, R, R]`; None: all.
        tiles: of each picture those that are looked at in its place, at least one; None: pictures are looked at whole.
    """

    squares: Tensor
    shaped: list[Tensor]
    regions: Tensor | None = None
    tiles: list[Tiles] | None = None

    @classmethod
    def of(
        cls,
        pictures: Sequence[Image.Image],
        resolution: int,
        size_of: Callable[[int, int], tuple[int, int] | None],
        region: Tensor | None = None,
        tile_size: int = 0,
        tile_overlap: int = 0,
    ) -> Inputs:
        """Converts RGB pictures.

        Args:
            resolution: R.
            size_of: gives the size at which the extractor describes a picture of a height and width; None: R x R.
            region: what of each picture counts, bool `[h, w]`; None: all.
            tile_size, tile_overlap: see `InspectionSettings`.
        """
        squares = [to_tensor(picture, resolution) for picture in pictures]
        shaped = []
        for picture, square in zip(pictures, squares, strict=True):
            size = size_of(picture.height, picture.width)
            shaped.append(square if size in (None, (resolution, resolution)) else to_tensor(picture, size))
        whole = region
        if region is not None:
            region = inside(region, (resolution, resolution)).expand(len(squares), 1, -1, -1)
        tiles = None
        if tile_size:
            tiles = [Tiles.of(one, resolution, size_of, whole, tile_size, tile_overlap) for one in pictures]
        return cls(torch.stack(squares), shaped, region, tiles)

    def __len__(self) -> int:
        return len(self.shaped)

    def __getitem__(self, index: int | slice) -> Inputs:
        """Gives one picture as inputs of length 1, or several."""
        rows = index if isinstance(index, slice) else slice(index, index + 1)
        regions = None if self.regions is None else self.regions[rows]
        return Inputs(self.squares[rows], self.shaped[rows], regions, None if self.tiles is None else self.tiles[rows])

    def chunks(self, count: int) -> Iterator[Inputs]:
        """Gives at most `count` pictures after another."""
        return (self[start : start + count] for start in range(0, len(self), count))

    def to(self, device: torch.device) -> Inputs:
        """Moves all to a device."""
        regions = None if self.regions is None else self.regions.to(device)
        return Inputs(self.squares.to(device), [picture.to(device) for picture in self.shaped], regions, self.tiles)

    def varied(self, seed: int, **limits: float) -> Inputs:
        """Varies every picture by `augment`, alike for both networks; draws differ from picture to picture."""

        def vary(pictures: Sequence[Tensor]) -> list[Tensor]:
            generator = torch.Generator().manual_seed(seed)
            return [augment(picture, generator, **limits) for picture in pictures]

        tiles = None
        if self.tiles is not None:
            tiles = [Tiles(own.boxes, own.inputs.varied(seed, **limits)) for own in self.tiles]
        return Inputs(torch.stack(vary(self.squares)), vary(self.shaped), self.regions, tiles)

    def digests(self) -> list[str]:
        """Tells pictures apart: 16 hexadecimal digits of each, equal for pictures of equal pixels."""
        levels = ((self.squares + 1) * 127.5).round().to("cpu", torch.uint8)
        return [hashlib.sha256(picture.numpy().tobytes()).hexdigest()[:16] for picture in levels]

    def fingerprints(self) -> list[str]:
        """Describes each picture in a kilobyte of text by which `first_alike` finds its copies: averages in 8 x 8
        cells, and 512 fixed random projections of what is finer, which keep correlations to a few hundredths."""
        levels = (self.squares.float().cpu() + 1) * 127.5
        coarse = F.adaptive_avg_pool2d(levels, 8).flatten(start_dim=1)
        fine = F.adaptive_avg_pool2d(levels, 64)
        fine = (fine - F.avg_pool2d(F.pad(fine, (2, 2, 2, 2), mode="replicate"), 5, stride=1)).flatten(start_dim=1)
        # Rounding errors of a plain picture are no texture.
        fine = torch.where(fine.abs().amax(dim=1, keepdim=True) < 0.01, 0.0, fine) @ _directions().float()
        fine = fine / fine.abs().amax(dim=1, keepdim=True).clamp(min=1e-9) * 127
        marks = torch.cat([coarse.round(), fine.round() + 128], dim=1).to(torch.uint8)
        return [base64.b64encode(mark.numpy().tobytes()).decode() for mark in marks]

    def alike(self) -> list[int]:
        """Tells copies apart from other pictures, see `first_alike`."""
        return first_alike(self.fingerprints())


@dataclass(frozen=True)
class Tiles:
    """Holds the tiles of a picture: where they lie in it, and how the networks see them."""

    boxes: list[Box]
    inputs: Inputs

    @classmethod
    def of(
        cls, picture: Image.Image, resolution: int, size_of, region: Tensor | None, size: int, overlap: int
    ) -> Tiles:
        """Cuts a picture; tiles that lie outside of the region are left out. Arguments as of `Inputs.of`."""
        boxes, regions = cut(picture.height, picture.width, size, overlap), None
        if region is not None:
            region = inside(region, (picture.height, picture.width))
            boxes = [box for box in boxes if region[box[1] : box[3], box[0] : box[2]].any()]
            regions = [inside(region[top:bottom, left:right], (resolution,) * 2) for left, top, right, bottom in boxes]
            regions = torch.stack(regions)[:, None]
        inputs = Inputs.of([picture.crop(box) for box in boxes], resolution, size_of)
        return cls(boxes, replace(inputs, regions=regions))

    def chunks(self, count: int) -> Iterator[tuple[Inputs, list[tuple[int, int]]]]:
        """Gives at most `count` tiles after another, with their sizes (H, W)."""
        sizes = [(bottom - top, right - left) for left, top, right, bottom in self.boxes]
        starts = range(0, len(sizes), count)
        return ((self.inputs[start : start + count], sizes[start : start + count]) for start in starts)


def first_alike(fingerprints: Sequence[str]) -> list[int]:
    """Finds for each picture the number of the first that it is a copy of, its own if it is none.

    A copy is the same picture in another file format, with the noise of another exposure, or of a part that did not
    move. In pictures of twenty kinds of drawn parts, plain sheets and nine kinds of photographs, copies as a JPEG of
    quality 75 and with noise of four levels differ by at most 1.1 levels and correlate by 0.63 or more; of different
    pictures either the levels differ by 2 or more, or the correlation is below 0.4.

    Args:
        fingerprints: of `Inputs.fingerprints`.
    """
    marks = np.array([np.frombuffer(base64.b64decode(text), np.uint8) for text in fingerprints])
    coarse, fine = torch.from_numpy(marks).float().split([_CELLS, marks.shape[1] - _CELLS], dim=1)
    difference = torch.cdist(coarse, coarse, p=1) / _CELLS  # [N, N]
    fine = fine - 128
    unit, plain = F.normalize(fine, dim=1), ~fine.any(dim=1)
    same_texture = (unit @ unit.T > COPY_CORRELATION) | (plain[:, None] & plain)
    copies = (difference < COPY_DIFFERENCE) & same_texture
    first = list(range(len(marks)))
    for index in first[1:]:
        earlier = copies[index, :index].nonzero()
        if len(earlier):
            first[index] = first[int(earlier[0])]
    return first


def check_fingerprints(fingerprints: object) -> None:
    """Raises ValueError for what `Inputs.fingerprints` cannot have written; an empty text is one that is not known."""
    sizes = {0, 4 * ((_CELLS + _DIRECTIONS + 2) // 3)}
    if not isinstance(fingerprints, list) or not all(
        isinstance(text, str) and len(text) in sizes and re.fullmatch(r"[A-Za-z0-9+/]*={0,2}", text)
        for text in fingerprints
    ):
        raise ValueError("`fingerprints` are no list of fingerprints")


@functools.cache
def _directions() -> torch.Tensor:
    """Draws the directions of the projections, -1 and 1: the same in every version of NumPy."""
    signs = np.random.RandomState(0).randint(0, 2, (64 * 64 * 3, _DIRECTIONS))
    return torch.from_numpy(signs.astype(np.int8) * 2 - 1)
