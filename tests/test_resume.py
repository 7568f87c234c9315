import pytest

from anomalysd_pipeline.adaptation.checkpoints import list_checkpoints

from .conftest import make_tiny_pipeline
from .tiny_training import Cancelled, assert_bit_equal, cancel_after, tiny_settings, train


@pytest.fixture
def shots(nuts):
    return {"hex_nut": nuts}


VARIANTS = {
    "lora": {"method": "lora"},
    "full": {"method": "full"},
    "lora, averaged": {"method": "lora", "use_ema": True, "gradient_accumulation_steps": 2},
    "lora, repainted": {"method": "lora", "use_ema": True, "repainting_weight": 0.5, "decoder_latents": "repainted"},
    "full, averaged, cosine": {"method": "full", "use_ema": True, "lr_scheduler": "cosine", "lr_warmup_steps": 2},
}


class TestGoingOn:
    @pytest.mark.parametrize(
        "variant", ["lora", *(pytest.param(v, marks=pytest.mark.full) for v in VARIANTS if v != "lora")]
    )
    def test_equals_the_uninterrupted_run(self, tiny_pipeline, shots, variant, tmp_path):
        settings = tiny_settings(steps=5, decoder_steps=5, learning_rate=1e-3, **VARIANTS[variant])
        whole = train(tiny_pipeline, shots, settings)
        every = {"output_dir": tmp_path, "checkpointing_steps": 2, "checkpoints_total_limit": 1}
        for stage in ("denoiser", "decoder"):
            with pytest.raises(Cancelled):
                train(
                    make_tiny_pipeline(),
                    shots,
                    settings,
                    callback=cancel_after(stage, 3),
                    resume_from_checkpoint="latest",
                    **every,
                )
            assert [path.name for path in list_checkpoints(tmp_path / stage)] == ["checkpoint-2"]
        resumed = train(make_tiny_pipeline(), shots, settings, resume_from_checkpoint="latest", **every)
        assert_bit_equal(resumed, whole)
        assert resumed.losses == {"denoiser": [], "decoder": whole.losses["decoder"][2:]}
        assert [path.name for path in list_checkpoints(tmp_path / "decoder")] == ["checkpoint-5"]

    def test_of_a_finished_run_gives_its_weights_again(self, tiny_pipeline, shots, tmp_path):
        whole = train(tiny_pipeline, shots, tiny_settings(use_ema=True), output_dir=tmp_path)
        again = train(
            tiny_pipeline, shots, tiny_settings(use_ema=True), output_dir=tmp_path, resume_from_checkpoint="latest"
        )
        assert_bit_equal(again, whole)
        assert again.losses == {"denoiser": [], "decoder": []}

    def test_with_more_steps_goes_on(self, tiny_pipeline, shots, tmp_path):
        train(tiny_pipeline, shots, tiny_settings(steps=2, decoder_steps=3), output_dir=tmp_path)
        longer = tiny_settings(steps=5, decoder_steps=4)
        extended = train(tiny_pipeline, shots, longer, output_dir=tmp_path, resume_from_checkpoint="latest")
        assert {stage: len(losses) for stage, losses in extended.losses.items()} == {"denoiser": 3, "decoder": 1}
        assert_bit_equal(extended, train(tiny_pipeline, shots, longer))

    def test_from_a_named_checkpoint(self, tiny_pipeline, shots, tmp_path):
        whole = train(tiny_pipeline, shots, tiny_settings(), output_dir=tmp_path, checkpointing_steps=1)
        for number in (3, 4):
            (tmp_path / "decoder" / f"checkpoint-{number}").rename(tmp_path / f"elsewhere-{number}")
        resumed = train(
            tiny_pipeline, shots, tiny_settings(), output_dir=tmp_path, resume_from_checkpoint="checkpoint-3"
        )
        assert_bit_equal(resumed, whole)
        # The decoder has none of that name and goes on from its own latest.
        assert {stage: len(losses) for stage, losses in resumed.losses.items()} == {"denoiser": 1, "decoder": 2}


class TestRefusals:
    @pytest.fixture(scope="class")
    @staticmethod
    def trained(registered_pipeline, nuts, tmp_path_factory):
        """The folder of a fine-tuning of two steps."""
        folder = tmp_path_factory.mktemp("trained")
        settings = tiny_settings(steps=2, train_decoder=False)
        train(registered_pipeline, {"hex_nut": nuts}, settings, output_dir=folder)
        return folder

    @pytest.mark.parametrize(
        "changed, argument",
        [
            ({"learning_rate": 2e-4}, "`learning_rate` is 0.0002, but '.*checkpoint-2' was written with 0.0001"),
            ({"train_batch_size": 1}, "`train_batch_size` is 1, but"),
            ({"seed": 1}, "`seed` is 1, but"),
            ({"method": "full"}, "`method` is 'full', but"),
            ({"use_ema": True}, "`use_ema` is True, but"),
        ],
    )
    def test_with_another_setting_is_refused(self, registered_pipeline, shots, trained, changed, argument):
        settings = tiny_settings(steps=3, train_decoder=False, **changed)
        with pytest.raises(ValueError, match=argument):
            train(registered_pipeline, shots, settings, output_dir=trained, resume_from_checkpoint="latest")

    def test_with_other_pictures_is_refused(self, registered_pipeline, shots, trained):
        fewer, settings = {"hex_nut": shots["hex_nut"][:2]}, tiny_settings(steps=3, train_decoder=False)
        with pytest.raises(ValueError, match="`pictures`"):
            train(registered_pipeline, fewer, settings, output_dir=trained, resume_from_checkpoint="latest")

    def test_another_number_of_denoiser_steps_is_refused(self, tiny_pipeline, shots, tmp_path):
        train(tiny_pipeline, shots, tiny_settings(steps=1, decoder_latents="repainted"), output_dir=tmp_path)
        settings = tiny_settings(steps=2, decoder_latents="repainted")
        with pytest.raises(ValueError, match="`steps` is 2, but .* was written with 1"):
            train(tiny_pipeline, shots, settings, output_dir=tmp_path, resume_from_checkpoint="latest")

    @pytest.mark.parametrize("part, argument", [("train_decoder", "steps"), ("train_denoiser", "decoder_steps")])
    def test_another_end_of_a_falling_rate_is_refused(self, tiny_pipeline, shots, part, argument, tmp_path):
        options = {part: False, "lr_scheduler": "cosine"}
        train(tiny_pipeline, shots, tiny_settings(**{argument: 1}, **options), output_dir=tmp_path)
        with pytest.raises(ValueError, match=f"`{argument}` is 2, but .* was written with 1"):
            train(
                tiny_pipeline,
                shots,
                tiny_settings(**{argument: 2}, **options),
                output_dir=tmp_path,
                resume_from_checkpoint="latest",
            )

    def test_from_a_name_that_is_nowhere_is_refused_at_once(self, tiny_pipeline, shots, tmp_path):
        train(tiny_pipeline, shots, tiny_settings(), output_dir=tmp_path)
        told = []
        with pytest.raises(ValueError, match="`resume_from_checkpoint`.*'checkpoint-9'"):
            train(
                tiny_pipeline,
                shots,
                tiny_settings(),
                output_dir=tmp_path,
                resume_from_checkpoint="checkpoint-9",
                callback=told.append,
            )
        assert not told
