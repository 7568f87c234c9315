"""The block transform that autoencoders are measured against, and the table of the denoiser's choices."""

import json

import pytest
import scipy.fft
import torch

from anomalysd_pipeline.method.inpainting import decode, encode
from scripts.block_transform import COLOR_AXES, BlockTransform
from scripts.denoiser_choices import VARIANTS, Autoencoder, folder_of, last_evaluation, rows_of
from scripts.recipe import make_vae, seeded


@pytest.fixture
def pictures():
    coarse = torch.randn(3, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, size=48, mode="bicubic").clamp(-1, 1)


class TestBlockTransform:
    def test_coefficients_are_scipys(self, pictures):
        transform = BlockTransform(8, pictures)
        blocks = pictures.unflatten(3, (12, 4)).unflatten(2, (12, 4)).permute(0, 1, 2, 4, 3, 5)  # [n, 3, 12, 12, 4, 4]
        axes = torch.nn.functional.normalize(COLOR_AXES, dim=1)
        waves = torch.from_numpy(scipy.fft.dctn(blocks.numpy(), axes=(4, 5), norm="ortho"))
        found = torch.einsum("ac,ncxyuv->naxyuv", axes, waves)
        own = transform.latents(pictures) * transform.deviation + transform.mean
        # The means of light and both colors, then light alone.
        order = [(0, 0, 0), (1, 0, 0), (2, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (0, 0, 2), (0, 2, 0)]
        for channel, (axis, u, v) in enumerate(order):
            torch.testing.assert_close(own[:, channel], found[:, axis, :, :, u, v], atol=1e-5, rtol=1e-4)

    def test_latents_have_unit_variance_and_all_of_them_lose_nothing(self, pictures):
        transform = BlockTransform(48, pictures)
        latents = encode(transform, pictures)
        torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(48), atol=1e-4, rtol=0)
        torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(48), atol=1e-3, rtol=0)
        torch.testing.assert_close(decode(transform, latents), pictures, atol=1e-4, rtol=0)

    def test_more_coefficients_restore_more(self, pictures):
        errors = [
            (decode(t, encode(t, pictures)) - pictures).square().mean()
            for t in (BlockTransform(channels, pictures) for channels in (3, 4, 12, 30))
        ]
        assert errors == sorted(errors, reverse=True) and errors[-1] < 0.1 * errors[0]


class TestTable:
    def write(self, work, name, *lines):
        log = folder_of(work, name) / "denoiser-training" / "log.jsonl"
        log.parent.mkdir()
        log.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def test_has_the_rows_that_are_done(self, tmp_path, pictures):
        raw, averaged = {"raw_kept": 25.0, "raw_left": 0.5}, {"eval_kept": 26.125, "eval_left": 0.25}
        self.write(tmp_path, "as it is", {"step": 100, **averaged}, {"step": 200, **raw}, {"step": 200, **averaged})
        self.write(tmp_path, "half the width", {"step": 100, **raw}, {"step": 100, **averaged}, {"step": 150})
        self.write(tmp_path, "block transform, 12 coefficients", {"step": 200, **raw, **averaged})
        own, blocks = rows_of(tmp_path, 200, pictures)
        assert own[:5] == ["as it is", "26.12 dB", "25.0 %", "25.00 dB", "50.0 %"]
        transform = BlockTransform(12, pictures)
        error = (decode(transform, encode(transform, pictures)) - pictures).square().mean()
        assert blocks[0] == "block transform, 12 coefficients"
        assert blocks[5] == f"{10 * torch.log10(4 / error):.1f} dB"

    def test_measures_a_row_of_another_autoencoder_with_that(self, tmp_path, pictures):
        name = "- factor 8, 4 channels"
        vae = seeded(make_vae, 0, 8, 4).eval()
        vae.save_pretrained(folder_of(tmp_path, name) / "vae")
        measures = ("eval_kept", "eval_left", "raw_kept", "raw_left")
        self.write(tmp_path, name, {"step": 5, **dict.fromkeys(measures, 0.0)})
        (row,) = rows_of(tmp_path, 5, pictures)
        with torch.no_grad():
            error = (decode(vae, encode(vae, pictures)) - pictures).square().mean()
        assert row[0] == name and row[5] == f"{10 * torch.log10(4 / error):.1f} dB"

    def test_rows_share_pictures_and_autoencoder_and_nothing_else(self, tmp_path):
        folders = {name: folder_of(tmp_path, name) for name in VARIANTS}
        assert len(set(folders.values())) == len(VARIANTS)
        for name, folder in folders.items():
            assert last_evaluation(tmp_path, name, 200) is None
            own = isinstance(VARIANTS[name], Autoencoder)
            assert (folder / "vae" / "config.json").is_file() != own
            assert (folder / "vae-training").is_dir() == own
        assert folder_of(tmp_path, "as it is") == folders["as it is"]  # once more

    def test_rows_that_scale_the_same_latents_share_the_autoencoders_training(self, tmp_path):
        whitened, scaled, more = (
            (folder_of(tmp_path, name) / "vae-training").resolve()
            for name in (
                "autoencoder trained briefly, factor 4, 4 channels",
                "- latents of one scale, not whitened",
                "- 8 channels",
            )
        )
        assert whitened == scaled != more
