"""`adapt` is all or nothing: cancelled, failed or refused, it leaves the pipeline as it was."""

import numpy as np
import pytest
import torch

from anomalysd_pipeline.adaptation.registry import check_shots

from .tiny_adaptations import Standing, adapted_to, drawn, inpainted, learned, pictures, quick_pipeline


class Cancelled(BaseException):
    """As KeyboardInterrupt, no Exception: whatever ends a fine-tuning must be undone."""


def cancel_after(stage, step):
    def callback(progress):
        if (progress.stage, progress.step) == (stage, step):
            raise Cancelled

    return callback


@pytest.fixture
def pipe():
    """A pipeline with a plain, calibrated part, an adaptation, and a choice for `inpaint`."""
    pipe = adapted_to("ring")
    pipe.add_category("nut", pictures("nut"), prompts="a nut of brass", noise_strength=0.6)
    pipe.calibrate("nut", pictures("nut"))
    pipe.set_adaptation("ring")
    return pipe


@pytest.fixture
def bare():
    """One without adaptations, which takes method "full" too."""
    pipe = quick_pipeline()
    pipe.add_category("plain", pictures("nut"))
    return pipe


class TestCancelled:
    @pytest.mark.parametrize(("stage", "step"), [("denoiser", 1), ("decoder", 2)])
    def test_lora(self, pipe, stage, step):
        before = Standing(pipe)
        with pytest.raises(Cancelled):
            pipe.adapt({"nut": pictures("nut"), "gear": pictures("gear")}, callback=cancel_after(stage, step))
        before.assert_unchanged()

    @pytest.mark.parametrize("stage", ["denoiser", "decoder"])
    def test_full(self, bare, stage):
        before = Standing(bare)
        with pytest.raises(Cancelled):
            bare.adapt({"nut": pictures("nut")}, method="full", callback=cancel_after(stage, 2))
        before.assert_unchanged()

    def test_then_it_can_be_done_again(self, pipe):
        with pytest.raises(Cancelled):
            pipe.adapt({"nut": pictures("nut")}, callback=cancel_after("decoder", 1))
        pipe.adapt({"nut": pictures("nut")}, calibrate=False)
        assert pipe.adaptations == ["nut", "ring"]


class TestFailedAfterTraining:
    @pytest.mark.parametrize(
        ("shots", "bad"),
        [
            (("gear",), {"prompts": {"gear": [""]}}),
            (("nut", "gear"), {"prompts": {"gear": {"middling": ["a gear"]}}}),
            (("ring", "gear"), {"prompts": {"gear": [""]}}),
            (("nut", "ring", "gear"), {"false_alarm_rate": 0.7}),
        ],
    )
    def test_lora(self, pipe, shots, bad):
        before = Standing(pipe)
        with pytest.raises(ValueError, match="`(prompts|false_alarm_rate)` must"):
            pipe.learn({part: pictures(part) for part in shots}, learned("nut"), **bad)
        before.assert_unchanged()

    @pytest.mark.parametrize("bad", [{"prompts": {"nut": [""]}}, {"false_alarm_rate": 0.7}])
    def test_full(self, bare, bad):
        before = Standing(bare)
        with pytest.raises(ValueError, match="`(prompts|false_alarm_rate)` must"):
            bare.learn({"nut": pictures("nut")}, learned("nut", method="full"), **bad)
        before.assert_unchanged()

    @pytest.mark.parametrize("part", ["ring", "gear"])
    def test_interrupted_in_the_middle_of_the_calibration(self, pipe, part, monkeypatch):
        before = Standing(pipe)
        calibrate = pipe.calibrate

        def interrupted(*args):
            calibrate(*args)  # the new adapter has been in use
            raise Cancelled

        monkeypatch.setattr(pipe, "calibrate", interrupted)
        with pytest.raises(Cancelled):
            pipe.learn({part: pictures(part)}, drawn(1), name=part)
        monkeypatch.undo()
        before.assert_unchanged()

    def test_a_failed_replacement_keeps_what_was_chosen(self, pipe):
        chosen = inpainted(pipe)
        with pytest.raises(ValueError):
            pipe.learn({"ring": pictures("ring")}, drawn(1), false_alarm_rate=0.7)
        assert torch.equal(inpainted(pipe), chosen)


class TestProgress:
    @pytest.mark.parametrize("trained", [("denoiser", "decoder"), ("denoiser",), ("decoder",)])
    def test_is_told_after_every_step(self, bare, trained):
        seen = []
        parts = {f"train_{part}": part in trained for part in ("denoiser", "decoder")}
        weights = bare.adapt(
            {"nut": pictures("nut")}, steps=3, decoder_steps=2, calibrate=False, callback=seen.append, **parts
        )
        lengths = [(part, steps) for part, steps in (("denoiser", 3), ("decoder", 2)) if part in trained]
        total = sum(steps for _, steps in lengths)
        expected = [(part, step + 1, steps) for part, steps in lengths for step in range(steps)]
        assert [(each.stage, each.step, each.steps) for each in seen] == expected
        assert [each.share for each in seen] == pytest.approx([(n + 1) / total for n in range(total)])
        assert seen[-1].share == 1
        assert all(each.seconds_left >= 0 for each in seen)
        assert all(each.seconds_left == 0 for each in seen if each.step == each.steps)
        assert [each.loss for each in seen] == [loss for part, _ in lengths for loss in weights.losses[part]]


class TestRefusedBeforeTraining:
    @pytest.fixture(scope="class")
    @staticmethod
    def pipe():
        return adapted_to("ring")

    @pytest.mark.parametrize(
        ("shots", "message"),
        [
            ({}, "`normal_images` must map at least one category to its pictures, .* got an empty one"),
            (None, "`normal_images` must map .* got NoneType"),
            ([np.zeros((64, 64, 3), np.uint8)], "`normal_images` must map .* got list"),
            ({"../x": [np.zeros((64, 64, 3), np.uint8)]}, "`category` must be a plain name .* '../x'"),
            ({"a/b": [np.zeros((64, 64, 3), np.uint8)]}, "`category` must be a plain name .* 'a/b'"),
            ({5: [np.zeros((64, 64, 3), np.uint8)]}, "`category` must be a non-empty name .* 5"),
            ({" ": [np.zeros((64, 64, 3), np.uint8)]}, "`category` must be a non-empty name"),
            ({"x" * 65: [np.zeros((64, 64, 3), np.uint8)]}, "`category` must have at most 64 characters"),
            ({"nut": []}, r"`normal_images\['nut'\]` must be a picture or a list with at least one"),
            ({"nut": None}, r"`normal_images\['nut'\]` must be a picture or a list with at least one"),
            ({"nut": ["no such file.png"]}, "`source` .*'no such file.png'"),
            ({"nut": np.zeros((0, 64, 64, 3), np.uint8)}, r"`normal_images\['nut'\]` must be"),
            ({"nut": [np.zeros((64, 64, 3), np.uint8), object()]}, "`source`"),
            ({"nut": [np.full((64, 64, 3), np.nan)]}, "`source`"),
        ],
    )
    def test_shots(self, pipe, shots, message):
        before = Standing(pipe, runs=False)
        with pytest.raises(ValueError, match=message) as caught:
            pipe.adapt(shots, callback=pytest.fail)
        assert "\n" not in str(caught.value)
        before.assert_unchanged()

    def test_a_picture_that_is_none(self, pipe, tmp_path):
        (tmp_path / "notes.png").write_text("not a picture")
        with pytest.raises(ValueError, match=r"notes\.png"):
            pipe.adapt({"nut": [*pictures("nut"), tmp_path / "notes.png"]}, callback=pytest.fail)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"prompts": {"nutt": ["a nut"]}}, r"`prompts` must map categories of `normal_images` .* got \['nutt'\]"),
            ({"prompts": ["a nut"]}, "`prompts` must map categories of `normal_images` .* got list"),
            ({"prompts": {"nut": [""]}}, "`prompts` must hold non-empty strings"),
            ({"prompts": {"nut": []}}, "`prompts` must hold at least one prompt"),
            ({"false_alarm_rate": 0.7}, "`false_alarm_rate` must be above 0 and below 0.5, got 0.7"),
            ({"name": "../x"}, "`name` must be a plain name .* '../x'"),
            ({"name": "x" * 65}, "`name` must have at most 64 characters"),
            ({"name": 5}, "`name` must be a non-empty name"),
        ],
    )
    def test_other_arguments(self, pipe, options, message):
        before = Standing(pipe, runs=False)
        with pytest.raises(ValueError, match=message):
            pipe.adapt({"nut": pictures("nut")}, callback=pytest.fail, **options)
        before.assert_unchanged()

    @pytest.mark.parametrize(
        ("setting", "value"),
        [
            ("method", "qlora"),
            ("steps", 0),
            ("steps", 2.5),
            ("decoder_steps", -1),
            ("epochs", 0),
            ("decoder_epochs", 0),
            ("train_batch_size", 0),
            ("gradient_accumulation_steps", 0),
            ("rank", 0),
            ("decoder_rank", 1.5),
            ("learning_rate", 0),
            ("learning_rate", float("inf")),
            ("learning_rate", float("nan")),
            ("learning_rate", "fast"),
            ("decoder_learning_rate", -1e-4),
            ("max_grad_norm", 0),
            ("mask_design", "squares"),
            ("prompt_design", "poetic"),
            ("noise_range", (0.5, 0.5)),
            ("noise_range", [0, 2]),
            ("defect_share", 1.5),
            ("repainting_weight", -1),
            ("decoder_latents", "guessed"),
            ("target_modules", ["no_such_layer"]),
            ("decoder_target_modules", ["no_such_layer"]),
            ("ema_decay", 1),
            ("mixed_precision", "fp4"),
            ("seed", -1),
        ],
    )
    def test_settings(self, pipe, setting, value):
        before = Standing(pipe, runs=False)
        with pytest.raises(ValueError, match=f"`{setting}`"):
            pipe.adapt({"nut": pictures("nut")}, callback=pytest.fail, **{setting: value})
        before.assert_unchanged()

    def test_both_parts_off(self, pipe):
        with pytest.raises(ValueError, match="`train_denoiser` and `train_decoder` are both off"):
            pipe.adapt({"nut": pictures("nut")}, train_denoiser=False, train_decoder=False)

    def test_a_name_that_is_no_setting(self, pipe):
        with pytest.raises(TypeError, match="`learning_rat` is not a setting of a fine-tuning"):
            pipe.adapt({"nut": pictures("nut")}, learning_rat=1e-3)
        with pytest.raises(TypeError, match="`colour` is not a setting"):
            pipe.adaptation_settings(colour="red")


class TestSettings:
    def test_call_then_checkpoint_then_paper(self, bare):
        settings = bare.adaptation_settings(rank=3, steps=None)
        assert (settings.rank, settings.steps, settings.max_grad_norm) == (3, 2, 1.0)

    @pytest.mark.parametrize("shots", [{"nut": pictures("nut")}, {"nut": pictures("nut")[0]}])
    def test_pictures_come_alone_or_in_lists(self, shots):
        (loaded,) = check_shots(shots).values()
        assert [picture.size for picture in loaded] == [(64, 64)] * (2 if isinstance(shots["nut"], tuple) else 1)
