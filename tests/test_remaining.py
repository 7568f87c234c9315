"""What the repainting leaves as far from the prototypes as a normal part may be."""

import numpy as np
import pytest
import torch

from anomalysd_pipeline.prototypes import REPAINTED_LIMIT, REPAINTED_WEIGHT, PrototypeBank
from anomalysd_pipeline.synthetic import normal_images

from .conftest import make_tiny_pipeline
from .tiny import RESOLUTION


def vectors(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def bank():
    bank = PrototypeBank()
    bank.add("nut", vectors(30, 4), sources=torch.arange(30) % 3)
    return bank


def test_is_taken_off(bank):
    psi, repainted = vectors(2, 4, 3, 3, seed=1), vectors(2, 4, 3, 3, seed=2)
    before, left = bank.deviations("nut", psi).numpy(), bank.relative_distances("nut", repainted).numpy()
    found = bank.deviations("nut", psi, repainted).numpy()
    expected = np.maximum(before - REPAINTED_WEIGHT * np.minimum(left, REPAINTED_LIMIT), 0)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert 0 < (found == 0).mean() < 1 and 0 < (left > REPAINTED_LIMIT).mean() < 1


def test_a_repainting_that_is_odd_everywhere_changes_no_order(bank):
    psi = 2 * vectors(2, 4, 3, 3, seed=1)
    before, found = bank.deviations("nut", psi), bank.deviations("nut", psi, 100 + vectors(2, 4, 3, 3, seed=2))
    off = (before - found)[found > 0]
    torch.testing.assert_close(off, torch.full_like(off, REPAINTED_WEIGHT * REPAINTED_LIMIT))


def test_features_of_another_length_are_refused(bank):
    with pytest.raises(ValueError, match="psi"):
        bank.deviations("nut", vectors(1, 4, 3, 3), vectors(1, 3, 3, 3))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_counts_in_parts_that_the_model_was_fine_tuned_to(method):
    nuts = normal_images("hex_nut", 3, seed=5, size=RESOLUTION)
    pipe = make_tiny_pipeline(
        preset_overrides={"fast": {"num_inference_steps": 3, "mask_scales": [1, 2]}}, rotations=1, feature_weight=0.5
    )
    pipe.add_category("other", nuts)
    options = {"steps": 1, "decoder_steps": 1, "train_batch_size": 1, "rank": 2, "decoder_rank": 2}
    pipe.adapt({"nut": nuts[:2]}, method=method, calibrate=False, **options)
    maps = {}
    for adapted in (False, True):
        pipe._store_category("nut", adapted=adapted)
        maps[adapted] = pipe(nuts[2], category="nut").anomaly_maps[0]
    assert (maps[True] <= maps[False]).all() and (maps[True] < maps[False]).any()
    assert not pipe.config.categories["other"]["adapted"]
