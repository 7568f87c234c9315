"""`anomalysd export`: the model by onnxruntime against the library, at a tiny configuration."""

import json
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

from anomalysd_pipeline import synthetic
from anomalysd_pipeline.cli import main
from anomalysd_pipeline.data.tensors import resize
from anomalysd_pipeline.hub.onnx_export import calibrate_distance, export_onnx, lanczos_weights
from anomalysd_pipeline.inspection.result import save_part
from anomalysd_pipeline.method.calibration import GROWTH, prediction_threshold
from anomalysd_pipeline.method.scoring import image_score, smooth, smoothing_sigma
from anomalysd_pipeline.models.extractor import PrototypeExtractor

from .conftest import make_tiny_pipeline
from .tiny import RESOLUTION

SIZE = (80, 120)
pytestmark = pytest.mark.timeout(180)  # tracing takes seconds


def pictures(good, defective):
    samples = synthetic.test_samples("hex_nut", good, defective, seed=5, size=96)
    return [Image.fromarray(sample.image).resize(SIZE[::-1]) for sample in samples]


@pytest.fixture(scope="module")
def pipe():
    """A pipeline with all that makes a distance: shapes kept, two windows, levels at unit length."""
    torch.manual_seed(0)
    options = {"normalize": "position", "windows": (1, 3), "image_size": RESOLUTION, "keep_shape": True}
    pipe = make_tiny_pipeline(extractor=PrototypeExtractor("resnet10t", (1, 2), **options))
    pipe.add_category("nut", [image.resize(SIZE[::-1]) for image in synthetic.normal_images("hex_nut", 3, 5, 96)])
    return pipe


@pytest.fixture(scope="module")
def exported(pipe, tmp_path_factory):
    """The file that the command writes, of a part as `detect` stores it."""
    folder = tmp_path_factory.mktemp("onnx")
    pipe.save_pretrained(folder / "base")
    (folder / "nut").mkdir()
    save_part(pipe, "nut", folder / "nut" / "part.safetensors")
    arguments = ["--base", folder / "base", "--out", folder / "nut.onnx", "--size", *SIZE, "--preset", "sota"]
    assert main(["export", *map(str, [folder / "nut", *arguments])]) == 0
    return folder / "nut.onnx"


def distances(pipe, image, left_out=None):
    (shaped,) = pipe._inputs([image]).shaped
    with torch.no_grad():
        return pipe.bank.distances("nut", pipe.extractor(shaped[None]), pipe.extractor.parts, left_out)


def map_of(pipe, far):
    maps = pipe.bank.relative("nut", resize(far, (RESOLUTION, RESOLUTION)), pipe.extractor.parts)
    return smooth(maps, smoothing_sigma(RESOLUTION))


def test_onnxruntime_gives_the_distances_of_the_library(pipe, exported):
    session = onnxruntime.InferenceSession(exported)
    facts = session.get_modelmeta().custom_metadata_map
    for image in pictures(1, 2):
        score, label, found, far = session.run(None, {"image": np.asarray(image)[None]})
        expected = distances(pipe, image)
        relative = pipe.bank.relative("nut", expected, pipe.extractor.parts)
        assert expected.max() > 0.01
        np.testing.assert_allclose(far, expected, rtol=1e-3, atol=1e-3 * expected.mean().item())
        np.testing.assert_allclose(far / float(facts["unit"]), relative, rtol=1e-3, atol=1e-3 * relative.mean().item())
        wanted = map_of(pipe, expected)
        assert found.shape == (1, RESOLUTION, RESOLUTION)
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3 * wanted.mean().item())
        np.testing.assert_allclose(score, image_score(wanted, 0.01), rtol=1e-3)
        assert label.dtype == bool and label[0] == (score[0] > float(facts["threshold"]))


def test_its_threshold_is_that_of_the_distance_alone(pipe, exported):
    facts = {entry.key: entry.value for entry in onnx.load(exported).metadata_props}
    shots = pipe.bank.shots("nut")
    expected = []
    for number in range(3):
        with torch.no_grad():
            psi = pipe.extractor(shots.copy(number)[None])
        far = pipe.bank.distances("nut", psi, pipe.extractor.parts, left_out=number)
        expected.append((2 / 3) ** GROWTH * image_score(map_of(pipe, far), 0.01).item())
    assert json.loads(facts["scores"]) == pytest.approx(expected, rel=1e-4)
    assert float(facts["threshold"]) == pytest.approx(prediction_threshold(expected, 0.05), rel=1e-4)
    assert json.loads(facts["size"]) == list(SIZE) and facts["category"] == "nut"
    assert json.loads(facts["held_out"]) is True


@pytest.mark.parametrize(("length", "target"), [(97, 64), (40, 64), (300, 32)])
def test_resizing_is_that_of_pillow(length, target):
    row = np.random.default_rng(0).integers(0, 256, (4, length), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(row).resize((target, 4), Image.Resampling.LANCZOS))
    found = (torch.from_numpy(row).float() @ lanczos_weights(length, target).T + 0.5).floor().clamp(0, 255)
    assert (found.numpy() != expected).mean() < 0.01 and np.abs(found.numpy() - expected).max() <= 1


def test_a_single_picture_gives_a_guess(pipe, nuts):
    single = make_tiny_pipeline()
    single.add_category("nut", nuts[:1])
    settings = single.settings("sota", feature_weight=1.0)
    found = calibrate_distance(single.extractor, single.bank, "nut", RESOLUTION, settings)
    assert not found.held_out and 0 < found.threshold < np.inf


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"category": "bolt"}, r"`category` must be one that has a prototype bank \(\"nut\"\)"),
            ({"size": (80, 7)}, "`size` must be a whole number of at least 8, got 7"),
            ({"size": 80}, "`size` must be height and width in pixels, got 80"),
            ({"false_alarm_rate": 0.7}, "`false_alarm_rate` must be above 0"),
        ],
    )
    def test_bad_arguments(self, pipe, tmp_path, arguments, message):
        with pytest.raises(ValueError, match=message):
            export_onnx(pipe, **{"category": "nut", "path": tmp_path / "x.onnx", **arguments})
        assert not list(tmp_path.iterdir())

    def test_a_part_without_its_normal_pictures(self, pipe, tmp_path):
        own = make_tiny_pipeline(extractor=pipe.extractor)
        own.bank.add("nut", pipe.bank["nut"])
        with pytest.raises(ValueError, match="saved without its normal pictures"):
            export_onnx(own, "nut", tmp_path / "x.onnx")

    def test_a_missing_package(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setitem(sys.modules, "onnxscript", None)
        assert main(["export", str(tmp_path / "nut"), "--out", str(tmp_path / "x.onnx")]) == 2
        assert capsys.readouterr().err == (
            "anomalysd: error: The export needs onnxscript; run `pip install 'anomalysd-pipeline[onnx]'`.\n"
        )
