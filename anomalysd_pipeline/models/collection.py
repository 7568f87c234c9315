"""Collect the vectors of a prototype bank from normal pictures, Eq. (13) of AnomalySD (arXiv 2408.01960)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..data.region import inside
from ..data.shots import Shots
from ..data.tensors import rotate

_CHECKED = 2**12


@torch.no_grad()
def collect_prototypes(
    extractor: Callable[[Tensor], Tensor],
    images: Sequence[Tensor],
    rotations: int = 4,
    regions: Sequence[Tensor] | None = None,
    callback: Callable[[int, int], object] | None = None,
) -> tuple[Tensor, Tensor]:
    """Collects all feature vectors of rotated normal pictures, P_c of Eq. (13), and where they are from.

    Args:
        extractor: A [`PrototypeExtractor`], or anything from [1, 3, H, W] to [1, C, h, w].
        images: K pictures [3, H, W] in [-1, 1], on the extractor's device; sizes may differ.
        rotations: Number of angles, evenly spaced over the full turn and starting at 0; multiples of 90 degrees are
            exact, others are bilinear with the border mirrored.
        regions: What of each picture counts, bool [h, w]: positions whose cell lies outside are left out. None: all.
        callback: Called as `callback(done, total)` after every copy of a picture; an exception that it raises ends the
            call.

    Returns:
        - [M, C]: all positions of the pictures as they are, one picture after another, then of the turned ones.
        - int64 [M, 3], the place of each: number of the copy (its turn times K, plus its picture), row and column.

    Raises:
        ValueError: If `images` has other shapes, `rotations` is less than 1, or features are not finite.
    """
    if not len(images) or any(image.ndim != 3 or len(image) != 3 for image in images):
        raise ValueError(
            f"`images` must be [3, H, W] each, at least one, got {[list(image.shape) for image in images]}."
        )
    if rotations < 1:
        raise ValueError(f"`rotations` must be at least 1, got {rotations}.")
    features, places = [], []
    for step in range(rotations):
        for index, image in enumerate(images):  # one by one, which takes least memory
            psi = extractor(rotate(image[None], 360 * step / rotations))
            found = psi.permute(0, 2, 3, 1).flatten(end_dim=2)
            rows, columns = map(torch.arange, psi.shape[2:])
            place = torch.cartesian_prod(torch.tensor([len(places)]), rows, columns)
            if regions is not None:
                own = inside(regions[index], image.shape[1:]).float()[None, None]
                kept = inside(rotate(own, 360 * step / rotations)[0, 0] > 0.5, psi.shape[2:]).flatten()
                found, place = found[kept.to(found.device)], place[kept]
            features.append(found)
            places.append(place)
            if callback is not None:
                callback(len(places), rotations * len(images))
    found = torch.cat(features)
    if not is_finite(found):
        raise ValueError(
            "`images` gave features that are not finite: use finite pictures in [-1, 1] or a wider dtype."
        )
    return found, torch.cat(places)


def fill_bank(
    bank,
    category: str,
    extractor,
    images: Sequence[Tensor],
    rotations: int = 4,
    regions: Sequence[Tensor] | None = None,
    sources: Sequence[int] | None = None,
    callback: Callable[[int, int], object] | None = None,
) -> None:
    """Stores the prototypes of normal pictures, and the pictures, in a [`PrototypeBank`].

    Args and errors: see [`collect_prototypes`] and `PrototypeBank.add`. `sources` numbers the picture that each of
    `images` is a tile of; None: each is a picture.
    """
    features, places = collect_prototypes(extractor, images, rotations, regions, callback)
    shots = Shots.of(images, places, rotations)
    unturned = int((places[:, 0] < len(images)).sum())
    numbers = places[:, 0] % len(images)
    if sources is not None:
        numbers = torch.tensor(sources)[numbers]
    bank.add(category, features, numbers, unturned=unturned, shots=shots)


def is_finite(features: Tensor) -> bool:
    """Tells whether all of [M, C] are finite, in pieces: PyTorch's own check takes more memory than they do."""
    return all(bool(torch.isfinite(part).all()) for part in features.split(_CHECKED))


def is_in_range(features: Tensor) -> bool:
    """Tells whether all of [M, C] are within half precision, so that their squares are finite too."""
    most = torch.finfo(torch.float16).max
    return bool(-most <= features.min() and features.max() <= most)  # NaN is neither
