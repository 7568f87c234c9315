"""Pictures in the sizes at which the networks take them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .tensors import augment, to_tensor

COPY_DIFFERENCE = 2.0
"""Mean difference, of 255 levels, of the averages in 32 x 32 cells of a picture and its copy."""
COPY_CORRELATION = 0.6
"""Correlation of what is finer: even surfaces differ as little under one lamp, but not in their texture."""


@dataclass(frozen=True)
class Inputs:
    """Holds N pictures as the networks see them.

    Attributes:
        squares: what is repainted, float32 `[N, 3, R, R]` in [-1, 1], R the pipeline's resolution.
        shaped: what the extractor describes, N of float32 `[3, h, w]` in [-1, 1]; sizes may differ.
    """

    squares: Tensor
    shaped: list[Tensor]

    @classmethod
    def of(
        cls,
        pictures: Sequence[Image.Image],
        resolution: int,
        size_of: Callable[[int, int], tuple[int, int] | None],
    ) -> Inputs:
        """Converts RGB pictures.

        Args:
            resolution: R.
            size_of: gives the size at which the extractor describes a picture of a height and width; None: R x R.
        """
        squares = [to_tensor(picture, resolution) for picture in pictures]
        shaped = []
        for picture, square in zip(pictures, squares, strict=True):
            size = size_of(picture.height, picture.width)
            shaped.append(square if size in (None, (resolution, resolution)) else to_tensor(picture, size))
        return cls(torch.stack(squares), shaped)

    def __len__(self) -> int:
        return len(self.shaped)

    def __getitem__(self, index: int) -> Inputs:
        """Gives one picture as inputs of length 1."""
        return Inputs(self.squares[index, None], [self.shaped[index]])

    def to(self, device: torch.device) -> Inputs:
        """Moves all to a device."""
        return Inputs(self.squares.to(device), [picture.to(device) for picture in self.shaped])

    def varied(self, seed: int, **limits: float) -> Inputs:
        """Varies every picture by `augment`, alike for both networks; draws differ from picture to picture."""

        def vary(pictures: Sequence[Tensor]) -> list[Tensor]:
            generator = torch.Generator().manual_seed(seed)
            return [augment(picture, generator, **limits) for picture in pictures]

        return Inputs(torch.stack(vary(self.squares)), vary(self.shaped))

    def digests(self) -> list[str]:
        """Tells pictures apart: 16 hexadecimal digits of each, equal for pictures of equal pixels."""
        levels = ((self.squares + 1) * 127.5).round().to("cpu", torch.uint8)
        return [hashlib.sha256(picture.numpy().tobytes()).hexdigest()[:16] for picture in levels]

    def alike(self) -> list[int]:
        """Tells copies apart from other pictures: for each picture the number of the first that it is a copy of, its
        own if it is none.

        A copy is the same picture in another file format, with the noise of another exposure, or of a part that did
        not move. In pictures of fourteen kinds of parts and four of plain sheets, copies as a JPEG of quality 75 and
        with noise of four levels differ by at most 1.4 levels and correlate by 0.68 or more; of different pictures
        either the levels differ by 3 or more, or the correlation is below 0.1.
        """
        levels = (self.squares.float() + 1) * 127.5
        coarse = F.adaptive_avg_pool2d(levels, 32).flatten(start_dim=1)
        fine = F.adaptive_avg_pool2d(levels, 64)
        fine = (fine - F.avg_pool2d(F.pad(fine, (2, 2, 2, 2), mode="replicate"), 5, stride=1)).flatten(start_dim=1)
        difference = torch.cdist(coarse, coarse, p=1) / coarse.shape[1]  # [N, N]
        unit, plain = F.normalize(fine, dim=1), ~fine.any(dim=1)
        same_texture = (unit @ unit.T > COPY_CORRELATION) | (plain[:, None] & plain)
        copies = (difference < COPY_DIFFERENCE) & same_texture
        first = list(range(len(self)))
        for index in first[1:]:
            earlier = copies[index, :index].nonzero()
            if len(earlier):
                first[index] = first[int(earlier[0])]
        return first
