import importlib.util

import numpy as np
import pytest
import torch

from .conftest import make_tiny_pipeline
from .tiny_training import Cancelled, assert_bit_equal, cancel_after, tiny_settings, train


@pytest.fixture
def shots(nuts):
    return {"hex_nut": nuts}


def snapshot(pipe):
    """Everything in a pipeline that a fine-tuning could disturb."""
    seen = {"config": {name: repr(value) for name, value in pipe.config.items()}}
    for name, component in pipe.components.items():
        if not isinstance(component, torch.nn.Module):
            continue
        seen[name] = {
            "modules": [(path, type(module).__name__, module.training) for path, module in component.named_modules()],
            "parameters": [
                (path, id(value), value.data_ptr(), value.requires_grad, value.dtype, value.grad is None)
                for path, value in component.named_parameters()
            ],
            "bits": {path: value.clone() for path, value in component.state_dict().items()},
        }
    return seen


def assert_unchanged(before, after):
    assert before.keys() == after.keys() and {"unet", "vae", "text_encoder", "perceptual"} <= before.keys()
    assert before["config"] == after["config"]
    for name in before.keys() - {"config"}:
        assert before[name]["modules"] == after[name]["modules"], name
        assert before[name]["parameters"] == after[name]["parameters"], name
        old, new = before[name]["bits"], after[name]["bits"]
        assert old.keys() == new.keys() and all(torch.equal(old[path], new[path]) for path in old), name


@pytest.mark.parametrize("method", ["lora", "full"])
class TestBaseIsLeftAsItIs:
    @pytest.fixture
    def pipe(self, tiny_pipeline):
        # Flags that differ from module to module, so that resetting them to anything would show.
        tiny_pipeline.unet.train()
        tiny_pipeline.unet.mid_block.eval()
        tiny_pipeline.unet.conv_in.requires_grad_(False)
        tiny_pipeline.vae.encoder.requires_grad_(False)
        tiny_pipeline.vae.decoder.mid_block.train()
        return tiny_pipeline

    def test_on_success(self, pipe, shots, method):
        before = snapshot(pipe)
        train(pipe, shots, tiny_settings(method=method, learning_rate=0.1, use_ema=True, gradient_checkpointing=True))
        assert_unchanged(before, snapshot(pipe))

    def test_when_pictures_are_repainted(self, pipe, shots, method):
        before = snapshot(pipe)
        train(pipe, shots, tiny_settings(method=method, repainting_weight=0.5, decoder_latents="repainted"))
        assert_unchanged(before, snapshot(pipe))

    @pytest.mark.parametrize("stage", ["denoiser", "decoder"])
    def test_when_cancelled(self, pipe, shots, method, stage):
        before = snapshot(pipe)
        with pytest.raises(Cancelled):
            train(pipe, shots, tiny_settings(method=method), callback=cancel_after(stage, 2))
        assert_unchanged(before, snapshot(pipe))

    def test_on_an_error(self, pipe, shots, method):
        before = snapshot(pipe)
        with pytest.raises(
            ValueError, match="`learning_rate` 1e\\+30 led to a loss of (nan|inf) in step . of the denoiser"
        ):
            train(pipe, shots, tiny_settings(method=method, learning_rate=1e30))
        assert_unchanged(before, snapshot(pipe))


class TestLearnedWeights:
    def test_of_lora_are_two_factors_for_each_target(self, tiny_pipeline, shots):
        weights = train(tiny_pipeline, shots, tiny_settings(steps=1, decoder_steps=1, rank=3, decoder_rank=2))
        for part, component, rank, ends, below in (
            ("denoiser", tiny_pipeline.unet, 3, weights.settings.target_modules, ""),
            ("decoder", tiny_pipeline.vae, 2, weights.settings.decoder_target_modules, "decoder."),
        ):
            modules = dict(component.named_modules())
            targets = [
                path
                for path in modules
                if path.startswith(below) and any(path == end or path.endswith(f".{end}") for end in ends)
            ]
            state = getattr(weights, part)
            assert targets
            assert state.keys() == {f"{path}.lora_{factor}.weight" for path in targets for factor in "AB"}
            for path in targets:
                assert state[f"{path}.lora_A.weight"].shape[:2] == (rank, modules[path].weight.shape[1])
                assert state[f"{path}.lora_B.weight"].shape[:2] == (modules[path].weight.shape[0], rank)
            assert all(value.dtype == torch.float32 and not value.requires_grad for value in state.values())

    def test_of_full_are_all_of_the_unet_and_the_decoder(self, tiny_pipeline, shots):
        weights = train(tiny_pipeline, shots, tiny_settings(method="full", steps=1, decoder_steps=1))
        assert weights.denoiser.keys() == dict(tiny_pipeline.unet.named_parameters()).keys()
        own = dict(tiny_pipeline.vae.named_parameters())
        assert weights.decoder.keys() == {name for name in own if name.startswith("decoder.")}
        for name, value in weights.denoiser.items():
            assert value.shape == tiny_pipeline.unet.get_parameter(name).shape and not value.requires_grad

    def test_of_a_half_precision_base_are_float32(self, tiny_pipeline, shots):
        """Full weights train in float32, whatever the base is kept in: steps of 1e-4 vanish in bfloat16."""
        tiny_pipeline.to(torch.bfloat16)
        for method in ("lora", "full"):
            weights = train(tiny_pipeline, shots, tiny_settings(method=method, steps=2, decoder_steps=2))
            for state in (weights.denoiser, weights.decoder):
                assert all(value.dtype == torch.float32 for value in state.values())
            assert np.isfinite([*weights.losses["denoiser"], *weights.losses["decoder"]]).all()
        moved = weights.denoiser["conv_out.weight"] - tiny_pipeline.unet.conv_out.weight.float()
        assert 0 < moved.abs().max() < 1e-3

    @pytest.mark.parametrize("part, other", [("denoiser", "decoder"), ("decoder", "denoiser")])
    def test_of_a_part_that_is_off_are_none(self, tiny_pipeline, shots, part, other):
        weights = train(tiny_pipeline, shots, tiny_settings(steps=1, decoder_steps=1, **{f"train_{other}": False}))
        assert getattr(weights, other) is None and list(weights.losses) == [part]
        assert getattr(weights, part)

    def test_unknown_target_modules(self, tiny_pipeline, shots):
        with pytest.raises(ValueError, match="`target_modules` must name modules of UNet2DConditionModel"):
            train(tiny_pipeline, shots, tiny_settings(target_modules=("nowhere",)))
        with pytest.raises(ValueError, match="`decoder_target_modules` must name modules of AutoencoderKL"):
            train(tiny_pipeline, shots, tiny_settings(decoder_target_modules=("nowhere",)))

    def test_8_bit_adam_without_its_package(self, tiny_pipeline, shots):
        if importlib.util.find_spec("bitsandbytes"):
            pytest.skip("bitsandbytes is installed")
        with pytest.raises(ValueError, match="`use_8bit_adam` needs the package bitsandbytes; `pip install"):
            train(tiny_pipeline, shots, tiny_settings(use_8bit_adam=True))


class TestLossesAndProgress:
    @pytest.mark.parametrize("method, rate", [("full", 3e-3), ("lora", 2e-2)])
    def test_losses_go_down_on_one_picture(self, tiny_pipeline, shots, method, rate):
        still = {"brightness": 0.0, "contrast": 0.0, "scale": 0.0, "degrees": 0.0}
        settings = tiny_settings(
            method=method,
            steps=25,
            decoder_steps=25,
            learning_rate=rate,
            noise_range=(0.8, 1.0),
            augmentation=still,
            # Attention alone cannot turn random convolutions into a denoiser.
            target_modules=("conv_in", "conv_out", "conv1", "conv2", "conv_shortcut"),
        )
        losses = train(tiny_pipeline, {"hex_nut": shots["hex_nut"][:1]}, settings).losses
        for stage in ("denoiser", "decoder"):
            assert len(losses[stage]) == 25
            assert np.mean(losses[stage][-5:]) < 0.5 * np.mean(losses[stage][:5]), stage

    def test_the_rate_follows_its_schedule(self, tiny_pipeline, shots):
        """Adam moves no weight further than the rate in its first step, and not much further in later ones."""
        weights = []

        def validate(stage, step):
            weights.append(torch.cat([value.detach().flatten().clone() for value in stage.module.parameters()]))

        settings = tiny_settings(
            method="full", steps=6, train_decoder=False, learning_rate=1e-3, lr_scheduler="linear", lr_warmup_steps=3
        )
        train(tiny_pipeline, shots, settings, validate=validate)
        start = torch.cat([value.detach().flatten() for value in tiny_pipeline.unet.parameters()])
        moved = [(new - old).abs().median().item() for old, new in zip([start, *weights], weights, strict=False)]
        assert moved[0] == 0  # rates of 0, 1/3, 2/3, 1, 2/3, 1/3 of 1e-3
        assert moved[1] < moved[2] < moved[3] > moved[4] > moved[5] > 0
        assert (weights[3] - weights[2]).abs().max() < 1.5e-3

    def test_progress_is_told_after_every_step(self, tiny_pipeline, shots):
        told = []
        weights = train(tiny_pipeline, shots, tiny_settings(steps=3, decoder_steps=1), callback=told.append)
        assert [(each.stage, each.step, each.steps) for each in told] == [
            ("denoiser", 1, 3),
            ("denoiser", 2, 3),
            ("denoiser", 3, 3),
            ("decoder", 1, 1),
        ]
        assert [each.share for each in told] == [0.25, 0.5, 0.75, 1.0]
        assert weights.losses == {"denoiser": [each.loss for each in told[:3]], "decoder": [told[3].loss]}
        assert told[0].seconds_left > 0 and told[2].seconds_left == 0

    def test_epochs_are_passes_over_all_pictures(self, tiny_pipeline, shots):
        settings = tiny_settings(steps=None, decoder_steps=None, epochs=2, decoder_epochs=1)
        losses = train(tiny_pipeline, shots, settings).losses
        assert len(losses["denoiser"]) == 3 and len(losses["decoder"]) == 2  # of 6 and 3 samples, in pairs


class TestSameResult:
    @pytest.mark.parametrize("method", ["lora", "full"])
    def test_for_the_same_seed_whatever_else_is_drawn(self, tiny_pipeline, shots, method):
        torch.manual_seed(1)
        state = torch.get_rng_state()
        first = train(tiny_pipeline, shots, tiny_settings(method=method))
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(2)
        again = train(make_tiny_pipeline(), shots, tiny_settings(method=method))
        assert_bit_equal(again, first)
        assert again.losses == first.losses
        other = train(tiny_pipeline, shots, tiny_settings(method=method, seed=1))
        for part in ("denoiser", "decoder"):
            assert not any(map(torch.equal, getattr(other, part).values(), getattr(first, part).values()))

    @pytest.mark.parametrize("method", ["lora", "full"])
    def test_of_accumulated_batches_and_of_one(self, tiny_pipeline, shots, method):
        whole = train(tiny_pipeline, shots, tiny_settings(method=method, train_batch_size=4))
        pieces = train(
            tiny_pipeline, shots, tiny_settings(method=method, train_batch_size=2, gradient_accumulation_steps=2)
        )
        for stage, losses in whole.losses.items():
            np.testing.assert_allclose(pieces.losses[stage], losses, atol=1e-5, rtol=0)
            assert len(set(losses)) == 4

    def test_with_gradient_checkpointing(self, tiny_pipeline, shots):
        plain = train(tiny_pipeline, shots, tiny_settings(method="full"))
        thrifty = train(tiny_pipeline, shots, tiny_settings(method="full", gradient_checkpointing=True))
        for stage, losses in plain.losses.items():
            np.testing.assert_allclose(thrifty.losses[stage], losses, atol=1e-6, rtol=0)

    def test_with_samples_made_by_another_process(self, tiny_pipeline, shots):
        assert_bit_equal(
            train(tiny_pipeline, shots, tiny_settings(), dataloader_num_workers=1),
            train(tiny_pipeline, shots, tiny_settings()),
        )


class TestRepaintedLatents:
    def test_are_those_of_the_denoiser_that_was_trained(self, tiny_pipeline, shots):
        """The decoder's first loss is that with the trained denoiser in the base's place."""
        settings = {"method": "full", "learning_rate": 0.01, "decoder_latents": "repainted", "decoder_steps": 1}
        both = train(tiny_pipeline, shots, tiny_settings(**settings, use_ema=True, ema_decay=0.5))
        before = train(tiny_pipeline, shots, tiny_settings(**settings, train_denoiser=False))
        tiny_pipeline.unet.load_state_dict(both.denoiser)
        after = train(tiny_pipeline, shots, tiny_settings(**settings, train_denoiser=False))
        assert both.losses["decoder"] == pytest.approx(after.losses["decoder"], abs=1e-6)
        assert abs(both.losses["decoder"][0] - before.losses["decoder"][0]) > 1e-3


class TestMovingAverage:
    settings = {"method": "full", "steps": 5, "decoder_steps": 3, "learning_rate": 1e-2}

    def run(self, pipe, shots, **given):
        """The learned weights, and for each stage the raw and the averaged weights after each step."""
        raw, averaged = {}, {}

        def weights(stage):
            return {name: value.detach().clone() for name, value in stage.module.named_parameters()}

        def validate(stage, step):
            raw.setdefault(stage.name, []).append(weights(stage))
            with stage.evaluation():
                assert not any(module.training for module in stage.module.modules())
                assert not torch.is_grad_enabled()
                averaged.setdefault(stage.name, []).append(weights(stage))
            assert stage.module.training
            now = weights(stage)
            assert all(torch.equal(now[name], value) for name, value in raw[stage.name][-1].items())

        return train(pipe, shots, tiny_settings(**self.settings, **given), validate=validate), raw, averaged

    def test_equals_one_kept_by_hand(self, tiny_pipeline, shots):
        weights, raw, averaged = self.run(tiny_pipeline, shots, use_ema=True, ema_decay=0.45)
        for part in ("denoiser", "decoder"):
            state = getattr(weights, part)
            mean = None
            for step, current in enumerate(raw[part], start=1):
                # The average warms up: 0 in the first step, then 1 - step^(-2/3) up to `ema_decay`.
                decay = min(1 - step ** (-2 / 3), 0.45)
                mean = {
                    name: current[name].double() * (1 - decay) + (0 if mean is None else mean[name] * decay)
                    for name in state
                }
                for name, value in mean.items():
                    torch.testing.assert_close(averaged[part][step - 1][name].double(), value, atol=1e-6, rtol=0)
            for name, value in mean.items():
                torch.testing.assert_close(state[name].double(), value, atol=1e-6, rtol=0)
            assert max((state[name] - raw[part][-1][name]).abs().max() for name in state) > 1e-3

    def test_without_it_the_last_weights_are_kept_and_evaluated(self, tiny_pipeline, shots):
        weights, raw, averaged = self.run(tiny_pipeline, shots)
        for part in ("denoiser", "decoder"):
            for name, value in getattr(weights, part).items():
                assert torch.equal(value, raw[part][-1][name]) and torch.equal(value, averaged[part][-1][name])

    def test_does_not_change_the_training(self, tiny_pipeline, shots):
        assert self.run(tiny_pipeline, shots, use_ema=True)[0].losses == self.run(tiny_pipeline, shots)[0].losses
