"""The fixed evaluation of the embedded checkpoint: a few normal pictures of a part, then its test pictures.

    python -m scripts.evaluate_embedded --data FOLDER --categories cookies metal_plate --shots 4
    python -m scripts.evaluate_embedded --synthetic gear capsule perforated_sheet --shots 4 --seed 10

Prints image and pixel AUROC with `feature_weight` 0 and with the checkpoint's own. From folders in MVTec's layout the
first K files by name are the shots; synthetic parts are drawn by seed.
"""

import argparse
import dataclasses
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from anomalysd_pipeline import AnomalySDPipeline
from anomalysd_pipeline.data import load_image, to_tensor
from anomalysd_pipeline.datasets import draw_shots, load_mask, read_mvtec
from anomalysd_pipeline.detection import score_maps
from anomalysd_pipeline.images import resize
from anomalysd_pipeline.metrics import image_metrics, pixel_metrics
from anomalysd_pipeline.scoring import image_score, smooth, smoothing_sigma
from anomalysd_pipeline.synthetic import normal_images, test_samples


def from_folder(root: Path, category: str, shots: int, limit: int | None, seed: int | None = None):
    """Normal pictures (the first by name, or drawn by `seed`), and `(picture, label, mask or None)` of the test set,
    256 px each."""
    data = read_mvtec(root, category)
    chosen = sorted(data.train, key=lambda p: p.name)[:shots] if seed is None else draw_shots(data.train, shots, seed)
    normals = [load_image(p) for p in chosen]
    chosen = [t for label in (False, True) for t in [t for t in data.test if t.label == label][:limit]]
    tests = []
    for test in chosen:
        image = load_image(test.path).resize((256, 256), Image.Resampling.LANCZOS)
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


def evaluate(pipe, category, tests, settings):
    """Image and pixel AUROC of a registered category, at feature weight 0 and at the weight in `settings`, and the
    seconds per picture.

    The feature term is added to one map of each picture, fusion and smoothing being linear, rather than inspecting
    twice.
    """
    side = pipe.config.resolution
    without, features = [], []
    began = time.time()
    for image, _, _ in tests:
        x = to_tensor(image, side)[None]
        with torch.no_grad():
            maps, _, _ = score_maps(pipe, x, category, dataclasses.replace(settings, feature_weight=0.0), pipe.bank)
            far = resize(pipe.bank.distances(category, pipe.extractor(x)), (side, side))
        without.append(maps)
        features.append(smooth(far, smoothing_sigma(side)))
    seconds = (time.time() - began) / len(tests)
    without, features = torch.cat(without), torch.cat(features)
    labels = [label for _, label, _ in tests]
    masked = [index for index, (_, _, mask) in enumerate(tests) if mask is not None]
    rows = []
    for weight in (0.0, settings.feature_weight):
        maps = without + weight * features
        row = {"image": image_metrics(labels, image_score(maps).numpy())["auroc"], "pixel": float("nan")}
        if any(labels[index] for index in masked):
            truth, predicted = [tests[i][2] for i in masked], [maps[i].numpy() for i in masked]
            row["pixel"] = pixel_metrics(truth, predicted)["auroc"]
        rows.append(row)
    return rows, seconds


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
        rows, seconds = evaluate(pipe, category, tests, settings)
        cells = [f"{row['image']:.3f}/{row['pixel']:.3f}" for row in rows]
        print(f"{category:18} {cells[0]:>22} {cells[-1]:>22} {seconds:>10.2f}", flush=True)


if __name__ == "__main__":
    main()
