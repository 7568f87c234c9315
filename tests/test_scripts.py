"""The training of the embedded checkpoint: initial weights, whitening, masks, tokenizer, resuming."""

import argparse
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch

from scripts.loop import train
from scripts.pictures import TRAINED, Pool, draw_pool_picture
from scripts.recipe import make_vae, seeded
from scripts.tokenizer import LENGTH, make_tokenizer
from scripts.train_denoiser import draw_mask
from scripts.train_perceptual import balanced_loss, draw_pair
from scripts.train_vae import whiten


def flat_picture(color):
    return torch.tensor(color).view(1, 3, 1, 1).expand(1, 3, 64, 64).clone()


class TestAutoencoder:
    @pytest.mark.parametrize("color", [(0.6, -0.4, 0.1), (-0.5, 0.5, 0.0), (0.2, 0.2, 0.2)])
    @pytest.mark.parametrize(("factor", "channels"), [(4, 4), (4, 8), (2, 4), (8, 16)])
    def test_an_untrained_one_keeps_colors_apart(self, color, factor, channels):
        vae = seeded(make_vae, 0, factor, channels).eval()
        with torch.no_grad():
            latents = vae.encode(flat_picture(color)).latent_dist.mean
            assert latents.shape == (1, channels, 64 // factor, 64 // factor)
            restored = vae.decode(latents).sample
        torch.testing.assert_close(restored[0, :, 32, 32], torch.tensor(color), atol=0.3, rtol=0)
        order = restored[0, :, 32, 32].argsort()
        if len(set(color)) == 3:
            assert order.tolist() == torch.tensor(color).argsort().tolist()

    @pytest.mark.parametrize(("factor", "channels"), [(4, 4), (8, 6)])
    def test_whitening_changes_the_latents_and_nothing_else(self, factor, channels):
        vae = seeded(make_vae, 1, factor, channels).eval()
        images = torch.nn.functional.interpolate(torch.randn(4, 3, 8, 8).clamp(-1, 1), size=64, mode="bicubic")

        def latents():
            return vae.encode(images).latent_dist.mean.transpose(0, 1).flatten(1)

        with torch.no_grad():
            before, old = vae.decode(vae.encode(images).latent_dist.mean).sample, latents()
            whiten(vae, old)
            after, new = vae.decode(vae.encode(images).latent_dist.mean).sample, latents()
            torch.testing.assert_close(after, before, atol=1e-3, rtol=1e-3)
            assert not torch.allclose(new, old, atol=0.1)
            torch.testing.assert_close(torch.cov(new), torch.eye(channels), atol=1e-2, rtol=0)
            torch.testing.assert_close(new.mean(1), torch.zeros(channels), atol=1e-2, rtol=0)
            posterior = vae.encode(images).latent_dist
            assert (posterior.sample() - posterior.mean).abs().max() < 1e-5


def open_pool_often(folder, times=30):
    """Its pictures, as every one of many openings finds them."""
    pools = [Pool(folder, 250, seed=3, size=32).images for _ in range(times)]
    assert all(np.array_equal(pools[0], images) for images in pools)
    return pools[0]


class TestPictures:
    def test_the_pool_is_the_same_however_it_is_drawn(self, tmp_path):
        pool = Pool(tmp_path / "pool", 250, seed=3, size=32, workers=2)
        assert len(pool) == 250 and set(pool.families) <= {*TRAINED, "surface"}
        for index in (0, 17):
            assert np.array_equal(pool.images[index], draw_pool_picture(3, index, 32).image)
        again = Pool(tmp_path / "pool", 250, seed=3, size=32)
        assert np.array_equal(again.images, pool.images)
        with pytest.raises(ValueError, match="other settings"):
            Pool(tmp_path / "pool", 250, seed=4, size=32)

        images, foregrounds, names = pool.batch(np.random.default_rng(0), 6, crop=16, zoom_out=0.5)
        assert images.shape == (6, 3, 16, 16) and foregrounds.shape == (6, 1, 16, 16) and len(names) == 6
        assert images.min() >= -1 and images.max() <= 1 and images.std() > 0.05

    def test_several_commands_can_draw_and_open_one_pool_at_once(self, tmp_path):
        with ProcessPoolExecutor(3) as commands:
            first, *others = commands.map(open_pool_often, [tmp_path / "pool"] * 3)
        assert all(np.array_equal(first, images) for images in others)
        assert sorted(path.name for path in (tmp_path / "pool").iterdir()) == ["00000.npz", "pool.json"]

    def test_unseen_families_are_never_trained_on(self):
        from anomalysd_pipeline.synthetic import UNSEEN

        assert len(UNSEEN) >= 3 and not set(UNSEEN) & set(TRAINED)

    def test_pairs_mark_what_was_changed(self):
        rng = np.random.default_rng(0)
        defective = 0
        for _ in range(12):
            original, query, mask = draw_pair(rng)
            assert query.shape == original.shape == (128, 128, 3) and original.dtype == np.uint8
            assert np.array_equal(original[~mask], query[~mask])
            defective += mask.any()
        assert 5 <= defective <= 12


def test_masks_are_binary_and_never_empty():
    generator, rng = torch.Generator().manual_seed(0), np.random.default_rng(0)
    foreground = torch.zeros(128, 128, dtype=torch.bool)
    foreground[30:90, 40:100] = True
    masks = torch.stack([draw_mask(foreground, rng, generator) for _ in range(100)])
    assert masks.shape == (100, 1, 128, 128) and set(masks.unique().tolist()) == {0.0, 1.0}
    areas = masks.mean((1, 2, 3))
    assert areas.min() > 0 and areas.max() == 1 and areas.std() > 0.1


def test_tokenizer_encodes_any_word(tmp_path):
    tokenizer = make_tokenizer()
    ids = tokenizer(["A perfect bottle.", "Flänsche №7 – ∅ 25 mm"], padding="max_length").input_ids
    assert all(len(row) == LENGTH and max(row) < len(tokenizer) for row in ids)
    assert tokenizer.decode(ids[0], skip_special_tokens=True).replace(" ", "") == "aperfectbottle."
    assert "bottle</w>" in tokenizer.tokenize("A perfect bottle.")
    assert tokenizer.unk_token_id not in ids[1][1 : ids[1].index(tokenizer.eos_token_id)]


def test_balanced_loss_weighs_both_classes_alike():
    target = torch.zeros(1, 10, 10)
    target[0, 0, :5] = 1  # 5 %
    misses_all = balanced_loss(torch.full_like(target, -8.0), target).item()
    alarms_everywhere = balanced_loss(torch.full_like(target, 8.0), target).item()
    assert misses_all == pytest.approx(alarms_everywhere, rel=1e-3)


class TestLoop:
    def arguments(self, folder, steps):
        return argparse.Namespace(
            work=folder, steps=6, threads=0, mixed_precision="no", learning_rate=0.01, seed=0, evaluate_every=steps
        )

    def run(self, folder, stop_at=None, every=3):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 1)

        def loss_of(model, rng, step):
            if stop_at is not None and step == stop_at:
                raise KeyboardInterrupt
            x = torch.from_numpy(rng.normal(size=(8, 4)).astype(np.float32))
            return (model(x) - x.sum(1, keepdim=True)).square().mean(), {}

        return train("stage", model, loss_of, lambda model: {}, self.arguments(folder, every)).state_dict()

    def test_a_resumed_run_ends_with_the_same_weights(self, tmp_path):
        expected = self.run(tmp_path / "whole")
        with pytest.raises(KeyboardInterrupt):
            self.run(tmp_path / "cut", stop_at=5)
        resumed = self.run(tmp_path / "cut")
        assert all(torch.equal(resumed[key], expected[key]) for key in expected)
