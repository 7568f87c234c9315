"""The pipeline's contract: reproducibility, saving, errors."""

import io
import json

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionInpaintPipeline,
)
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.spatial.distance import cdist

from anomalysd_pipeline import AnomalySDPipeline
from anomalysd_pipeline.data.tensors import to_tensor
from anomalysd_pipeline.method.calibration import prediction_threshold, threshold_between
from anomalysd_pipeline.method.inpainting import decode, encode, repaint
from anomalysd_pipeline.method.prompts import average_embedding
from anomalysd_pipeline.method.scoring import smoothing_sigma
from anomalysd_pipeline.models.collection import collect_prototypes

from .conftest import make_tiny_pipeline, warnings_of
from .tiny import RESOLUTION, tiny_components, tiny_taesd, tiny_unet


class TestInspection:
    def test_shapes_types_and_sizes(self, tiny_pipeline, nuts):
        tiny_pipeline.add_category("hex_nut", nuts)
        odd = nuts[0].resize((90, 70))
        out = tiny_pipeline([nuts[1], odd], category="hex_nut")
        assert out.pred_scores.shape == (2,) and out.pred_scores.dtype == np.float32
        assert [m.shape for m in out.anomaly_maps] == [(64, 64), (70, 90)]
        assert all(m.dtype == np.float32 and np.isfinite(m).all() and m.min() >= 0 for m in out.anomaly_maps)
        assert out.inpainted[1].size == (90, 70) and out.inpainted[1].mode == "RGB"
        assert [m.shape for m in out.prototype_masks] == [(64, 64), (70, 90)]
        assert out.pred_labels == [None, None] and out.thresholds == [None, None] and out.pred_masks is None
        same = tiny_pipeline(nuts[:2], category="hex_nut", output_type="pt")
        assert isinstance(same.anomaly_maps, torch.Tensor) and same.anomaly_maps.shape == (2, 64, 64)

    def test_zero_shot_has_no_prototypes(self, tiny_pipeline, nuts):
        out = tiny_pipeline(nuts[0])
        assert out.prototype_masks is None and out.pred_scores[0] > 0
        assert tiny_pipeline(nuts[0], category="bottle").pred_scores[0] != out.pred_scores[0]  # other prompts

    def test_the_score_is_the_papers(self, tiny_pipeline, nuts):
        """Every stage once more, pass by pass, through the public `inpaint` and numpy."""
        pipe = tiny_pipeline
        pipe.add_category("hex_nut", nuts[:2])
        settings = {"mask_scales": (1, 2), "mask_grouping": "none", "feature_weight": 0.3, "top_share": 0.05}
        settings["start"] = "image"
        out = pipe(nuts[2], category="hex_nut", **settings)
        x = to_tensor(nuts[2], RESOLUTION)[None]
        embeds = average_embedding(pipe.prompt_book.prompts("hex_nut"), pipe.tokenizer, pipe.text_encoder)
        noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        reference = pipe.perceptual.features(x)

        def repaint(mask):
            return pipe.inpaint(x, mask, embeds, noise_strength=0.4, num_inference_steps=5, noise=noise)

        def difference(repainted):
            return (
                pipe.perceptual.distance_map(reference, pipe.perceptual.features(repainted), (64, 64))[0]
                .detach()
                .numpy()
            )

        by_scale = []
        for k in (1, 2):
            total, cell = np.zeros((64, 64)), 64 // k
            for i in range(k):
                for j in range(k):
                    mask = torch.zeros(1, 1, 64, 64)
                    mask[..., i * cell : (i + 1) * cell, j * cell : (j + 1) * cell] = 1
                    total += mask[0, 0].numpy() * difference(repaint(mask))
            by_scale.append(total)
        multi_scale = 2 / (1 / by_scale[0] + 1 / by_scale[1])
        with torch.no_grad():
            bank, _ = collect_prototypes(pipe.extractor, [to_tensor(p, RESOLUTION) for p in nuts[:2]])
            psi = pipe.extractor(x)[0].permute(1, 2, 0).numpy()
        bank = bank.numpy()
        far = cdist(psi.reshape(-1, psi.shape[-1]), bank, "sqeuclidean").min(-1).reshape(psi.shape[:-1])
        cuts = np.sort(far.ravel())[:-1]
        cost = [far[far > r].var() + far[far <= r].var() for r in cuts]
        mask = (
            (far > cuts[int(np.argmin(cost))])
            .astype(np.float32)
            .repeat(64 // far.shape[0], 0)
            .repeat(64 // far.shape[1], 1)
        )
        assert np.array_equal(out.prototype_masks[0], mask > 0)
        guided = mask * difference(repaint(torch.from_numpy(mask)[None, None]))
        far = far / np.square(bank).sum(-1).mean()
        far = torch.nn.functional.interpolate(torch.from_numpy(far)[None, None], size=64, mode="bilinear")[
            0, 0
        ].numpy()
        fused = 0.9 * multi_scale + 0.1 * guided + 0.3 * far
        expected = gaussian_filter(fused, smoothing_sigma(RESOLUTION), mode="reflect")
        np.testing.assert_allclose(out.anomaly_maps[0], expected, rtol=1e-3, atol=1e-6)
        highest = np.sort(expected.ravel())[-int(0.05 * expected.size) :]
        assert out.pred_scores[0] == pytest.approx(highest.mean(), rel=1e-3)
        maximum = pipe(nuts[2], category="hex_nut", **{**settings, "top_share": 0.0})
        np.testing.assert_allclose(maximum.pred_scores[0], expected.max(), rtol=1e-3)

    def test_joined_passes_of_a_scale_are_one_repainted_picture(self, tiny_pipeline, nuts):
        """Joined by numpy from what diffusers' own loop gives of each mask, then decoded and compared once."""
        pipe = tiny_pipeline
        pipe.add_category("hex_nut", nuts[:2])
        settings = {"mask_scales": (2, 4), "mask_grouping": "joined", "start": "image", "output_type": "pt"}
        settings |= {"prototype_weight": 0.3, "noise_strength": 0.4, "num_inference_steps": 5}
        out = pipe(nuts[2], category="hex_nut", batch_size=3, **settings)
        x = to_tensor(nuts[2], RESOLUTION)[None]
        embeds = average_embedding(pipe.prompt_book.prompts("hex_nut"), pipe.tokenizer, pipe.text_encoder)
        noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            latents, reference = encode(pipe.vae, x), pipe.perceptual.features(x)

        def difference(masks):
            joined = latents.clone()
            for mask in masks:
                with torch.no_grad():
                    schedule = {"noise_strength": 0.4, "num_inference_steps": 5}
                    own = repaint(pipe.unet, pipe.vae, pipe.scheduler, x, latents, mask, noise, embeds, **schedule)
                small = mask[:, :, ::4, ::4].numpy() > 0.5
                joined = torch.from_numpy(np.where(small, own.numpy(), joined.numpy()))
            with torch.no_grad():
                features = pipe.perceptual.features(decode(pipe.vae, joined))
                return pipe.perceptual.distance_map(reference, features, (64, 64))[0].numpy()

        def cells(k):
            kinds = np.arange(64) // (64 // k) % 2
            each = [np.outer(kinds == i, kinds == j) for i in range(2) for j in range(2)]
            return [torch.from_numpy(mask.astype(np.float32))[None, None] for mask in each]

        by_scale = [difference(cells(k)) for k in (2, 4)]
        proposed = out.prototype_masks[0].float().view(1, 1, 64, 64)
        guided = proposed[0, 0].numpy() * difference([proposed])
        fused = 0.7 * 2 / (1 / by_scale[0] + 1 / by_scale[1]) + 0.3 * guided
        expected = gaussian_filter(fused, smoothing_sigma(RESOLUTION), mode="reflect")
        np.testing.assert_allclose(out.anomaly_maps[0].numpy(), expected, rtol=1e-3, atol=1e-6)

    def test_same_seed_same_map_whatever_the_batch(self, tiny_pipeline, nuts, tested_nuts):
        tiny_pipeline.add_category("hex_nut", nuts)

        def maps(batch_size, seed=7):
            generator = torch.Generator().manual_seed(seed)
            return tiny_pipeline(
                tested_nuts, category="hex_nut", generator=generator, batch_size=batch_size
            ).anomaly_maps

        np.testing.assert_allclose(maps(1), maps(16), rtol=1e-4, atol=1e-6)
        assert np.array_equal(maps(5), maps(5))
        assert np.abs(maps(5) - maps(5, seed=8)).max() > 1e-5

    def test_default_noise_makes_a_score_independent_of_its_neighbors(self, tiny_pipeline, nuts):
        together = tiny_pipeline(nuts).pred_scores
        alone = [tiny_pipeline(nut).pred_scores[0] for nut in nuts]
        np.testing.assert_allclose(together, alone, rtol=1e-5)

    def test_grouping_runs_the_paper_s_number_of_passes(self, tiny_pipeline, nuts):
        steps = []

        def count(pipe, step, timestep, tensors):
            steps.append((step, timestep, len(tensors["latents"])))

        scales = {"mask_scales": (1, 2, 4, 8), "callback_on_step_end": count}
        tiny_pipeline(nuts[0], mask_grouping="grouped", batch_size=4, **scales)
        assert sum(size for _, _, size in steps) == 13 * 2  # 5 steps at strength 0.4 run 2
        assert [step for step, _, _ in steps] == list(range(len(steps)))
        assert len({timestep for _, timestep, _ in steps}) == 2
        steps.clear()
        tiny_pipeline(nuts[0], mask_grouping="none", batch_size=85, **scales)
        assert sum(size for _, _, size in steps) == 85 * 2

    def test_callback_can_change_latents_and_stop(self, tiny_pipeline, nuts):
        plain = tiny_pipeline(nuts[0]).pred_scores
        changed = tiny_pipeline(
            nuts[0], callback_on_step_end=lambda p, i, t, k: {"latents": k["latents"] * 0}
        ).pred_scores
        assert abs(plain - changed) > 1e-6

        def stop(pipe, step, timestep, tensors):
            raise InterruptedError

        with pytest.raises(InterruptedError):
            tiny_pipeline(nuts[0], callback_on_step_end=stop)
        assert tiny_pipeline(nuts[0]).pred_scores == plain  # nothing was left behind

    def test_return_dict_false_gives_the_same_fields(self, tiny_pipeline, nuts):
        out = tiny_pipeline(nuts[0])
        as_tuple = tiny_pipeline(nuts[0], return_dict=False)
        assert np.array_equal(as_tuple[0], out.pred_scores)

    @pytest.mark.parametrize(
        "scheduler", [DDPMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler, LCMScheduler]
    )
    def test_other_schedulers(self, scheduler, tiny_pipeline, nuts):
        """Also with noise of their own: it follows from the generator, and is the same in a batch of any size."""
        pipe = tiny_pipeline
        before = pipe(nuts[0]).anomaly_maps
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)

        def maps(seed, **given):
            given |= {"num_inference_steps": 10, "mask_scales": (2,)}
            return pipe(nuts[0], generator=torch.Generator().manual_seed(seed), **given).anomaly_maps

        found = maps(1)
        assert np.isfinite(found).all() and not np.array_equal(found, before)
        assert np.array_equal(maps(1), found) and not np.allclose(maps(2), found)
        np.testing.assert_allclose(maps(1, batch_size=1), found, rtol=1e-4, atol=1e-6)

    def test_autoencoder_tiny(self, tiny_pipeline, nuts):
        tiny_pipeline.add_category("hex_nut", nuts)
        torch.manual_seed(0)
        tiny_pipeline.vae = tiny_taesd()
        assert np.isfinite(tiny_pipeline(nuts[0], "hex_nut").anomaly_maps).all()

    def test_bfloat16(self, tiny_pipeline, nuts):
        tiny_pipeline.to(torch.bfloat16)
        tiny_pipeline.add_category("hex_nut", nuts)
        out = tiny_pipeline(nuts[0], category="hex_nut")
        assert out.anomaly_maps.dtype == np.float32 and np.isfinite(out.anomaly_maps).all()

    def test_memory_shortage_halves_the_batch_and_keeps_the_result(self, nuts):
        class SmallMemory(type(tiny_components()["vae"])):
            """A VAE that cannot decode more than 3 pictures at once."""

            def decode(self, latents, **kwargs):
                if len(latents) > 3:
                    raise torch.OutOfMemoryError("CUDA out of memory.")
                return super().decode(latents, **kwargs)

        pipe = make_tiny_pipeline()
        expected = pipe(nuts[:2], batch_size=13).anomaly_maps
        pipe.vae.__class__ = SmallMemory
        np.testing.assert_allclose(pipe(nuts[:2], batch_size=13).anomaly_maps, expected, rtol=1e-4, atol=1e-6)

    def test_steps_are_counted_on_after_a_memory_shortage(self, nuts):
        class SmallMemory(type(tiny_components()["perceptual"])):
            """A distance that cannot take more than 3 pictures at once, when all their steps are done."""

            def features(self, x):
                if len(x) > 3:
                    raise torch.OutOfMemoryError("CUDA out of memory.")
                return super().features(x)

        steps, pipe = [], make_tiny_pipeline()
        pipe.perceptual.__class__ = SmallMemory

        def count(pipe, step, timestep, tensors):
            steps.append(step)

        scales = {"mask_scales": (1, 2, 4, 8), "mask_grouping": "grouped"}
        pipe(nuts[0], **scales, callback_on_step_end=count, batch_size=13)  # 13 passes of 2 steps
        assert steps == [0, 1, 0, 1, *range(10)]  # batches of 13 and 6 that failed, then 3, 3, 3, 3 and 1
        steps.clear()
        pipe(nuts[0], **{**scales, "mask_grouping": "joined"}, callback_on_step_end=count, batch_size=13)
        assert steps == [0, 1]  # what is joined is compared after all steps

    def test_other_runtime_errors_are_not_taken_for_a_shortage(self, tiny_pipeline, nuts):
        def fail(pipe, step, timestep, tensors):
            raise RuntimeError("broken")

        with pytest.raises(RuntimeError, match="broken"):
            tiny_pipeline(nuts[0], callback_on_step_end=fail)


class TestFasterNetworks:
    """Those that users of diffusers bring."""

    def test_lora_weights_are_merged(self, tiny_pipeline, nuts, tmp_path):
        pipe, own, other = tiny_pipeline, tiny_pipeline.unet, tiny_components()["unet"]  # with the same weights
        torch.manual_seed(0)
        other.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=["to_q"]))
        state = convert_state_dict_to_diffusers(get_peft_model_state_dict(other))
        StableDiffusionInpaintPipeline.save_lora_weights(tmp_path / "lora", unet_lora_layers=state)
        before = pipe(nuts[0]).anomaly_maps
        pipe.add_category("hex_nut", nuts[:2])
        pipe.calibrate("hex_nut", nuts[:2], mask_scales=(1,))
        pipe.load_lora_weights(tmp_path / "lora")
        inputs = torch.randn(1, 9, 16, 16), 10, torch.randn(1, 77, 32)
        with torch.no_grad():
            found, expected, plain = (unet(*inputs)[0] for unet in (pipe.unet, other, own))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(found, plain)
        after = pipe(nuts[0]).anomaly_maps
        assert np.isfinite(after).all() and not np.allclose(after, before)
        assert pipe.config.categories["hex_nut"]["calibration"] is None
        pipe.save_pretrained(tmp_path / "saved")
        assert np.array_equal(AnomalySDPipeline.from_pretrained(tmp_path / "saved")(nuts[0]).anomaly_maps, after)
        pipe.unet = own  # left as it was, for other pipelines that share it
        assert np.array_equal(pipe(nuts[0]).anomaly_maps, before)

    def test_other_weights_are_no_lora(self, registered_pipeline):
        unet = registered_pipeline.unet
        with pytest.raises(ValueError, match="LoRA"):
            registered_pipeline.load_lora_weights({"unet.conv_in.weight": torch.zeros(1)})
        assert registered_pipeline.unet is unet

    def test_compiled_networks(self, tiny_pipeline, nuts, tmp_path):
        """As they are wired: compiling takes a minute, so they are told to compute without."""
        pipe = tiny_pipeline
        pipe.add_category("hex_nut", nuts[:2])
        pipe.calibrate("hex_nut", nuts[:2], mask_scales=(1,))
        expected = pipe(nuts[0], "hex_nut", mask_scales=(1,))
        pipe.unet, pipe.vae = (torch.compile(net, backend="eager") for net in (pipe.unet, pipe.vae))
        with torch.compiler.set_stance("force_eager"):
            found = pipe(nuts[0], "hex_nut", mask_scales=(1,))
        assert np.array_equal(found.anomaly_maps, expected.anomaly_maps)
        assert found.thresholds == expected.thresholds != [None]
        pipe.save_pretrained(tmp_path)
        again = AnomalySDPipeline.from_pretrained(tmp_path)(nuts[0], "hex_nut", mask_scales=(1,))
        assert np.array_equal(again.anomaly_maps, expected.anomaly_maps) and again.thresholds == expected.thresholds


class TestCategories:
    def test_calibration_gives_labels_and_masks(self, tiny_pipeline, nuts):
        tiny_pipeline.add_category("hex_nut", nuts)
        record = tiny_pipeline.calibrate("hex_nut", nuts)
        assert record.held_out and len(record.scores) == record.pictures == 3
        assert record.threshold == pytest.approx(prediction_threshold(record.scores, 0.05), rel=1e-6)
        out = tiny_pipeline(nuts, category="hex_nut")
        assert out.thresholds == [record.threshold] * 3
        assert out.pred_labels == [bool(s > record.threshold) for s in out.pred_scores]
        defective = np.array(out.pred_labels)[:, None, None]
        assert np.array_equal(out.pred_masks, (out.anomaly_maps > record.threshold) & defective)
        json.dumps(dict(tiny_pipeline.config.categories))

    @pytest.mark.parametrize("part", ["scheduler", "vae"])
    def test_a_threshold_holds_for_the_scheduler_and_the_vae_it_was_set_with(
        self, part, tiny_pipeline, nuts, tmp_path
    ):
        def thresholds(pipe):
            return pipe(nuts[0], "hex_nut", mask_scales=(1,)).thresholds

        def save(pipe, name):
            pipe.save_pretrained(tmp_path / name)
            return tmp_path / name

        pipe, settings = tiny_pipeline, {"mask_scales": (1,)}
        pipe.add_category("hex_nut", nuts)
        record = pipe.calibrate("hex_nut", nuts, **settings)
        folder = save(pipe, "own")
        assert "classes" not in pipe.config.categories["hex_nut"]["calibration"]
        own = getattr(pipe, part)
        other = LCMScheduler.from_config(pipe.scheduler.config) if part == "scheduler" else tiny_taesd()
        setattr(pipe, part, other)
        with warnings_of() as said:
            assert thresholds(pipe) == [None]
        assert f"({part} differ)" in said[0]
        assert thresholds(AnomalySDPipeline.from_pretrained(folder, **{part: other})) == [None]
        again = AnomalySDPipeline.from_pretrained(save(pipe, "other"))
        assert type(getattr(again, part)) is type(other) and thresholds(again) == [None]
        setattr(again, part, own)
        assert thresholds(again) == [record.threshold]
        new = pipe.calibrate("hex_nut", nuts[:2], **settings)  # the third picture's score was another's
        assert new.pictures == 2 and new.classes == {part: type(other).__name__}
        assert thresholds(pipe) == thresholds(AnomalySDPipeline.from_pretrained(save(pipe, "new"))) == [new.threshold]
        setattr(pipe, part, own)
        assert thresholds(pipe) == [None]

    def test_nothing_is_marked_in_a_picture_that_is_normal_as_a_whole(self, tiny_pipeline, nuts, tested_nuts):
        """With the mean of the whole map for a score, some pixels are always above it."""
        tiny_pipeline.add_category("hex_nut", nuts)
        record = tiny_pipeline.calibrate("hex_nut", nuts, top_share=1.0)
        score = float(tiny_pipeline(tested_nuts[-1], category="hex_nut", top_share=1.0).pred_scores[0])
        for threshold, defective in ((score / 2, True), (1.05 * score, False)):
            changed = {**record.to_dict(), "threshold": threshold}
            tiny_pipeline._store_category("hex_nut", calibration=changed)
            out = tiny_pipeline(tested_nuts[-1], category="hex_nut", top_share=1.0)
            above = out.anomaly_maps > threshold
            assert above.any() and out.pred_labels == [defective]
            assert np.array_equal(out.pred_masks, above & defective)

    def test_the_threshold_of_one_picture_is_called_a_guess(self, tiny_pipeline, nuts):
        tiny_pipeline.add_category("hex_nut", nuts[:1])
        with warnings_of() as said:
            record = tiny_pipeline.calibrate("hex_nut", nuts[:1], preset="fast")
        assert "The threshold of 'hex_nut' is a guess" in said[0] and not record.held_out
        with warnings_of() as said:
            assert tiny_pipeline.calibrate("hex_nut", nuts, preset="fast").pictures == 2
        assert said == []

    def test_pictures_of_the_bank_score_as_if_they_were_new(self, tiny_pipeline, nuts, monkeypatch):
        """As against a bank that was made without them, times what a larger bank finds closer."""
        tiny_pipeline.add_category("hex_nut", nuts)
        usual = tiny_pipeline.bank.usual_distance("hex_nut", tiny_pipeline.extractor.parts)
        settings = {"feature_weight": 10.0, "top_share": 0.01}
        record = tiny_pipeline.calibrate("hex_nut", nuts, **settings)
        for index, score in enumerate(record.scores):
            others = make_tiny_pipeline()
            others.add_category("hex_nut", [*nuts[:index], *nuts[index + 1 :]])
            # What is usual is measured between all good pictures, in a calibration as in an inspection.
            monkeypatch.setattr(others.bank, "usual_distance", lambda *_: usual)
            new = others(nuts[index], category="hex_nut", **settings).pred_scores[0]
            assert score == pytest.approx(new * (2 / 3) ** 0.2, rel=5e-4)
            assert new > tiny_pipeline(nuts[index], category="hex_nut", **settings).pred_scores[0]

    def test_further_pictures_move_the_threshold(self, tiny_pipeline, nuts, tested_nuts):
        tiny_pipeline.add_category("hex_nut", nuts)
        settings = {"feature_weight": 10.0, "top_share": 0.01}
        first = tiny_pipeline.calibrate("hex_nut", nuts, **settings)
        more = tiny_pipeline.calibrate("hex_nut", tested_nuts[:1], **settings)
        new = tiny_pipeline(tested_nuts[0], category="hex_nut", **settings)
        assert more.scores == [*first.scores, pytest.approx(float(new.pred_scores[0]), rel=1e-6)]
        assert new.thresholds == [more.threshold] and more.threshold != first.threshold

    def test_copies_change_no_threshold(self, tiny_pipeline, nuts):
        """The same pictures once more as JPEG: neither independent of the others, nor new."""
        copies = []
        for nut in nuts:
            file = io.BytesIO()
            nut.save(file, "JPEG", quality=90)
            copies.append(Image.open(file).convert("RGB"))
        found = []
        for pictures in (nuts, [*nuts, *copies], [copies[1], *nuts, copies[0]]):
            tiny_pipeline.add_category("hex_nut", pictures)
            found.append(tiny_pipeline.calibrate("hex_nut", pictures))
        assert [record.pictures for record in found] == [3, 3, 3]
        assert found[1].threshold == found[0].threshold
        assert found[2].threshold == pytest.approx(found[0].threshold, rel=0.02)
        with warnings_of() as said:
            tiny_pipeline.add_category("hex_nut", [nuts[0], copies[0]])
        assert "1 of the 2 normal pictures of 'hex_nut' are copies of others" in said[0]
        assert not tiny_pipeline.calibrate("hex_nut", [nuts[0], copies[0]]).held_out

    def test_known_defective_pictures_set_the_threshold(self, tiny_pipeline, nuts, tested_nuts):
        tiny_pipeline.add_category("nut", nuts)
        alone = tiny_pipeline.calibrate("nut", nuts)
        with warnings_of() as said:
            both = tiny_pipeline.calibrate("nut", nuts, defective_images=tested_nuts[2:])
        scores = tiny_pipeline(tested_nuts[2:], category="nut").pred_scores
        assert both.defective_scores == pytest.approx(scores.tolist(), rel=1e-4)
        assert both.threshold == pytest.approx(threshold_between(alone.scores, scores), rel=1e-4)
        # Random weights tell no defect.
        assert both.expected_misses > 0.05 and "cannot keep false alarms and misses to 5.0%" in said[-1]
        assert tiny_pipeline(nuts[0], category="nut").thresholds == [both.threshold]

    def test_equal_pictures_are_one(self, tiny_pipeline, nuts):
        tiny_pipeline.add_category("hex_nut", [nuts[0], nuts[1], nuts[0]])
        assert tiny_pipeline.config.categories["hex_nut"]["shots"] == 2
        other = make_tiny_pipeline()
        other.add_category("hex_nut", nuts[:2])
        assert torch.equal(tiny_pipeline.bank["hex_nut"], other.bank["hex_nut"])
        found = [
            pipe.calibrate("hex_nut", pictures).scores
            for pipe, pictures in ((tiny_pipeline, nuts[:2] * 2), (other, nuts[:2]))
        ]
        assert found[0] == found[1] and len(found[0]) == 2

    def test_what_is_not_finite_has_no_score(self, nuts):
        """One weight that is NaN: the score was 0, and the part normal."""
        pipe = make_tiny_pipeline()
        pipe.add_category("hex_nut", nuts)
        pipe.calibrate("hex_nut", nuts)
        with torch.no_grad():
            pipe.vae.decoder.conv_out.weight[0, 0, 0, 0] = torch.nan
        with pytest.raises(ValueError, match="Picture 1 of 2 has no score, because the repainting gave values that"):
            pipe(nuts[:2], category="hex_nut")
        with pytest.raises(ValueError, match="has no score, because the repainting"):
            pipe.calibrate("hex_nut", nuts)

    def test_a_bank_that_is_not_finite_gives_no_score(self, nuts):
        pipe = make_tiny_pipeline()
        pipe.add_category("hex_nut", nuts)
        pipe.bank["hex_nut"][3] = torch.nan
        with pytest.raises(ValueError, match="Picture 1 of 1 has no score, because the comparison with the normal"):
            pipe(nuts[0], category="hex_nut")

    def test_other_settings_have_no_threshold(self, tiny_pipeline, nuts):
        tiny_pipeline.add_category("hex_nut", nuts[:1])
        tiny_pipeline.calibrate("hex_nut", nuts[:1])
        assert tiny_pipeline(nuts[0], category="hex_nut").thresholds != [None]
        assert tiny_pipeline(nuts[0], category="hex_nut", noise_strength=0.8).thresholds == [None]

    def test_new_pictures_forget_the_calibration(self, tiny_pipeline, nuts):
        tiny_pipeline.add_category("hex_nut", nuts)
        tiny_pipeline.calibrate("hex_nut", nuts)
        tiny_pipeline.add_category("hex_nut", nuts[:1])
        assert tiny_pipeline(nuts[0], category="hex_nut").thresholds == [None]

    def test_category_strength_is_the_default_of_its_calls(self, tiny_pipeline, nuts):
        tiny_pipeline.add_category("hex_nut", nuts, noise_strength=0.8)
        assert tiny_pipeline.settings(category="hex_nut").noise_strength == 0.8
        assert tiny_pipeline.settings(category="hex_nut", noise_strength=0.6).noise_strength == 0.6
        assert tiny_pipeline.settings(category="other").noise_strength == 0.4

    def test_custom_prompts_reach_the_embedding(self, tiny_pipeline, nuts, tested_nuts):
        tiny_pipeline.add_category("hex_nut", nuts, prompts=["a shiny thing."])
        assert tiny_pipeline.prompt_book.prompts("hex_nut") == ["a shiny thing."]
        first = tiny_pipeline(tested_nuts[-1], category="hex_nut").pred_scores
        tiny_pipeline.add_category("hex_nut", nuts, prompts=["zebra."])
        assert tiny_pipeline(tested_nuts[-1], category="hex_nut").pred_scores != first

    def test_failed_registration_changes_nothing(self, tiny_pipeline, nuts, tmp_path):
        tiny_pipeline.add_category("hex_nut", nuts)
        before = json.dumps(dict(tiny_pipeline.config.categories))
        bank = tiny_pipeline.bank["hex_nut"].clone()
        bad = tmp_path / "bad.png"
        bad.write_text("no picture")
        with pytest.raises(ValueError, match="bad.png"):
            tiny_pipeline.add_category("hex_nut", [nuts[0], bad], prompts="new")
        with pytest.raises(ValueError, match="prompts"):
            tiny_pipeline.add_category("hex_nut", nuts[:1], prompts=[])
        assert json.dumps(dict(tiny_pipeline.config.categories)) == before
        assert torch.equal(tiny_pipeline.bank["hex_nut"], bank)

    def test_remove(self, tiny_pipeline, nuts):
        tiny_pipeline.add_category("hex_nut", nuts)
        tiny_pipeline.remove_category("hex_nut")
        assert tiny_pipeline.categories == [] and "hex_nut" not in tiny_pipeline.bank
        with pytest.raises(ValueError, match="hex_nut"):
            tiny_pipeline.remove_category("hex_nut")


class TestSaving:
    def test_round_trip_is_bit_equal(self, tiny_pipeline, nuts, tmp_path):
        tiny_pipeline.add_category("hex nut/5".replace("/", "."), nuts, prompts={"coarse": ["A."], "fine": ["B ü."]})
        tiny_pipeline.add_category("washer", nuts[:1], noise_strength=0.6)
        tiny_pipeline.calibrate("washer", nuts[:1])
        before = {c: tiny_pipeline(nuts, category=c) for c in tiny_pipeline.categories}
        tiny_pipeline.save_pretrained(tmp_path / "saved")
        assert not [p for p in (tmp_path / "saved").rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl")]
        index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
        assert index["_class_name"] == "AnomalySDPipeline"
        loaded = AnomalySDPipeline.from_pretrained(tmp_path / "saved")
        loaded.set_progress_bar_config(disable=True)
        assert loaded.categories == ["hex nut.5", "washer"]
        for category, out in before.items():
            again = loaded(nuts, category=category)
            assert np.array_equal(again.anomaly_maps, out.anomaly_maps)
            assert again.thresholds == out.thresholds and again.pred_labels == out.pred_labels
        assert loaded.prompt_book.prompts("hex nut.5") == ["A.", "B ü."]

    def test_a_bare_inpainting_checkpoint_gets_the_missing_parts(self, tmp_path, nuts):
        import timm
        from safetensors.torch import save_file
        from torchvision.models import alexnet

        components = tiny_components()
        bare = StableDiffusionInpaintPipeline(
            **{k: components[k] for k in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")},
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        bare.save_pretrained(tmp_path / "bare")
        backbone = timm.create_model("tf_efficientnet_b0", pretrained=False)
        save_file(backbone.state_dict(), tmp_path / "b0.safetensors")
        torch.save(alexnet(weights=None).state_dict(), tmp_path / "alexnet.pth")
        pipe = AnomalySDPipeline.from_pretrained(
            tmp_path / "bare",
            timm_model="tf_efficientnet_b0",
            timm_checkpoint=tmp_path / "b0.safetensors",
            alexnet_checkpoint=tmp_path / "alexnet.pth",
            dtype=torch.float32,
        )
        assert pipe.config.resolution == 512 and pipe.config.default_preset == "paper"
        assert torch.equal(
            pipe.extractor.model.state_dict()["conv_stem.weight"], backbone.state_dict()["conv_stem.weight"]
        )
        pipe.set_progress_bar_config(disable=True)
        pipe.register_to_config(resolution=64)
        pipe.add_category("nut", nuts)
        assert np.isfinite(pipe(nuts[0], category="nut", preset="fast", num_inference_steps=3).anomaly_maps).all()
        pipe.save_pretrained(tmp_path / "full")  # and from then on it needs none of those files
        assert AnomalySDPipeline.from_pretrained(tmp_path / "full").categories == ["nut"]

    def test_components_given_by_the_caller_win(self, tiny_pipeline_folder):
        vae = tiny_taesd()
        assert AnomalySDPipeline.from_pretrained(tiny_pipeline_folder, vae=vae).vae is vae


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "named"),
        [
            ({"preset": "quick"}, "preset"),
            ({"noise_strength": 0.0}, "noise_strength"),
            ({"noise_strength": 1.2}, "noise_strength"),
            ({"noise_strength": "high"}, "noise_strength"),
            ({"num_inference_steps": 0}, "num_inference_steps"),
            ({"num_inference_steps": 2}, "num_inference_steps"),
            ({"num_inference_steps": 2.5}, "num_inference_steps"),
            ({"mask_scales": ()}, "mask_scales"),
            ({"mask_scales": "1248"}, "mask_scales"),
            ({"mask_scales": (0,)}, "mask_scales"),
            ({"mask_scales": (1, 100)}, "scales"),
            ({"mask_grouping": "all"}, "mask_grouping"),
            ({"prototype_weight": 2}, "prototype_weight"),
            ({"feature_weight": -1}, "feature_weight"),
            ({"feature_weight": float("nan")}, "feature_weight"),
            ({"guidance_scale": 0.5}, "guidance_scale"),
            ({"batch_size": 0}, "batch_size"),
            ({"output_type": "pil"}, "output_type"),
            ({"category": "../up"}, "category"),
            ({"category": ""}, "category"),
            ({"callback_on_step_end_tensor_inputs": ["weights"]}, "callback_on_step_end_tensor_inputs"),
            ({"generator": [torch.Generator()] * 2}, "generator"),
            ({"generator": 5}, "`generator` must be a `torch.Generator`.*got 5"),
            ({"generator": [5]}, "`generator` must be"),
        ],
    )
    def test_call(self, registered_pipeline, nuts, arguments, named):
        with pytest.raises(ValueError, match=named):
            registered_pipeline(nuts[0], **arguments)

    def test_a_precision_that_is_none(self, nuts):
        pipe = make_tiny_pipeline()
        pipe.mixed_precision = "bogus"
        with pytest.raises(ValueError, match="`mixed_precision` must be 'no', 'bf16' or 'fp16', got 'bogus'"):
            pipe(nuts[0])

    def test_no_pictures(self, registered_pipeline):
        for nothing in (None, []):
            with pytest.raises(ValueError, match="`image`"):
                registered_pipeline(nothing)

    def test_calibrate(self, registered_pipeline, nuts):
        with pytest.raises(ValueError, match="add_category"):
            registered_pipeline.calibrate("washer", nuts)
        for rate in (0, 0.5, 1):
            with pytest.raises(ValueError, match="false_alarm_rate"):
                registered_pipeline.calibrate("hex_nut", nuts, false_alarm_rate=rate)
        with pytest.raises(ValueError, match="normal_images"):
            registered_pipeline.calibrate("hex_nut", [])

    @pytest.mark.parametrize("channels", [4, 8])
    def test_unet_without_nine_channels(self, channels):
        with pytest.raises(ValueError, match=f"9 input channels, but it has {channels}"):
            make_tiny_pipeline(unet=tiny_unet(channels))

    def test_resolution_that_is_no_multiple_of_the_factor(self):
        with pytest.raises(ValueError, match="`resolution`"):
            make_tiny_pipeline(resolution=66)
