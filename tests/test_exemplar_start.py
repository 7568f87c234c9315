"""Exemplars as the start of repainting, and where the normal pictures travel that they are made of."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.ndimage import gaussian_filter

from anomalysd_pipeline import AnomalySDPipeline
from anomalysd_pipeline.data.tensors import resize, to_tensor
from anomalysd_pipeline.hub.exemplars import count_exemplars, without_exemplars
from anomalysd_pipeline.hub.publishing import export, push
from anomalysd_pipeline.knowledge import PackedPart
from anomalysd_pipeline.method.inpainting import decode, encode, repaint
from anomalysd_pipeline.method.masks import multi_scale_masks
from anomalysd_pipeline.method.prompts import average_embedding
from anomalysd_pipeline.method.scoring import smoothing_sigma

from .conftest import make_tiny_pipeline, warnings_of


class TestStart:
    def test_noise_is_added_to_the_exemplar_inside_the_mask_alone(self, tiny_pipeline):
        pipe, generator = tiny_pipeline, torch.Generator().manual_seed(0)
        images, others = (torch.rand(2, 3, 64, 64, generator=generator) * 2 - 1 for _ in range(2))
        latents, starts = encode(pipe.vae, images).detach(), encode(pipe.vae, others).detach()
        noise, embeds = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(2, 7, 32, generator=generator)
        masks = torch.zeros(2, 1, 64, 64)
        masks[..., 16:40, 8:32] = 1
        small = masks[..., ::4, ::4]

        def run(latents, **options):
            with torch.no_grad():
                networks = (pipe.unet, pipe.vae, pipe.scheduler)
                strength = {"noise_strength": 0.4, "num_inference_steps": 5}
                return repaint(*networks, images, latents, masks, noise, embeds, **strength, **options)

        assert torch.equal(run(latents, starts=latents), run(latents))
        mixed = small * starts + (1 - small) * latents
        assert torch.equal(run(latents, starts=starts), run(mixed))
        assert not torch.equal(run(latents, starts=starts), run(latents))

    def test_is_the_exemplar_where_pictures_are_kept_but_for_the_paper(self, tiny_pipeline, nuts, tested_nuts):
        pipe = tiny_pipeline
        pipe.add_category("hex_nut", nuts)
        assert [pipe.settings(p, "hex_nut").start for p in ("paper", "fast", "sota")] == [
            *("image", "exemplar", "exemplar")
        ]
        assert pipe.settings("paper", "hex_nut", start="exemplar").start == "exemplar"
        with pytest.raises(ValueError, match="`start` must be one of 'image', 'exemplar', got 'noise'"):
            pipe(tested_nuts[-1], category="hex_nut", start="noise")
        zero_shot = [
            pipe(tested_nuts[-1], category="bottle", start=start).pred_scores for start in ("image", "exemplar")
        ]
        assert zero_shot[0] == zero_shot[1]
        from_exemplar = pipe(tested_nuts[-1], category="hex_nut")
        from_image = pipe(tested_nuts[-1], category="hex_nut", start="image")
        assert from_exemplar.pred_scores != from_image.pred_scores
        pipe.bank.forget_shots("hex_nut")
        before = pipe(tested_nuts[-1], category="hex_nut")
        assert np.array_equal(before.anomaly_maps, from_image.anomaly_maps)
        assert pipe.settings("fast", "hex_nut").start == "image"
        with pytest.raises(ValueError, match="`start` 'exemplar' needs the normal pictures.*'hex_nut'"):
            pipe(tested_nuts[-1], category="hex_nut", start="exemplar")

    def test_needs_other_noise_unless_a_call_or_the_part_says_how_much(self, nuts):
        own = {"noise_strength": 0.2, "num_inference_steps": 5}
        pipe = make_tiny_pipeline(preset_overrides={"exemplar": own})

        def noise(**given):
            settings = pipe.settings(category="hex_nut", **given)
            return settings.noise_strength, settings.num_inference_steps

        pipe.add_category("hex_nut", nuts)
        assert noise() == (0.2, 5) and noise(start="image") == (0.4, 20) and noise(preset="paper") == (0.4, 50)
        assert noise(noise_strength=0.5) == (0.5, 20) and noise(num_inference_steps=7) == (0.4, 7)
        pipe.add_category("hex_nut", nuts, noise_strength=0.3)
        assert noise(num_inference_steps=None, noise_strength=None) == (0.3, 20)
        with pytest.raises(ValueError, match="`noise_strength` must be a number above 0"):
            make_tiny_pipeline(preset_overrides={"exemplar": {"noise_strength": 2.0}})

    def test_is_the_picture_itself_as_far_as_normal_pictures_explain_it(self, tiny_pipeline, nuts, tested_nuts):
        """What people see, and what is scored, by numpy and scipy from distances, exemplar and repainted picture."""
        pipe, picture = tiny_pipeline, to_tensor(tested_nuts[-1], 64)[None]
        pipe.add_category("hex_nut", nuts)
        settings = pipe.settings("fast", "hex_nut", noise_strength=0.5, mask_scales=(4,), prototype_weight=0.0)
        with torch.no_grad():
            found = pipe._score_maps(pipe._inputs(tested_nuts[-1:]), "hex_nut", settings)
            far = pipe.bank.distances("hex_nut", pipe.extractor(picture))
        far = gaussian_filter(resize(far, (64, 64))[0].numpy(), smoothing_sigma(64), mode="reflect")
        shares = torch.from_numpy(np.maximum(0, 1 - (pipe.bank.usual_distance("hex_nut") / far) ** 2))
        kept = (shares == 0).numpy()
        assert 0.1 < kept.mean() < 0.9
        assert np.array_equal(found.repainted[0].numpy()[:, kept], picture[0].numpy()[:, kept])

        mixed = shares * found.exemplars + (1 - shares) * picture
        with torch.no_grad():
            arguments = (pipe.unet, pipe.vae, pipe.scheduler, picture, encode(pipe.vae, picture))
            noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
            embeds = average_embedding(pipe.prompt_book.prompts("hex_nut"), pipe.tokenizer, pipe.text_encoder)
            joined = arguments[-1]
            for mask in multi_scale_masks(64, 64, (4,), "joined")[0].masks[:, None]:
                schedule = {"noise_strength": 0.5, "num_inference_steps": settings.num_inference_steps}
                painted = repaint(*arguments, mask, noise, embeds, **schedule, starts=encode(pipe.vae, mixed))
                joined = torch.where(mask[..., ::4, ::4] > 0.5, painted, joined)
            fading = 1 - (1 - shares) ** 2
            repainted = fading * decode(pipe.vae, joined) + (1 - fading) * picture
            scored = pipe.perceptual.distance_map(*map(pipe.perceptual.features, (picture, repainted)), (64, 64))
        torch.testing.assert_close(found.multi_scale, scored, atol=1e-6, rtol=1e-3)
        proposed = found.prototype_masks[0, 0].numpy()  # where the pass of its own is shown
        shown = repainted[0].numpy()
        np.testing.assert_allclose(found.repainted[0].numpy()[:, ~proposed], shown[:, ~proposed], atol=1e-5)

    def test_a_score_does_not_depend_on_the_pictures_beside_it(self, tiny_pipeline, nuts, tested_nuts):
        tiny_pipeline.add_category("hex_nut", nuts)
        together = tiny_pipeline(tested_nuts, category="hex_nut", batch_size=3).pred_scores
        alone = [tiny_pipeline(picture, category="hex_nut").pred_scores[0] for picture in tested_nuts]
        np.testing.assert_allclose(together, alone, rtol=1e-4)

    def test_calibration_leaves_a_picture_out_of_the_exemplar_too(self, tiny_pipeline, nuts, monkeypatch):
        pipe = tiny_pipeline
        pipe.add_category("hex_nut", nuts)
        usual = pipe.bank.usual_distance("hex_nut")
        score = pipe.calibrate("hex_nut", nuts).scores[1]
        others = make_tiny_pipeline()
        others.add_category("hex_nut", [nuts[0], nuts[2]])
        monkeypatch.setattr(others.bank, "usual_distance", lambda *_: usual)  # that stays the part's
        assert score == pytest.approx(others(nuts[1], category="hex_nut").pred_scores[0], rel=1e-4)

    def test_a_threshold_holds_for_the_start_it_was_set_with(self, tiny_pipeline, nuts):
        pipe = tiny_pipeline
        pipe.add_category("hex_nut", nuts)
        pipe.calibrate("hex_nut", nuts)
        assert pipe(nuts[0], category="hex_nut").thresholds[0] is not None
        with warnings_of() as said:
            assert pipe(nuts[0], category="hex_nut", start="image").thresholds == [None]
        assert "(start differ)" in said[0]


class TestTravel:
    """They are people's own pictures: they go where people send them, and stay where people say so."""

    @pytest.fixture
    def pipe(self, nuts):
        pipe = make_tiny_pipeline()
        pipe.add_category("hex_nut", nuts)
        return pipe

    def test_with_a_saved_pipeline_and_a_part(self, pipe, nuts, tmp_path):
        expected = pipe(nuts[0], category="hex_nut").pred_scores
        pipe.save_pretrained(tmp_path / "saved")
        loaded = AnomalySDPipeline.from_pretrained(tmp_path / "saved")
        np.testing.assert_array_equal(loaded(nuts[0], category="hex_nut").pred_scores, expected)
        pipe.knowledge.pack("hex_nut").save(tmp_path / "part.safetensors")
        other, known = make_tiny_pipeline(), None
        known = other.knowledge
        known.unpack("hex_nut", PackedPart.load(tmp_path / "part.safetensors"))
        other.knowledge = known
        np.testing.assert_array_equal(other(nuts[0], category="hex_nut").pred_scores, expected)

    def test_not_with_an_export_without_them(self, pipe, nuts, tmp_path):
        export(pipe, tmp_path / "with")
        export(pipe, tmp_path / "without", exemplars=False)
        assert count_exemplars(tmp_path / "with") == 3 and count_exemplars(tmp_path / "without") == 0
        shot = ((to_tensor(nuts[0], 64) + 1) * 127.5).round().byte().numpy().tobytes()
        held = [path.read_bytes().find(shot) >= 0 for path in (tmp_path / "with" / "bank").glob("*.safetensors")]
        assert held == [True]
        assert not any(path.read_bytes().find(shot) >= 0 for path in (tmp_path / "without").rglob("*.*"))
        loaded = AnomalySDPipeline.from_pretrained(tmp_path / "without")
        assert loaded.settings(category="hex_nut").start == "image"
        expected = pipe(nuts[0], category="hex_nut", start="image").pred_scores
        np.testing.assert_array_equal(loaded(nuts[0], category="hex_nut").pred_scores, expected)
        assert without_exemplars(tmp_path / "without") == {}

    def test_not_with_an_upload_without_them(self, pipe, tmp_path, hub):
        export(pipe, tmp_path / "with")
        before = {path: path.read_bytes() for path in (tmp_path / "with").rglob("*.*")}
        for name, wanted, count in (("user/with", True, 3), ("user/without", False, 0)):
            push(tmp_path / "with", name, token=hub.token, exemplars=wanted)
            files = hub.repositories[name].files("main")
            folder = tmp_path / name.replace("/", "-")
            for path, content in files.items():
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_bytes(content)
            assert count_exemplars(folder) == count
        assert before == {path: path.read_bytes() for path in (tmp_path / "with").rglob("*.*")}

    def test_with_an_adaptation_or_not(self, nuts, tmp_path):
        pipe = make_tiny_pipeline()
        pipe.adapt({"hex_nut": nuts}, steps=1, decoder_steps=1, calibrate=False)
        pipe.save_adaptation(tmp_path / "with")
        pipe.save_adaptation(tmp_path / "without", exemplars=False)
        assert count_exemplars(tmp_path / "with") == 3 and count_exemplars(tmp_path / "without") == 0
        assert not any("pixels" in key for key in load_file(tmp_path / "without" / "adaptation.safetensors"))
        for name, start in (("with", "exemplar"), ("without", "image")):
            other = make_tiny_pipeline()
            other.load_adaptation(tmp_path / name)
            assert other.settings(category="hex_nut").start == start
            expected = pipe(nuts[0], category="hex_nut", start=start).pred_scores
            np.testing.assert_allclose(other(nuts[0], category="hex_nut").pred_scores, expected, rtol=1e-3)
