"""Weigh the distances of Eq. (14): missing pieces, the picture as a whole, and what repainting does to them.

None of this is in AnomalySD (arXiv 2408.01960); docs/features.md derives each term.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .neighbors import NeighborSearch

TOLERANCE = 2.0
"""Squared distance of a picture from the normal ones that is still normal, as a multiple of the largest that these
have from each other."""
REPAIRED_WEIGHT = 0.6
"""Weight of the share of a distance that repainting takes away."""
REMAINING_WEIGHT, REMAINING_LIMIT = 0.7, 0.35
"""Weight of the distance of the repainted picture, and the value up to which it counts: beyond what normal parts
differ by, the repainting itself is odd, and tells nothing."""


# Missing pieces


@torch.no_grad()
def gaps_of(grids: Tensor) -> Tensor:
    """Measures how far vectors of a normal picture are from the nearest in another, averaged over the others.

    Args:
        grids: [K, P, C], K >= 2 pictures of P positions.

    Returns:
        float32 [K, P], squared Euclidean distances.
    """
    searches = [NeighborSearch(grid) for grid in grids]
    others = [
        torch.stack([search.distances(grid) for j, search in enumerate(searches) if j != i]).mean(dim=0)
        for i, grid in enumerate(grids)
    ]
    return torch.stack(others)


@torch.no_grad()
def missing_distances(grids: Tensor, gaps: Tensor, psi: Tensor) -> Tensor:
    """Measures what normal parts have and a picture lacks: Eq. (14) from the normal pictures to the tested one.

    Where a piece has broken off, all that is left may look as it does on a good part. In units of what normal parts
    differ by: d / (2 m + g), g the gap of the normal vector and m the mean of all gaps. Of the normal pictures the
    most alike counts: that with the smallest maximum.

    Args:
        grids: [K, P, C], normal pictures of P = h * w positions, row by row.
        gaps: [K, P], see [`gaps_of`].
        psi: [N, C, h, w].

    Returns:
        float32 [N, h, w], >= 0, at the positions of the normal picture: where parts lie as they did there, this is
        where something is missing.
    """
    scale = (2 * gaps.float().mean() + gaps.float()).clamp(min=torch.finfo(torch.float32).tiny)
    queries, maps = grids.flatten(end_dim=1), []
    for picture in psi.float().flatten(start_dim=2).transpose(1, 2):  # [P, C]
        relative = NeighborSearch(picture).distances(queries).view_as(scale) / scale
        maps.append(relative[relative.amax(dim=1).argmin()])
    return torch.stack(maps).view(len(psi), *psi.shape[2:])


# The picture as a whole


@torch.no_grad()
def views_of(features: Tensor, pictures: int, unturned: int) -> Tensor:
    """Averages the features of each turned copy, and finds how far one normal picture is from the others.

    The nearest-neighbor distance between averages is SPADE's between pictures (Cohen and Hoshen 2020): parts that are
    put together wrongly have no region that looks wrong by itself.

    Args:
        features: [M, C] of `collection.collect_prototypes`.
        pictures: K >= 2, how many these are of.
        unturned: how many of the M vectors are of pictures that were not turned, a multiple of K that divides M.

    Returns:
        float32 [M K / unturned, C + 1]. The last column is the same in all rows: the largest squared distance between
        a copy and the nearest one of another picture.
    """
    copies = features.unflatten(0, (-1, pictures, unturned // pictures))  # [turns, K, P, C]
    views = torch.stack([turn.float().mean(dim=1) for turn in copies])  # [turns, K, C]
    sources = torch.arange(pictures, device=views.device).repeat(len(views))
    views = views.flatten(end_dim=1)
    squares = _squares(views, views).masked_fill_(sources[:, None] == sources, torch.inf)
    return torch.cat([views, squares.amin(dim=1).amax().expand(len(views), 1)], dim=1)


@torch.no_grad()
def unlikeness(views: Tensor, psi: Tensor) -> Tensor:
    """Measures how many times as far a picture is from the normal ones as it may be.

    max(1, sqrt(d / (TOLERANCE m))), d the squared distance between the average of psi and the nearest view, and m the
    largest between normal pictures; 1 where m is 0, because these are all equal and tell nothing.

    Args:
        views: [V, C + 1], see [`views_of`].
        psi: [N, C, h, w].

    Returns:
        float32 [N], >= 1.
    """
    nearest = _squares(psi.float().mean(dim=(2, 3)), views[:, :-1].float()).amin(dim=1)
    allowed = TOLERANCE * views[0, -1].float()
    return torch.where(allowed > 0, nearest / allowed, torch.ones_like(nearest)).clamp(min=1).sqrt()


def stress(maps: Tensor, factors: Tensor) -> Tensor:
    """Raises the high values of maps by a factor and leaves those near zero: D becomes D f^(D / max D).

    Args:
        maps: [N, h, w], >= 0.
        factors: [N], >= 1.

    Returns:
        [N, h, w], in each map in the same order of size.
    """
    highest = maps.amax(dim=(1, 2), keepdim=True)
    share = torch.where(highest > 0, maps / highest, torch.zeros_like(maps))
    return maps * factors[:, None, None] ** share


def _squares(a: Tensor, b: Tensor) -> Tensor:
    # Differences rather than products: averages lie close together, and far from zero.
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square()


# Repainting


def repaired_share(before: Tensor, after: Tensor) -> Tensor:
    """Computes the share of the distance around each position that is gone: max(1 - a / b, 0), over a window.

    The window is 2 r + 1 positions wide, r = w / 10 rounded, at least 1: a single position says too little.

    Args:
        before: [N, h, w], >= 0.
        after: [N, h, w], >= 0.

    Returns:
        [N, h, w] in [0, 1]; 0 where nothing was there before.
    """
    reach = max(1, round(before.shape[-1] / 10))
    before, after = (
        F.avg_pool2d(map_[:, None], 2 * reach + 1, stride=1, padding=reach)[:, 0] for map_ in (before, after)
    )
    return torch.where(before > 0, 1 - after / before, torch.zeros_like(before)).clamp(min=0)


def weigh(deviations: Tensor, original: Tensor, repainted: Tensor, restored: Tensor) -> Tensor:
    """Scales a distance up where repainting reduced it, and down where it leaves parts as far from the bank.

    max((1 + `REPAIRED_WEIGHT` q) D - `REMAINING_WEIGHT` min(R, `REMAINING_LIMIT`), 0), q see [`repaired_share`].

    Args:
        deviations: D, [N, h, w], >= 0, see `PrototypeBank.deviations`.
        original: relative distances of the picture, [N, h, w].
        repainted: R, those of the repainted picture, [N, h, w].
        restored: those of the repainted picture with what the autoencoder loses of the original put back, [N, h, w].

    Returns:
        [N, h, w], >= 0.
    """
    raised = deviations * (1 + REPAIRED_WEIGHT * repaired_share(original, restored))
    return (raised - REMAINING_WEIGHT * repainted.clamp(max=REMAINING_LIMIT)).clamp(min=0)
