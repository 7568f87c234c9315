import copy

import lpips
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionInpaintPipeline

from anomalysd_pipeline.adaptation.loop import make_stages
from anomalysd_pipeline.adaptation.losses import Decoder, clean_latents, decoder_loss, noisy_latents, repainting_loss
from anomalysd_pipeline.adaptation.samples import FewShotDataset
from anomalysd_pipeline.method.prompts import encode_prompts
from anomalysd_pipeline.models.perceptual import PerceptualDistance

from .tiny import RESOLUTION, ddim, tiny_taesd, tiny_vae
from .tiny_training import tiny_settings, train


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batch(n=3):
    """Pictures, masks whose borders lie between the latent grid's, noise and timesteps from end to end."""
    images = numbers(n, 3, RESOLUTION, RESOLUTION).clamp(-1, 1)
    masks = (numbers(n, 1, RESOLUTION, RESOLUTION, seed=1) > 0.3).float()
    noise = numbers(n, 4, RESOLUTION // 4, RESOLUTION // 4, seed=2)
    return images, masks, noise, torch.tensor([0, 400, 999])[:n]


def latents_of(vae, images):
    with torch.no_grad():
        return vae.encode(images).latent_dist.mode() * vae.config.scaling_factor


def coefficients(timesteps):
    """sqrt(alpha bar) and sqrt(1 - alpha bar) of the tiny scheduler, in NumPy and float64, `[N, 1, 1, 1]`."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    kept = np.cumprod(1 - betas)[timesteps.numpy()].reshape(-1, 1, 1, 1)
    return np.sqrt(kept), np.sqrt(1 - kept)


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return tiny_vae()


@pytest.fixture(scope="module")
def reference():
    torch.manual_seed(0)
    # `pnet_rand` keeps AlexNet random (no download); the layer weights are the real ones of the package.
    return lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)


class TestNoisyLatents:
    def test_input_is_noisy_latents_mask_and_masked_latents(self, vae):
        images, masks, noise, timesteps = batch()
        sample, _ = noisy_latents(vae, ddim(), images, masks, noise, timesteps)
        assert sample.dtype == torch.float32 and sample.shape == (3, 9, 16, 16)
        signal, spread = coefficients(timesteps)
        noisy = signal * latents_of(vae, images).numpy() + spread * noise.numpy()
        np.testing.assert_allclose(sample[:, :4], noisy, atol=1e-5)
        np.testing.assert_array_equal(sample[:, 4:5], masks[:, :, ::4, ::4])
        visible = torch.where(masks < 0.5, images, 0.0)
        np.testing.assert_allclose(sample[:, 5:], latents_of(vae, visible), atol=1e-5)

    def test_mask_and_masked_latents_equal_those_of_diffusers(self, tiny_pipeline):
        images, masks, noise, timesteps = batch()
        vae = tiny_pipeline.vae
        with torch.no_grad():
            # diffusers draws from the posterior; without spread a draw is the mean.
            vae.quant_conv.weight[4:] = 0
            vae.quant_conv.bias[4:] = -30
        parts = {
            name: getattr(tiny_pipeline, name) for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
        }
        theirs = StableDiffusionInpaintPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
        with torch.no_grad():
            mask, masked = theirs.prepare_mask_latents(
                masks, images * (masks < 0.5), 3, RESOLUTION, RESOLUTION, torch.float32, "cpu", None, False
            )
        sample, _ = noisy_latents(vae, ddim(), images, masks, noise, timesteps)
        assert torch.equal(sample[:, 4:5], mask)
        torch.testing.assert_close(sample[:, 5:], masked, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
    def test_target_follows_the_scheduler(self, vae, prediction_type):
        images, masks, noise, timesteps = batch()
        scheduler = DDIMScheduler.from_config(ddim().config, prediction_type=prediction_type)
        _, target = noisy_latents(vae, scheduler, images, masks, noise, timesteps)
        latents, (signal, spread) = latents_of(vae, images).numpy(), coefficients(timesteps)
        expected = {
            "epsilon": noise.numpy(),
            "v_prediction": signal * noise.numpy() - spread * latents,
            "sample": latents,
        }
        np.testing.assert_allclose(target, expected[prediction_type], atol=1e-5)

    @pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
    def test_what_is_shown_is_led_back_to_the_picture_inside_the_masks(self, vae, prediction_type):
        images, masks, noise, timesteps = batch()
        shown = numbers(3, 3, RESOLUTION, RESOLUTION, seed=3).clamp(-1, 1)
        scheduler = DDIMScheduler.from_config(ddim().config, prediction_type=prediction_type)
        sample, target = noisy_latents(vae, scheduler, images, masks, noise, timesteps, shown)
        signal, spread = coefficients(timesteps)
        noisy = signal * latents_of(vae, shown).numpy() + spread * noise.numpy()
        np.testing.assert_allclose(sample[:, :4], noisy, atol=1e-5)
        np.testing.assert_allclose(sample[:, 5:], latents_of(vae, torch.where(masks < 0.5, shown, 0.0)), atol=1e-5)
        wanted = latents_of(vae, masks * images + (1 - masks) * shown).numpy()
        epsilon = (noisy - signal * wanted) / spread
        expected = {"epsilon": epsilon, "v_prediction": signal * epsilon - spread * wanted, "sample": wanted}
        # At t = 0 the noise is 3 % of the latents, and rounding 30 times as large.
        np.testing.assert_allclose(target, expected[prediction_type], atol=1e-3)

    def test_another_prediction_type(self, vae):
        scheduler = DDIMScheduler.from_config(ddim().config, prediction_type="flow")
        with pytest.raises(ValueError, match="`scheduler` must have the prediction_type.*'flow'"):
            noisy_latents(vae, scheduler, *batch())

    def test_no_gradient_reaches_the_vae(self, vae):
        assert all(parameter.requires_grad for parameter in vae.parameters())
        sample, target = noisy_latents(vae, ddim(), *batch())
        assert not sample.requires_grad and not target.requires_grad


class TestCleanLatents:
    @pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
    def test_of_the_right_answer_are_those_of_the_picture(self, vae, prediction_type):
        images, masks, noise, timesteps = batch()
        scheduler = DDIMScheduler.from_config(ddim().config, prediction_type=prediction_type)
        sample, target = noisy_latents(vae, scheduler, images, masks, noise, timesteps)
        cleaned = clean_latents(scheduler, sample[:, :4], target, timesteps)
        torch.testing.assert_close(cleaned, latents_of(vae, images), atol=1e-4, rtol=0)


class TestRepaintingLoss:
    def test_is_the_error_and_distance_inside_the_masks(self, reference):
        images, repainted, masks = batch()[0], batch()[0].flip(0), torch.zeros(3, 1, RESOLUTION, RESOLUTION)
        masks[0, :, :8, :8] = masks[1, :, 20:60, 10:] = masks[2] = 1
        loss = repainting_loss(PerceptualDistance.from_lpips(reference), repainted, images, masks)
        reference.spatial = True
        with torch.no_grad():
            distances = reference(repainted, images).numpy()
        squared = ((repainted - images).numpy() ** 2).mean(axis=1, keepdims=True)
        each = [(squared + 0.1 * distances)[i][masks[i].numpy() > 0].mean() for i in range(3)]
        assert loss.dtype == torch.float32 and loss.shape == ()
        assert loss.item() == pytest.approx(np.mean(each), rel=1e-4)
        assert np.ptp(each) > 0.01


class TestStageLosses:
    def stages(self, pipe, nuts, **given):
        stages = make_stages(pipe.base, {"hex_nut": nuts}, tiny_settings(**given), torch.device("cpu"))
        samples = [stages[0].dataset[number] for number in range(3)]
        return stages, {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}

    def repainted(self, pipe, stage, drawn):
        """The denoiser's answer to a batch, and the pictures of the clean latents in it."""
        sample, _ = noisy_latents(
            pipe.vae, pipe.scheduler, *(drawn[n] for n in ("image", "mask", "noise", "timestep"))
        )
        embeds = encode_prompts(stage.dataset.prompts, pipe.tokenizer, pipe.text_encoder)[drawn["prompt"]]
        predicted = pipe.unet(sample, drawn["timestep"], embeds).sample
        cleaned = clean_latents(pipe.scheduler, sample[:, :4], predicted, drawn["timestep"])
        return predicted, pipe.vae.decode(cleaned / pipe.vae.config.scaling_factor).sample

    def test_of_the_denoiser_is_the_mean_squared_error(self, tiny_pipeline, nuts):
        (stage, _), drawn = self.stages(tiny_pipeline, nuts)
        with torch.no_grad():
            predicted, _ = self.repainted(tiny_pipeline, stage, drawn)
            loss = stage.loss(drawn)
        assert loss.dtype == torch.float32 and loss.shape == ()
        assert loss.item() == pytest.approx(np.mean((predicted - drawn["noise"]).numpy() ** 2), rel=1e-5)

    def test_of_the_denoiser_with_repainted_pictures(self, tiny_pipeline, nuts):
        (stage, _), drawn = self.stages(tiny_pipeline, nuts, repainting_weight=0.3)
        with torch.no_grad():
            predicted, pictures = self.repainted(tiny_pipeline, stage, drawn)
            inside = repainting_loss(tiny_pipeline.perceptual, pictures, drawn["image"], drawn["mask"]).item()
            loss = stage.loss(drawn).item()
        assert loss == pytest.approx(((predicted - drawn["noise"]) ** 2).mean().item() + 0.3 * inside, rel=1e-4)

    def test_of_the_decoder_on_repainted_latents(self, tiny_pipeline, nuts):
        (_, stage), drawn = self.stages(tiny_pipeline, nuts, decoder_latents="repainted")
        with torch.no_grad():
            _, pictures = self.repainted(tiny_pipeline, stage, drawn)
            inside = repainting_loss(tiny_pipeline.perceptual, pictures, drawn["image"], drawn["mask"]).item()
            assert stage.loss(drawn).item() == pytest.approx(inside, rel=1e-4)

    @pytest.mark.parametrize("method", ["lora", "full"])
    @pytest.mark.parametrize("weight", [0.0, 0.5])
    def test_gradients_reach_what_trains_of_the_denoiser_alone(self, tiny_pipeline, nuts, method, weight):
        (stage, _), drawn = self.stages(tiny_pipeline, nuts, method=method, repainting_weight=weight)
        self.assert_reached(stage, drawn, tiny_pipeline)

    @pytest.mark.parametrize("method", ["lora", "full"])
    @pytest.mark.parametrize("latents", ["encoded", "repainted"])
    def test_gradients_reach_what_trains_of_the_decoder_alone(self, tiny_pipeline, nuts, method, latents):
        (denoiser, stage), drawn = self.stages(tiny_pipeline, nuts, method=method, decoder_latents=latents)
        self.assert_reached(stage, drawn, tiny_pipeline)
        assert all(name.startswith("decoder.") for name in stage.trained_names())
        assert all(parameter.grad is None for parameter in denoiser.module.parameters())

    def assert_reached(self, stage, drawn, pipe):
        stage.loss(drawn).backward()
        reached = {name for name, parameter in stage.module.named_parameters() if parameter.grad is not None}
        assert reached == set(stage.trained_names()) and reached
        for component in (pipe.vae, pipe.unet, pipe.perceptual, pipe.text_encoder):
            assert all(parameter.grad is None for parameter in component.parameters())


class TestDecoder:
    @pytest.mark.parametrize("make", [tiny_vae, tiny_taesd])
    def test_equals_decoding_with_the_vae(self, make):
        torch.manual_seed(0)
        vae, latents = make(), numbers(2, 4, 16, 16)
        with torch.no_grad():
            expected = vae.decode(latents / vae.config.scaling_factor).sample
            torch.testing.assert_close(Decoder(vae)(latents), expected, atol=1e-6, rtol=0)

    def test_loss_is_mean_squared_error_plus_lpips(self, vae, reference):
        latents, images = numbers(2, 4, 16, 16), batch(2)[0]
        reference.spatial = False
        with torch.no_grad():
            loss = decoder_loss(Decoder(vae), PerceptualDistance.from_lpips(reference), latents, images)
            decoded = vae.decode(latents / vae.config.scaling_factor).sample
            distance = reference(decoded, images).mean().item()
        squared = np.mean((decoded.numpy() - images.numpy()) ** 2)
        assert loss.dtype == torch.float32 and loss.shape == ()
        assert distance > 1e-3
        assert loss.item() == pytest.approx(squared + 0.1 * distance, abs=1e-5)


class TestOneStepByHand:
    """One step of Adam in plain arithmetic, beside one step of the loop."""

    rate, longest = 1e-3, 0.05

    def samples(self, pipe, nuts):
        prompts = pipe.prompt_book.prompts("hex_nut", "hierarchical")
        settings = tiny_settings()
        dataset = FewShotDataset(
            {"hex_nut": nuts},
            {"hex_nut": prompts},
            64,
            (4, 16, 16),
            1000,
            settings.seed,
            augmentation=settings.augmentation,
        )
        drawn = [dataset[0], dataset[1]]
        return dataset, {name: torch.stack([sample[name] for sample in drawn]) for name in drawn[0]}

    def adam_step(self, module, loss):
        parameters = dict(module.named_parameters())
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        length = torch.sqrt(sum((gradient.double() ** 2).sum() for gradient in gradients)).item()
        assert length > self.longest, "the gradients are not clipped, so clipping is not tested"
        stepped = {}
        for (name, value), gradient in zip(parameters.items(), gradients, strict=True):
            clipped = gradient.double() * (self.longest / length)
            # After one step Adam's corrected moments are g and g^2.
            stepped[name] = (value.double() - self.rate * clipped / (clipped.abs() + 1e-8)).float().detach()
        return stepped

    def assert_same_step(self, actual, expected, before):
        assert actual.keys() == expected.keys()
        moved = sum((expected[name] - before[name]).abs().sum() for name in expected)
        missed = sum((actual[name] - expected[name]).abs().sum() for name in expected)
        assert missed < 1e-3 * moved
        # A gradient of about Adam's epsilon turns rounding into a part of a step; all others agree closely.
        off = torch.cat([(actual[name] - expected[name]).abs().flatten() for name in expected])
        assert (off > 1e-2 * self.rate).float().mean() < 1e-3

    def settings(self, part):
        return tiny_settings(
            method="full",
            steps=1,
            decoder_steps=1,
            learning_rate=self.rate,
            max_grad_norm=self.longest,
            train_denoiser=part == "denoiser",
            train_decoder=part == "decoder",
        )

    def test_denoiser(self, tiny_pipeline, nuts):
        dataset, drawn = self.samples(tiny_pipeline, nuts)
        unet, vae = copy.deepcopy(tiny_pipeline.unet).train(), tiny_pipeline.vae
        signal, spread = (torch.from_numpy(value).float() for value in coefficients(drawn["timestep"]))
        image, mask = drawn["image"], drawn["mask"]
        noisy = signal * latents_of(vae, image) + spread * drawn["noise"]
        sample = torch.cat([noisy, mask[:, :, ::4, ::4], latents_of(vae, image * (1 - mask))], dim=1)
        with torch.no_grad():
            embeds = encode_prompts(dataset.prompts, tiny_pipeline.tokenizer, tiny_pipeline.text_encoder)
        predicted = unet(sample, drawn["timestep"], embeds[drawn["prompt"]]).sample
        loss = ((predicted - drawn["noise"]) ** 2).mean()
        result = train(tiny_pipeline, {"hex_nut": nuts}, self.settings("denoiser"))
        assert result.losses["denoiser"] == [pytest.approx(loss.item(), rel=1e-5)]
        self.assert_same_step(result.denoiser, self.adam_step(unet, loss), tiny_pipeline.unet.state_dict())

    def test_decoder(self, tiny_pipeline, nuts):
        _, drawn = self.samples(tiny_pipeline, nuts)
        vae = copy.deepcopy(tiny_pipeline.vae).train()
        latents = latents_of(tiny_pipeline.vae, drawn["image"]) / vae.config.scaling_factor
        decoded = vae.decoder(vae.post_quant_conv(latents).detach())
        distance = tiny_pipeline.perceptual(decoded, drawn["image"]).mean()
        loss = ((decoded - drawn["image"]) ** 2).mean() + 0.1 * distance
        stepped = self.adam_step(vae.decoder, loss)
        result = train(tiny_pipeline, {"hex_nut": nuts}, self.settings("decoder"))
        assert result.losses["decoder"] == [pytest.approx(loss.item(), rel=1e-5)]
        ours = {name.removeprefix("decoder."): value for name, value in result.decoder.items()}
        self.assert_same_step(ours, stepped, tiny_pipeline.vae.decoder.state_dict())
