"""Build a picture's exemplar: the part as it should look, from patches of normal pictures.

Not in the paper, which starts to repaint from the picture itself, Eq. (11), so that a defect shows through the noise.
Every patch is copied from the normal pictures, at the place of the prototype that Eq. (14) finds nearest.
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
"""Rounds in which a patch may take over its neighbors' offsets."""

_FADE = (0.2, 0.5)
"""Shares of the largest distance between which pictures fade to repainted ones."""


def build_exemplar(
    picture: Tensor,
    psi: Tensor,
    nearest: Tensor,
    vectors: Tensor,
    shots: Shots,
    usable: Tensor | None = None,
) -> Tensor:
    """Copies normal patches to where the picture looks like them, and blends them.

    Neighbors that agree come from one piece (propagation of PatchMatch, Barnes et al. 2009): a position may take the
    prototype that continues a neighbor's if it is nearer. Each patch is then moved by up to half a patch's distance to
    where it fits best, because features are coarser than pixels; last the exemplar takes over the picture's median
    color, because lamps differ.

    Args:
        picture: float `[3, H, W]` in [-1, 1].
        psi: `[C, h, w]`, its features.
        nearest: int64 `[parts, h, w]`, rows of the nearest prototypes, see `PrototypeBank.nearest`.
        vectors: `[M, C]`, the prototypes.
        shots: the normal pictures, and the places of the prototypes in them.
        usable: bool `[M]`, which prototypes may be taken; None: all.

    Returns:
        float `[3, H, W]` in [-1, 1].
    """
    height, width = psi.shape[1:]
    cell = max(1, round(picture.shape[1] / height))  # pixels
    scale = (height * cell / picture.shape[1], width * cell / picture.shape[2])
    places = shots.places.long()  # [M, 3]
    rows = _propagate(psi, nearest, vectors.float(), places, usable)  # [h, w]
    step = max(1, round((height * width) ** 0.5 / PATCHES))  # cells from patch to patch
    offsets = torch.stack(torch.meshgrid(*map(torch.arange, (height, width)), indexing="ij"), dim=-1)
    found = places[rows]  # [h, w, 3]
    shift = found[..., 1:] - offsets.to(found.device)  # [h, w, 2], in cells
    down, across = (
        torch.arange(step // 2, length + step // 2, step).clamp(max=length - 1) for length in (height, width)
    )
    canvas = _scaled(picture, scale)
    exemplar = _assemble(
        canvas,
        found[down][:, across, 0],
        shift[down][:, across] * cell,
        step * cell,
        lambda number: _scaled(shots.copy(number), scale),
    )
    exemplar = exemplar + (canvas - exemplar).flatten(start_dim=1).median(dim=1).values[:, None, None]
    exemplar = exemplar.clamp(-1, 1)
    return fit(exemplar, tuple(picture.shape[1:]))


def keep_outside(pictures: Tensor, repainted: Tensor, distances: Tensor) -> Tensor:
    """Keeps pictures as they are where they look like their prototypes, for people: repainting blurs a little.

    Args:
        pictures, repainted: `[N, 3, R, R]`.
        distances: E of Eq. (14), brought to `[N, R, R]`.

    Returns:
        `[N, 3, R, R]`: the picture where E is below a fifth of its largest value, the repainted picture where it is
        above half of it, and between these a mixture.
    """
    low, high = _FADE
    distances = smooth(distances, smoothing_sigma(distances.shape[-1]))
    share = distances / distances.amax(dim=(1, 2), keepdim=True).clamp(min=torch.finfo(distances.dtype).tiny)
    weight = ((share - low) / (high - low)).clamp(0, 1)[:, None]
    return weight * repainted + (1 - weight) * pictures


def _scaled(picture: Tensor, scale: tuple[float, float]) -> Tensor:
    return fit(picture, tuple(round(length * s) for length, s in zip(picture.shape[1:], scale, strict=True)))


def _propagate(psi: Tensor, nearest: Tensor, vectors: Tensor, places: Tensor, usable: Tensor | None) -> Tensor:
    """Chooses of the nearest prototypes of all parts, and of those that continue a neighbor's, the nearest in all
    channels: int64 `[h, w]`."""
    channels, height, width = psi.shape
    queries = psi.float().flatten(start_dim=1).T  # [P, C]
    copies, down, across = (int(top) + 1 for top in places.amax(dim=0))
    # Row of the prototype at a place; -1 where a bank that was thinned has none. A border of -1 around all.
    table = torch.full((copies, down + 2, across + 2), -1, dtype=torch.int64, device=places.device)
    allowed = torch.arange(len(places), device=places.device)
    if usable is not None:
        allowed = allowed[usable]
    number, row, column = places[allowed].unbind(dim=1)
    table[number, row + 1, column + 1] = allowed

    best = nearest[0].flatten()  # [P]
    distances = (queries - vectors[best]).square().sum(dim=1)

    def consider(rows: Tensor) -> None:
        nonlocal best, distances
        far = (queries - vectors[rows.clamp(min=0)]).square().sum(dim=1)
        nearer = (rows >= 0) & (far < distances)
        best, distances = torch.where(nearer, rows, best), torch.where(nearer, far, distances)

    for part in nearest[1:]:
        consider(part.flatten())
    for _ in range(_PASSES):
        for axis, step in ((0, 1), (0, -1), (1, 1), (1, -1)):
            # The prototype beside the neighbor's, as this position lies beside the neighbor.
            number, row, column = places[best].view(height, width, 3).unbind(dim=2)
            beside = table[number, row + 1 + step * (axis == 0), column + 1 + step * (axis == 1)].roll(step, dims=axis)
            beside.select(axis, 0 if step > 0 else -1).fill_(-1)
            consider(beside.flatten())
    return best.view(height, width)


def _assemble(
    canvas: Tensor, numbers: Tensor, offsets: Tensor, distance: int, copy: Callable[[int], Tensor]
) -> Tensor:
    """Blends patches of three times their distance, each moved to where it fits the canvas best.

    Args:
        canvas: `[3, H, W]`.
        numbers: int64 `[a, b]`, the copy that each patch is taken from.
        offsets: int64 `[a, b, 2]`, from the patch's own place to the place in the copy, in pixels.
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
    shifts = _fitting_shifts(around, wanted.view(-1, side, side)) - reach  # [P, 2]
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


def _fitting_shifts(around: Tensor, wanted: Tensor) -> Tensor:
    """Finds for each of wanted `[P, m, m]` the corner in around `[P, n, n]` where it differs least: int64 `[P, 2]`."""
    count, side, shifts = len(around), wanted.shape[-1], around.shape[-1] - wanted.shape[-1] + 1
    products = F.conv2d(around[None], wanted[:, None], groups=count)[0]  # [P, shifts, shifts]
    squares = F.avg_pool2d(around.square()[:, None], side, stride=1)[:, 0] * side**2
    best = (squares - 2 * products).flatten(start_dim=1).argmin(dim=1)
    return torch.stack([best // shifts, best % shifts], dim=1)


def _mirrored(picture: Tensor, pad: tuple[int, int, int, int]) -> Tensor:
    """Pads `[3, H, W]` by (left, right, top, bottom), as often mirrored as it takes."""
    left, right, top, bottom = pad
    for axis, (before, after) in ((2, (left, right)), (1, (top, bottom))):
        length = picture.shape[axis]
        index = torch.arange(-before, length + after, device=picture.device) % (2 * length)
        picture = picture.index_select(axis, torch.where(index < length, index, 2 * length - 1 - index))
    return picture
