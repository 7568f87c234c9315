"""Detection and segmentation metrics, exact: AUROC, AUPR, F1-max and PRO.

Each is computed over all distinct thresholds from a single sort; equal scores form one threshold. A metric that is
undefined for the data is `float("nan")`, never 0: AUROC, AUPR and F1-max when only one class is present, PRO when
there is no defective region or no normal pixel. Higher scores mean more anomalous; scores may have any scale.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

_NEIGHBORS = {4: ndimage.generate_binary_structure(2, 1), 8: ndimage.generate_binary_structure(2, 2)}


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
    labels, scores = _check_pairs(labels, scores)
    true_positives, false_positives = _cumulative(labels, scores)
    return _metrics(true_positives, false_positives)


def pixel_metrics(
    masks: Sequence[np.ndarray], maps: Sequence[np.ndarray], fpr_limit: float = 0.3, connectivity: int = 8
) -> dict[str, float]:
    """Pixel-level metrics over all pixels of all pictures together, from one sort.

    Args:
        masks: N masks [H, W], bool or 0 and 1, true for defective pixels; sizes may differ between pictures.
        maps: N anomaly maps, each of its mask's shape.
        fpr_limit: see `pro`.
        connectivity: see `pro`.

    Returns:
        `auroc`, `aupr`, `f1_max` and `pro`, each in [0, 1] or nan where undefined.

    Raises:
        ValueError: as `pro`.
    """
    _check_pro_options(fpr_limit, connectivity)
    labels, scores, weights = _flatten(masks, maps, connectivity)
    order = np.argsort(scores)[::-1]
    ends = _group_ends(scores[order])
    true_positives, false_positives = _counts(labels[order], ends)
    result = _metrics(true_positives, false_positives)
    result["pro"] = _pro(weights[order], ends, false_positives, fpr_limit)
    return result


def auroc(labels: Sequence[bool], scores: Sequence[float]) -> float:
    """Area under the ROC curve, ties counted half; nan if only one class is present.

    Arguments and errors are those of `image_metrics`.
    """
    return _auroc(*_cumulative(*_check_pairs(labels, scores)))


def aupr(labels: Sequence[bool], scores: Sequence[float]) -> float:
    """Average precision Σ (R_n - R_{n-1}) P_n, without interpolation; nan if only one class is present.

    Arguments and errors are those of `image_metrics`.
    """
    return _aupr(*_cumulative(*_check_pairs(labels, scores)))


def f1_max(labels: Sequence[bool], scores: Sequence[float]) -> float:
    """The largest F1 over all thresholds; nan if only one class is present.

    Arguments and errors are those of `image_metrics`.
    """
    return _f1_max(*_cumulative(*_check_pairs(labels, scores)))


def pro(
    masks: Sequence[np.ndarray], maps: Sequence[np.ndarray], fpr_limit: float = 0.3, connectivity: int = 8
) -> float:
    """Area under the per-region-overlap curve up to a false positive rate, divided by that rate.

    At each threshold the overlap is the share of a defective region (a connected component of a mask) that is found,
    averaged over all regions, so that small defects weigh as much as large ones; the false positive rate is taken over
    all normal pixels (Bergmann et al., MVTec AD). The curve starts at (0, 0) and is linear between thresholds.

    Args:
        masks: N masks [H, W], bool or 0 and 1, true for defective pixels; sizes may differ between pictures.
        maps: N anomaly maps, each of its mask's shape.
        fpr_limit: where the integration ends, in (0, 1].
        connectivity: 4 or 8, which pixels are neighbors within a region.

    Returns:
        A value in [0, 1]; nan if there is no region or no normal pixel.

    Raises:
        ValueError: if the numbers of masks and maps or the shapes of a pair differ, a picture is not two-dimensional,
            a mask is not binary, a map holds NaN, or an option is out of range.
    """
    _check_pro_options(fpr_limit, connectivity)
    labels, scores, weights = _flatten(masks, maps, connectivity)
    order = np.argsort(scores)[::-1]
    ends = _group_ends(scores[order])
    _, false_positives = _counts(labels[order], ends)
    return _pro(weights[order], ends, false_positives, fpr_limit)


def _check_binary(values, argument: str) -> np.ndarray:
    values = np.asarray(values)
    if values.dtype != bool and not ((values == 0) | (values == 1)).all():
        raise ValueError(f"`{argument}` must hold booleans, or 0 and 1, only; binarize it first.")
    return values.astype(bool)


def _check_scores(values, argument: str) -> np.ndarray:
    values = np.asarray(values)
    if values.dtype.kind not in "fiub":
        raise ValueError(f"`{argument}` must hold real numbers, but values of type {values.dtype} were given.")
    if np.isnan(values).any():
        raise ValueError(f"`{argument}` must hold numbers only, but NaN was given.")
    return values


def _check_pairs(labels, scores) -> tuple[np.ndarray, np.ndarray]:
    labels, scores = _check_binary(labels, "labels"), _check_scores(scores, "scores")
    if labels.ndim != 1 or labels.shape != scores.shape:
        raise ValueError(
            "`labels` and `scores` must be one-dimensional and of equal length, but shapes "
            f"{labels.shape} and {scores.shape} were given."
        )
    return labels, scores


def _check_pro_options(fpr_limit: float, connectivity: int) -> None:
    if not 0 < fpr_limit <= 1:
        raise ValueError(f"`fpr_limit` must lie in (0, 1], but {fpr_limit} was given.")
    if connectivity not in _NEIGHBORS:
        raise ValueError(f"`connectivity` must be 4 or 8, but {connectivity!r} was given.")


def _flatten(masks, maps, connectivity: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels and scores of all pixels, and each one's share 1 / (regions × region size) of the mean overlap."""
    if len(masks) != len(maps):
        raise ValueError(
            f"`masks` and `maps` must be of equal number, but {len(masks)} masks and {len(maps)} maps were given."
        )
    labels, scores, weights, regions = [], [], [], 0
    for mask, anomaly_map in zip(masks, maps, strict=True):
        mask, anomaly_map = _check_binary(mask, "masks"), _check_scores(anomaly_map, "maps")
        if mask.ndim != 2 or mask.shape != anomaly_map.shape:
            raise ValueError(
                "`masks` and `maps` must hold pairs of one shape [H, W], but a mask of shape "
                f"{mask.shape} and a map of shape {anomaly_map.shape} were given."
            )
        components, count = ndimage.label(mask, structure=_NEIGHBORS[connectivity])
        sizes = np.bincount(components.ravel())
        shares = 1.0 / np.maximum(sizes, 1)
        shares[0] = 0.0
        regions += count
        labels.append(mask.ravel())
        scores.append(anomaly_map.ravel())
        weights.append(shares[components.ravel()])
    if not labels:
        return np.zeros(0, bool), np.zeros(0), np.zeros(0)
    return np.concatenate(labels), np.concatenate(scores), np.concatenate(weights) / max(regions, 1)


def _group_ends(descending: np.ndarray) -> np.ndarray:
    """Index of the last element of each run of equal scores: the places where a threshold can lie."""
    if not len(descending):
        return np.zeros(0, np.int64)
    return np.append(np.flatnonzero(descending[1:] != descending[:-1]), len(descending) - 1)


def _counts(labels: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    true_positives = np.cumsum(labels, dtype=np.int64)[ends]
    return true_positives, ends + 1 - true_positives


def _cumulative(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(scores)[::-1]
    return _counts(labels[order], _group_ends(scores[order]))


def _one_class(true_positives: np.ndarray, false_positives: np.ndarray) -> bool:
    return not len(true_positives) or not true_positives[-1] or not false_positives[-1]


def _metrics(true_positives: np.ndarray, false_positives: np.ndarray) -> dict[str, float]:
    return {
        "auroc": _auroc(true_positives, false_positives),
        "aupr": _aupr(true_positives, false_positives),
        "f1_max": _f1_max(true_positives, false_positives),
    }


def _auroc(true_positives: np.ndarray, false_positives: np.ndarray) -> float:
    if _one_class(true_positives, false_positives):
        return float("nan")
    tpr = np.concatenate([[0.0], true_positives / true_positives[-1]])
    fpr = np.concatenate([[0.0], false_positives / false_positives[-1]])
    return _area(fpr, tpr)


def _aupr(true_positives: np.ndarray, false_positives: np.ndarray) -> float:
    if _one_class(true_positives, false_positives):
        return float("nan")
    precision = true_positives / (true_positives + false_positives)
    return float(np.sum(np.diff(true_positives, prepend=0) * precision) / true_positives[-1])


def _f1_max(true_positives: np.ndarray, false_positives: np.ndarray) -> float:
    if _one_class(true_positives, false_positives):
        return float("nan")
    # 2TP / (2TP + FP + FN), where TP + FN is the number of positives.
    return float(np.max(2 * true_positives / (true_positives + false_positives + true_positives[-1])))


def _pro(weights: np.ndarray, ends: np.ndarray, false_positives: np.ndarray, fpr_limit: float) -> float:
    if not len(ends) or not false_positives[-1] or not weights.any():
        return float("nan")
    fpr = np.concatenate([[0.0], false_positives / false_positives[-1]])
    overlap = np.concatenate([[0.0], np.cumsum(weights)[ends]])
    inside = int(np.searchsorted(fpr, fpr_limit, side="right"))
    if inside < len(fpr):
        slope = (overlap[inside] - overlap[inside - 1]) / (fpr[inside] - fpr[inside - 1])
        at_limit = overlap[inside - 1] + slope * (fpr_limit - fpr[inside - 1])
        fpr, overlap = np.append(fpr[:inside], fpr_limit), np.append(overlap[:inside], at_limit)
    # Rounding in the running sum may pass 1 by some 1e-16.
    return min(_area(fpr, overlap) / fpr_limit, 1.0)


def _area(x: np.ndarray, y: np.ndarray) -> float:
    """Trapezoid rule; written out because numpy 1 and 2 name theirs differently."""
    return float(np.sum(np.diff(x) * (y[1:] + y[:-1])) / 2)
