"""The ready examples: those that are shipped, and how they are made."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from anomalysd_pipeline import EMBEDDED, AnomalySDPipeline, synthetic
from anomalysd_pipeline.app import gallery
from anomalysd_pipeline.app.downloads import ReportFacts, report


@pytest.fixture(scope="module")
def made(tiny_pipeline_folder, tmp_path_factory):
    """Examples of one family, made with the tiny checkpoint, and their folder."""
    folder = tmp_path_factory.mktemp("gallery") / "examples"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gallery, "DRAWN", {"ring": "stain"})
        patch.setattr(gallery, "SHOTS", 2)
        return folder, gallery.make_examples(folder, str(tiny_pipeline_folder))


class TestMaking:
    def test_a_good_and_a_defective_picture(self, made):
        good, defective = made[1]
        assert (good.name, good.title, good.defect) == ("ring_good", "Ring, good part", None)
        assert (defective.name, defective.title, defective.defect) == ("ring_defective", "Ring, stain", "stain")
        sample = next(s for s in synthetic.test_samples("ring", 0, 10, gallery.SEED, 64) if s.defect == "stain")
        assert np.abs(np.asarray(defective.image).astype(int) - sample.image).mean() < 8  # as a JPEG

    def test_the_stored_result_is_that_of_the_stored_picture(self, made, tiny_pipeline_folder):
        example = made[1][1]
        pipe = AnomalySDPipeline.from_pretrained(tiny_pipeline_folder)
        pipe.add_category("ring", list(map(gallery._compressed, synthetic.normal_images("ring", 2, gallery.SEED, 64))))
        out = pipe(example.path, category="ring", generator=torch.Generator().manual_seed(0))
        assert example.score == pytest.approx(float(out.pred_scores[0]), rel=1e-4)
        step = out.anomaly_maps[0].max() / 255
        assert np.abs(out.anomaly_maps[0] - example.anomaly_map).max() <= 0.51 * step
        assert np.array_equal(out.prototype_masks[0], example.prototype_mask)
        inpainted = np.asarray(out.inpainted[0]).astype(int)
        assert np.abs(inpainted - np.asarray(example.inpainted)).mean() < 16  # a JPEG of noise
        assert example.settings == pipe.settings(category="ring").to_dict()

    def test_replaces_what_was_there(self, made, tiny_pipeline_folder, tmp_path, monkeypatch):
        folder = shutil.copytree(made[0], tmp_path / "examples")
        (folder / "old.png").write_bytes(b"x")
        monkeypatch.setattr(gallery, "DRAWN", {})
        assert gallery.make_examples(folder, str(tiny_pipeline_folder)) == []
        assert [path.name for path in folder.iterdir()] == ["examples.json"]

    def test_a_failed_attempt_changes_nothing(self, made, tiny_pipeline_folder, tmp_path, monkeypatch):
        folder = shutil.copytree(made[0], tmp_path / "examples")
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        monkeypatch.setattr(gallery, "DRAWN", {"unknown": None})
        with pytest.raises(ValueError, match="unknown"):
            gallery.make_examples(folder, str(tiny_pipeline_folder))
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


class TestReading:
    def test_what_a_result_has(self, made):
        for example in made[1]:
            assert example.image.mode == example.inpainted.mode == "RGB" and example.path.is_file()
            assert example.image.size == example.inpainted.size == example.overlay().size == (64, 64)
            assert example.anomaly_map.shape == example.prototype_mask.shape == (64, 64)
            assert example.anomaly_map.dtype == np.float32 and example.prototype_mask.dtype == bool
            assert example.is_defective == (example.score > example.threshold)
            assert ("Defect likely" in example.sentence) == example.is_defective

    def test_opacity(self, made):
        hot = made[1][1]
        assert hot.overlay(0.9).tobytes() != hot.overlay(0.1).tobytes()

    def test_a_report_can_be_made_of_one(self, made):
        example = made[1][0]
        assert report(example, ReportFacts(example.part, example.path.name, "tiny")).size == (1240, 1754)

    @pytest.mark.parametrize("missing", ["examples.json", "ring_good.jpg", "ring_defective_map.png"])
    def test_a_damaged_folder(self, made, tmp_path, missing):
        folder = shutil.copytree(made[0], tmp_path / "examples")
        (folder / missing).unlink()
        with pytest.raises(ValueError, match=r"must hold examples\.json .*anomalysd_pipeline\.app\.gallery"):
            gallery.load_examples(folder)

    @pytest.mark.parametrize("content", ["", "[]", '{"examples": [{}]}', '{"examples": 3}'])
    def test_damaged_facts(self, tmp_path, content):
        (tmp_path / "examples.json").write_text(content)
        with pytest.raises(ValueError, match="make them anew"):
            gallery.load_examples(tmp_path)


class TestFingerprint:
    def test_is_stored(self, made, tiny_pipeline_folder):
        assert gallery.made_with(made[0]) == gallery.checkpoint_fingerprint(tiny_pipeline_folder)

    def test_follows_weights_and_configs_and_not_texts(self, tiny_pipeline_folder, tmp_path):
        folder = shutil.copytree(tiny_pipeline_folder, tmp_path / "pipeline")
        before = gallery.checkpoint_fingerprint(folder)
        (folder / "README.md").write_text("other words")
        assert gallery.checkpoint_fingerprint(folder) == before
        for name in ("model_index.json", "unet/diffusion_pytorch_model.safetensors"):
            content = bytearray((folder / name).read_bytes())
            content[-2] ^= 1
            (folder / name).write_bytes(content)
            after = gallery.checkpoint_fingerprint(folder)
            assert after != before
            before = after


class TestShipped:
    def test_were_made_with_the_embedded_checkpoint(self):
        hint = "the embedded checkpoint has changed; run `python -m anomalysd_pipeline.app.gallery`"
        assert gallery.made_with() == gallery.checkpoint_fingerprint(EMBEDDED), hint

    def test_are_complete(self):
        examples = gallery.load_examples()
        resolution = json.loads(Path(EMBEDDED, "model_index.json").read_text())["resolution"]
        assert len(examples) == 2 * len(gallery.DRAWN)
        assert [example.part for example in examples] == [family for family in gallery.DRAWN for _ in range(2)]
        assert all(example.image.size == (resolution, resolution) for example in examples)

    def test_show_the_method_at_work(self):
        defective = [example for example in gallery.load_examples() if example.defect is not None]
        assert any(example.is_defective for example in defective)

    def test_are_small(self):
        assert sum(path.stat().st_size for path in gallery.FOLDER.iterdir()) < 1_500_000

    def test_are_pictures_of_ours(self):
        example = gallery.load_examples()[0]
        drawn = synthetic.test_samples(example.part, 1, 0, gallery.SEED, example.image.width)[0].image
        assert np.abs(np.asarray(Image.open(example.path)).astype(int) - drawn).mean() < 8

    def test_are_read_without_torch(self):
        code = (
            "import sys; from anomalysd_pipeline.app import gallery; "
            "[example.overlay() for example in gallery.load_examples()]; assert 'torch' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_the_app_is_imported_without_torch():
    names = "limits, sessions, turns, uploads, downloads, gallery"
    code = f"import sys; from anomalysd_pipeline.app import {names}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
