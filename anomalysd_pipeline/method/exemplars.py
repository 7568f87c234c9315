"""Build a picture's exemplar: the part as it should look, from patches of normal pictures.

Not in the paper, which starts to repaint from the picture itself, Eq. (11), so that a defect shows through the noise.
Every patch is copied from the normal pictures, at the place of a prototype whose surroundings look like the patch's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.shots import Shots
from ..data.tensors import fit
from .scoring import smooth, smoothing_sigma

PATCHES = 32
"""Patches along the side of a square picture; each overlaps its neighbors by a whole patch's distance."""

_PASSES = 2
"""Rounds in which a position may take over its neighbors' offsets."""

_REACH = 2
"""Positions to every side that decide together."""

_AGREEING = 3
"""Patches to every side that move together."""


def build_exemplar(picture: Tensor, distances: Tensor, shots: Shots) -> Tensor:
    """Copies normal patches to where the picture looks like them, and blends them.

    Neighbors decide together, most those that look normal, so that their patches continue over a defect: `_choose`.
    Patches are then moved by up to half their distance to where they fit best, because features are coarser than
    pixels: those that look normal by themselves, others as the patches that they continue: `_agreed`. Last the
    exemplar takes over the picture's median color, because lamps differ.

    Args:
        picture: float `[3, H, W]` in [-1, 1].
        distances: float32 `[h, w, M]`, squared distances of its features to the prototypes.
        shots: the normal pictures, and the places of these prototypes in them.

    Returns:
        float `[3, H, W]` in [-1, 1].
    """
    height, width = distances.shape[:2]
    cell = max(1, round(picture.shape[1] / height))  # pixels
    scale = (height * cell / picture.shape[1], width * cell / picture.shape[2])
    places = shots.places.long()  # [M, 3]
    nearest, first = _nearest(distances)  # [h, w]
    found = places[_choose(distances, places, nearest, first)]  # [h, w, 3]
    step = max(1, round((height * width) ** 0.5 / PATCHES))  # cells from patch to patch
    shift = found[..., 1:] - _grid(height, width, found.device)  # [h, w, 2], in cells
    down, across = (
        torch.arange(step // 2, length + step // 2, step).clamp(max=length - 1) for length in (height, width)
    )
    canvas = _scaled(picture, scale)
    exemplar = _assemble(
        canvas,
        found[down][:, across, 0],
        shift[down][:, across] * cell,
        _normality(nearest)[down][:, across],
        step * cell,
        lambda number: _scaled(shots.copy(number), scale),
    )
    exemplar = exemplar + (canvas - exemplar).flatten(start_dim=1).median(dim=1).values[:, None, None]
    exemplar = exemplar.clamp(-1, 1)
    return fit(exemplar, tuple(picture.shape[1:]))


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


def _scaled(picture: Tensor, scale: tuple[float, float]) -> Tensor:
    return fit(picture, tuple(round(length * s) for length, s in zip(picture.shape[1:], scale, strict=True)))


def _nearest(distances: Tensor) -> tuple[Tensor, Tensor]:
    """Finds E, the distance of each position to its nearest prototype, and that, from `[h, w, M]`: both `[h, w]`."""
    nearest, first = distances.min(dim=2)
    # Distances below a millionth of the mean are rounding.
    least = 1e-6 * distances.mean()
    return nearest.clamp(min=least).clamp(min=torch.finfo(torch.float32).tiny ** 0.25), first


def _normality(nearest: Tensor) -> Tensor:
    """Tells how normal positions look, (median E / E)^2 and at most 1, from E `[h, w]`: `[h, w]`.

    The median is that of the picture itself, which half of the positions are below, so that there are always some
    that decide.
    """
    return (nearest.median() / nearest).square().clamp(max=1)


def _choose(distances: Tensor, places: Tensor, nearest: Tensor, first: Tensor) -> Tensor:
    """Chooses a prototype for every position such that its surroundings fit the position's.

    Begins with the nearest, and lets positions take over the prototype that continues a neighbor's choice
    (propagation of PatchMatch, Barnes et al. 2009) where that costs less. The cost is the mean distance of the 5 x 5
    positions around to the prototypes that lie so around the chosen one, weighted by 1 / E^2, E the distance of each
    position to its own nearest: positions that look like nothing normal have no say.

    Args:
        distances: float32 `[h, w, M]`.
        places: int64 `[M, 3]`, copy, row and column of the prototypes.
        nearest, first: `[h, w]`, as of `_nearest`.

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

    around = _grid(2 * _REACH + 1, 2 * _REACH + 1, device).view(-1, 1, 2) - _REACH  # [25, 1, 2]
    neighbors = _grid(height, width, device).view(-1, 2) + around  # [25, P, 2]
    top = torch.tensor([height - 1, width - 1], device=device)
    inside = ((neighbors >= 0) & (neighbors <= top)).all(dim=2)  # [25, P]
    neighbors = neighbors.clamp(min=0).minimum(top)
    neighbors = neighbors[..., 0] * width + neighbors[..., 1]  # [25, P]
    weights, best = nearest.flatten() ** -2, first.flatten()  # [P]
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


def _grid(height: int, width: int, device) -> Tensor:
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)  # [h, w, 2]


def _assemble(
    canvas: Tensor,
    numbers: Tensor,
    offsets: Tensor,
    normality: Tensor,
    distance: int,
    copy: Callable[[int], Tensor],
) -> Tensor:
    """Blends patches of three times their distance, moved to where they fit the canvas best.

    Args:
        canvas: `[3, H, W]`.
        numbers: int64 `[a, b]`, the copy that each patch is taken from.
        offsets: int64 `[a, b, 2]`, from the patch's own place to the place in the copy, in pixels.
        normality: `[a, b]` in (0, 1], of the patches' own places.
        distance: of neighboring patches, in pixels.
        copy: gives the copy of a number.
    """
    height, width = canvas.shape[1:]
    side, reach = 3 * distance, distance // 2
    down, across = numbers.shape
    pad = (distance, across * distance + distance - width, distance, down * distance + distance - height)
    wanted = F.unfold(_mirrored(canvas, pad).mean(dim=0)[None, None], side, stride=distance)[0].T  # [P, side^2]
    # Patches begin a distance before their own place and end as far behind it.
    border = 2 * distance + reach
    copies = {number: _mirrored(copy(number), (border,) * 4) for number in numbers.unique().tolist()}
    own = torch.stack(torch.meshgrid(torch.arange(down), torch.arange(across), indexing="ij"), dim=-1) * distance
    corners = (own.to(offsets.device) + offsets).view(-1, 2) - distance + border  # [P, 2], in the copies

    gray = {number: picture.mean(dim=0, keepdim=True) for number, picture in copies.items()}
    around = _cut(gray, numbers.flatten(), corners - reach, side + 2 * reach)[:, 0]
    costs = _differences(around, wanted.view(-1, side, side)).view(down, across, -1)  # [a, b, (2 reach + 1)^2]
    best = _agreed(costs, numbers, offsets, normality).flatten(end_dim=1).argmin(dim=1)  # [P]
    shifts = torch.stack([best // (2 * reach + 1), best % (2 * reach + 1)], dim=1) - reach  # [P, 2]
    patches = _cut(copies, numbers.flatten(), corners + shifts, side)  # [P, 3, side, side]
    fade = torch.hann_window(side + 2, device=canvas.device, dtype=canvas.dtype)[1:-1]
    fade = fade[:, None] * fade
    size = (down * distance + 2 * distance, across * distance + 2 * distance)

    def blended(patches: Tensor) -> Tensor:
        return F.fold(patches.flatten(start_dim=1).T[None], size, side, stride=distance)[0]

    weights = blended(fade.expand(len(patches), 1, side, side))
    return (blended(patches * fade) / weights)[:, distance : distance + height, distance : distance + width]


def _cut(copies: Mapping[int, Tensor], numbers: Tensor, corners: Tensor, side: int) -> Tensor:
    """Cuts patches `[P, C, side, side]` from copies `[C, H, W]` by number `[P]` and upper left corner `[P, 2]`."""
    first = next(iter(copies.values()))
    patches = first.new_empty(len(numbers), len(first), side, side)
    inside = torch.arange(side, device=first.device)
    for number, picture in copies.items():
        chosen = (numbers == number).nonzero()[:, 0]
        rows, columns = (
            (corners[chosen, axis, None] + inside).clamp(0, picture.shape[axis + 1] - 1) for axis in (0, 1)
        )
        patches[chosen] = picture[:, rows[:, :, None], columns[:, None, :]].transpose(0, 1)
    return patches


def _differences(around: Tensor, wanted: Tensor) -> Tensor:
    """Finds how much wanted `[P, m, m]` differ from around `[P, n, n]` at every corner, squared and summed:
    `[P, n - m + 1, n - m + 1]`."""
    count, side = len(around), wanted.shape[-1]
    products = F.conv2d(around[None], wanted[:, None], groups=count)[0]
    squares = F.avg_pool2d(around.square()[:, None], (side, 1), stride=1)  # one axis at a time is several times faster
    squares = F.avg_pool2d(squares, (1, side), stride=1)[:, 0] * side**2
    return squares - 2 * products + wanted.square().sum(dim=(1, 2))[:, None, None]


def _agreed(costs: Tensor, numbers: Tensor, offsets: Tensor, normality: Tensor) -> Tensor:
    """Takes a patch's own costs as far as it looks normal; for the rest the mean of the patches around that are of the
    same copy and offset, weighted by how normal each looks.

    Args:
        costs: `[a, b, S]`, of S shifts.
        numbers, offsets, normality: as of `_assemble`.

    Returns:
        `[a, b, S]`.
    """
    down, across = numbers.shape
    around = 2 * _AGREEING + 1
    places = torch.cat([numbers[..., None], offsets], dim=2)  # [a, b, 3]
    places, shares = (
        F.pad(x, (0, 0, *(_AGREEING,) * 4)) for x in (places, normality[..., None])
    )  # nothing in the border counts
    own = slice(_AGREEING, _AGREEING + down), slice(_AGREEING, _AGREEING + across)
    padded = F.pad(costs, (0, 0, *(_AGREEING,) * 4))
    total, counted = torch.zeros_like(costs), torch.zeros_like(normality)[..., None]
    for row in range(around):
        for column in range(around):
            beside = slice(row, row + down), slice(column, column + across)
            share = shares[beside] * (places[beside] == places[own]).all(dim=2, keepdim=True)
            total += padded[beside] * share
            counted += share
    return torch.lerp(total / counted, costs, normality[..., None])


def _mirrored(picture: Tensor, pad: tuple[int, int, int, int]) -> Tensor:
    """Pads `[3, H, W]` by (left, right, top, bottom), as often mirrored as it takes."""
    left, right, top, bottom = pad
    for axis, (before, after) in ((2, (left, right)), (1, (top, bottom))):
        length = picture.shape[axis]
        index = torch.arange(-before, length + after, device=picture.device) % (2 * length)
        picture = picture.index_select(axis, torch.where(index < length, index, 2 * length - 1 - index))
    return picture
