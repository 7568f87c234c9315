"""What the comparison with normal pictures says of others, Eqs. (12) to (15) of AnomalySD (arXiv 2408.01960)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.tensors import resize


@dataclass(frozen=True)
class Comparison:
    """Holds the distances of N pictures to the prototypes, and what follows from them; nothing without prototypes.

    Attributes:
        distances: E of Eq. (14), N of float32 `[1, h, w]`; grids differ with the pictures' shapes.
        cells: what counts of each, bool `[h, w]`; None: all.
        prototype_masks: M^(p), Eq. (15), bool `[N, 1, R, R]`.
        exemplars: the parts as they should look, `[N, 3, R, R]` in [-1, 1]; None where they are not the start.
    """

    distances: Sequence[Tensor] = ()
    cells: Sequence[Tensor | None] = ()
    prototype_masks: Tensor | None = None
    exemplars: Tensor | None = None

    def resized(self, side: int, regions: Tensor | None) -> Tensor:
        """Brings the distances to one size, `[N, side, side]`; with regions, bool `[N, 1, side, side]`, as means of
        the cells inside."""
        size = (side, side)
        if regions is None:
            return torch.cat([resize(far, size) for far in self.distances])
        each = zip(self.distances, self.cells, strict=True)
        found = torch.cat([resize(far * own, size) for far, own in each]) * regions[:, 0]
        shares = torch.cat([resize(own[None].float(), size) for own in self.cells])
        return found / shares.clamp(min=torch.finfo(shares.dtype).tiny)
