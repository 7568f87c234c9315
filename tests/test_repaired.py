"""How distances to the prototypes are weighed by what the repainting does to them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import uniform_filter

from anomalysd_pipeline.data.tensors import augment, to_tensor
from anomalysd_pipeline.method.calibration import MIN_SCORES, VARIATION
from anomalysd_pipeline.method.deviations import (
    REMAINING_LIMIT,
    REMAINING_WEIGHT,
    REPAIRED_WEIGHT,
    repaired_share,
    weigh,
)
from anomalysd_pipeline.method.prompts import average_embedding
from anomalysd_pipeline.method.scoring import image_score
from anomalysd_pipeline.models.bank import PrototypeBank
from anomalysd_pipeline.synthetic import normal_images

from .conftest import make_tiny_pipeline
from .tiny import RESOLUTION


def vectors(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def distances(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def bank():
    bank = PrototypeBank()
    bank.add("nut", vectors(30, 4), sources=torch.arange(30) % 3)
    return bank


@pytest.mark.parametrize(("side", "width"), [(4, 3), (8, 3), (32, 7), (64, 13)])
def test_share_is_that_of_averages_over_a_window(side, width):
    before, after = distances(2, side, side, seed=1), 0.9 * distances(2, side, side, seed=2) ** 1.2
    averages = [
        np.stack([uniform_filter(m, width, mode="constant") for m in maps.double().numpy()])
        for maps in (before, after)
    ]
    expected = np.maximum(1 - averages[1] / averages[0], 0)
    np.testing.assert_allclose(repaired_share(before, after), expected, rtol=1e-4, atol=1e-5)
    assert (expected > 0).mean() > 0


def test_nothing_is_repaired_where_nothing_was():
    share = repaired_share(torch.zeros(1, 16, 16), distances(1, 16, 16))
    assert torch.equal(share, torch.zeros(1, 16, 16))


def test_what_is_wholly_repaired_counts_as_much_more_as_the_weight():
    found, zeros = distances(1, 16, 16), torch.zeros(1, 16, 16)
    torch.testing.assert_close(weigh(found, found, zeros, zeros), (1 + REPAIRED_WEIGHT) * found)
    torch.testing.assert_close(weigh(found, found, zeros, found), found)


def test_deviations_are_weighed(bank):
    psi, repainted, restored = (vectors(2, 4, 6, 6, seed=seed) for seed in (1, 2, 3))
    before = bank.deviations("nut", psi).numpy()
    original, left, after = (bank.relative_distances("nut", f) for f in (psi, repainted, restored))
    raised = before * (1 + REPAIRED_WEIGHT * repaired_share(original, after).numpy())
    expected = np.maximum(raised - REMAINING_WEIGHT * np.minimum(left.numpy(), REMAINING_LIMIT), 0)
    found = bank.deviations("nut", psi, (repainted, restored)).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert (found > before).any() and (found < before).any()


def test_a_repainting_that_is_odd_everywhere_changes_no_order(bank):
    psi, odd = 2 * vectors(2, 4, 3, 3, seed=1), 100 + vectors(2, 4, 3, 3, seed=2)
    before, found = bank.deviations("nut", psi), bank.deviations("nut", psi, (odd, odd))
    off = (before - found)[found > 0]
    torch.testing.assert_close(off, torch.full_like(off, REMAINING_WEIGHT * REMAINING_LIMIT))


def test_features_of_another_length_are_refused(bank):
    psi, short = vectors(1, 4, 3, 3), vectors(1, 3, 3, 3)
    for repainted in ((psi, short), (short, psi)):
        with pytest.raises(ValueError, match="psi"):
            bank.deviations("nut", psi, repainted)


@pytest.fixture
def adapted():
    """A pipeline fine-tuned to "nut" alone, and a picture of something else: repainted, it is closer to nuts."""
    nuts = normal_images("hex_nut", 3, seed=5, size=RESOLUTION)
    pipe = make_tiny_pipeline(
        preset_overrides={"fast": {"num_inference_steps": 3, "mask_scales": [1]}}, rotations=1, feature_weight=0.5
    )
    pipe.add_category("other", nuts)
    options = {"steps": 1, "decoder_steps": 1, "train_batch_size": 1, "rank": 2, "decoder_rank": 2}
    pipe.adapt({"nut": nuts[:2]}, calibrate=False, **options)
    return pipe, normal_images("wood", 1, seed=1, size=RESOLUTION)[0]


def test_counts_in_parts_that_the_model_was_fine_tuned_to(adapted):
    pipe, wood = adapted
    maps = {}
    for known in (False, True):
        pipe._store_category("nut", adapted=known)
        maps[known] = pipe(wood, category="nut").anomaly_maps[0]
    assert (maps[True] != maps[False]).any()
    assert not pipe.config.categories["other"]["adapted"]


@torch.no_grad()
def test_what_the_autoencoder_loses_is_put_back(adapted):
    pipe, wood = adapted
    x, settings = to_tensor(wood, RESOLUTION)[None], pipe.settings(category="nut")
    found = pipe._score_maps(x, "nut", settings, pipe.bank, generator=torch.Generator().manual_seed(1)).deviations

    # One mask, of everything: diffusers' own modules, and the noise that the generator gives first.
    z = pipe.vae.encode(x).latent_dist.mean
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(1))
    embeds = average_embedding(pipe.prompt_book.prompts("nut"), pipe.tokenizer, pipe.text_encoder)
    repainted = pipe.inpaint(
        x,
        torch.ones(1, 1, RESOLUTION, RESOLUTION),
        embeds,
        noise_strength=settings.noise_strength,
        num_inference_steps=settings.num_inference_steps,
        noise=noise,
    )
    restored = repainted + x - pipe.vae.decode(z).sample.clamp(-1, 1)
    features = [pipe.extractor(picture) for picture in (x, repainted, restored.clamp(-1, 1))]
    expected, without = (
        F.interpolate(
            pipe.bank.deviations("nut", features[0], (features[1], after))[:, None],
            (RESOLUTION, RESOLUTION),
            mode="bilinear",
        )[:, 0]
        for after in (features[2], features[1])
    )
    torch.testing.assert_close(found, expected, rtol=5e-3, atol=1e-3)
    assert (found / without - 1).abs().max() > 0.05


def test_thresholds_are_found_with_the_score_of_inspections(adapted):
    """A single picture is calibrated by augmented copies, compared with the bank that inspections use."""
    pipe, _ = adapted
    nut = normal_images("hex_nut", 1, seed=6, size=RESOLUTION)[0]
    found = pipe.calibrate("nut", [nut])
    x, generator = to_tensor(nut, RESOLUTION), torch.Generator().manual_seed(0)
    copies = torch.stack([augment(x, generator, **VARIATION) for _ in range(MIN_SCORES)])
    settings = pipe.settings(category="nut")
    maps = pipe._score_maps(copies, "nut", settings, pipe.bank)
    inspected = image_score(maps.fused(settings.prototype_weight, settings.feature_weight))
    assert found.scores == inspected.tolist()
    pipe._store_category("nut", adapted=False)
    assert found.scores != pipe.calibrate("nut", [nut]).scores
