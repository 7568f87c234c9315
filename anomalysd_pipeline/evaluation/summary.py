"""Compute the metrics of each category and draw, then mean and spread over the draws."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from ..data.datasets import Category
from ..data.tensors import resize
from .curves import image_curves, pixel_metrics_and_curves
from .data import load_truth
from .metrics import image_metrics
from .store import Draw, Store

DIGITS = 6
"""Decimals of a figure in `summary.json`; the next ones depend on rounding in the computation."""
METRICS = (
    "image_auroc",
    "image_aupr",
    "image_f1_max",
    "pixel_auroc",
    "pixel_aupr",
    "pixel_f1_max",
    "pixel_pro",
    "false_alarms",
    "misses",
)


def resize_map(anomaly_map: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes a map, float32 [h, w] to [H, W], bilinearly."""
    return resize(torch.from_numpy(np.ascontiguousarray(anomaly_map, dtype=np.float32))[None], size)[0].numpy()


def evaluate_class(
    store: Store,
    draw: Draw,
    number: int,
    category: Category,
    rows: Sequence[Mapping],
    fpr_limit: float,
    connectivity: int,
) -> dict:
    """Computes metrics and curves of a category after one draw, JSON-serializable.

    Defective pictures without a mask count for the image metrics only. A mask is resized to its picture's map.

    Args:
        rows: one for each test picture of `category`, in their order.
        fpr_limit, connectivity: see `metrics.pro`.

    Returns:
        `metrics`: each of `METRICS`, None where undefined; `curves`: name to two lists.
    """
    labels, scores = [row["label"] for row in rows], [row["score"] for row in rows]
    metrics = {f"image_{name}": value for name, value in image_metrics(labels, scores).items()}
    curves = {f"image_{name}": points for name, points in image_curves(labels, scores).items()}
    compared = [row for row, test in zip(rows, category.test, strict=True) if not test.label or test.mask_path]
    if any(row["label"] for row in compared):
        paths = [store.map_path(draw, number, row["index"]) for row in compared]
        # Masks need only the sizes of the maps, which stand in their first bytes.
        sizes = [np.load(path, mmap_mode="r").shape for path in paths]
        truths = (load_truth(category.test[row["index"]], size) for row, size in zip(compared, sizes, strict=True))
        masks = (np.zeros(size, bool) if truth is None else truth for truth, size in zip(truths, sizes, strict=True))
        maps = (np.load(path) for path in paths)
        pixel, pixel_curves = pixel_metrics_and_curves(masks, maps, fpr_limit, connectivity)
        metrics |= {f"pixel_{name}": value for name, value in pixel.items()}
        curves |= {("pro" if name == "pro" else f"pixel_{name}"): points for name, points in pixel_curves.items()}
    metrics |= _error_rates(rows)
    return {
        "metrics": {name: _defined(metrics.get(name)) for name in METRICS},
        "curves": {name: np.round(points, DIGITS).tolist() for name, points in curves.items()},
    }


def summarize(
    system: Mapping,
    dataset: Mapping,
    protocol: Mapping,
    draws: Sequence[Draw],
    found: Mapping[tuple[Draw, str], Mapping],
    categories: Sequence[str],
) -> dict:
    """Collects facts and figures that do not depend on the machine, as written to `summary.json`.

    The mean over categories is taken for each draw, then the mean and the spread over the draws, as few-shot papers
    do. The spread is the standard deviation of the draws (division by their number), not that of their mean.

    Args:
        system, dataset, protocol: facts, as they are.
        draws: in the order of the results.
        found: draw and category to the result of `evaluate_class`.
    """
    results = []
    for shots in dict.fromkeys(draw.shots for draw in draws):
        own = [draw for draw in draws if draw.shots == shots]
        by_category = {
            category: {name: _statistic([found[draw, category]["metrics"][name] for draw in own]) for name in METRICS}
            for category in categories
        }
        mean = {}
        for name in METRICS:
            # A category without masks must not remove draws from the means of the others.
            counted = [c for c in categories if all(value is not None for value in by_category[c][name]["values"])]
            values = [
                float(np.mean([found[draw, c]["metrics"][name] for c in counted])) if counted else None for draw in own
            ]
            mean[name] = _statistic(values) | {"categories": len(counted)}
        results.append({"shots": shots, "seeds": [draw.seed for draw in own], "categories": by_category, "mean": mean})
    return {"system": dict(system), "dataset": dict(dataset), "protocol": dict(protocol), "results": results}


def _error_rates(rows: Sequence[Mapping]) -> dict[str, float]:
    """Computes the shares of normal pictures above the threshold, and of defective ones not above it."""
    if any(row["threshold"] is None for row in rows):
        return {}
    alarms = [row["score"] > row["threshold"] for row in rows if not row["label"]]
    found = [row["score"] > row["threshold"] for row in rows if row["label"]]
    return {
        "false_alarms": float(np.mean(alarms)) if alarms else math.nan,
        "misses": 1 - float(np.mean(found)) if found else math.nan,
    }


def _statistic(values: Sequence[float | None]) -> dict:
    known = [value for value in values if value is not None]
    mean = float(np.mean(known)) if known else None
    spread = float(np.std(known)) if known else None
    return {"mean": _rounded(mean), "std": _rounded(spread), "values": [_rounded(value) for value in values]}


def _defined(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, DIGITS)
