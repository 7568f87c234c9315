"""Draw masks to repaint: multi-scale and prototype-guided to detect, foreground and random to train."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .settings import GROUPINGS

MASK_DESIGNS = ("foreground", "random", "detection")
"""How training masks are drawn; see `adaptation.samples.FewShotDataset`."""


@dataclass(frozen=True)
class ScalePasses:
    """Holds the inpainting passes of a scale.

    scale: k, the picture being cut into k x k cells.
    masks: float32 `[P, 1, H, W]` in {0, 1}, 1 where the pass repaints; disjoint, and their sum is all ones.
    """

    scale: int
    masks: Tensor


def multi_scale_masks(
    height: int, width: int, scales: Sequence[int] = (1, 2, 4, 8), grouping: str = "none"
) -> list[ScalePasses]:
    """Cuts a picture into k x k cells for each scale k (the paper's multi-scale masks).

    Args:
        height, width: the picture's size in pixels; any size works, cell borders are rounded to whole pixels.
        scales: the k, each in [1, min(height, width)] and given once.
        grouping: "none" gives each cell its own pass, 85 in all for the paper's scales; "grouped" and "joined" let
            cells of one scale share a pass where they do not touch, not even at a corner: 1 + 4 + 4 + 4 passes.

    Returns:
        One entry per scale, in the order of `scales`.

    Raises:
        ValueError: the grouping is unknown, or the scales are none, repeated, or out of range.
    """
    if grouping not in GROUPINGS:
        raise ValueError(f"`grouping` is {grouping!r}; give one of {', '.join(map(repr, GROUPINGS))}.")
    if not scales or len(set(scales)) != len(scales):
        raise ValueError(f"`scales` is {tuple(scales)}; give one or more scales, each once, such as (1, 2, 4, 8).")
    for scale in scales:
        if not 1 <= scale <= min(height, width):
            raise ValueError(
                f"`scales` holds {scale}; for {height} x {width} pixels give scales from 1 to {min(height, width)}."
            )
    # Cells of equal row parity and equal column parity always have a whole cell between them.
    period = {scale: scale if grouping == "none" else min(scale, 2) for scale in scales}
    passes = []
    for scale in scales:
        rows, columns = (_cell_index(length, scale) % period[scale] for length in (height, width))
        kinds = torch.arange(period[scale])
        in_rows = (rows == kinds[:, None]).float()  # [period, H]
        in_columns = (columns == kinds[:, None]).float()  # [period, W]
        masks = in_rows[:, None, :, None] * in_columns[None, :, None, :]  # [period, period, H, W]
        passes.append(ScalePasses(scale, masks.reshape(-1, 1, height, width)))
    return passes


def _cell_index(length: int, cells: int) -> Tensor:
    """Finds the cell that each pixel of a row falls in, `[length]`, borders rounded to the nearest pixel."""
    borders = (torch.arange(1, cells) * 2 * length + cells) // (2 * cells)
    return torch.bucketize(torch.arange(length), borders, right=True)


def variance_threshold(values: Tensor | np.ndarray) -> float:
    """Finds the threshold r = argmin_r Var({E >= r}) + Var({E < r}) of Eq. (15).

    This is the plain sum of the two population variances, not Otsu's sum weighted by size. The minimum is exact over
    all splits of the sorted values, in O(n log n). The paper splits by `E >= r` but marks `E > r`; the two agree for
    any r strictly between the two sides, and we return the largest value of the lower side, so that `values > r` is
    the upper side. Of splits that tie (to 1e-10 of the sum) the highest r is taken, so that less is marked.

    Args:
        values: any shape, any float type; computed in float64.

    Returns:
        r, one of the values. Where all values are equal it is that value, and nothing lies above it.

    Raises:
        ValueError: there are no values, or some are not finite.
    """
    ordered = torch.as_tensor(values).detach().cpu().double().flatten().sort().values.numpy()
    if not ordered.size or not np.isfinite(ordered).all():
        raise ValueError("`values` is empty or holds NaN or infinite values; give at least one value, all finite.")
    splits = np.flatnonzero(ordered[1:] > ordered[:-1])  # the last index of each possible lower side
    if not splits.size:
        return float(ordered[0])
    cost = _running_variance(ordered)[splits] + _running_variance(ordered[::-1])[::-1][splits + 1]
    return float(ordered[splits[np.flatnonzero(cost <= cost.min() * (1 + 1e-10))[-1]]])


def _running_variance(values: np.ndarray) -> np.ndarray:
    """Computes the population variance of the first 1, 2, ..., n values.

    Welford's update written as cumulative sums: each term is nonnegative, so nothing cancels as it does in
    E[x^2] - E[x]^2.
    """
    centered = values - values[0]
    count = np.arange(1, len(values) + 1)
    mean = np.cumsum(centered) / count
    previous = np.concatenate(([0.0], mean[:-1]))
    return np.cumsum((centered - previous) * (centered - mean)) / count


def prototype_mask(distances: Tensor, size: int | tuple[int, int], inside: Tensor | None = None) -> Tensor:
    """Makes the prototype-guided mask M^(p) = upsample(1[E > r]), Eq. (15), r found for each picture.

    Args:
        distances: E, float `[N, h, w]`, squared distances to the nearest prototype (Eq. 14).
        size: of the result, a square's side or `(H, W)`, in pixels; nearest-neighbor upsampling.
        inside: which positions count, bool `[h, w]`; None: all.

    Returns:
        bool `[N, 1, H, W]`, True where the picture is to be repainted; empty where all distances are equal.

    Raises:
        ValueError: `distances` has another shape or holds values that are not finite.
    """
    if distances.ndim != 3:
        raise ValueError(f"`distances` has shape {list(distances.shape)}; give [N, h, w].")
    if inside is None:
        inside = torch.ones_like(distances[0], dtype=torch.bool)
    above = torch.stack([(image > variance_threshold(image[inside])) & inside for image in distances])
    return torch.nn.functional.interpolate(above[:, None].float(), size=size) > 0


def random_rectangle_mask(
    height: int, width: int, generator: torch.Generator, min_fraction: float = 0.125, max_fraction: float = 1.0
) -> Tensor:
    """Draws a random rectangle m_r, float32 `[1, H, W]` in {0, 1}, 1 inside.

    Each side is uniform between `min_fraction` and `max_fraction` of the picture's side, at least one pixel, and the
    place is uniform inside the picture. The default smallest side is a cell of the finest detection scale, the largest
    the whole picture.

    Raises:
        ValueError: not 0 < min_fraction <= max_fraction <= 1.
    """
    if not 0 < min_fraction <= max_fraction <= 1:
        raise ValueError(
            f"`min_fraction` is {min_fraction} and `max_fraction` {max_fraction}; give 0 < min_fraction <= "
            "max_fraction <= 1."
        )
    mask = torch.zeros(1, height, width)
    draws = torch.rand(4, generator=generator, device=generator.device).tolist()
    (top, bottom), (left, right) = (
        _interval(length, min_fraction + (max_fraction - min_fraction) * extent, place)
        for length, extent, place in ((height, *draws[:2]), (width, *draws[2:]))
    )
    mask[:, top:bottom, left:right] = 1
    return mask


def _interval(length: int, fraction: float, place: float) -> tuple[int, int]:
    extent = max(1, round(length * fraction))
    start = int(place * (length - extent + 1))
    return start, start + extent


def training_mask(
    foreground: Tensor,
    generator: torch.Generator,
    gammas: Sequence[float] = (0.0, 0.2, 0.5),
    max_draws: int = 50,
) -> Tensor:
    """Draws a training mask by the paper's foreground mask mechanism.

    Random rectangles m_r are drawn until IoU(m_r, m_f) > gamma, with gamma drawn from `gammas` at equal odds. No
    rectangle may reach a high gamma on a thin object, so after `max_draws` the best rectangle seen is taken.

    Args:
        foreground: m_f, bool or {0, 1}, `[H, W]` or `[1, H, W]`.
        generator: the source of all draws.

    Returns:
        float32 `[1, H, W]` in {0, 1} on the CPU, 1 where the picture is to be repainted.

    Raises:
        ValueError: `foreground` is empty, `gammas` is empty or not in [0, 1), or `max_draws` is below 1.
    """
    if not foreground.any():
        raise ValueError("`foreground` marks no pixel; give all ones where there is no object, as for a texture.")
    if not gammas or not all(0 <= gamma < 1 for gamma in gammas):
        raise ValueError(f"`gammas` is {tuple(gammas)}; give one or more values in [0, 1).")
    if max_draws < 1:
        raise ValueError(f"`max_draws` is {max_draws}; give 1 or more.")
    height, width = foreground.shape[-2:]
    foreground = foreground.reshape(1, height, width).bool().cpu()
    choice = torch.randint(len(gammas), (), generator=generator, device=generator.device)
    best, best_iou = None, -1.0
    for _ in range(max_draws):
        mask = random_rectangle_mask(height, width, generator)
        overlap = iou(mask, foreground)
        if overlap > best_iou:
            best, best_iou = mask, overlap
        if overlap > gammas[choice]:
            break
    return best


def iou(a: Tensor, b: Tensor) -> float:
    """Computes the intersection over union of two masks, bool or {0, 1}; two empty masks give 0.

    Raises:
        ValueError: the shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"`a` has shape {list(a.shape)} and `b` {list(b.shape)}; give masks of one shape.")
    a, b = a.bool(), b.bool()
    return (a & b).sum().item() / max((a | b).sum().item(), 1)


def latent_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """Shrinks masks to m~ on the latent grid, by nearest neighbor as diffusers' inpainting pipeline does.

    Args:
        mask: `[N, 1, H, W]`, bool or {0, 1}.
        height, width: of the latent grid: the picture's size divided by the VAE's scale factor.

    Returns:
        `[N, 1, height, width]`, of the mask's float type (float32 for bool).
    """
    mask = mask if mask.is_floating_point() else mask.float()
    return torch.nn.functional.interpolate(mask, size=(height, width))
