"""Detection and segmentation metrics, exact: AUROC, AUPR, F1-max and PRO.

Each is computed over all distinct thresholds; equal scores form one threshold. A metric that is undefined for the data
is `float("nan")`, never 0: when only one class is present, so that AUROC, AUPR and F1-max have nothing to tell apart
and PRO has no defective region or no normal pixel. Higher scores mean more anomalous; scores may have any scale and
may be infinite.

Pictures are read one at a time, and of each only its pixels' scores are kept: 4 bytes per pixel of a float32 map,
twice that for a defective one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
from scipy import ndimage

_NEIGHBORS = {4: ndimage.generate_binary_structure(2, 1), 8: ndimage.generate_binary_structure(2, 2)}

# In scores. A block is large enough to be returned to the system as soon as it is dropped (C libraries keep less than
# 32 MiB for themselves). A part of consecutive scores, and the scores among which they are looked up, fit a cache.
_BLOCK = 1 << 24
_CHUNK = 1 << 21
_PART = 1 << 16


def image_metrics(labels: Sequence[bool], scores: Sequence[float]) -> dict[str, float]:
    """Image-level metrics.

    Args:
        labels: [N] booleans (or 0 and 1), true for defective.
        scores: [N] image scores.

    Returns:
        `auroc`, `aupr` and `f1_max`, each in [0, 1] or nan where undefined.

    Raises:
        ValueError: if the two differ in length or are not one-dimensional, a label is not 0 or 1, or a score is NaN.
    """
    return rank_images(labels, scores).metrics()


def pixel_metrics(
    masks: Iterable[np.ndarray], maps: Iterable[np.ndarray], fpr_limit: float = 0.3, connectivity: int = 8
) -> dict[str, float]:
    """Pixel-level metrics over all pixels of all pictures together.

    Args:
        masks: N masks [H, W], bool or 0 and 1, true for defective pixels; sizes may differ between pictures. Any
            iterable: from a generator the pictures are taken, and let go, one at a time.
        maps: N anomaly maps, each of its mask's shape; any iterable too.
        fpr_limit: see `pro`.
        connectivity: see `pro`.

    Returns:
        `auroc`, `aupr`, `f1_max` and `pro`, each in [0, 1] or nan where undefined.

    Raises:
        ValueError: as `pro`.
    """
    check_fpr_limit(fpr_limit)
    ranking = rank_pixels(masks, maps, connectivity)
    return ranking.metrics() | {"pro": ranking.pro(fpr_limit)}


def auroc(labels: Sequence[bool], scores: Sequence[float]) -> float:
    """Area under the ROC curve, ties counted half; nan if only one class is present.

    Arguments and errors are those of `image_metrics`.
    """
    return image_metrics(labels, scores)["auroc"]


def aupr(labels: Sequence[bool], scores: Sequence[float]) -> float:
    """Average precision Σ (R_n - R_{n-1}) P_n, without interpolation; nan if only one class is present.

    Arguments and errors are those of `image_metrics`.
    """
    return image_metrics(labels, scores)["aupr"]


def f1_max(labels: Sequence[bool], scores: Sequence[float]) -> float:
    """The largest F1 over all thresholds; nan if only one class is present.

    Arguments and errors are those of `image_metrics`.
    """
    return image_metrics(labels, scores)["f1_max"]


def pro(
    masks: Iterable[np.ndarray], maps: Iterable[np.ndarray], fpr_limit: float = 0.3, connectivity: int = 8
) -> float:
    """Area under the per-region-overlap curve up to a false positive rate, divided by that rate.

    At each threshold the overlap is the share of a defective region (a connected component of a mask) that is found,
    averaged over all regions, so that small defects weigh as much as large ones; the false positive rate is taken over
    all normal pixels (Bergmann et al., MVTec AD). The curve starts at (0, 0) and is linear between thresholds.

    Args:
        masks: N masks [H, W], bool or 0 and 1, true for defective pixels; sizes may differ between pictures. Any
            iterable.
        maps: N anomaly maps, each of its mask's shape; any iterable.
        fpr_limit: where the integration ends, in (0, 1].
        connectivity: 4 or 8, which pixels are neighbors within a region.

    Returns:
        A value in [0, 1]; nan if there is no region or no normal pixel.

    Raises:
        ValueError: if the numbers of masks and maps or the shapes of a pair differ, a picture is not two-dimensional,
            a mask is not binary, a map holds NaN, or an option is out of range.
    """
    check_fpr_limit(fpr_limit)
    return rank_pixels(masks, maps, connectivity).pro(fpr_limit)


@dataclass(frozen=True, eq=False)
class Ranking:
    """The scores of normal and of defective items (pictures or pixels).

    Only thresholds at a defective item's score matter: any other finds as many defects as the next one above it, at no
    fewer false positives. So every metric is a sum over the defective items, each of which needs its place among the
    normal ones alone.

    normal: [N] scores of the normal items, ascending.
    defective: [P] scores of the defective items, ascending, of the same type.
    """

    normal: np.ndarray
    defective: np.ndarray

    @property
    def has_both(self) -> bool:
        """Whether both classes are present; otherwise there is nothing to measure."""
        return bool(len(self.normal) and len(self.defective))

    def metrics(self) -> dict[str, float]:
        """`auroc`, `aupr` and `f1_max`, each nan unless both classes are present."""
        if not self.has_both:
            return dict.fromkeys(("auroc", "aupr", "f1_max"), float("nan"))
        normal, defective = len(self.normal), len(self.defective)
        ranked_below, precision, f1 = 0, 0.0, 0.0
        for part in _parts(self.defective):
            false_positives, true_positives = count_from(self.normal, part), count_from(self.defective, part)
            # Twice the normal items that score lower, so that those that score the same count half.
            ranked_below += int(np.sum(2 * normal - count_above(self.normal, part) - false_positives))
            predicted = true_positives + false_positives
            precision += float(np.sum(true_positives / predicted))
            # 2TP / (2TP + FP + FN), where TP + FN is the number of defective items.
            f1 = max(f1, float(np.max(2 * true_positives / (predicted + defective))))
        return {
            "auroc": ranked_below / (2 * normal * defective),
            "aupr": precision / defective,
            "f1_max": f1,
        }


@dataclass(frozen=True, eq=False)
class PixelRanking(Ranking):
    """The scores of pixels, and which of the defective ones form a region.

    by_region: [P] the scores of the defective pixels, region after region.
    bounds: [R + 1] where in `by_region` each region starts; the last entry is P.
    """

    by_region: np.ndarray
    bounds: np.ndarray

    def pro(self, fpr_limit: float) -> float:
        """The area of `pro`; nan unless there are both a region and a normal pixel.

        The curve is a mean over regions, and a region's own curve a mean over its pixels: each is found from its own
        false positive rate on. So no order of the defective pixels is needed to add up their areas.
        """
        if not self.has_both:
            return float("nan")
        limit = fpr_limit * len(self.normal)
        area = 0.0
        for scores, shares in self._shares():
            areas = [
                _step_area(count_above(self.normal, part), count_from(self.normal, part), limit)
                for part in _parts(scores)
            ]
            area += float(np.dot(np.concatenate(areas), shares))
        # Rounding in the sum may pass 1 by some 1e-16.
        return min(area / limit, 1.0)

    def overlap(self, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The share of a region, averaged over regions, that scores above, and at or above, each threshold [T]."""
        above, from_there = np.zeros(len(thresholds)), np.zeros(len(thresholds))
        for scores, shares in self._shares():
            remaining = np.append(np.cumsum(shares[::-1])[::-1], 0.0)
            above += remaining[np.searchsorted(scores, thresholds, side="right")]
            from_there += remaining[np.searchsorted(scores, thresholds, side="left")]
        return np.minimum(above, 1.0), np.minimum(from_there, 1.0)

    def _shares(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Ascending scores of some defective pixels, and each one's share 1 / (regions × region size), in chunks."""
        for start in range(0, len(self.by_region), _CHUNK):
            scores = self.by_region[start : start + _CHUNK]
            regions = np.searchsorted(self.bounds, np.arange(start, start + len(scores)), side="right") - 1
            sizes = self.bounds[regions + 1] - self.bounds[regions]
            order = np.argsort(scores)
            yield scores[order], 1.0 / (sizes[order] * (len(self.bounds) - 1.0))


def rank_images(labels: Sequence[bool], scores: Sequence[float]) -> Ranking:
    """The scores of pictures by class; arguments and errors are those of `image_metrics`."""
    labels, scores = _check_binary(labels, "labels"), _check_scores(scores, "scores")
    if labels.ndim != 1 or labels.shape != scores.shape:
        raise ValueError(
            "`labels` and `scores` must be one-dimensional and of equal length, but shapes "
            f"{labels.shape} and {scores.shape} were given."
        )
    return Ranking(np.sort(scores[~labels]), np.sort(scores[labels]))


def rank_pixels(masks: Iterable[np.ndarray], maps: Iterable[np.ndarray], connectivity: int = 8) -> PixelRanking:
    """The scores of all pixels of all pictures by class and region; arguments and errors are those of `pro`."""
    if connectivity not in _NEIGHBORS:
        raise ValueError(f"`connectivity` must be 4 or 8, but {connectivity!r} was given.")
    normal, by_region, sizes = _Scores(), _Scores(), [np.zeros(1, np.int64)]
    for mask, anomaly_map in _pairs(masks, maps):
        if mask.any():
            components, _ = ndimage.label(mask, structure=_NEIGHBORS[connectivity])
            components = components[mask]
            by_region.append(anomaly_map[mask][np.argsort(components, kind="stable")])
            sizes.append(np.bincount(components)[1:])
        normal.append(anomaly_map[~mask])
    # One type for both, else each look-up would convert the larger array.
    dtype = np.result_type(np.bool_, *normal.dtypes, *by_region.dtypes)
    ranked, by_region = normal.take(dtype), by_region.take(dtype)
    ranked.sort()
    return PixelRanking(ranked, np.sort(by_region), by_region, np.cumsum(np.concatenate(sizes)))


def count_above(ascending: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """How many of some scores lie above each threshold; both ascending, at least one threshold."""
    return _count(ascending, thresholds, "right")


def count_from(ascending: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """How many of some scores lie at or above each threshold; both ascending, at least one threshold."""
    return _count(ascending, thresholds, "left")


def check_fpr_limit(fpr_limit: float) -> None:
    """Raises ValueError unless 0 < `fpr_limit` <= 1."""
    if not 0 < fpr_limit <= 1:
        raise ValueError(f"`fpr_limit` must lie in (0, 1], but {fpr_limit} was given.")


class _Scores:
    """Scores gathered piece by piece and handed over as one array, without ever holding them twice."""

    def __init__(self):
        self.dtypes = set()
        self._blocks: list[np.ndarray] = []
        self._filled: list[int] = []

    def append(self, piece: np.ndarray) -> None:
        """Copies the scores of a piece [n]."""
        self.dtypes.add(piece.dtype)
        if not self._blocks or piece.dtype != self._blocks[-1].dtype or self._room() < len(piece):
            size = max(len(piece), min(sum(self._filled), _BLOCK))
            self._blocks.append(np.empty(size, piece.dtype))
            self._filled.append(0)
        start = self._filled[-1]
        self._filled[-1] += len(piece)
        self._blocks[-1][start : self._filled[-1]] = piece

    def take(self, dtype: np.dtype) -> np.ndarray:
        """All scores; this object is empty thereafter."""
        scores, end = np.empty(sum(self._filled), dtype), sum(self._filled)
        # The memory of `scores` is used only as it is written, and each block is dropped once copied.
        while self._blocks:
            block, filled = self._blocks.pop(), self._filled.pop()
            scores[end - filled : end] = block[:filled]
            end -= filled
        return scores

    def _room(self) -> int:
        return len(self._blocks[-1]) - self._filled[-1]


def _count(ascending: np.ndarray, thresholds: np.ndarray, side: str) -> np.ndarray:
    # Only the stretch that the thresholds span is searched.
    start = np.searchsorted(ascending, thresholds[0], side="left")
    end = np.searchsorted(ascending, thresholds[-1], side="right")
    return len(ascending) - start - np.searchsorted(ascending[start:end], thresholds, side=side)


def _parts(scores: np.ndarray) -> Iterator[np.ndarray]:
    return (scores[start : start + _PART] for start in range(0, len(scores), _PART))


def _step_area(above: np.ndarray, from_there: np.ndarray, limit: float) -> np.ndarray:
    """Area up to `limit` under a curve that rises from 0 at `above` to 1 at `from_there` and stays there."""
    whole = limit - (above + from_there) / 2
    cut = np.maximum(limit - above, 0) ** 2 / (2 * np.maximum(from_there - above, 1))
    return np.where(from_there <= limit, whole, cut)


def _pairs(masks, maps) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    missing = object()
    for number, (mask, anomaly_map) in enumerate(zip_longest(masks, maps, fillvalue=missing)):
        if mask is missing or anomaly_map is missing:
            ended, longer = ("masks", "maps") if mask is missing else ("maps", "masks")
            raise ValueError(
                f"`masks` and `maps` must be of equal number, but `{ended}` held {number} and `{longer}` more."
            )
        mask, anomaly_map = _check_binary(mask, "masks"), _check_scores(anomaly_map, "maps")
        if mask.ndim != 2 or mask.shape != anomaly_map.shape:
            raise ValueError(
                "`masks` and `maps` must hold pairs of one shape [H, W], but a mask of shape "
                f"{mask.shape} and a map of shape {anomaly_map.shape} were given."
            )
        yield mask, anomaly_map


def _check_binary(values, argument: str) -> np.ndarray:
    values = np.asarray(values)
    if values.dtype != bool and not ((values == 0) | (values == 1)).all():
        raise ValueError(f"`{argument}` must hold booleans, or 0 and 1, only; binarize it first.")
    return values.astype(bool, copy=False)


def _check_scores(values, argument: str) -> np.ndarray:
    values = np.asarray(values)
    if values.dtype.kind not in "fiub":
        raise ValueError(f"`{argument}` must hold real numbers, but values of type {values.dtype} were given.")
    if np.isnan(values).any():
        raise ValueError(f"`{argument}` must hold numbers only, but NaN was given.")
    return values
