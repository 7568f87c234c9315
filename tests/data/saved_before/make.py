"""Writes this folder with the package as it was at commit 82dc530, before its modules were sorted into folders.

In a checkout of that commit, with its requirements installed:

    PYTHONPATH=. OMP_NUM_THREADS=1 python make.py OUT
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from anomalysd_pipeline.prototypes import PrototypeExtractor
from anomalysd_pipeline.publishing import export
from anomalysd_pipeline.synthetic import normal_images, test_samples
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from tests.conftest import make_tiny_pipeline

CELLS = 8


def small_networks() -> dict:
    """The large ones of `tests.tiny`, at a third of their size."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=9,
        out_channels=4,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=0.5,
    )
    extractor = PrototypeExtractor("test_efficientnet", (2,), normalize="layer")
    return {"unet": unet.eval(), "vae": vae.eval(), "extractor": extractor}


def found(pipe, category: str, picture: Path) -> dict:
    """What an inspection says: score, threshold, and the means of the map's 8 x 8 cells; also by the paper's score."""
    output = pipe(Image.open(picture), category=category)
    paper = pipe(Image.open(picture), category=category, feature_weight=0.0)
    cells, of_paper = (
        o.anomaly_maps[0].reshape(CELLS, 64 // CELLS, CELLS, 64 // CELLS).mean((1, 3)) for o in (output, paper)
    )
    return {
        "category": category,
        "picture": picture.name,
        "score": float(output.pred_scores[0]),
        "label": output.pred_labels[0],
        "threshold": output.thresholds[0],
        "cells": np.round(cells.astype(float), 8).tolist(),
        "paper": {"score": float(paper.pred_scores[0]), "cells": np.round(of_paper.astype(float), 8).tolist()},
    }


def main() -> None:
    out = Path(sys.argv[1])
    pipe = make_tiny_pipeline(**small_networks(), rotations=1, feature_weight=1.0)
    nuts, gears = (normal_images(family, 3, seed=5, size=64) for family in ("hex_nut", "gear"))
    pipe.add_category("hex nut", nuts, prompts=["A perfect nut.", "{name} with six sides"])
    pipe.calibrate("hex nut", nuts)
    short = {"steps": 4, "decoder_steps": 2, "train_batch_size": 2, "rank": 2, "decoder_rank": 2}
    pipe.adapt({"gear": gears}, name="gears", method="lora", learning_rate=0.02, mixed_precision="no", **short)
    export(pipe, out / "published", repo_id="user/nuts")
    pipe.save_adaptation(out / "adaptation", "gears")
    pictures = []
    for category, family in (("hex nut", "hex_nut"), ("gear", "gear")):
        for kind, sample in zip(("good", "defective"), test_samples(family, 1, 1, seed=5, size=64), strict=True):
            pictures.append((category, out / f"{family}_{kind}.png"))
            Image.fromarray(sample.image).save(pictures[-1][1])
    expected = [found(pipe, category, path) for category, path in pictures]
    (out / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
