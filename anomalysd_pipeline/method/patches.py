"""Put a picture together of patches of normal pictures, moved to where they fit best."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

_AGREEING = 3
"""Patches to every side that move together."""


class Patches:
    """Holds patches of normal pictures and the pixels around them, each of three times the patches' distance.

    Args:
        numbers: int64 `[a, b]`, the copy that each patch is taken from.
        offsets: int64 `[a, b, 2]`, from the patch's own place to the place in the copy, in pixels.
        normality: `[a, b]` in (0, 1], of the patches' own places.
        distance: of neighboring patches, in pixels.
        copy: gives the copy `[3, h, w]` of a number.
    """

    def __init__(
        self, numbers: Tensor, offsets: Tensor, normality: Tensor, distance: int, copy: Callable[[int], Tensor]
    ):
        self.numbers, self.offsets, self.normality, self.distance = numbers, offsets, normality, distance
        self.side, self.reach = 3 * distance, distance // 2
        # Patches begin a distance before their own place and end as far behind it.
        border = 2 * distance + self.reach
        self.copies = {number: _mirrored(copy(number), (border,) * 4) for number in numbers.unique().tolist()}
        corners = (grid(*numbers.shape, numbers.device) * distance + offsets).view(-1, 2) - distance
        self.corners = corners + border  # [P, 2], in the copies
        gray = {number: picture.mean(dim=0, keepdim=True) for number, picture in self.copies.items()}
        self.around = _cut(gray, numbers.flatten(), self.corners - self.reach, self.side + 2 * self.reach)[:, 0]
        self.squares = _squares(self.around, self.side)  # [P, 2 reach + 1, 2 reach + 1]

    def blended(self, canvas: Tensor) -> Tensor:
        """Moves patches to where they fit the canvas `[3, H, W]` best, and blends them to one such picture."""
        height, width = canvas.shape[1:]
        (down, across), distance, side, reach = self.numbers.shape, self.distance, self.side, self.reach
        pad = (distance, across * distance + distance - width, distance, down * distance + distance - height)
        wanted = F.unfold(_mirrored(canvas, pad).mean(dim=0)[None, None], side, stride=distance)[0].T  # [P, side^2]
        costs = _differences(self.around, self.squares, wanted.view(-1, side, side)).view(down, across, -1)
        best = _agreed(costs, self.numbers, self.offsets, self.normality).flatten(end_dim=1).argmin(dim=1)  # [P]
        shifts = torch.stack([best // (2 * reach + 1), best % (2 * reach + 1)], dim=1) - reach  # [P, 2]
        patches = _cut(self.copies, self.numbers.flatten(), self.corners + shifts, side)  # [P, 3, side, side]
        fade = torch.hann_window(side + 2, device=canvas.device, dtype=canvas.dtype)[1:-1]
        fade = fade[:, None] * fade
        size = (down * distance + 2 * distance, across * distance + 2 * distance)

        def summed(patches: Tensor) -> Tensor:
            return F.fold(patches.flatten(start_dim=1).T[None], size, side, stride=distance)[0]

        blended = summed(patches * fade) / summed(fade.expand(len(patches), 1, side, side))
        return blended[:, distance : distance + height, distance : distance + width]


def grid(height: int, width: int, device) -> Tensor:
    """Gives row and column of every position, int64 `[h, w, 2]`."""
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)


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


def _squares(around: Tensor, side: int) -> Tensor:
    """Sums the squares of every part of that side of `[P, n, n]`: `[P, n - side + 1, n - side + 1]`."""
    squares = F.avg_pool2d(around.square()[:, None], (side, 1), stride=1)  # one axis at a time is several times faster
    return F.avg_pool2d(squares, (1, side), stride=1)[:, 0] * side**2


def _differences(around: Tensor, squares: Tensor, wanted: Tensor) -> Tensor:
    """Finds how much wanted `[P, m, m]` differ from around `[P, n, n]` at every corner, squared and summed:
    `[P, n - m + 1, n - m + 1]`; squares are those of `_squares`."""
    products = F.conv2d(around[None], wanted[:, None], groups=len(around))[0]
    return squares - 2 * products + wanted.square().sum(dim=(1, 2))[:, None, None]


def _agreed(costs: Tensor, numbers: Tensor, offsets: Tensor, normality: Tensor) -> Tensor:
    """Takes a patch's own costs as far as it looks normal; for the rest the mean of the patches around that are of the
    same copy and offset, weighted by how normal each looks.

    Args:
        costs: `[a, b, S]`, of S shifts.
        numbers, offsets, normality: as of `Patches`.

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
