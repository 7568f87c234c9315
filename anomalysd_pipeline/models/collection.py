"""Collect the vectors of a prototype bank from normal pictures, Eq. (13) of AnomalySD (arXiv 2408.01960)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..method.neighbors import NeighborSearch

COMPARED_PICTURES = 3
"""Normal pictures from which on they are compared, see `fill_bank`: of fewer, none can be held out for a threshold."""

_CHECKED = 2**12
_COMPARED = 2**14


@torch.no_grad()
def collect_prototypes(extractor: nn.Module, images: Tensor, rotations: int = 4) -> Tensor:
    """Collects all feature vectors of rotated normal pictures, P_c of Eq. (13).

    Args:
        extractor: A [`PrototypeExtractor`], or any module from [N, 3, H, W] to [N, C, h, w].
        images: [K, 3, H, W] in [-1, 1], on the extractor's device.
        rotations: Number of angles, evenly spaced over the full turn and starting at 0; multiples of 90 degrees are
            exact, others are bilinear with the border mirrored.

    Returns:
        [M, C], M = K * rotations * h * w.

    Raises:
        ValueError: If `images` has another shape, `rotations` is less than 1, or features are not finite.
    """
    if images.ndim != 4 or images.shape[1] != 3 or len(images) == 0:
        raise ValueError(f"`images` must be [K, 3, H, W] with at least one picture, got {list(images.shape)}.")
    if rotations < 1:
        raise ValueError(f"`rotations` must be at least 1, got {rotations}.")
    features, done = None, 0
    for step in range(rotations):
        for image in images.split(1):  # one by one, which takes least memory
            psi = extractor(_rotate(image, 360 * step / rotations))
            rows = psi.permute(0, 2, 3, 1).flatten(end_dim=2)
            if features is None:  # in place: pieces and their whole at once would take twice the memory
                features = rows.new_empty(len(images) * rotations * len(rows), rows.shape[1])
            features[done : done + len(rows)] = rows
            done += len(rows)
    if not is_finite(features):
        raise ValueError(
            "`images` gave features that are not finite: use finite pictures in [-1, 1] or a wider dtype."
        )
    return features


def fill_bank(
    bank, category: str, extractor: nn.Module, images: Tensor, rotations: int = 4, compare: bool = False
) -> None:
    """Stores the prototypes of normal pictures in a [`PrototypeBank`], with what is known of where each is from.

    Args:
        compare: whether to know by the differences between the pictures what another one lacks, how its colors
            deviate by themselves, and how unlike it is as a whole. Turned copies of one picture do not tell that.
        Others, and errors: see [`collect_prototypes`] and `PrototypeBank.add`.
    """
    whole = len(images) if compare else 0
    colors = getattr(extractor, "color_channels", 0) if compare else 0
    features = collect_prototypes(extractor, images, rotations)
    sources = prototype_sources(len(features), len(images), rotations)
    bank.add(category, features, sources=sources, unturned=len(features) // rotations, whole=whole, colors=colors)


def held_out_bank(bank, category: str, extractor: nn.Module, images: Tensor, index: int, rotations: int = 4):
    """Makes a bank of all normal pictures but one, to score that one as if it were new.

    How unlike the others a picture may be as a whole is known from all of them: a picture unlike the others is why all
    are allowed more, not one that the others would reject.

    Args:
        bank: the [`PrototypeBank`] whose limits the new one gets.
        images: [K, 3, H, W], K >= 2, see [`collect_prototypes`].
        index: of the picture to leave out.

    Returns:
        A new bank that holds `category` alone.
    """
    others = torch.cat([images[:index], images[index + 1 :]])
    made = bank.empty()
    fill_bank(made, category, extractor, others, rotations, len(images) >= COMPARED_PICTURES)
    if category in bank:
        made.take_reach(category, bank)
    return made


def is_finite(features: Tensor) -> bool:
    """Tells whether all of [M, C] are finite, in pieces: PyTorch's own check takes more memory than they do."""
    return all(bool(torch.isfinite(part).all()) for part in features.split(_CHECKED))


def prototype_sources(count: int, pictures: int, rotations: int) -> Tensor:
    """Numbers the picture that each of the `count` vectors of [`collect_prototypes`] is from, int64 [count].

    Numbers the turned copies instead where there is one picture alone.
    """
    positions = count // (pictures * rotations)
    if pictures == 1:
        return torch.arange(rotations).repeat_interleave(positions)
    return torch.arange(pictures).repeat_interleave(positions).repeat(rotations)


def spread_of(features: Tensor, sources: Tensor, kept: Tensor, seed: int) -> Tensor:
    """Measures the squared distance of vectors to the nearest of another source.

    Args:
        features: [M, C].
        sources: whole numbers [M], at least two different ones.
        kept: indices [S] of the vectors that are asked for.
        seed: of the sample of at most 16384 vectors with which they are compared.

    Returns:
        float32 [S].
    """
    others = torch.arange(len(features), device=features.device)
    if len(others) > _COMPARED:
        chosen = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))[:_COMPARED]
        others = others[chosen.to(others.device)]
    search = NeighborSearch(features[others], features.float().mean(dim=0), inplace=True)  # a copy of its own
    found = features.new_empty(len(kept), dtype=torch.float32)
    # In pieces, because the vectors asked for are most of them all.
    for part, result in zip(kept.split(search.chunk), found.split(search.chunk), strict=True):
        result.copy_(search.distances(features[part], (sources[part], sources[others])))
    return found


def _rotate(images: Tensor, degrees: float) -> Tensor:
    if degrees % 90 == 0:
        return torch.rot90(images, int(degrees // 90), dims=(2, 3))
    return _resample_rotated(images, degrees)


def _resample_rotated(images: Tensor, degrees: float) -> Tensor:
    height, width = images.shape[-2:]
    angle = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    cos, sin = angle.cos().item(), angle.sin().item()
    theta = images.new_tensor([[cos, -sin * height / width, 0], [sin * width / height, cos, 0]])
    grid = F.affine_grid(theta.expand(len(images), -1, -1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
