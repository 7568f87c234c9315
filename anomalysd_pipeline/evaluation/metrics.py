"""Compute detection and segmentation metrics: AUROC, AUPR and F1-max by scikit-learn, and PRO.

All are exact: every distinct score is a threshold, and equal scores form one threshold. A metric that is undefined for
the data is `float("nan")`, never 0: AUROC, AUPR and F1-max where only one class is present, PRO where there is no
defective region or no normal pixel. Higher scores mean more anomalous; they may have any scale and may be infinite.

Pictures are read one at a time, and only the scores of their pixels are kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
from scipy import ndimage
from sklearn.metrics import auc, average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

_NEIGHBORS = {4: ndimage.generate_binary_structure(2, 1), 8: ndimage.generate_binary_structure(2, 2)}


def image_metrics(labels: Sequence[bool], scores: Sequence[float]) -> dict[str, float]:
    """Computes the image-level metrics.

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
    """Computes the pixel-level metrics over all pixels of all pictures together.

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
    """Computes the area under the ROC curve, ties counted half; nan if only one class is present.

    Arguments and errors are those of `image_metrics`.
    """
    return image_metrics(labels, scores)["auroc"]


def aupr(labels: Sequence[bool], scores: Sequence[float]) -> float:
    """Computes the average precision Σ (R_n - R_{n-1}) P_n; nan if only one class is present.

    Arguments and errors are those of `image_metrics`.
    """
    return image_metrics(labels, scores)["aupr"]


def f1_max(labels: Sequence[bool], scores: Sequence[float]) -> float:
    """Computes the largest F1 over all thresholds; nan if only one class is present.

    Arguments and errors are those of `image_metrics`.
    """
    return image_metrics(labels, scores)["f1_max"]


def pro(
    masks: Iterable[np.ndarray], maps: Iterable[np.ndarray], fpr_limit: float = 0.3, connectivity: int = 8
) -> float:
    """Computes the area under the per-region-overlap curve up to `fpr_limit`, divided by it.

    At each threshold the overlap is the share of a defective region (a connected component of a mask) that is found,
    averaged over all regions, so that small defects weigh as much as large ones. The false positive rate is taken over
    all normal pixels (Bergmann et al., MVTec AD). The curve starts at (0, 0) and is linear between thresholds.

    Args:
        masks: N masks [H, W], bool or 0 and 1, true for defective pixels; sizes may differ between pictures. Any
            iterable.
        maps: N anomaly maps, each of its mask's shape; any iterable.
        fpr_limit: where the integration ends, in (0, 1].
        connectivity: of a region's pixels, 4 or 8 neighbors.

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
    """Holds the order of pictures or pixels by score, in groups that no threshold separates.

    Attributes:
        labels: [G] bool, true for a group of defective items.
        places: [G] int64, the group's place in the ascending order; groups of one score share a place.
        counts: [G] items in the group, above 0.
        overlaps: [G] float64, of defective pixels the sum of 1 / (pixels of the region), of normal pixels their count;
            None for pictures.
    """

    labels: np.ndarray
    places: np.ndarray
    counts: np.ndarray
    overlaps: np.ndarray | None = None

    @property
    def has_both(self) -> bool:
        """Tells whether both classes are present; otherwise no metric is defined."""
        return bool(self.labels.any() and not self.labels.all())

    def metrics(self) -> dict[str, float]:
        """Computes `auroc`, `aupr` and `f1_max`, each nan unless both classes are present."""
        if not self.has_both:
            return dict.fromkeys(("auroc", "aupr", "f1_max"), float("nan"))
        recall, precision = self.precision_recall()
        return {
            "auroc": float(roc_auc_score(self.labels, self.places, sample_weight=self.counts)),
            "aupr": float(average_precision_score(self.labels, self.places, sample_weight=self.counts)),
            "f1_max": float(np.max(2 * recall * precision / (recall + precision))),
        }

    def roc(self) -> np.ndarray:
        """Computes the ROC curve [2, P], false positive rate and recall; both classes must be present."""
        return np.stack(roc_curve(self.labels, self.places, sample_weight=self.counts)[:2])

    def precision_recall(self) -> np.ndarray:
        """Computes recall and precision [2, P] where recall rises; both classes must be present."""
        precision, recall, _ = precision_recall_curve(self.labels, self.places, sample_weight=self.counts)
        curve = np.stack([recall, precision])[:, -2::-1]  # ascending, without scikit-learn's point at recall 0
        return curve[:, np.diff(curve[0], prepend=0) > 0]

    def overlap(self, fpr_limit: float) -> np.ndarray:
        """Computes the PRO curve [2, P], false positive rate up to `fpr_limit` and mean overlap.

        It is the ROC curve of pixels that weigh 1 / (pixels of their region): regions weigh the same, whatever their
        size. Both classes must be present.
        """
        rates, overlaps, _ = roc_curve(self.labels, self.places, sample_weight=self.overlaps)
        inside = np.searchsorted(rates, fpr_limit, side="right")
        curve = np.stack([rates, overlaps])[:, :inside]
        if inside == len(rates):  # at a limit of 1
            return curve
        at_limit = np.interp(fpr_limit, rates[inside - 1 : inside + 1], overlaps[inside - 1 : inside + 1])
        return np.append(curve, [[fpr_limit], [at_limit]], axis=1)

    def pro(self, fpr_limit: float) -> float:
        """Computes the area of `pro`; nan unless there are both a region and a normal pixel."""
        if not self.has_both:
            return float("nan")
        return float(min(auc(*self.overlap(fpr_limit)) / fpr_limit, 1.0))  # rounding may pass 1


def rank_images(labels: Sequence[bool], scores: Sequence[float]) -> Ranking:
    """Orders pictures by score; arguments and errors are those of `image_metrics`."""
    labels, scores = _check_binary(labels, "labels"), _check_scores(scores, "scores")
    if labels.ndim != 1 or labels.shape != scores.shape:
        raise ValueError(
            "`labels` and `scores` must be one-dimensional and of equal length, but shapes "
            f"{labels.shape} and {scores.shape} were given."
        )
    return _rank(scores[~labels], scores[labels])


def rank_pixels(masks: Iterable[np.ndarray], maps: Iterable[np.ndarray], connectivity: int = 8) -> Ranking:
    """Orders all pixels of all pictures by score; arguments and errors are those of `pro`."""
    if connectivity not in _NEIGHBORS:
        raise ValueError(f"`connectivity` must be 4 or 8, but {connectivity!r} was given.")
    normal, defective, shares = [np.empty(0, bool)], [np.empty(0, bool)], [np.empty(0)]
    for mask, anomaly_map in _pairs(masks, maps):
        normal.append(anomaly_map[~mask])
        defective.append(anomaly_map[mask])
        if mask.any():
            regions = ndimage.label(mask, structure=_NEIGHBORS[connectivity])[0][mask]
            shares.append(1 / np.bincount(regions)[regions])
    return _rank(np.concatenate(normal), np.concatenate(defective), np.concatenate(shares))


def check_fpr_limit(fpr_limit: float) -> None:
    """Raises ValueError unless 0 < `fpr_limit` <= 1."""
    if not 0 < fpr_limit <= 1:
        raise ValueError(f"`fpr_limit` must lie in (0, 1], but {fpr_limit} was given.")


def _rank(normal: np.ndarray, defective: np.ndarray, shares: np.ndarray | None = None) -> Ranking:
    """Groups scores of one type; `normal` is sorted in place.

    Normal items between two neighboring scores of defective ones form one group, since no metric depends on their
    order. Few pixels are defective, so there are few groups: scikit-learn would take many times the memory for all
    scores.
    """
    normal.sort()
    thresholds, places, found = np.unique(defective, return_inverse=True, return_counts=True)
    starts, ends = (np.searchsorted(normal, thresholds, side) for side in ("left", "right"))
    between = np.append(starts, len(normal)) - np.append(0, ends)
    odd = 2 * np.arange(len(thresholds)) + 1  # even places are between the thresholds
    counts = np.concatenate([found, ends - starts, between])
    labels = np.arange(len(counts)) < len(found)
    order = np.concatenate([odd, odd, 2 * np.arange(len(between))])
    overlaps = None
    if shares is not None:
        overlaps = counts.astype(np.float64)
        overlaps[labels] = np.bincount(places, shares)
    groups = counts > 0
    return Ranking(labels[groups], order[groups], counts[groups], overlaps if shares is None else overlaps[groups])


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
