"""`pipe.inpaint` alone: equality with diffusers, and what it refuses."""

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionInpaintPipeline,
)

from anomalysd_pipeline import AnomalySDPipeline
from anomalysd_pipeline.method.prompts import average_embedding

from .tiny import RESOLUTION, tiny_components, tiny_taesd, tiny_vae


def two_pictures(seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(2, 3, 8, 8, generator=generator) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=RESOLUTION, mode="bicubic").clamp(-1, 1)


def two_masks():
    masks = torch.zeros(2, 1, RESOLUTION, RESOLUTION)
    masks[0, :, 8:40, 16:48] = 1
    masks[1, :, 30:, :21] = 1
    return masks


def without_posterior_spread(vae: AutoencoderKL) -> AutoencoderKL:
    """diffusers samples the posterior; with a spread of e^-15 its sample is the mean."""
    with torch.no_grad():
        vae.quant_conv.weight[4:] = 0
        vae.quant_conv.bias[4:] = -30
    return vae


class TestInpaintEqualsDiffusers:
    """`pipe.inpaint` against diffusers' own inpainting pipeline: same weights, noise and strength."""

    @pytest.fixture(scope="class")
    @staticmethod
    def components():
        components = tiny_components(seed=3)
        without_posterior_spread(components["vae"])
        return components

    @pytest.mark.parametrize("strength", [0.2, 0.4, 0.6, 0.8, 1.0])
    @pytest.mark.parametrize("scheduler", [DDIMScheduler, DPMSolverMultistepScheduler])
    @pytest.mark.parametrize("guidance", [1.0, 4.0])
    def test_equal(self, components, scheduler, strength, guidance):
        self.compare(components, scheduler, strength, guidance)

    @pytest.mark.parametrize("strength", [0.4, 1.0])
    def test_with_euler(self, components, strength):
        self.compare(components, EulerDiscreteScheduler, strength)

    def test_with_lcm(self, components):
        """Whose last step alone draws no noise."""
        self.compare(components, LCMScheduler, 0.25, steps=4)

    def test_with_a_tiny_autoencoder(self, components):
        torch.manual_seed(0)
        self.compare({**components, "vae": tiny_taesd()}, LCMScheduler, 0.25, steps=4)

    @staticmethod
    def compare(components, scheduler, strength, guidance=1.0, steps=10):
        ours = AnomalySDPipeline(**{**components, "vae": tiny_vae()}, resolution=RESOLUTION)
        schedule = ours.scheduler = scheduler.from_config(ours.scheduler.config)
        ours.vae = components["vae"]
        theirs = StableDiffusionInpaintPipeline(
            **{k: components[k] for k in ("vae", "text_encoder", "tokenizer", "unet")},
            scheduler=type(schedule).from_config(schedule.config),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        theirs.set_progress_bar_config(disable=True)
        images, masks = two_pictures(), two_masks()
        with torch.no_grad():
            embeds = average_embedding(["a perfect nut.", "a nut."], ours.tokenizer, ours.text_encoder).repeat(2, 1, 1)
            negative = average_embedding([""], ours.tokenizer, ours.text_encoder).repeat(2, 1, 1)

        def generators():
            return [torch.Generator().manual_seed(seed) for seed in (1, 2)]

        # What diffusers draws: the noise from each generator after the posterior samples of the picture (unless the
        # strength is 1), so the same draws are made here in the same order.
        noise = []
        for generator in generators():
            if strength < 1 and isinstance(components["vae"], AutoencoderKL):
                torch.randn(1, 4, 16, 16, generator=generator)
            noise.append(torch.randn(1, 4, 16, 16, generator=generator))
        expected = theirs(
            image=(images + 1) / 2,
            mask_image=masks,
            prompt_embeds=embeds,
            negative_prompt_embeds=negative,
            strength=strength,
            num_inference_steps=steps,
            guidance_scale=guidance,
            height=RESOLUTION,
            width=RESOLUTION,
            generator=generators(),
            output_type="pt",
        ).images
        result = ours.inpaint(
            images,
            masks,
            embeds,
            noise_strength=strength,
            num_inference_steps=steps,
            noise=torch.cat(noise),
            guidance_scale=guidance,
            negative_prompt_embeds=negative,
        )
        assert result.dtype == torch.float32 and result.shape == images.shape
        assert expected.std() > 0.01  # a constant picture would be equal to anything constant
        torch.testing.assert_close((result + 1) / 2, expected, atol=1e-4, rtol=0)

    def test_strength_and_mask_matter(self, components):
        pipe = AnomalySDPipeline(**components, resolution=RESOLUTION)
        images = two_pictures()
        embeds = average_embedding(["a perfect nut."], pipe.tokenizer, pipe.text_encoder)
        results = [
            pipe.inpaint(images, masks, embeds, noise_strength=strength, num_inference_steps=10)
            for masks, strength in ((two_masks(), 0.2), (two_masks(), 0.8), (1 - two_masks(), 0.2))
        ]
        assert (results[0] - results[1]).abs().max() > 1e-3
        assert (results[0] - results[2]).abs().max() > 1e-3


def test_bad_shapes(tiny_pipeline):
    embeds = torch.zeros(1, 77, 32)
    good = {"images": two_pictures(), "masks": two_masks(), "prompt_embeds": embeds}
    for name, bad in (
        ("images", torch.zeros(2, 3, 63, 64)),
        ("masks", torch.zeros(2, 1, 32, 32)),
        ("noise", torch.zeros(2, 4, 8, 8)),
    ):
        with pytest.raises(ValueError, match=f"`{name}`"):
            tiny_pipeline.inpaint(**{**good, name: bad})
    with pytest.raises(ValueError, match="negative_prompt_embeds"):
        tiny_pipeline.inpaint(**good, guidance_scale=3.0)


def test_offloaded_weights_go_back_after_an_error_too(tiny_pipeline):
    class Failing(type(tiny_pipeline.vae)):
        def decode(self, latents, **kwargs):
            raise RuntimeError("broken")

    freed = []
    tiny_pipeline.maybe_free_model_hooks = lambda: freed.append(True)
    tiny_pipeline.vae.__class__ = Failing
    with pytest.raises(RuntimeError, match="broken"):
        tiny_pipeline.inpaint(two_pictures(), two_masks(), torch.zeros(1, 77, 32))
    assert freed == [True]
