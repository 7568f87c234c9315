"""How a picture differs from normal ones as a whole: the nearest-neighbor distance between averaged features, as SPADE
(Cohen and Hoshen 2020) takes it between pictures. Not in AnomalySD (arXiv 2408.01960): parts that are put together
wrongly have no region that looks wrong by itself.
"""

import torch
from torch import Tensor

TOLERANCE = 2.0
"""A picture this many times as far from the normal ones, in squared distance, as the farthest of these is from the
others, is still as normal as they are. Chosen on drawn parts and metal plates, where less cost accuracy."""


@torch.no_grad()
def views_of(features: Tensor, pictures: int, unturned: int) -> Tensor:
    """The average of each turned copy of each normal picture, and how far one picture may be from the others.

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
    """How many times as far a picture is from the normal ones as it may be, at least 1.

    max(1, sqrt(d / (TOLERANCE m))), d the squared distance between the average of psi and the nearest view, and m the
    largest between normal pictures; 1 where m is 0, because these are all equal and tell nothing.

    Args:
        views: [V, C + 1], see [`views_of`].
        psi: [N, C, h, w].

    Returns:
        float32 [N].
    """
    nearest = _squares(psi.float().mean(dim=(2, 3)), views[:, :-1].float()).amin(dim=1)
    allowed = TOLERANCE * views[0, -1].float()
    return torch.where(allowed > 0, nearest / allowed, torch.ones_like(nearest)).clamp(min=1).sqrt()


def stress(maps: Tensor, factors: Tensor) -> Tensor:
    """Let what stands out in a map stand out by a factor: D becomes D f^(D / max D).

    The highest value is multiplied by f, and those near zero are left as they are, for what looks normal is no more
    suspicious in a picture that is unlike: multiplied as a whole, maps marked regions of plates less well.

    Args:
        maps: [N, h, w], >= 0.
        factors: [N], >= 1.

    Returns:
        [N, h, w], in each map in the same order of size.
    """
    highest = maps.amax(dim=(1, 2), keepdim=True)
    share = torch.where(highest > 0, maps / highest, torch.zeros_like(maps))
    return maps * factors[:, None, None] ** share


def _squares(one: Tensor, other: Tensor) -> Tensor:
    # Differences rather than products: averages lie close together, and far from zero.
    return torch.cdist(one, other, compute_mode="donot_use_mm_for_euclid_dist").square()
