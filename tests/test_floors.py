"""The floors against computations written out by hand, and the contract that all detectors share."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline
from PIL import Image
from scipy.ndimage import gaussian_filter

from anomalysd_pipeline.data.tensors import to_tensor
from anomalysd_pipeline.evaluation.detector import Detector, Prediction
from anomalysd_pipeline.evaluation.floors import ColorPatchFloor, PlainInpaintingFloor
from anomalysd_pipeline.synthetic import normal_images, test_samples

from .conftest import make_tiny_pipeline
from .tiny import RESOLUTION

SIDE, GRID = 64, 8


@pytest.fixture(scope="module")
def tests():
    """Two good and two defective pictures of the product of `nuts`."""
    return [Image.fromarray(sample.image) for sample in test_samples("hex_nut", 2, 2, seed=5, size=SIDE)]


def small_floor(**options):
    return ColorPatchFloor(**{"resolution": SIDE, "grid": GRID, **options})


def patches_by_hand(image: Image.Image) -> np.ndarray:
    """[GRID, GRID, 27]: the colors in [-1, 1] around each cell, mid-gray outside."""
    pixels = np.asarray(image, dtype=np.float64) / 127.5 - 1
    cell = SIDE // GRID
    cells = np.zeros((GRID + 2, GRID + 2, 3))
    for row in range(GRID):
        for column in range(GRID):
            block = pixels[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell]
            cells[row + 1, column + 1] = block.mean(axis=(0, 1))
    around = [[cells[r : r + 3, c : c + 3].transpose(2, 0, 1).ravel() for c in range(GRID)] for r in range(GRID)]
    return np.array(around)


class TestColorPatches:
    def test_equals_brute_force(self, nuts, tests):
        floor = small_floor()
        floor.fit("nut", nuts, seed=0)
        turned = [image.rotate(angle) for image in nuts for angle in (0, 90, 180, 270)]
        bank = np.concatenate([patches_by_hand(image).reshape(-1, 27) for image in turned])
        for image in tests:
            distances = np.array(
                [[np.sqrt(((bank - v) ** 2).sum(axis=1).min()) for v in row] for row in patches_by_hand(image)]
            )
            large = torch.nn.functional.interpolate(
                torch.from_numpy(distances)[None, None], size=(SIDE, SIDE), mode="bilinear"
            )[0, 0].numpy()
            expected = gaussian_filter(large, sigma=4 * SIDE / 512, mode="reflect")
            found = floor.predict("nut", image)
            assert found.anomaly_map.dtype == np.float32
            np.testing.assert_allclose(found.anomaly_map, expected, atol=1e-4)
            assert found.score == pytest.approx(expected.max(), abs=1e-4)
            assert expected.max() > 0.05

    def test_normal_pictures_and_their_quarter_turns_score_zero(self, nuts):
        floor = small_floor()
        floor.fit("nut", nuts[:1], seed=0)
        assert floor.predict("nut", nuts[0]).score == pytest.approx(0, abs=1e-3)
        assert floor.predict("nut", nuts[0].rotate(90)).score == pytest.approx(0, abs=1e-3)
        without = small_floor(rotations=1)
        without.fit("nut", nuts[:1], seed=0)
        assert without.predict("nut", nuts[0].rotate(90)).score > 0.05

    def test_a_large_stain_is_found_where_it_is(self, nuts):
        floor = small_floor()
        floor.fit("nut", nuts[:2], seed=0)
        stained = nuts[2].copy()
        stained.paste((255, 0, 255), (40, 8, 56, 24))
        found = floor.predict("nut", stained)
        row, column = np.unravel_index(found.anomaly_map.argmax(), found.anomaly_map.shape)
        assert 8 <= row < 24 and 40 <= column < 56
        assert found.score > floor.predict("nut", nuts[2]).score

    @pytest.mark.parametrize("options", [{"resolution": 60}, {"grid": 0}, {"rotations": 0}])
    def test_bad_options(self, options):
        with pytest.raises(ValueError, match="`resolution` must be a multiple of `grid`"):
            small_floor(**options)


class TestWhatDetectorsShare:
    """Through the color floor, the smallest detector that learns."""

    def test_a_fit_forgets_the_one_before(self, nuts, tests):
        once, twice = small_floor(), small_floor()
        once.fit("nut", nuts[1:], seed=0)
        twice.fit("nut", nuts[:1], seed=0)
        before = twice.predict("nut", tests[0]).score
        twice.fit("nut", nuts[1:], seed=0)
        assert twice.predict("nut", tests[0]).score == once.predict("nut", tests[0]).score != before

    def test_categories_do_not_disturb_each_other(self, nuts, tests):
        floor = small_floor()
        floor.fit("nut", nuts, seed=0)
        before = floor.predict("nut", tests[2])
        floor.fit("other", normal_images("tiles", 1, seed=1, size=SIDE), seed=0)
        floor.predict("other", tests[3])
        np.testing.assert_array_equal(floor.predict("nut", tests[2]).anomaly_map, before.anomaly_map)

    def test_a_saved_state_predicts_the_same(self, nuts, tests, tmp_path):
        floor, other = small_floor(), small_floor()
        floor.fit("nut", nuts, seed=0)
        floor.save("nut", tmp_path / "nut.safetensors")
        other.load("nut", tmp_path / "nut.safetensors")
        expected, found = floor.predict("nut", tests[2]), other.predict("nut", tests[2])
        assert found.score == expected.score
        np.testing.assert_array_equal(found.anomaly_map, expected.anomaly_map)

    def test_a_state_of_other_settings_is_refused(self, nuts, tmp_path):
        floor = small_floor()
        floor.fit("nut", nuts, seed=0)
        floor.save("nut", tmp_path / "nut.safetensors")
        with pytest.raises(ValueError, match="`path` must hold what `color_patches` learned with these settings"):
            small_floor(rotations=2).load("nut", tmp_path / "nut.safetensors")
        (tmp_path / "torn.safetensors").write_bytes((tmp_path / "nut.safetensors").read_bytes()[:100])
        for name in ("torn.safetensors", "missing.safetensors"):
            with pytest.raises(ValueError, match="`path` must be a file that `save` wrote"):
                small_floor().load("nut", tmp_path / name)

    def test_what_was_never_learned(self, nuts, tests, tmp_path):
        floor = small_floor()
        floor.fit("nut", nuts, seed=0)
        with pytest.raises(ValueError, match=r"`category` must be one that `color_patches` was fitted to \('nut'\)"):
            floor.predict("screw", tests[0])
        with pytest.raises(ValueError, match="`category`"):
            floor.save("screw", tmp_path / "screw.safetensors")
        with pytest.raises(ValueError, match="`normals` must hold at least 1"):
            floor.fit("screw", [], seed=0)

    def test_a_detector_need_not_share(self, tests, tmp_path):
        class Constant(Detector):
            name = "constant"

            def describe(self):
                return {}

            def fit(self, category, normals, seed):
                pass

            def predict(self, category, image):
                return Prediction(0.0, np.zeros((2, 2), np.float32))

        assert not Constant.shareable
        for action in (Constant().save, Constant().load):
            with pytest.raises(ValueError, match="`constant` has no state"):
                action("nut", tmp_path / "file")


class TestPlainInpainting:
    @pytest.mark.parametrize(
        ("prompt", "filled"), [("", ""), ("A perfect {name}.", "A perfect hex nut."), (None, "A perfect hex nut.")]
    )
    def test_equals_diffusers(self, tests, prompt, filled):
        pipe = make_tiny_pipeline()
        floor = PlainInpaintingFloor(pipe, num_inference_steps=5, **({} if prompt is None else {"prompt": prompt}))
        found = floor.predict("hex_nut", tests[2])
        theirs = StableDiffusionInpaintPipeline(
            vae=pipe.vae,
            text_encoder=pipe.text_encoder,
            tokenizer=pipe.tokenizer,
            unet=pipe.unet,
            scheduler=pipe.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        theirs.set_progress_bar_config(disable=True)
        repainted = theirs(
            prompt=filled,
            image=tests[2],
            mask_image=Image.new("L", (RESOLUTION, RESOLUTION), 255),
            strength=0.4,
            num_inference_steps=5,
            guidance_scale=1.0,
            height=RESOLUTION,
            width=RESOLUTION,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        ).images[0]
        difference = np.abs(repainted - np.asarray(tests[2]) / 255).mean(axis=2)
        expected = gaussian_filter(difference, sigma=4 * RESOLUTION / 512, mode="reflect")
        np.testing.assert_allclose(found.anomaly_map, expected, atol=1e-4)
        assert found.score == pytest.approx(expected.max(), abs=1e-4)
        assert expected.std() > 0.01
        shown = np.asarray(found.inpainted) / 255
        np.testing.assert_allclose(shown, repainted, atol=1 / 255)

    def test_strength_and_steps_are_those_of_the_checkpoint(self):
        # The short schedule of the embedded checkpoint leaves no step at the paper's strength.
        floor = PlainInpaintingFloor()
        settings = floor.pipe.settings(start="image")
        assert (floor.noise_strength, floor.num_inference_steps) == (0.25, settings.num_inference_steps)

    def test_the_prompt_matters(self, tests):
        pipe = make_tiny_pipeline()
        maps = [
            PlainInpaintingFloor(pipe, p).predict("hex_nut", tests[2]).anomaly_map for p in ("", "A perfect {name}.")
        ]
        assert np.abs(maps[0] - maps[1]).max() > 1e-5

    def test_earlier_calls_and_normal_pictures_change_nothing(self, nuts, tests):
        pipe = make_tiny_pipeline()
        floor = PlainInpaintingFloor(pipe)
        before = floor.predict("hex_nut", tests[2])
        floor.fit("hex_nut", nuts, seed=3)
        floor.predict("hex_nut", tests[3])
        pipe.add_category("hex_nut", nuts)
        pipe(tests[3], category="hex_nut")
        np.testing.assert_array_equal(floor.predict("hex_nut", tests[2]).anomaly_map, before.anomaly_map)
        assert floor.zero_shot

    def test_sizes(self, tests):
        found = PlainInpaintingFloor(make_tiny_pipeline()).predict("hex_nut", tests[0].resize((90, 50)))
        assert found.inpainted.size == (90, 50)
        assert found.anomaly_map.shape == (RESOLUTION, RESOLUTION) and found.anomaly_map.dtype == np.float32

    def test_from_a_folder(self, tiny_pipeline_folder, tests):
        expected = PlainInpaintingFloor(make_tiny_pipeline(), num_inference_steps=5).predict("hex_nut", tests[2])
        found = PlainInpaintingFloor(str(tiny_pipeline_folder), num_inference_steps=5).predict("hex_nut", tests[2])
        np.testing.assert_allclose(found.anomaly_map, expected.anomaly_map, atol=1e-5)

    def test_bad_options(self):
        with pytest.raises(ValueError, match="`prompt` must be one of '', 'A perfect {name}.', got 'nut'"):
            PlainInpaintingFloor(make_tiny_pipeline(), prompt="nut")
        with pytest.raises(ValueError, match="`noise_strength`"):
            PlainInpaintingFloor(make_tiny_pipeline(), noise_strength=1.5)


def test_pictures_are_read_as_the_pipeline_reads_them(nuts):
    """The floor by hand above takes pictures of the right size; larger ones must be scaled as ours are."""
    floor = small_floor()
    large = nuts[0].resize((150, 100), Image.Resampling.BICUBIC)
    floor.fit("nut", [large], seed=0)
    shrunk = Image.fromarray(((to_tensor(large, SIDE).permute(1, 2, 0).numpy() + 1) * 127.5).round().astype(np.uint8))
    assert floor.predict("nut", shrunk).score == pytest.approx(0, abs=1e-3)
