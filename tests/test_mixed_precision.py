"""Inspections in bfloat16, and the layout in memory that makes them fast."""

import numpy as np
import pytest
import torch
from PIL import Image

from anomalysd_pipeline.common.devices import autocast

from .conftest import make_tiny_pipeline
from .tiny import RESOLUTION

PICTURES = np.random.default_rng(0).random((3, RESOLUTION, RESOLUTION, 3), dtype=np.float32)


@pytest.fixture
def pipe():
    pipe = make_tiny_pipeline()
    pipe.add_category("nut", list(PICTURES[:2]))
    return pipe


def test_weights_of_convolutions_are_channels_last(pipe):
    for module in (pipe.unet, pipe.vae, pipe.perceptual):
        weights = [weight for weight in module.parameters() if weight.ndim == 4 and weight[0, 0].numel() > 1]
        assert weights
        assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)


def test_bfloat16_scores_are_close_but_not_the_same(pipe):
    exact = pipe(PICTURES[2], category="nut")
    pipe.mixed_precision = "bf16"
    rough = pipe(PICTURES[2], category="nut")
    assert rough.anomaly_maps.dtype == np.float32
    assert not np.array_equal(rough.anomaly_maps, exact.anomaly_maps)
    assert np.abs(rough.anomaly_maps - exact.anomaly_maps).mean() < 0.02 * exact.anomaly_maps.mean()


def test_prototypes_and_their_distances_stay_in_full_precision(pipe):
    def share_of_the_prototypes():
        with_it, without = (pipe(PICTURES[2], category="nut", feature_weight=weight) for weight in (1e3, 0.0))
        return with_it.anomaly_maps - without.anomaly_maps

    exact = share_of_the_prototypes()
    pipe.mixed_precision = "bf16"
    np.testing.assert_allclose(share_of_the_prototypes(), exact, rtol=1e-4, atol=1e-4 * exact.max())


def test_calibration_uses_it_too(pipe):
    pictures = [Image.fromarray((255 * picture).astype(np.uint8)) for picture in PICTURES[:2]]
    settings = {"mask_scales": (1,), "num_inference_steps": 4}
    pipe.add_category("nut", pictures)  # rounded, so that they are the pictures of the bank and no copies of them
    exact = pipe.calibrate("nut", pictures, **settings)
    pipe.mixed_precision = "bf16"
    rough = pipe.calibrate("nut", pictures, **settings)
    assert rough.scores != exact.scores
    assert rough.threshold == pytest.approx(exact.threshold, rel=0.1)


def test_no_leaves_the_type_of_the_weights():
    with autocast(torch.device("cpu"), "no"):
        assert not torch.is_autocast_enabled("cpu")
    with autocast(torch.device("cpu"), "bf16"):
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
