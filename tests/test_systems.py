"""From the options of an evaluation to what is evaluated."""

import argparse

import pytest
import torch

from anomalysd_pipeline.common.devices import resolve_precision
from anomalysd_pipeline.evaluation.options import add_arguments
from anomalysd_pipeline.evaluation.store import Draw
from anomalysd_pipeline.evaluation.system import AnomalySDDetector
from anomalysd_pipeline.evaluation.systems import IMAGENET_LEVELS, make_system, needs_new_system
from anomalysd_pipeline.synthetic import normal_images

from .tiny_adaptations import pictures, quick_pipeline


def options(*given):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(["--synthetic", "ring", "--out", "x", *given])


def system(*given):
    return make_system(options(*given), Draw(1, 0), torch.device("cpu"))


def test_settings_of_an_inspection_reach_the_pipeline():
    facts = system(
        "--resolution", "64", "--mask_scales", "1", "--feature_weight", "0.5", "--noise_strength", "1"
    ).describe()
    assert (facts["model_resolution"], facts["mask_scales"]) == (64, [1])
    assert (facts["feature_weight"], facts["noise_strength"]) == (0.5, 1.0)


def test_mixed_precision_reaches_the_pipeline():
    assert system("--mixed_precision", "bf16").pipe.mixed_precision == "bf16"
    assert system().pipe.mixed_precision == resolve_precision("auto", torch.device("cpu"))
    assert system("--mixed_precision", "no").pipe.mixed_precision == "no"


def test_options_of_draem_reach_it():
    pytest.importorskip("anomalib")
    given = "--peer", "draem", "--draem_steps", "7", "--draem_resolution", "64"
    facts = system(*given, "--mixed_precision", "bf16").describe()
    assert (facts["steps"], facts["resolution"], facts["mixed_precision"]) == (7, 64, "bf16")
    assert system(*given, "--mixed_precision", "fp16").describe()["mixed_precision"] == "no"


def test_imagenet_features_take_the_place_of_the_checkpoints():
    detector = system("--timm_model", "imagenet", "--resolution", "64")
    config = detector.pipe.extractor.config
    assert (config.model_name, tuple(config.out_indices)) == ("tf_efficientnet_lite2", IMAGENET_LEVELS)
    pictures = normal_images("ring", 2, 0, size=64)
    detector.fit("ring", pictures[:1], 0)
    assert detector.pipe.bank["ring"].shape[1] == sum(detector.pipe.extractor.model.feature_info.channels())
    assert detector.predict("ring", pictures[0]).score < detector.predict("ring", pictures[1]).score


def test_names_with_placeholders_are_loaded_for_each_draw():
    first, second = Draw(1, 0), Draw(1, 1)
    assert needs_new_system(options("--base", "runs/k{shots}-s{seed}"), first, second)
    assert needs_new_system(options("--adaptation", "runs/{seed}"), first, second)
    assert not needs_new_system(options("--base", "runs/k{shots}"), first, second)
    assert not needs_new_system(options("--peer", "color_patches", "--base", "runs/{seed}"), first, second)


def test_adapting_counts_its_steps_and_the_calibration_of_each_part():
    told = []
    detector = AnomalySDDetector(quick_pipeline(), adaptation={"steps": 2, "decoder_steps": 1})
    normals = {part: pictures(part) for part in ("nut", "ring")}
    detector.adapt(normals, 0, lambda stage, step, steps, note="": told.append((stage, step, steps)))
    stages = [("denoiser", 2), ("decoder", 1), ("calibrating nut", 2), ("calibrating ring", 2)]
    assert told == [(stage, step, steps) for stage, steps in stages for step in range(1, steps + 1)]
