"""Compute ROC, precision-recall and PRO curves of pictures and pixels, with few points for a report.

A curve keeps at most `MAX_POINTS` points, evenly spread along it, its ends among them. A curve that is undefined for
the data, as its metric is, has no points: an empty array [2, 0].
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from .metrics import Ranking, check_fpr_limit, rank_images, rank_pixels

MAX_POINTS = 400


def image_curves(labels: Sequence[bool], scores: Sequence[float]) -> dict[str, np.ndarray]:
    """Computes the image-level curves.

    Args:
        labels: [N] booleans (or 0 and 1), true for defective.
        scores: [N] image scores.

    Returns:
        Each a float64 array [2, P], P <= `MAX_POINTS`, both rows in [0, 1] and the first one ascending; [2, 0] where
        only one class is present:

        - `roc`: false positive rate and recall, from (0, 0) to (1, 1).
        - `pr`: recall and precision, from recall 0 to 1, at the thresholds where recall rises. It starts at the
          precision of the first of them, as the average precision takes it.

    Raises:
        ValueError: as `metrics.image_metrics`.
    """
    return _curves(rank_images(labels, scores))


def pixel_metrics_and_curves(
    masks: Iterable[np.ndarray], maps: Iterable[np.ndarray], fpr_limit: float = 0.3, connectivity: int = 8
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Computes `metrics.pixel_metrics`, and the curves over the same pixels, read and sorted only once.

    Args:
        masks, maps, fpr_limit, connectivity: as for `metrics.pixel_metrics`.

    Returns:
        The metrics, and the curves: `roc` and `pr` as from `image_curves`, and

        - `pro`: float64 [2, P], false positive rate in [0, fpr_limit] and mean overlap of the regions in [0, 1]; empty
          as above if there is no region or no normal pixel.

    Raises:
        ValueError: as `metrics.pro`.
    """
    check_fpr_limit(fpr_limit)
    ranking = rank_pixels(masks, maps, connectivity)
    metrics = ranking.metrics() | {"pro": ranking.pro(fpr_limit)}
    overlap = _thin(ranking.overlap(fpr_limit), fpr_limit) if ranking.has_both else np.empty((2, 0))
    return metrics, _curves(ranking) | {"pro": overlap}


def _curves(ranking: Ranking) -> dict[str, np.ndarray]:
    if not ranking.has_both:
        return {"roc": np.empty((2, 0)), "pr": np.empty((2, 0))}
    precision_recall = ranking.precision_recall()
    start = [[0.0], precision_recall[1:, 0]]
    return {"roc": _thin(ranking.roc()), "pr": _thin(np.append(start, precision_recall, axis=1))}


def _thin(curve: np.ndarray, width: float = 1.0) -> np.ndarray:
    """Keeps at most `MAX_POINTS` points of a curve [2, P], evenly spread along it.

    The spread is that in a plot whose horizontal axis ends at `width` and whose vertical axis ends at 1.
    """
    if curve.shape[1] <= MAX_POINTS:
        return curve
    steps = np.abs(np.diff(curve)) / [[width], [1.0]]
    along = np.append(0.0, np.cumsum(steps.sum(axis=0)))
    kept = np.searchsorted(along, np.linspace(0, along[-1], MAX_POINTS))
    return curve[:, np.unique(kept)]
