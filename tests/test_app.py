"""The app, driven as a browser would: a real server, a tiny pipeline, gradio's own client."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from anomalysd_pipeline import AnomalySDPipeline, synthetic

from .tiny_adaptations import adapted_to, drawn, inspected, learned
from .tiny_adaptations import pictures as part_pictures

gradio = pytest.importorskip("gradio")
gradio_client = pytest.importorskip("gradio_client")
httpx = pytest.importorskip("httpx")  # comes with gradio

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def app(tiny_pipeline_folder, tmp_path_factory):
    pipe = AnomalySDPipeline.from_pretrained(tiny_pipeline_folder)
    quick = {"num_inference_steps": 5, "mask_scales": [1, 2]}
    pipe.register_to_config(preset_overrides={"fast": quick, "paper": quick})  # they still differ in their grouping
    short = {"steps": 2, "decoder_steps": 2, "train_batch_size": 1, "learning_rate": 0.02, "mixed_precision": "no"}
    pipe.register_to_config(adaptation=short)
    folder = tmp_path_factory.mktemp("model")
    pipe.save_pretrained(folder)
    os.environ["ANOMALYSD_MODEL"] = str(folder)
    spec = importlib.util.spec_from_file_location("app", ROOT / "app.py")
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up by name.
    sys.modules["app"] = module
    spec.loader.exec_module(module)
    yield module
    del os.environ["ANOMALYSD_MODEL"], sys.modules["app"]


@pytest.fixture(scope="module")
def address(app):
    _, url, _ = app.demo.launch(
        server_name="127.0.0.1", server_port=None, prevent_thread_lock=True, quiet=True, max_file_size="20mb"
    )
    yield url
    app.demo.close()


@pytest.fixture
def client(address, tmp_path):
    """A visitor of their own."""
    return gradio_client.Client(address, verbose=False, download_files=str(tmp_path / "downloads"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two normal rings, a defective one, and a text file that calls itself a picture."""
    folder = tmp_path_factory.mktemp("pictures")
    for index, image in enumerate(synthetic.normal_images("ring", 2, seed=1, size=96)):
        image.save(folder / f"normal_{index}.png")
    (sample,) = synthetic.test_samples("ring", 0, 1, seed=1, size=96)
    Image.fromarray(sample.image[:, :80]).save(folder / "defective.png")
    (folder / "notes.png").write_text("not a picture")
    return folder


def upload(path):
    return gradio_client.handle_file(str(path))


def learn(client, pictures, count=2, name="ring", preset="fast", **options):
    return client.predict(
        name, [upload(pictures / f"normal_{i}.png") for i in range(count)], preset, api_name="/learn", **options
    )


def inspect(client, part, path, preset="fast"):
    return client.predict(part, upload(path), preset, api_name="/inspect")


def call_with_path(address, path):
    """How a bare request to inspect a file on the server ends; gradio's own client would upload the file first."""
    data = ["part", {"path": path, "meta": {"_type": "gradio.FileData"}}, "fast"]
    call = f"{address}gradio_api/call/inspect"
    event = httpx.post(call, json={"data": data}).json()["event_id"]
    with httpx.stream("GET", f"{call}/{event}", timeout=60) as answer:
        return next(line for line in answer.iter_lines() if line in ("event: complete", "event: error"))[7:]


def pixels(shown):
    path = shown["path"] if isinstance(shown, dict) else shown
    assert path.endswith(".png")
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


class TestVisit:
    def test_learn_then_inspect(self, client, pictures):
        part, message = learn(client, pictures)
        assert "ring" in str(part) and "Learned **ring** from 2 pictures" in message
        verdict, score, heat, repainted = inspect(client, "ring", pictures / "defective.png")
        assert "× the threshold" in verdict and score > 0
        assert pixels(heat).shape == pixels(repainted).shape == (96, 80, 3)
        assert not np.array_equal(pixels(heat), pixels(repainted))

    def test_a_changed_preset_keeps_the_verdict(self, client, pictures):
        learn(client, pictures)
        verdict, *_ = inspect(client, "ring", pictures / "defective.png", preset="paper")
        assert "× the threshold" in verdict

    def test_visitors_do_not_share_parts(self, app, address, client, pictures):
        learn(client, pictures)
        other = gradio_client.Client(address, verbose=False)
        verdict, *_ = inspect(other, "ring", pictures / "defective.png")
        assert "not calibrated" in verdict
        assert app.load_base().categories == []

    def test_an_unknown_part_gets_a_heatmap_without_verdict(self, client, pictures):
        verdict, score, heat, _ = inspect(client, "part", pictures / "defective.png")
        assert "not calibrated" in verdict and score > 0
        assert pixels(heat).shape == (96, 80, 3)


class TestFineTuning:
    def test_changes_the_repainting_of_that_visitors_part(self, client, pictures):
        learn(client, pictures)
        plain = inspect(client, "ring", pictures / "defective.png")
        part, message = learn(client, pictures, fine_tune=True)
        assert "ring" in str(part) and "Learned **ring** from 2 pictures" in message
        tuned = inspect(client, "ring", pictures / "defective.png")
        assert "× the threshold" in tuned[0]
        assert not np.array_equal(pixels(tuned[3]), pixels(plain[3]))
        learn(client, pictures)  # the fine-tuning is forgotten with the part that had it
        assert np.array_equal(pixels(inspect(client, "ring", pictures / "defective.png")[3]), pixels(plain[3]))

    def test_a_changed_preset_keeps_the_verdict(self, client, pictures):
        learn(client, pictures, fine_tune=True)
        assert "× the threshold" in inspect(client, "ring", pictures / "defective.png", preset="paper")[0]

    def test_other_visitors_keep_theirs(self, app, address, client, pictures):
        other = gradio_client.Client(address, verbose=False)
        learn(other, pictures)
        before = inspect(other, "ring", pictures / "defective.png")
        learn(client, pictures, fine_tune=True)
        inspect(client, "ring", pictures / "defective.png")  # leaves the adapter in modules that both share
        after = inspect(other, "ring", pictures / "defective.png")
        assert after[:2] == before[:2] and np.array_equal(pixels(after[3]), pixels(before[3]))
        assert app.load_base().adaptations == app.load_base().categories == []

    def test_a_refused_one_leaves_the_part(self, client, pictures):
        learn(client, pictures)
        before = inspect(client, "ring", pictures / "defective.png")
        with pytest.raises(Exception, match="`category` must be a plain name"):
            learn(client, pictures, name="../x", fine_tune=True)
        assert inspect(client, "ring", pictures / "defective.png")[:2] == before[:2]


class TestErrors:
    def test_a_text_file_is_named(self, client, pictures):
        with pytest.raises(Exception, match=r"'notes\.png' is damaged or not a picture") as error:
            inspect(client, "part", pictures / "notes.png")
        assert str(Path("tmp", "gradio")) not in str(error.value)

    def test_a_bad_normal_picture_is_named_and_nothing_learned(self, client, pictures):
        uploads = [upload(pictures / name) for name in ("normal_0.png", "notes.png")]
        with pytest.raises(Exception, match=r"'notes\.png' is damaged or not a picture"):
            client.predict("ring", uploads, "fast", api_name="/learn")
        assert "not calibrated" in inspect(client, "ring", pictures / "defective.png")[0]

    @pytest.mark.parametrize(
        ("count", "name", "part"), [(0, "ring", "1 to 8"), (9, "ring", "1 to 8"), (1, " ", "category")]
    )
    def test_what_learning_refuses(self, client, pictures, count, name, part):
        uploads = [upload(pictures / "normal_0.png")] * count
        with pytest.raises(Exception, match=part):
            client.predict(name, uploads, "fast", api_name="/learn")

    def test_a_missing_picture(self, client):
        with pytest.raises(Exception, match="`picture` is missing"):
            client.predict("part", None, "fast", api_name="/inspect")

    def test_files_of_the_server_cannot_be_read(self, address, pictures):
        uploaded = httpx.post(
            f"{address}gradio_api/upload", files={"files": (pictures / "defective.png").read_bytes()}
        )
        assert call_with_path(address, uploaded.json()[0]) == "complete"
        assert call_with_path(address, str(pictures / "defective.png")) == "error"


def test_sessions_share_weights_but_no_parts(tiny_pipeline_folder, app):
    base = AnomalySDPipeline.from_pretrained(tiny_pipeline_folder)
    base.add_category("ring", synthetic.normal_images("ring", 1, seed=0, size=64))
    mine = app.session_pipeline(base)
    assert mine.unet is base.unet and mine.bank is not base.bank
    assert mine.categories == ["ring"]
    mine.add_category("wood", synthetic.normal_images("wood", 1, seed=0, size=64))
    assert base.categories == ["ring"] and "wood" not in base.bank
    assert mine.config.resolution == base.config.resolution


def test_sessions_keep_the_adaptations_of_the_checkpoint_and_their_own(app):
    base = adapted_to("ring")
    base.add_category("nut", part_pictures("nut"))
    expected = inspected(base, "ring", "ring"), inspected(base, "nut")
    mine, other = app.session_pipeline(base), app.session_pipeline(base)
    assert mine.adaptations == ["ring"] and mine.adapters is not base.adapters and mine.vae is base.vae
    mine.learn({"nut": part_pictures("nut")}, learned("nut"), calibrate=False)
    other.learn({"nut": part_pictures("nut")}, drawn(1), calibrate=False)
    maps = [inspected(pipe, "nut") for pipe in (base, mine, other)]
    assert len({m.numpy().tobytes() for m in maps}) == 3 and torch.equal(maps[0], expected[1])
    assert base.adaptations == ["ring"] and mine.adaptations == ["nut", "ring"]
    assert all(torch.equal(inspected(pipe, "ring", "ring"), expected[0]) for pipe in (mine, base, other))


def test_import_loads_no_model():
    code = "import sys, app; assert not {'torch', 'diffusers'} & set(sys.modules), 'heavy import'"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
