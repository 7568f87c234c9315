"""The fixed evaluation of the embedded checkpoint: a few normal pictures of a part, then its test pictures.

    python -m scripts.evaluate_embedded --data FOLDER --categories cookies metal_plate --shots 4
    python -m scripts.evaluate_embedded --synthetic gear capsule perforated_sheet --shots 4 --seed 10

Prints image and pixel AUROC with `feature_weight` 0 and with the checkpoint's own. From folders in MVTec's layout the
first K files by name are the shots; synthetic parts are drawn by seed.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from anomalysd_pipeline import AnomalySDPipeline
from anomalysd_pipeline.data.datasets import draw_shots, load_mask, read_mvtec
from anomalysd_pipeline.data.images import load_image
from anomalysd_pipeline.data.tensors import resize
from anomalysd_pipeline.evaluation.metrics import image_metrics, pixel_metrics
from anomalysd_pipeline.method.scoring import image_score, smooth, smoothing_sigma
from anomalysd_pipeline.synthetic import normal_images, test_samples


def from_folder(root: Path, category: str, shots: int, limit: int | None, seed: int | None = None):
    """Normal pictures (the first by name, or drawn by `seed`), and `(picture, label, mask or None)` of the test set,
    masks of 256 px."""
    data = read_mvtec(root, category)
    chosen = sorted(data.train, key=lambda p: p.name)[:shots] if seed is None else draw_shots(data.train, shots, seed)
    normals = [load_image(p) for p in chosen]
    chosen = [t for label in (False, True) for t in [t for t in data.test if t.label == label][:limit]]
    tests = []
    for test in chosen:
        image = load_image(test.path)
        mask = np.zeros((256, 256), bool) if not test.label else None
        if test.mask_path:
            mask = load_mask(test.mask_path, 256)
        tests.append((image, test.label, mask))
    return normals, tests


def drawn(family: str, shots: int, seed: int, limit: int | None):
    """The same for a drawn part."""
    count = limit or 12
    samples = test_samples(family, count, count, seed)
    return normal_images(family, shots, seed), [
        (Image.fromarray(s.image), s.defect is not None, s.mask) for s in samples
    ]


@torch.no_grad()
def evaluate(pipe, category, tests, settings):
    """What a registered category is judged by, each way of scoring, and the seconds per picture.

    Returns:
        "paper" (the paper's score), "features" (the prototype distance alone) and "fused" (both, as `settings` say),
        each with the figures of `judge`; all from one inspection of each picture.
    """
    found = {"paper": [], "features": [], "fused": []}
    began = time.time()
    for image, _, _ in tests:
        seen = pipe._score_maps(pipe._inputs([image]), category, settings)
        found["paper"].append(seen.fused(settings.prototype_weight, 0.0))
        found["features"].append(smooth(seen.deviations, smoothing_sigma(seen.deviations.shape[-1])))
        found["fused"].append(seen.fused(settings.prototype_weight, settings.feature_weight))
    seconds = (time.time() - began) / len(tests)
    scored = {name: torch.cat([resize(m, (256, 256)) for m in maps]) for name, maps in found.items()}
    shares = {"paper": 0.0, "features": settings.top_share, "fused": settings.top_share}
    return {name: judge(maps, image_score(maps, shares[name]), tests) for name, maps in scored.items()}, seconds


def judge(maps, scores, tests) -> dict[str, float]:
    """Image AUROC of scores `[N]`, pixel AUROC and PRO of maps `[N, H, W]`; NaN where nothing has a mask."""
    labels = [label for _, label, _ in tests]
    figures = {"image": image_metrics(labels, np.asarray(scores))["auroc"], "pixel": float("nan"), "pro": float("nan")}
    masked = [index for index, (_, _, mask) in enumerate(tests) if mask is not None]
    if any(labels[index] for index in masked):
        found = pixel_metrics([tests[i][2] for i in masked], [np.asarray(maps[i]) for i in masked])
        figures |= {"pixel": found["auroc"], "pro": found["pro"]}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="folder of a pipeline; default: the embedded checkpoint")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--categories", nargs="*", default=[])
    parser.add_argument("--synthetic", nargs="*", default=[])
    parser.add_argument("--shots", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, default=None, help="test pictures of each label")
    parser.add_argument("--preset", default=None)
    parser.add_argument("--noise_strength", type=float, default=None)
    parser.add_argument("--num_inference_steps", type=int, default=None)
    parser.add_argument("--feature_weight", type=float, default=None, help="of the second column; default: its own")
    parser.add_argument("--threads", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    pipe = AnomalySDPipeline.from_pretrained(arguments.model)
    pipe.set_progress_bar_config(disable=True)
    names = ("preset", "noise_strength", "num_inference_steps", "feature_weight")
    settings = pipe.settings(**{name: getattr(arguments, name) for name in names})
    print(settings)
    jobs = [(c, from_folder(arguments.data, c, arguments.shots, arguments.limit)) for c in arguments.categories]
    jobs += [(f, drawn(f, arguments.shots, arguments.seed, arguments.limit)) for f in arguments.synthetic]
    print(f"{'category':18} {'image/pixel, weight 0':>22} {'with feature_weight':>22} {'s/picture':>10}")
    for category, (normals, tests) in jobs:
        pipe.add_category(category, normals)
        figures, seconds = evaluate(pipe, category, tests, settings)
        cells = [f"{own['image']:.3f}/{own['pixel']:.3f}" for own in (figures["paper"], figures["fused"])]
        print(f"{category:18} {cells[0]:>22} {cells[1]:>22} {seconds:>10.2f}", flush=True)


if __name__ == "__main__":
    main()
