"""Measure time and memory of all pixel metrics and their curves over a class of pictures.

    python benchmarks/metrics.py [--pictures 160] [--side 1024] [--share 0.02] [--levels 256] [--compare]

Draws a seeded class, every second picture with defects, and hands masks and float32 maps over one at a time, as a
reader of files would. The seconds exclude the drawing. The peak memory is the whole process's: interpreter, libraries,
the picture being drawn and all that the metrics keep. `--share` is the share of defective pixels; `--levels` rounds
the scores to about so many different ones, so that there are ties. `--compare` then also measures a class of
`--compare-pictures` of the same side, for which scikit-learn from single pixels instead of groups, and anomalib if
installed, compute the same figures.
"""

import argparse
import resource
import time
from collections import deque
from collections.abc import Iterator

import numpy as np
from scipy import ndimage

from anomalysd_pipeline.evaluation.curves import pixel_metrics_and_curves

FIGURES = ("auroc", "aupr", "f1_max", "pro")


class Class:
    """Draws pictures as they are asked for, and measures how long drawing takes."""

    def __init__(self, pictures: int, side: int, share: float, levels: int, seed: int):
        self.pictures, self.side, self.share, self.levels, self.seed = pictures, side, share, levels, seed
        self.seconds = 0.0

    def __iter__(self):
        for index in range(self.pictures):
            began = time.perf_counter()
            picture = self.draw(index)
            self.seconds += time.perf_counter() - began
            yield picture

    def draw(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Draws a mask of several blobs and a map of noise that is higher in the blobs."""
        rng = np.random.default_rng([self.seed, index])
        mask = np.zeros((self.side, self.side), bool)
        if index % 2:
            coarse = ndimage.zoom(rng.standard_normal((16, 16), np.float32), self.side / 16, order=1)
            mask = coarse >= np.quantile(coarse, 1 - min(2 * self.share, 1))
        scores = rng.standard_normal(mask.shape, np.float32) + 2 * mask.astype(np.float32)
        if self.levels:
            scores = np.round(scores * (self.levels / 8)) / np.float32(self.levels / 8)
        return mask, scores


def apart(drawn: Class) -> tuple[Iterator[np.ndarray], Iterator[np.ndarray]]:
    """Splits the pictures into masks and maps; `itertools.tee` would hold on to dozens of them."""
    waiting = deque()

    def masks():
        for mask, anomaly_map in drawn:
            waiting.append(anomaly_map)
            yield mask

    def maps():
        while waiting:
            yield waiting.popleft()

    return masks(), maps()


def ours(drawn: Class) -> tuple[dict, dict, float]:
    """Computes metrics and curves, and the seconds that they took."""
    began = time.perf_counter()
    metrics, curves = pixel_metrics_and_curves(*apart(drawn))
    return metrics, curves, time.perf_counter() - began - drawn.seconds


def scikit_learn(masks: list, maps: list) -> tuple[dict, float]:
    from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

    began = time.perf_counter()
    labels = np.concatenate([mask.ravel() for mask in masks])
    scores = np.concatenate([anomaly_map.ravel() for anomaly_map in maps])
    precision, recall, _ = precision_recall_curve(labels, scores)
    f1 = np.max(2 * precision * recall / np.maximum(precision + recall, 1e-12))
    figures = {
        "auroc": roc_auc_score(labels, scores),
        "aupr": average_precision_score(labels, scores),
        "f1_max": f1,
    }
    return figures, time.perf_counter() - began


def anomalib(masks: list, maps: list) -> tuple[dict, float] | None:
    try:
        import torch
        from anomalib.data import ImageBatch
        from anomalib.metrics import AUPRO
    except ImportError:
        return None
    maps, masks = torch.from_numpy(np.stack(maps)), torch.from_numpy(np.stack(masks))
    batch = ImageBatch(image=torch.zeros(len(maps), 3, 1, 1), anomaly_map=maps, gt_mask=masks)
    began = time.perf_counter()
    metric = AUPRO(fields=["anomaly_map", "gt_mask"], fpr_limit=0.3)
    metric.update(batch)
    return {"pro": float(metric.compute())}, time.perf_counter() - began


def line(name: str, figures: dict, seconds: float) -> str:
    cells = [f"{figures[figure]:.7f}" if figure in figures else "-" for figure in FIGURES]
    return "".join(f"{cell:<14}" for cell in (name, *cells, f"{seconds:.2f}"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=160)
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--share", type=float, default=0.02, help="of all pixels, at most 0.5; default: %(default)s")
    parser.add_argument("--levels", type=int, default=0, help="default: scores as they are drawn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--compare-pictures", type=int, default=8)
    arguments = parser.parse_args()

    drawn = Class(arguments.pictures, arguments.side, arguments.share, arguments.levels, arguments.seed)
    metrics, curves, seconds = ours(drawn)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{arguments.pictures} pictures of {arguments.side} x {arguments.side}, seed {arguments.seed}")
    print("   ".join(f"{name} {value:.6f}" for name, value in metrics.items()))
    print("points   " + "   ".join(f"{name} {curve.shape[1]}" for name, curve in curves.items()))
    print(f"metrics and curves   {seconds:.1f} s, and {drawn.seconds:.1f} s for drawing the pictures")
    print(f"peak memory          {peak:.0f} MiB")
    if arguments.compare:
        few = Class(arguments.compare_pictures, arguments.side, arguments.share, arguments.levels, arguments.seed)
        masks, maps = map(list, zip(*few, strict=True))
        few.seconds = 0.0
        print(f"\n{few.pictures} pictures" + " " * 4 + "".join(f"{name:<14}" for name in (*FIGURES, "seconds")))
        metrics, _, seconds = ours(few)
        print(line("ours", metrics, seconds))
        print(line("scikit-learn", *scikit_learn(masks, maps)))
        theirs = anomalib(masks, maps)
        print(line("anomalib", *theirs) if theirs else "anomalib is not installed.")


if __name__ == "__main__":
    main()
