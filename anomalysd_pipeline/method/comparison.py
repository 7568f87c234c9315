"""Compare pictures with the normal ones, Eqs. (12) to (15) of AnomalySD (arXiv 2408.01960)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.inputs import Inputs
from ..data.region import inside
from ..data.tensors import fit, resize
from .exemplars import build_exemplar, unexplained
from .masks import prototype_mask
from .scoring import check_finite


@dataclass(frozen=True)
class Comparison:
    """Holds what N pictures differ by from a category's prototypes, and what follows; nothing without prototypes.

    Attributes:
        distances: E of Eq. (14), brought to `[N, R, R]`.
        prototype_masks: M^(p), Eq. (15), bool `[N, 1, R, R]`.
        exemplars: the parts as they should look, `[N, 3, R, R]` in [-1, 1]; None where they are not the start.
        shares: how much of the pictures they replace, `[N, R, R]` in [0, 1], see `unexplained`; None like `exemplars`.
    """

    distances: Tensor | None = None
    prototype_masks: Tensor | None = None
    exemplars: Tensor | None = None
    shares: Tensor | None = None


def compare(
    inputs: Inputs, extractor, bank, category: str, side: int, exemplars: bool, left_out: int | None = None
) -> Comparison:
    """Compares N pictures with a category's prototypes.

    Args:
        extractor: `PrototypeExtractor`.
        bank: `PrototypeBank`.
        side: R, to which all is brought.
        exemplars: builds them where the category's normal pictures are kept.
        left_out: number of the normal picture with which none is compared; None: with all.
    """
    shots = bank.shots(category, left_out) if exemplars else None
    usual = None if shots is None else bank.usual_distance(category, extractor.parts)

    def search(picture: Tensor) -> Tensor:
        return bank.all_distances(category, extractor(picture[None]), extractor.parts, left_out)[0]  # [h, w, M]

    distances, cells, brought, built, shares = [], [], [], [], []
    for index, picture in enumerate(inputs.shaped):  # one by one: grids differ with the pictures' shapes
        psi = extractor(picture[None])  # [1, C, h, w]
        total = None if shots is None else torch.zeros(psi[0, 0].numel(), len(shots.places), device=psi.device)
        far = bank.distances(category, psi, extractor.parts, left_out, total=total)  # [1, h, w]
        region = None if inputs.regions is None else inputs.regions[index, 0]  # [R, R]
        distances.append(far)
        cells.append(None if region is None else inside(region, far.shape[1:]))  # [h, w]
        brought.append(_brought(far, side, region, cells[-1]))  # [1, R, R]
        if shots is not None:
            shares.append(unexplained(brought[-1], usual))  # [1, R, R]
            exemplar = build_exemplar(picture, total.view(*far.shape[1:], -1), shots, shares[-1][0], search)
            if region is not None:
                exemplar = torch.where(inside(region, picture.shape[1:]), exemplar, picture)
            built.append(fit(exemplar, (side, side)))
    check_finite("comparison with the normal pictures", distances)
    each = zip(distances, cells, strict=True)
    masks = torch.cat([prototype_mask(far, (side, side), own) for far, own in each])  # [N, 1, R, R]
    if inputs.regions is not None:
        masks &= inputs.regions
    if shots is None:
        return Comparison(torch.cat(brought), masks)
    return Comparison(torch.cat(brought), masks, torch.stack(built), torch.cat(shares))


def _brought(far: Tensor, side: int, region: Tensor | None, cells: Tensor | None) -> Tensor:
    """Brings distances `[1, h, w]` to `[1, side, side]`; with a region as means of the cells inside."""
    if region is None:
        return resize(far, (side, side))
    share = resize(cells[None].float(), (side, side))
    return resize(far * cells, (side, side)) * region / share.clamp(min=torch.finfo(share.dtype).tiny)
