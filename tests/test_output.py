"""What an inspection returns: shown, saved and printed."""

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageShow

from anomalysd_pipeline.common.drawing import contour, overlay

from .conftest import make_tiny_pipeline, warnings_of


@pytest.fixture(scope="module")
def pipe(nuts):
    pipe = make_tiny_pipeline()
    pipe.add_category("hex_nut", nuts)
    pipe.calibrate("hex_nut", nuts)
    return pipe


@pytest.fixture(scope="module")
def out(pipe, tested_nuts):
    return pipe(tested_nuts, category="hex_nut")


@pytest.fixture(scope="module")
def uncalibrated(pipe, tested_nuts):
    return pipe(tested_nuts[:1], category="hex_nut", noise_strength=0.5, output_type="pt")


def test_the_overlay_is_the_heatmap_with_the_outline(out, tested_nuts):
    heat = overlay(tested_nuts[3], out.anomaly_maps[3], out.thresholds[3])
    assert np.array_equal(out.overlay(3), contour(heat, out.pred_masks[3]))


def test_the_tuple_is_as_ever(pipe, out, tested_nuts):
    found = pipe(tested_nuts, category="hex_nut", return_dict=False)
    assert len(found) == 7 and np.array_equal(found[0], out.pred_scores) and "images" not in out


def test_it_saves_itself(out, tested_nuts, tmp_path):
    (tmp_path / "mine.txt").touch()
    out.save(tmp_path)
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [row["pred_label"] for row in rows] == out.pred_labels
    for index, row in enumerate(rows):
        assert row["pred_score"] == pytest.approx(out.pred_scores[index]) and row["threshold"] == out.thresholds[0]
        assert np.array_equal(np.load(tmp_path / row["anomaly_map"]), out.anomaly_maps[index])
        assert np.array_equal(np.asarray(Image.open(tmp_path / row["pred_mask"])), 255 * out.pred_masks[index])
        assert np.array_equal(np.asarray(Image.open(tmp_path / row["heatmap"])), np.asarray(out.overlay(index)))
    assert (tmp_path / "montage.png").is_file() and (tmp_path / "mine.txt").is_file()


def test_without_a_threshold_and_with_tensors(uncalibrated, tmp_path):
    uncalibrated.save(tmp_path / "out")
    (row,) = json.loads((tmp_path / "out" / "results.json").read_text())
    assert row["pred_label"] is row["pred_mask"] is None and not (tmp_path / "out" / "masks").exists()
    assert np.load(tmp_path / "out" / "maps" / "0.npy").shape == (64, 64)


def test_a_folder_that_cannot_be_written_is_one_sentence(out, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="`folder` .* could not be written"):
        out.save(tmp_path / "file")


def test_it_shows_itself(out, monkeypatch):
    shown = []

    class Viewer(ImageShow.Viewer):
        def show_image(self, image, **options):
            shown.append(image)
            return 1

    monkeypatch.setattr(ImageShow, "_viewers", [Viewer()])
    out.show()
    assert np.array_equal(np.asarray(shown[0]), np.asarray(out.figure()))
    assert "base64," in out._repr_html_() and out._repr_html_().startswith("<img")
    monkeypatch.setattr(ImageShow, "_viewers", [])
    with pytest.raises(ValueError, match="call `save`"):
        out.show()


def test_few_lines(pipe, out):
    assert len(repr(out).splitlines()) == 5 and "the threshold" in repr(out)
    text = repr(pipe)
    assert "part 'hex_nut': 3 pictures, threshold " in text and "64 px" in text and len(text.splitlines()) < 40


def test_float16_on_a_cpu_is_said_once(nuts):
    pipe = make_tiny_pipeline()
    with warnings_of() as said, warnings_of("diffusers.pipelines.pipeline_utils") as theirs:
        pipe.to("cpu", torch.float16)
        pipe.use_adaptation(None)
        pipe.use_adaptation(None)
    (told,) = said
    assert "float16" in told and "`pipe.to(torch.float32)`" in told and not theirs


def test_learning_tells_how_far_it_is(pipe, nuts):
    calls = []
    pipe.add_category("ring", nuts, rotations=2, callback=lambda done, total: calls.append((done, total)))
    assert calls == [(done, 6) for done in range(1, 7)]
    calls.clear()
    pipe.calibrate("ring", nuts, callback=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 3), (2, 3), (3, 3)]
    before = pipe.knowledge.record("ring")

    def cancel(done, total):
        raise KeyboardInterrupt

    for learn in (pipe.add_category, pipe.calibrate):
        with pytest.raises(KeyboardInterrupt):
            learn("ring", nuts[:2], callback=cancel)
    assert pipe.knowledge.record("ring") == before
    pipe.add_category("single", nuts[:1], rotations=1)
    calls.clear()
    pipe.calibrate("single", nuts[:1], callback=lambda done, total: calls.append((done, total)))
    assert calls == [(done, 4) for done in range(1, 5)]
