"""What good parts have and a picture lacks: the distance of Eq. (14) of AnomalySD (arXiv 2408.01960) the other way
round, from normal pictures to the tested one. Not in the paper: where a piece has broken off, all that is left may
look as it does on a good part.
"""

import torch
from torch import Tensor

_ENTRIES = 2**22


@torch.no_grad()
def gaps_of(grids: Tensor) -> Tensor:
    """How far vectors of a normal picture are from the nearest one of another, on average over the others.

    Args:
        grids: [K, P, C], K >= 2 pictures of P positions.

    Returns:
        float32 [K, P], squares of Euclidean distances.
    """
    others = [
        torch.stack([_nearest_squares(one, two) for j, two in enumerate(grids) if j != i]).mean(dim=0)
        for i, one in enumerate(grids)
    ]
    return torch.stack(others)


@torch.no_grad()
def missing_distances(grids: Tensor, gaps: Tensor, psi: Tensor) -> Tensor:
    """How far the nearest vector of a picture is from what a normal one has at each position.

    In units of what normal parts differ by: d / (2 m + g), where g is the gap of that vector and m the mean of all
    gaps. Of the normal pictures the one with the smallest maximum counts, which is the most alike.

    Args:
        grids: [K, P, C], normal pictures of P = h * w positions, row by row.
        gaps: [K, P], see [`gaps_of`].
        psi: [N, C, h, w].

    Returns:
        float32 [N, h, w], >= 0. The positions are those of the normal picture: where parts lie as they did there, this
        is where something is missing.
    """
    scale = (2 * gaps.float().mean() + gaps.float()).clamp(min=torch.finfo(torch.float32).tiny)
    maps = []
    for picture in psi.float().flatten(start_dim=2).transpose(1, 2):  # [P, C]
        relative = _nearest_squares(grids.flatten(end_dim=1), picture).view_as(scale) / scale
        maps.append(relative[relative.amax(dim=1).argmin()])
    return torch.stack(maps).view(len(psi), *psi.shape[2:])


def _nearest_squares(queries: Tensor, vectors: Tensor) -> Tensor:
    """Of each of [Q, C], the square of the distance to the nearest of [V, C]; float32 [Q]."""
    center = vectors.float().mean(dim=0)
    vectors = vectors.float() - center
    squares, found = vectors.square().sum(dim=1), queries.new_empty(len(queries), dtype=torch.float32)
    chunk = max(1, _ENTRIES // len(vectors))
    for part, result in zip(queries.split(chunk), found.split(chunk), strict=True):
        part = part.float() - center
        torch.amin(torch.addmm(squares, part, vectors.T, alpha=-2), dim=1, out=result)
        result += part.square().sum(dim=1)
    return found.clamp_(min=0)
