"""The points of the ROC, precision-recall and PRO curves, few enough for a report, for pictures and for pixels.

A curve keeps at most `MAX_POINTS` of its points, its ends among them; no other point lies visibly off the line through
those. A curve that is undefined for the data, as its metric is, has no points: an empty array [2, 0].
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence

import numpy as np

from .metrics import PixelRanking, Ranking, check_fpr_limit, count_above, count_from, rank_images, rank_pixels

MAX_POINTS = 200

# In units of the plot's width and height: a tenth of a pixel in a plot of 1000.
_INVISIBLE = 1e-4
# A curve of millions of points is first read at so many thresholds, evenly spread over one of its axes.
_STEPS = 1000


def image_curves(labels: Sequence[bool], scores: Sequence[float]) -> dict[str, np.ndarray]:
    """Image-level curves.

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
    ranking = rank_images(labels, scores)
    return {"roc": _roc(ranking), "pr": _precision_recall(ranking)}


def pixel_metrics_and_curves(
    masks: Iterable[np.ndarray], maps: Iterable[np.ndarray], fpr_limit: float = 0.3, connectivity: int = 8
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """`metrics.pixel_metrics`, and the curves over the same pixels, which are read and sorted only once.

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
    curves = {"roc": _roc(ranking), "pr": _precision_recall(ranking), "pro": _overlap(ranking, fpr_limit)}
    return metrics, curves


def _roc(ranking: Ranking) -> np.ndarray:
    if not ranking.has_both:
        return np.empty((2, 0))
    # Between two of these thresholds recall rises by one step at most, so the curve cannot leave the line by more.
    thresholds = _at_ranks(ranking.defective, _even_ranks(len(ranking.defective)))
    rates = [
        _stairs(count_above(scores, thresholds), count_from(scores, thresholds)) / len(scores)
        for scores in (ranking.normal, ranking.defective)
    ]
    return _thin(np.pad(np.stack(rates), ((0, 0), (0, 1)), constant_values=1.0))


def _precision_recall(ranking: Ranking) -> np.ndarray:
    if not ranking.has_both:
        return np.empty((2, 0))
    count = len(ranking.defective)
    # Precision varies most where few items are found yet: there each step is 1 % more of them.
    early = np.geomspace(1, count, math.ceil(math.log(count) / 0.01) + 1).astype(np.int64) - 1
    thresholds = _at_ranks(ranking.defective, np.concatenate([early, _even_ranks(count)]))
    true_positives, false_positives = count_from(ranking.defective, thresholds), count_from(ranking.normal, thresholds)
    precision = (true_positives / (true_positives + false_positives))[::-1]
    recall = true_positives[::-1] / count
    return _thin(np.stack([np.append(0.0, recall), np.append(precision[0], precision)]))


def _overlap(ranking: PixelRanking, fpr_limit: float) -> np.ndarray:
    if not ranking.has_both:
        return np.empty((2, 0))
    # One normal pixel past the limit is needed too, to know the curve on both sides; two, as the product is rounded.
    within = min(math.floor(fpr_limit * len(ranking.normal)) + 2, len(ranking.normal))
    thresholds = _at_ranks(ranking.normal, _even_ranks(within))
    false_positives = _stairs(count_above(ranking.normal, thresholds), count_from(ranking.normal, thresholds))
    rates = false_positives / len(ranking.normal)
    overlaps = _stairs(*ranking.overlap(thresholds))
    inside = int(np.searchsorted(rates, fpr_limit, side="right"))
    if inside < len(rates):
        last = slice(inside - 1, inside + 1)
        at_limit = np.interp(fpr_limit, rates[last], overlaps[last])
    else:
        # Only at a limit of 1, where everything is found.
        at_limit = 1.0
    curve = np.stack([np.append(rates[:inside], fpr_limit), np.append(overlaps[:inside], at_limit)])
    scale = np.array([[fpr_limit], [1.0]])
    return _thin(curve, scale)


def _even_ranks(count: int) -> np.ndarray:
    """At most `_STEPS` + 1 of the ranks 0 to `count` - 1, the first and the last among them."""
    return np.linspace(0, count - 1, min(count, _STEPS + 1)).astype(np.int64)


def _at_ranks(ascending: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """The distinct scores at some ranks, where rank 0 is the highest score; ascending."""
    return np.unique(ascending[len(ascending) - 1 - ranks])


def _stairs(above: np.ndarray, from_there: np.ndarray) -> np.ndarray:
    """One coordinate along a curve from its start at 0: before and at each threshold, the highest threshold first.

    Before it, so that the line does not run straight from one threshold to the next where the curve is a step.
    """
    return np.append(0.0, np.stack([above, from_there], axis=1)[::-1].ravel())


def _thin(curve: np.ndarray, scale: np.ndarray | float = 1.0) -> np.ndarray:
    """The points of a curve [2, P] that show its course best (Ramer, Douglas and Peucker), `MAX_POINTS` at most.

    From the ends on, the point farthest from the line through those kept is kept too, until none is visibly off it.
    """
    points = curve / scale
    kept, last = [0], points.shape[1] - 1
    waiting = [(*_farthest(points, 0, last), 0, last)]
    while len(kept) < MAX_POINTS - 1 and waiting[0][0] < -_INVISIBLE:
        _, middle, start, end = heapq.heappop(waiting)
        kept.append(middle)
        for piece in ((start, middle), (middle, end)):
            heapq.heappush(waiting, (*_farthest(points, *piece), *piece))
    return curve[:, [*sorted(kept), last]]


def _farthest(points: np.ndarray, start: int, end: int) -> tuple[float, int]:
    """Of the points between two, the one farthest from the line through those: minus its distance, and its place.

    Minus, because a heap hands out the smallest first.
    """
    if end - start < 2:
        return 0.0, start
    offsets = points[:, start + 1 : end] - points[:, start : start + 1]
    line = points[:, end] - points[:, start]
    length = float(line @ line)
    along = np.clip(line @ offsets / length, 0, 1) if length else np.zeros(offsets.shape[1])
    distances = np.hypot(*(offsets - np.outer(line, along)))
    farthest = int(np.argmax(distances))
    return -float(distances[farthest]), start + 1 + farthest
