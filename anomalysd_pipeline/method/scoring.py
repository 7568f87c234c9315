"""Fuse distance maps to an anomaly map, Eqs. (18) to (21) of AnomalySD (arXiv 2408.01960), and smooth it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_FAINT = 1e-6
"""Weight below which a blurred region counts as outside."""


@dataclass(frozen=True)
class ScoreMaps:
    """Holds the maps that N pictures are scored by, at the pipeline's resolution R.

    Attributes:
        multi_scale: S_ms, Eq. (19), float32 `[N, R, R]`.
        guided: S_pg, Eq. (20), float32 `[N, R, R]`; None without normal pictures, and where it has no weight.
        deviations: D, see `PrototypeBank.relative`, float32 `[N, R, R]`; None where they are not asked for.
        repainted: pictures to show to people, `[N, 3, R, R]` in [-1, 1].
        prototype_masks: M^(p), Eq. (15), bool `[N, 1, R, R]`; None without normal pictures.
        exemplars: the parts as they should look, `[N, 3, R, R]` in [-1, 1]; None where they are not the start.
        regions: what counts of the maps, which are 0 outside, bool `[N, 1, R, R]`; None: all.
    """

    multi_scale: Tensor
    guided: Tensor | None
    deviations: Tensor | None
    repainted: Tensor
    prototype_masks: Tensor | None
    exemplars: Tensor | None = None
    regions: Tensor | None = None

    def fused(self, prototype_weight: float, feature_weight: float) -> Tensor:
        """Weighs and smooths: S_map, Eq. (21), float32 `[N, R, R]`. With regions, pixels outside do not darken those
        inside, and have values that fade from the border on, for `image_score` and for masks to cut off."""
        fused = fuse(self.multi_scale, self.guided, self.deviations, prototype_weight, feature_weight)
        sigma = smoothing_sigma(fused.shape[-1])
        if self.regions is None:
            return smooth(fused, sigma)
        weights = self.regions[:, 0].to(fused)
        return smooth(fused * weights, sigma) / smooth(weights, sigma).clamp(min=_FAINT)


class NotFiniteError(ValueError):
    """Says that a picture has no score, because a stage of its inspection gave values that are not finite.

    Args:
        picture: its name, the subject of the sentence.
        stage: of the inspection.
    """

    def __init__(self, picture: str, stage: str):
        super().__init__(
            f"{picture} has no score, because the {stage} gave values that are not finite; check the weights and the "
            "adaptation, or compute in float32 with `mixed_precision` 'no'."
        )
        self.stage = stage


def check_finite(stage: str, values: Sequence[Tensor]) -> None:
    """Refuses values that are not finite, which would end as a score of a normal part.

    Args:
        stage: of an inspection, for the error.
        values: a tensor for each picture.

    Raises:
        NotFiniteError: naming the stage and the first picture, counted from 1.
    """
    for number, own in enumerate(values, start=1):
        if not torch.isfinite(own).all():
            raise NotFiniteError(f"Picture {number} of {len(values)}", stage)


def scale_map(masks: Tensor, distances: Tensor) -> Tensor:
    """Picks at every pixel the distance of the pass that repainted it: S^(k) of Eq. (18).

    Args:
        masks: [P, 1, H, W] in {0, 1}, the masks of one scale; together they cover each pixel once.
        distances: [P, H, W] or [N, P, H, W], one distance map per mask.

    Returns:
        [H, W] or [N, H, W].
    """
    return (masks[:, 0].to(distances.dtype) * distances).sum(dim=-3)


def harmonic_mean(maps: Tensor) -> Tensor:
    """Takes the harmonic mean over the first dimension: S_ms of Eq. (19). NaN stays NaN.

    Args:
        maps: [K, ...], >= 0.

    Returns:
        float32 [...]; exactly 0 wherever any of the K values is 0.
    """
    maps = maps.float()
    smallest = maps.amin(dim=0)
    positive = smallest > 0
    # Ratios to the smallest value lie in (0, 1], whereas 1 / S overflows for denormal S.
    ratios = smallest / torch.where(positive, maps, torch.ones_like(maps))
    total = torch.where(positive, ratios.sum(dim=0), torch.ones_like(smallest))
    mean = torch.where(positive, smallest * (maps.shape[0] / total), torch.zeros_like(smallest))
    return torch.where(smallest.isnan(), smallest, mean)


def fuse(
    multi_scale: Tensor,
    prototype: Tensor | None = None,
    feature: Tensor | None = None,
    prototype_weight: float = 0.1,
    feature_weight: float = 0.0,
) -> Tensor:
    """Weighs the final map S = (1 - a) S_ms + a S_pg, Eq. (21), plus an optional feature term b D.

    The term b D is this project's extension: D is the distance to the nearest prototype, Eq. (14), in units of the
    prototypes' squared length (`PrototypeBank.relative`); the paper uses the distance only to place a mask. With
    b = 0 the map is the paper's.

    Args:
        multi_scale: S_ms [N, H, W].
        prototype: S_pg [N, H, W], or None without normal pictures (K = 0): S_ms then keeps its full weight.
        feature: D [N, H, W], or None: no feature term.
        prototype_weight: a in [0, 1].
        feature_weight: b >= 0.

    Returns:
        [N, H, W].

    Raises:
        ValueError: If a weight is out of its range or a map has another shape than `multi_scale`.
    """
    if not 0 <= prototype_weight <= 1:
        raise ValueError(f"`prototype_weight` must be in [0, 1], got {prototype_weight}.")
    if not 0 <= feature_weight < math.inf:
        raise ValueError(f"`feature_weight` must be a finite number >= 0, got {feature_weight}.")
    for name, other in (("prototype", prototype), ("feature", feature)):
        if other is not None and other.shape != multi_scale.shape:
            raise ValueError(
                f"`{name}` must have the shape {list(multi_scale.shape)} of `multi_scale`, got {list(other.shape)}."
            )
    fused = multi_scale
    if prototype is not None:
        fused = (1 - prototype_weight) * fused + prototype_weight * prototype
    if feature is not None and feature_weight > 0:
        fused = fused + feature_weight * feature
    return fused


def smooth(maps: Tensor, sigma: float) -> Tensor:
    """Blurs by a Gaussian cut off at 4 sigma, the border mirrored with its edge pixel (c b a | a b c | c b a).

    Equal to `scipy.ndimage.gaussian_filter(mode="reflect")`, on any device and for maps of any size, also smaller than
    the kernel.

    Args:
        maps: [N, H, W], floating point.
        sigma: Standard deviation in pixels; 0 returns `maps` unchanged.

    Returns:
        [N, H, W], of the dtype of `maps`.

    Raises:
        ValueError: If `sigma` is negative or not finite.
    """
    if not 0 <= sigma < math.inf:
        raise ValueError(f"`sigma` must be a finite number >= 0, got {sigma}.")
    radius = int(4.0 * sigma + 0.5)
    if radius == 0:
        return maps
    weights = [math.exp(-0.5 * (offset / sigma) ** 2) for offset in range(-radius, radius + 1)]
    total = sum(weights)
    for dim in (-2, -1):
        length = maps.shape[dim]
        index = torch.arange(-radius, length + radius, device=maps.device) % (2 * length)
        index = torch.where(index < length, index, 2 * length - 1 - index)
        padded = maps.index_select(dim, index)
        # A sum of shifted copies rather than a convolution: cuDNN may run float32 convolutions in TF32.
        blurred = padded.narrow(dim, 0, length) * (weights[0] / total)
        for offset, weight in enumerate(weights[1:], start=1):
            blurred = blurred.add_(padded.narrow(dim, offset, length), alpha=weight / total)
        maps = blurred
    return maps


def smoothing_sigma(resolution: int, sigma_at_512: float = 4.0) -> float:
    """Finds the deviation in pixels that covers the same part of the picture as the paper's 4 px at 512 px."""
    return sigma_at_512 * resolution / 512


def image_score(maps: Tensor, top_share: float = 0.0, regions: Tensor | None = None) -> Tensor:
    """Takes image scores [N] of maps [N, H, W]: the mean of the highest `top_share` of each, at least one pixel; with
    0 its maximum, as the paper does. `regions`, bool [N, 1, H, W], tell which pixels count; None: all."""
    if regions is not None:
        each = zip(maps, regions[:, 0], strict=True)
        return torch.cat([image_score(own[None, counts], top_share) for own, counts in each])
    flat = maps.flatten(start_dim=1)
    return flat.topk(max(1, int(top_share * flat.shape[1])), dim=1).values.mean(dim=1)
