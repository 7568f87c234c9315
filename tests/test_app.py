"""The app as programs use it: a real server with the embedded checkpoint at a small size, and gradio's own client."""

import copy
import io
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from anomalysd_pipeline import EMBEDDED, synthetic
from anomalysd_pipeline.app.limits import Limits
from anomalysd_pipeline.app.model import Models

gradio_client = pytest.importorskip("gradio_client")
httpx = pytest.importorskip("httpx")  # comes with gradio

ROOT = Path(__file__).resolve().parents[1]
SIDE = 64


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page on the embedded weights, small and with lessons of two steps."""
    folder = tmp_path_factory.mktemp("model") / "embedded"
    shutil.copytree(EMBEDDED, folder)
    index = folder / "model_index.json"
    config = json.loads(index.read_text())
    config["adaptation"] |= {"steps": 2, "decoder_steps": 2, "train_batch_size": 1}
    config |= {"resolution": SIDE, "rotations": 1, "preset_overrides": {"fast": {"num_inference_steps": 4}}}
    config["preset_overrides"]["fast"]["mask_scales"] = [1, 2]
    index.write_text(json.dumps(config))
    before = os.environ.get("GRADIO_TEMP_DIR")
    os.environ["GRADIO_TEMP_DIR"] = str(tmp_path_factory.mktemp("gradio"))
    from anomalysd_pipeline.app.page import build

    built = build(Limits(pictures=5, upload_bytes=6_000_000), Models(str(folder), full=False))
    yield built
    built.close()
    os.environ.pop("GRADIO_TEMP_DIR")
    if before is not None:
        os.environ["GRADIO_TEMP_DIR"] = before


@pytest.fixture(scope="module")
def address(page):
    _, url, _ = page.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    return url


@pytest.fixture
def visitors(address, tmp_path):
    """Makes visitors of their own."""
    made = []

    def new():
        patience = {"timeout": 60}  # on a busy machine; httpx's own is 5 s
        downloads = str(tmp_path / str(len(made)))
        made.append(gradio_client.Client(address, verbose=False, download_files=downloads, httpx_kwargs=patience))
        return made[-1]

    yield new
    for client in made:
        client.close()


@pytest.fixture
def client(visitors):
    return visitors()


@pytest.fixture(scope="module")
def asker(address, tmp_path_factory):
    """A visitor for calls that teach nothing: connecting takes longer than a refusal."""
    downloads = str(tmp_path_factory.mktemp("asked"))
    client = gradio_client.Client(address, verbose=False, download_files=downloads, httpx_kwargs={"timeout": 60})
    yield client
    client.close()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two normal rings, a defective one, and what is no picture."""
    folder = tmp_path_factory.mktemp("pictures")
    for index, image in enumerate(synthetic.normal_images("ring", 2, seed=1, size=96)):
        image.save(folder / f"normal_{index}.png")
    (sample,) = synthetic.test_samples("ring", 0, 1, seed=1, size=96)
    Image.fromarray(sample.image[:, :80]).save(folder / "defective.png")
    (folder / "notes.png").write_text("not a picture")
    with zipfile.ZipFile(folder / "more.zip", "w") as archive:
        archive.write(folder / "defective.png", "line/one.png")
        archive.write(folder / "normal_0.png", "../../evil.png")
    return folder


def sent(path):
    return gradio_client.handle_file(str(path))


def teach(client, pictures, length="quick", name="ring", count=2, coarse="", fine=""):
    given = [sent(pictures / f"normal_{i}.png") for i in range(count)]
    return list(client.submit(name, given, coarse, fine, length, api_name="/teach"))


def inspect(client, part, path, preset="fast"):
    return client.predict(sent(path), part, preset, api_name="/inspect")


class TestFunctions:
    def test_their_names_and_types(self, asker):
        functions = asker.view_api(return_format="dict")["named_endpoints"]
        assert set(functions) == {"/inspect", "/teach", "/batch", "/load_adaptation", "/accept", "/set_region"}
        names = {name: [p["parameter_name"] for p in of["parameters"]] for name, of in functions.items()}
        assert names["/inspect"] == ["picture", "part", "preset"] and names["/batch"] == ["files", "part", "preset"]
        assert names["/accept"] == ["picture", "part"] and names["/set_region"] == ["part", "region"]
        assert names["/teach"] == ["name", "pictures", "coarse", "fine", "length", "false_alarm_rate", "bit_depth"]
        assert functions["/inspect"]["description"].startswith("Inspects one picture.")

    def test_every_argument_is_described_in_our_words(self, page):
        for name, function in page.get_api_info()["named_endpoints"].items():
            for parameter in function["parameters"]:
                told = parameter["python_type"]["description"]
                assert told and "FileData" not in told, (name, parameter["parameter_name"])
        by_name = {p["parameter_name"]: p for p in page.get_api_info()["named_endpoints"]["/teach"]["parameters"]}
        assert by_name["false_alarm_rate"]["python_type"]["type"] == "float"
        assert by_name["false_alarm_rate"]["parameter_default"] == 0.05
        assert by_name["bit_depth"]["python_type"]["type"] == "int" and by_name["bit_depth"]["parameter_default"] == 0

    def test_inspect_a_part_that_was_not_taught(self, asker, pictures):
        result, files = inspect(asker, "Any part", pictures / "defective.png")
        assert result["verdict"].startswith("No verdict") and result["is_defective"] is None
        assert result["file"] == "defective.png" and result["score"] > 0
        suffixes = ["_map.png", "_map.npy", "_report.png", "_report.pdf"]
        assert [Path(file).name for file in files] == [f"defective{suffix}" for suffix in suffixes]
        values = np.load(files[1])
        with Image.open(files[0]) as drawn:
            assert values.shape == (96, 80) and drawn.size == (80, 96) and drawn.mode.startswith("I")
        assert Path(files[3]).read_bytes().startswith(b"%PDF")

    def test_one_picture_gives_a_guess_and_good_ones_a_threshold(self, client, pictures):
        *_, (told, _) = teach(client, pictures, count=1)
        assert told["is_guess"]
        found = client.predict(sent(pictures / "normal_1.png"), "ring", api_name="/accept")
        assert found["pictures"] == 1 and not found["is_guess"] and found["threshold"] != told["threshold"]
        result, _ = inspect(client, "ring", pictures / "normal_1.png")
        assert result["threshold"] == found["threshold"]
        with pytest.raises(Exception, match="`part` must be one that you have taught, got 'washer'"):
            client.predict(sent(pictures / "normal_1.png"), "washer", api_name="/accept")

    def test_only_a_region_of_a_part_counts(self, client, pictures):
        *_, (told, _) = teach(client, pictures)
        found = client.predict("ring", [[0, 0], [0.5, 1]], api_name="/set_region")
        assert found["pictures"] == 2 and not found["is_guess"] and found["threshold"] != told["threshold"]
        _, files = inspect(client, "ring", pictures / "defective.png")
        assert not np.load(files[1])[:, 41:].any()
        assert client.predict("ring", [], api_name="/set_region")["threshold"] == pytest.approx(told["threshold"])
        with pytest.raises(Exception, match="`region` must have corners"):
            client.predict("ring", [[0, 0], [5, 1]], api_name="/set_region")

    def test_teach_then_inspect_and_inspect_a_batch(self, client, pictures):
        *_, (told, adaptation) = teach(client, pictures)
        assert told["stage"] == "done" and told["parts"] == ["ring"] and adaptation.endswith("ring.safetensors")
        result, _ = inspect(client, "ring", pictures / "defective.png")
        assert "× the threshold" in result["verdict"] and result["threshold"] == told["threshold"]
        assert result["times_threshold"] == pytest.approx(result["score"] / result["threshold"])
        names = ("defective.png", "notes.png", "more.zip")
        answer, files = client.predict([sent(pictures / n) for n in names], "ring", "fast", api_name="/batch")
        rows = answer["rows"]
        assert answer["done"] == answer["total"] == len(rows) == 4
        assert rows[0]["score"] == pytest.approx(result["score"]) and rows[0]["verdict"] == result["verdict"]
        assert "'notes.png'" in rows[1]["error"] and rows[3]["error"] and "score" not in rows[3]
        assert rows[2]["score"] > 0
        table = Path(files[0]).read_text(encoding="utf-8-sig")
        assert len(table.splitlines()) == 5 and "defective.png" in table
        with zipfile.ZipFile(files[1]) as archive:
            assert sum(name.startswith("heatmaps/") for name in archive.namelist()) == 2

    def test_a_part_goes_to_another_visitor_as_a_file_however_it_was_taught(self, visitors, pictures):
        teacher, pupil = visitors(), visitors()
        *_, (told, file) = teach(teacher, pictures)
        assert pupil.predict(sent(file), api_name="/load_adaptation") == {"parts": ["ring"]}
        assert inspect(pupil, "ring", pictures / "defective.png")[0]["threshold"] == told["threshold"]

    def test_a_fine_tuned_part_goes_to_another_visitor_as_a_file(self, visitors, pictures):
        teacher, pupil = visitors(), visitors()
        states = teach(teacher, pictures, "standard", coarse="A perfect ring.", fine="A smooth ring.")
        shares = [told["share"] for told, _ in states]
        assert shares == sorted(shares) and shares[-1] == 1
        told, adaptation = states[-1]
        assert told["pictures"] == 2 and told["length"] == "standard"
        expected, _ = inspect(teacher, "ring", pictures / "defective.png")
        brought = pupil.predict(sent(adaptation), api_name="/load_adaptation")
        assert brought == {"parts": ["ring"]}
        assert inspect(pupil, "ring", pictures / "defective.png")[0]["score"] == pytest.approx(expected["score"])

    def test_the_app_stays_what_it_was(self, page, client, pictures):
        teach(client, pictures)
        base = page.desk.models.base()
        assert base.categories == [] and base.adaptations == []


class TestCancel:
    def test_a_lesson_is_left(self, page, client, pictures):
        given = [sent(pictures / f"normal_{i}.png") for i in range(2)]
        job = client.submit("ring", given, "", "", "thorough", api_name="/teach")
        next(iter(job))
        job.cancel()
        result, _ = inspect(client, "ring", pictures / "defective.png")
        assert result["verdict"].startswith("No verdict")
        *_, (told, _) = teach(client, pictures)  # the first is no more under way
        assert told["stage"] == "done"


class TestIsolation:
    def test_parts_are_ones_own(self, visitors, pictures):
        one, two = visitors(), visitors()
        teach(one, pictures)
        assert inspect(two, "ring", pictures / "defective.png")[0]["verdict"].startswith("No verdict")

    def test_files_are_ones_own(self, address, client, pictures):
        browser, stranger = httpx.Client(base_url=address, timeout=60), httpx.Client(base_url=address, timeout=60)
        for visitor in (browser, stranger):
            visitor.get("config")
        assert browser.cookies != stranger.cookies
        sent_file = browser.post(
            "gradio_api/upload", files={"files": ("a.png", (pictures / "defective.png").read_bytes())}
        ).json()[0]
        urls = [f"gradio_api/file={sent_file}", *call(browser, sent_file)[1]]
        assert len(urls) == 5
        for url in urls:
            assert browser.get(url).status_code == 200
            refused = stranger.get(url)
            assert refused.status_code == 403 and "not yours" in refused.json()["detail"]
        # Nor may it be given as one's own to a function that would read it.
        assert call(stranger, sent_file)[0] == "error"

    def test_files_of_the_server_are_nobodys(self, address, page, client, pictures):
        visitor = httpx.Client(base_url=address, timeout=60)
        visitor.get("config")
        session_files = page.desk.stores["embedded"].root
        for path in ("/etc/passwd", str(pictures / "defective.png"), f"{session_files}/x", str(ROOT / "app.py")):
            assert visitor.get(f"gradio_api/file={path}").status_code == 403
            assert call(visitor, path)[0] == "error"


def call(visitor, path):
    """How a bare request to `inspect` ends, and the addresses of the files in its answer."""
    data = [{"path": path, "meta": {"_type": "gradio.FileData"}}, "Any part", "fast"]
    event = visitor.post("gradio_api/call/inspect", json={"data": data}).json()["event_id"]
    with visitor.stream("GET", f"gradio_api/call/inspect/{event}", timeout=120) as answer:
        text = "\n".join(answer.iter_lines())
    kind = re.search("event: (complete|error)", text)[1]
    return kind, re.findall(r'"url": "[^"]*?(gradio_api/file=[^"]+)"', text)


class TestRefused:
    @pytest.mark.parametrize(
        ("given", "named"),
        [
            ({"preset": "slow"}, "`preset`"),
            ({"part": "../x"}, "`part`"),
            ({"part": "x" * 1000}, "part"),
            ({"part": {"a": 1}}, "part"),
        ],
    )
    def test_inspect(self, asker, pictures, given, named):
        given = {"picture": sent(pictures / "defective.png"), "part": "ring", "preset": "fast", **given}
        with pytest.raises(Exception, match=named):
            asker.predict(**given, api_name="/inspect")

    @pytest.mark.parametrize(
        ("given", "named"),
        [
            ({"length": "forever"}, "`length`"),
            ({"name": " "}, "name"),
            ({"name": "a/b"}, "`name`"),
            ({"count": 0}, "`pictures` are missing"),
            ({"count": 9}, "1 to 8"),
            ({"fine": "x" * 400}, "fine"),
        ],
    )
    def test_teach(self, asker, pictures, given, named):
        count = given.pop("count", 1)
        files = [sent(pictures / "normal_0.png")] * count
        given = {"name": "ring", "coarse": "", "fine": "", "length": "quick", **given}
        with pytest.raises(Exception, match=named):
            asker.predict(**given, pictures=files, api_name="/teach")

    def test_a_missing_picture(self, asker):
        with pytest.raises(Exception, match="`picture` is missing"):
            asker.predict(None, "ring", "fast", api_name="/inspect")

    def test_a_file_that_is_no_picture_and_has_markup_in_its_name(self, asker, address, tmp_path):
        name = "<img src=x onerror=alert(1)>.png"
        (tmp_path / name).write_text("no picture")
        with pytest.raises(Exception, match="damaged or not a picture") as error:
            inspect(asker, "Any part", tmp_path / name)
        assert "<img" not in str(error.value) and os.environ["GRADIO_TEMP_DIR"] not in str(error.value)

    def test_too_many_pictures_are_said_to_be(self, asker, pictures):
        answer, _ = asker.predict(
            [sent(pictures / f"normal_{i % 2}.png") for i in range(6)], "Any part", "fast", api_name="/batch"
        )
        assert len([row for row in answer["rows"] if not row["error"]]) == 5 and answer["rows"][-1]["error"]

    def test_a_file_above_the_bound(self, asker, tmp_path):
        noise = np.random.default_rng(0).integers(0, 256, (1600, 1600, 3), dtype=np.uint8)
        data = io.BytesIO()
        Image.fromarray(noise).save(data, "PNG")
        (tmp_path / "large.png").write_bytes(data.getvalue())
        with pytest.raises(Exception, match="maximum file size|413"):
            inspect(asker, "Any part", tmp_path / "large.png")

    def test_something_else_than_an_adaptation(self, asker, pictures):
        with pytest.raises(Exception, match=r"more\.zip"):
            asker.predict(sent(pictures / "more.zip"), api_name="/load_adaptation")
        assert inspect(asker, "Any part", pictures / "defective.png")[0]["score"] > 0


class TestPage:
    def test_copies_of_its_config_copy_no_weights(self, page, monkeypatch):
        """gradio copies the config for every request: 210 MiB each, where a callback is a method of the desk."""
        from gradio.utils import safe_deepcopy

        copied = []
        for kind in (torch.Tensor, torch.nn.Parameter):
            monkeypatch.setattr(kind, "__deepcopy__", lambda tensor, memo: copied.append(tensor) or tensor)
        copy.deepcopy(page.desk.models.base().unet)
        assert len(copied) > 100
        copied.clear()
        assert len(safe_deepcopy(page.config)["components"]) == len(page.config["components"])
        assert copied == []

    def test_it_holds_no_key_and_no_path_of_the_server(self, address, client, pictures, page):
        teach(client, pictures)
        served = httpx.get(address, timeout=60).text + httpx.get(f"{address}config", timeout=60).text
        keys = [session.key for session in page.desk._sessions.values()]
        assert keys and not any(key in served for key in keys)
        assert str(page.desk.stores["embedded"].root) not in served

    def test_names_that_the_browser_tests_rely_on(self, page):
        held = {block.elem_id for block in page.blocks.values() if getattr(block, "elem_id", None)}
        tabs = [block.label for block in page.blocks.values() if type(block).__name__ == "Tab"]
        assert tabs == ["Inspect", "Teach", "Batch", "Gallery", "About"]
        expected = {
            "inspect": "picture part run verdict gauge heatmap threshold keep good opacity compare masks downloads "
            "examples",
            "region": "picture apply again whole",
            "teach": "name pictures coarse fine length run cancel progress loss-denoiser loss-decoder validation "
            "result inspect pictures-thumbnails rate download upload",
            "batch": "files files-thumbnails part run cancel progress table gallery downloads",
            "about": "model",
        }
        assert not {f"{tab}-{name}" for tab, names in expected.items() for name in names.split()} - held

    def test_every_control_has_a_label(self, page):
        kinds = ("Textbox", "Image", "File", "Dropdown", "Radio", "Slider", "Gallery", "Dataframe", "ImageSlider")
        kinds += ("LinePlot",)
        for block in page.blocks.values():
            if type(block).__name__ in kinds and getattr(block, "elem_id", None):
                assert block.label, block.elem_id


def test_import_loads_no_model():
    code = "import sys, app; assert not {'torch', 'diffusers'} & set(sys.modules), 'heavy import'; app.demo.launch"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
