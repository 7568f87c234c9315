"""Collect the vectors of a prototype bank from normal pictures, Eq. (13) of AnomalySD (arXiv 2408.01960)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..data.region import inside
from ..data.shots import Shots
from ..data.tensors import rotate
from .coreset import greedy_coreset

_CHECKED = 2**12
_HELD, _PICTURES = 2**26, 8
"""Above so many values, 256 MiB in float32, of more pictures with their turned copies, vectors are thinned early."""


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
    check_copies(images, rotations)
    places, known = _places(extractor, images, rotations, regions)
    return _gathered(extractor, images, rotations, places, known, None, callback)


def check_copies(images: Sequence[Tensor], rotations: int) -> None:
    """Raises ValueError for pictures of another shape than [3, H, W] or less than one rotation."""
    if not len(images) or any(image.ndim != 3 or len(image) != 3 for image in images):
        raise ValueError(
            f"`images` must be [3, H, W] each, at least one, got {[list(image.shape) for image in images]}."
        )
    if rotations < 1:
        raise ValueError(f"`rotations` must be at least 1, got {rotations}.")


def _places(
    extractor, images: Sequence[Tensor], rotations: int, regions: Sequence[Tensor] | None
) -> tuple[list[Tensor], dict[int, Tensor]]:
    """Finds what each copy gives vectors of, int64 [m, 3], by describing one copy of each size.

    Returns:
        - the places of each copy.
        - number of a copy to what was described, [1, C, h, w].
    """
    places, known, grids = [], {}, {}
    for number in range(rotations * len(images)):
        step, index = divmod(number, len(images))
        size = images[index].shape[1:]
        shape = size[::-1] if 4 * step % rotations == 0 and 4 * step // rotations % 2 else size  # a quarter turn
        if shape not in grids:
            known[number] = extractor(rotate(images[index][None], 360 * step / rotations))
            grids[shape] = known[number].shape[2:]
        place = torch.cartesian_prod(torch.tensor([number]), *map(torch.arange, grids[shape]))
        if regions is not None:
            own = inside(regions[index], size).float()[None, None]
            place = place[inside(rotate(own, 360 * step / rotations)[0, 0] > 0.5, grids[shape]).flatten()]
        places.append(place)
    return places, known


def _gathered(
    extractor,
    images: Sequence[Tensor],
    rotations: int,
    places: list[Tensor],
    known: dict[int, Tensor],
    most: int | None,
    callback: Callable[[int, int], object] | None,
) -> tuple[Tensor, Tensor]:
    """Describes copies one by one, which takes least memory, and gathers the vectors at their places.

    Args:
        places, known: of [`_places`]; another copy without places is not described.
        most: vectors to which a coreset thins what was gathered where that passes `_HELD`; None: all are kept.
    """
    features, at, held, copies = [], [], 0, 0
    for number, place in enumerate(places):
        if len(place) or number in known:
            step, index = divmod(number, len(images))
            psi = known.pop(number, None)
            if psi is None:
                psi = extractor(rotate(images[index][None], 360 * step / rotations))
            rows, columns = place[:, 1:].to(psi.device).unbind(dim=1)
            found = psi[0].permute(1, 2, 0)[rows, columns]
            if not is_finite(found):
                raise ValueError(
                    "`images` gave features that are not finite: use finite pictures in [-1, 1] or a wider dtype."
                )
            features.append(found)
            at.append(place)
            held, copies = held + found.numel(), copies + 1
        if most is not None and copies > _PICTURES * rotations and held > max(_HELD, most * found.shape[1]):
            found, place = torch.cat(features), torch.cat(at)
            kept = greedy_coreset(found, most)
            features, at, held, copies = [found[kept]], [place[kept.cpu()]], most * found.shape[1], 0
        if callback is not None:
            callback(number + 1, len(places))
    return torch.cat(features), torch.cat(at)


@torch.no_grad()
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
    check_copies(images, rotations)
    places, known = _places(extractor, images, rotations, regions)
    counts = [len(place) for place in places]
    unturned = sum(counts[: len(images)])
    drawn, most = bank.drawn(sum(counts), unturned), bank.config.max_size
    if drawn is not None:  # the others need not be gathered
        bounds = torch.tensor([0, *counts]).cumsum(dim=0)
        own = drawn.tensor_split(torch.searchsorted(drawn, bounds[1:-1]))
        places = [place[rows - start] for place, rows, start in zip(places, own, bounds[:-1], strict=True)]
        unturned = sum(map(len, places[: len(images)]))
    features, places = _gathered(extractor, images, rotations, places, known, most, callback)
    shots = Shots.of(images, places, rotations)
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
