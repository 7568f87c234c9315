"""Build a picture's exemplar: the part as it should look, from patches of normal pictures.

Not in the paper, which starts to repaint from the picture itself, Eq. (11), so that a defect shows through the noise.
Every patch is copied from the normal pictures, at the place of a prototype whose surroundings look like the patch's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ..data.shots import Shots
from ..data.tensors import fit, resize
from .patches import Patches, grid
from .scoring import smooth, smoothing_sigma

PATCHES = 32
"""Patches along the side of a square picture; each overlaps its neighbors by a whole patch's distance."""

_PASSES = 2
"""Rounds in which a position may take over its neighbors' offsets."""

_REACH = 2
"""Positions to every side that decide together."""

_ROUNDS = 2
"""How often patches are moved; from the second on to where they fit what those before have mended."""


def build_exemplar(
    picture: Tensor, distances: Tensor, shots: Shots, shares: Tensor, search: Callable[[Tensor], Tensor]
) -> Tensor:
    """Copies normal patches to where the picture looks like them, and blends them; then once more, to where the
    picture that this has mended looks like them.

    A defect changes the features around it, and patches do not fit where it covers them. In a mended picture more of
    them find their places; the second exemplar takes over as far as the picture needs one.

    Args:
        picture: float `[3, H, W]` in [-1, 1].
        distances: float32 `[h, w, M]`, squared distances of its features to the prototypes.
        shots: the normal pictures, and the places of these prototypes in them.
        shares: `[R, R]` in [0, 1], how much of the picture is replaced, see `unexplained`.
        search: measures the distances of another picture `[3, H, W]`.

    Returns:
        float `[3, H, W]` in [-1, 1].
    """
    cell = max(1, round(picture.shape[1] / distances.shape[0]))  # pixels
    size = distances.shape[0] * cell, distances.shape[1] * cell
    scale = size[0] / picture.shape[1], size[1] / picture.shape[2]

    @functools.cache
    def copy(number: int) -> Tensor:
        own = shots.copy(number)
        return fit(own, tuple(round(length * s) for length, s in zip(own.shape[1:], scale, strict=True)))

    places, nearest = shots.places.long(), _nearest(distances)  # [M, 3], [h, w]
    shares = resize(shares[None], tuple(picture.shape[1:]))[0]  # [H, W]
    parts = resize(shares[None], size)[0]

    def copied(picture: Tensor, distances: Tensor) -> Tensor:
        return fit(_copied(fit(picture, size), distances, nearest, places, parts, copy), tuple(picture.shape[1:]))

    first = copied(picture, distances)
    mended = _replaced(picture, first, shares)
    # How normal a position looks stays what it was: what hides a defect is made of guesses.
    second = copied(mended, search(mended))
    return _replaced(first, second, shares)


def _copied(
    picture: Tensor, distances: Tensor, nearest: Tensor, places: Tensor, shares: Tensor, copy: Callable[[int], Tensor]
) -> Tensor:
    """Copies patches and blends them.

    Neighbors decide together, most those that look normal, so that their patches continue over a defect: `_choose`.
    Patches are then moved by up to half their distance to where they fit best, because features are coarser than
    pixels: those that look normal by themselves, others as the patches that they continue: `Patches`. They are moved
    anew to where they fit what the first round has mended. Last the exemplar takes over the picture's median color,
    because lamps differ.

    Args:
        picture: `[3, H, W]`, a whole number of pixels a position.
        distances: `[h, w, M]`.
        nearest: `[h, w]`, how far positions are from normal.
        places: int64 `[M, 3]`.
        shares: `[H, W]`.
        copy: gives the copy of a number.
    """
    height, width = distances.shape[:2]
    cell = picture.shape[1] // height  # pixels
    found = places[_choose(distances, places, nearest)]  # [h, w, 3]
    step = max(1, round((height * width) ** 0.5 / PATCHES))  # cells from patch to patch
    shift = found[..., 1:] - grid(height, width, found.device)  # [h, w, 2], in cells
    down, across = (
        torch.arange(step // 2, length + step // 2, step).clamp(max=length - 1) for length in (height, width)
    )
    patches = Patches(
        found[down][:, across, 0],
        shift[down][:, across] * cell,
        _normality(nearest)[down][:, across],
        step * cell,
        copy,
    )
    canvas = picture
    for _ in range(_ROUNDS):
        exemplar = patches.blended(canvas)
        exemplar = exemplar + (picture - exemplar).flatten(start_dim=1).median(dim=1).values[:, None, None]
        exemplar = exemplar.clamp(-1, 1)
        canvas = _replaced(picture, exemplar, shares)
    return exemplar


def unexplained(distances: Tensor, usual: float | None) -> Tensor:
    """Finds how much of what sets a picture apart from its prototypes normal pictures do not explain.

    This is the gain of Wiener's filter, whose noise is what normal pictures differ by: 1 - (usual / E)^2, at least 0.

    Args:
        distances: E of Eq. (14), brought to `[N, R, R]`; smoothed here as an anomaly map is.
        usual: what E is in normal pictures, see `PrototypeBank.usual_distance`; None: its median in each picture, most
            of which is normal.

    Returns:
        `[N, R, R]` in [0, 1].
    """
    distances = smooth(distances, smoothing_sigma(distances.shape[-1]))
    if usual is None:
        usual = distances.flatten(start_dim=1).median(dim=1).values[:, None, None]
    return (1 - (usual / distances.clamp(min=torch.finfo(distances.dtype).tiny)).square()).clamp(0, 1)


def mix(pictures: Tensor, others: Tensor, shares: Tensor) -> Tensor:
    """Replaces shares `[N, R, R]` in [0, 1] of pictures by others, both `[N, 3, R, R]`."""
    return torch.lerp(pictures, others, shares[:, None].to(pictures))


def _replaced(picture: Tensor, other: Tensor, shares: Tensor) -> Tensor:
    return mix(picture[None], other[None], shares[None])[0]


def _nearest(distances: Tensor) -> Tensor:
    """Finds E, the distance of each position to its nearest prototype, from `[h, w, M]`: `[h, w]`."""
    nearest = distances.amin(dim=2)
    # Distances below a millionth of the mean are rounding.
    least = 1e-6 * distances.mean()
    return nearest.clamp(min=least).clamp(min=torch.finfo(torch.float32).tiny ** 0.25)


def _normality(nearest: Tensor) -> Tensor:
    """Tells how normal positions look, (median E / E)^2 and at most 1, from E `[h, w]`: `[h, w]`.

    The median is that of the picture itself, which half of the positions are below, so that there are always some
    that decide.
    """
    return (nearest.median() / nearest).square().clamp(max=1)


def _choose(distances: Tensor, places: Tensor, nearest: Tensor) -> Tensor:
    """Chooses a prototype for every position such that its surroundings fit the position's.

    Begins with the nearest, and lets positions take over the prototype that continues a neighbor's choice
    (propagation of PatchMatch, Barnes et al. 2009) where that costs less. The cost is the mean distance of the 5 x 5
    positions around to the prototypes that lie so around the chosen one, weighted by 1 / E^2, E how far each
    position is from normal: positions that look like nothing normal have no say.

    Args:
        distances: float32 `[h, w, M]`.
        places: int64 `[M, 3]`, copy, row and column of the prototypes.
        nearest: E, `[h, w]`, as of `_nearest`.

    Returns:
        int64 `[h, w]`.
    """
    height, width = distances.shape[:2]
    distances, device = distances.flatten(end_dim=1), places.device  # [P, M]
    border = _REACH + 1
    copies, down, across = (int(top) + 1 for top in places.amax(dim=0))
    # Number of the prototype at a place; -1 where a bank that was thinned has none, and in a border around all.
    table = torch.full((copies, down + 2 * border, across + 2 * border), -1, dtype=torch.int64, device=device)
    copy, row, column = places.unbind(dim=1)
    table[copy, row + border, column + border] = torch.arange(len(places), device=device)

    around = grid(2 * _REACH + 1, 2 * _REACH + 1, device).view(-1, 1, 2) - _REACH  # [25, 1, 2]
    neighbors = grid(height, width, device).view(-1, 2) + around  # [25, P, 2]
    top = torch.tensor([height - 1, width - 1], device=device)
    inside = ((neighbors >= 0) & (neighbors <= top)).all(dim=2)  # [25, P]
    neighbors = neighbors.clamp(min=0).minimum(top)
    neighbors = neighbors[..., 0] * width + neighbors[..., 1]  # [25, P]
    weights, best = nearest.flatten() ** -2, distances.argmin(dim=1)  # [P]
    weights = torch.where(inside, weights[neighbors], 0)  # [25, P]

    def cost(chosen: Tensor) -> Tensor:
        copy, row, column = places[chosen].unbind(dim=1)
        beside = table[copy, row + around[..., 0] + border, column + around[..., 1] + border]  # [25, P]
        share = torch.where(beside >= 0, weights, 0)
        return (distances[neighbors, beside.clamp(min=0)] * share).sum(dim=0) / share.sum(dim=0)

    least = cost(best)
    for _ in range(_PASSES):
        for axis, step in ((0, 1), (0, -1), (1, 1), (1, -1)):
            # The prototype beside the neighbor's, as this position lies beside the neighbor.
            copy, row, column = places[best].view(height, width, 3).unbind(dim=2)
            beside = table[copy, row + border + step * (axis == 0), column + border + step * (axis == 1)]
            beside = beside.roll(step, dims=axis)
            beside.select(axis, 0 if step > 0 else -1).fill_(-1)
            beside = beside.flatten()
            found = cost(beside.clamp(min=0))
            better = (beside >= 0) & (found < least)
            best, least = torch.where(better, beside, best), torch.where(better, found, least)
    return best.view(height, width)
