"""Pictures in the sizes at which the networks take them."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .region import inside
from .tensors import augment, to_tensor

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
    """

    squares: Tensor
    shaped: list[Tensor]
    regions: Tensor | None = None

    @classmethod
    def of(
        cls,
        pictures: Sequence[Image.Image],
        resolution: int,
        size_of: Callable[[int, int], tuple[int, int] | None],
        region: Tensor | None = None,
    ) -> Inputs:
        """Converts RGB pictures.

        Args:
            resolution: R.
            size_of: gives the size at which the extractor describes a picture of a height and width; None: R x R.
            region: what of each picture counts, bool `[h, w]`; None: all.
        """
        squares = [to_tensor(picture, resolution) for picture in pictures]
        shaped = []
        for picture, square in zip(pictures, squares, strict=True):
            size = size_of(picture.height, picture.width)
            shaped.append(square if size in (None, (resolution, resolution)) else to_tensor(picture, size))
        if region is not None:
            region = inside(region, (resolution, resolution)).expand(len(squares), 1, -1, -1)
        return cls(torch.stack(squares), shaped, region)

    def __len__(self) -> int:
        return len(self.shaped)

    def __getitem__(self, index: int) -> Inputs:
        """Gives one picture as inputs of length 1."""
        region = None if self.regions is None else self.regions[index, None]
        return Inputs(self.squares[index, None], [self.shaped[index]], region)

    def to(self, device: torch.device) -> Inputs:
        """Moves all to a device."""
        regions = None if self.regions is None else self.regions.to(device)
        return Inputs(self.squares.to(device), [picture.to(device) for picture in self.shaped], regions)

    def varied(self, seed: int, **limits: float) -> Inputs:
        """Varies every picture by `augment`, alike for both networks; draws differ from picture to picture."""

        def vary(pictures: Sequence[Tensor]) -> list[Tensor]:
            generator = torch.Generator().manual_seed(seed)
            return [augment(picture, generator, **limits) for picture in pictures]

        return Inputs(torch.stack(vary(self.squares)), vary(self.shaped), self.regions)

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
