"""Compare pictures with the normal ones, Eqs. (12) to (15) of AnomalySD (arXiv 2408.01960)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.inputs import Inputs
from ..data.region import inside
from ..data.tensors import fit, resize
from .exemplars import build_exemplar
from .masks import prototype_mask
from .scoring import check_finite


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


def compare(
    inputs: Inputs, extractor, bank, category: str, side: int, exemplars: bool, left_out: int | None = None
) -> Comparison:
    """Compares N pictures with a category's prototypes.

    Args:
        extractor: `PrototypeExtractor`.
        bank: `PrototypeBank`.
        side: R, to which masks and exemplars are brought.
        exemplars: builds them where the category's normal pictures are kept.
        left_out: number of the normal picture with which none is compared; None: with all.
    """
    distances, cells, built = [], [], []
    shots = bank.shots(category, left_out) if exemplars else None
    for index, picture in enumerate(inputs.shaped):  # one by one: grids differ with the pictures' shapes
        psi = extractor(picture[None])  # [1, C, h, w]
        total = None if shots is None else torch.zeros(psi[0, 0].numel(), len(shots.places), device=psi.device)
        far = bank.distances(category, psi, extractor.parts, left_out, total=total)  # [1, h, w]
        distances.append(far)
        own = None if inputs.regions is None else inputs.regions[index, 0]  # [R, R]
        cells.append(None if own is None else inside(own, far.shape[1:]))  # [h, w]
        if shots is not None:
            exemplar = build_exemplar(picture, total.view(*far.shape[1:], -1), shots)
            if own is not None:
                exemplar = torch.where(inside(own, picture.shape[1:]), exemplar, picture)
            built.append(fit(exemplar, (side, side)))
    check_finite("comparison with the normal pictures", distances)
    each = zip(distances, cells, strict=True)
    masks = torch.cat([prototype_mask(far, (side, side), own) for far, own in each])  # [N, 1, R, R]
    if inputs.regions is not None:
        masks &= inputs.regions
    return Comparison(distances, cells, masks, torch.stack(built) if built else None)
