"""Exported folders, and their way to a Hub and back: every byte, every flag, and one sentence for what goes wrong."""

import hashlib
import json
import logging
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import close_session, constants
from PIL import Image
from safetensors.torch import load_file

from anomalysd_pipeline import EMBEDDED, AnomalySDPipeline
from anomalysd_pipeline.hub.publishing import export, push, push_to_hub
from anomalysd_pipeline.synthetic import normal_images

from .conftest import make_tiny_pipeline
from .hub_server import HubServer

pytestmark = pytest.mark.timeout(240)  # saves whole pipelines, and loads them in new processes

ROOT = Path(__file__).resolve().parents[1]
LOADER = Path(__file__).with_name("load_published.py")


def run_loader(folder: Path, *arguments: str, hub: HubServer | None = None, package: bool = False):
    """Runs `load_published.py` in `folder`, far from this repository; its facts, and what it found."""
    unwanted = ("HF_", "PYTHON", "TRANSFORMERS_")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(unwanted)}
    # As many threads as here: with another number sums round otherwise, and the comparison is bit by bit.
    threads = str(torch.get_num_threads())
    environment |= {"HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": threads, "NO_PROXY": "127.0.0.1"}
    if hub is None:
        environment["HF_HUB_OFFLINE"] = "1"
    else:
        environment |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token, "HF_HUB_DISABLE_XET": "1"}
    if package:
        environment["PYTHONPATH"] = str(ROOT)
    out = folder / "out.npz"
    command = [sys.executable, str(LOADER), *arguments[:3], str(out), *arguments[3:]]
    command.append("--package" if package else "--forbid-package")
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    # What diffusers says where it misses packages, or finds a class that is not the one a pipeline names.
    assert "might require" not in done.stderr and "Expected types" not in done.stderr
    return json.loads(done.stdout.splitlines()[-1]), np.load(out)


@pytest.fixture(scope="module")
def pipe():
    """A pipeline that knows a calibrated part, and another through an adaptation."""
    made = make_tiny_pipeline()
    nuts, gears = (normal_images(family, 2, seed=5, size=64) for family in ("hex_nut", "gear"))
    made.add_category("hex nut", nuts, prompts=["A perfect *nut* <b>.", "{name}"])
    made.calibrate("hex nut", nuts)
    short = {"steps": 2, "decoder_steps": 1, "train_batch_size": 2, "rank": 2, "decoder_rank": 2}
    made.adapt({"gear": gears}, name="gears", method="lora", mixed_precision="no", **short)
    return made


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "part.png"
    Image.fromarray(np.asarray(normal_images("hex_nut", 1, seed=6, size=64)[0])).save(path)
    return path


@pytest.fixture(scope="module")
def exported(pipe, tmp_path_factory):
    return export(pipe, tmp_path_factory.mktemp("export") / "pipeline")


@pytest.fixture
def copy(exported, tmp_path):
    """A copy of the exported folder that a test may change."""
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class TestExport:
    def test_a_pipeline_is_complete(self, exported):
        names = set(content(exported))
        assert {"model_index.json", "README.md", "pipeline.py"} <= names
        assert {
            "extractor/anomalysd_pipeline.models.extractor.py",
            "perceptual/anomalysd_pipeline.models.perceptual.py",
        } <= names
        assert not [name for name in names if name.endswith((".bin", ".pt", ".partial"))]
        assert "hex nut" in (exported / "README.md").read_text()

    def test_what_is_listed_is_there(self, exported):
        index = json.loads((exported / "model_index.json").read_text())
        assert index["_class_name"] == "AnomalySDPipeline"
        for name, entry in index.items():
            if isinstance(entry, list) and entry[0] is not None:
                assert any((exported / name).iterdir())
            if isinstance(entry, list) and str(entry[0]).startswith("anomalysd_pipeline."):
                assert (exported / name / f"{entry[0]}.py").is_file()

    def test_an_adaptation_is_small(self, pipe, tmp_path):
        folder = export(pipe, tmp_path / "gears", adaptation="gears", repo_id="user/gears")
        assert set(content(folder)) == {"README.md", "adaptation.json", "adaptation.safetensors"}
        card = (folder / "README.md").read_text()
        assert 'load_adaptation("user/gears")' in card and "gear" in card and "hex nut" not in card

    def test_paths_of_this_machine_stay_here(self, copy, tmp_path):
        AnomalySDPipeline.from_pretrained(copy).save_pretrained(tmp_path / "again")
        assert str(tmp_path).encode() in b"".join(
            data for name, data in content(tmp_path / "again").items() if name.endswith(".json")
        )
        folder = export(AnomalySDPipeline.from_pretrained(tmp_path / "again"), tmp_path / "out")
        for name, data in content(folder).items():
            assert str(tmp_path).encode() not in data, name

    def test_the_card_says_where_it_came_from(self, copy, tmp_path):
        loaded = AnomalySDPipeline.from_pretrained(copy)
        loaded.register_to_config(_name_or_path=EMBEDDED)
        card = (export(loaded, tmp_path / "out") / "README.md").read_text()
        assert "license: apache-2.0" in card and "made from the embedded checkpoint" in card

    def test_a_folder_with_something_in_it_is_refused(self, pipe, tmp_path):
        (tmp_path / "notes.txt").write_text("mine")
        for overwrite in (False, True):
            with pytest.raises(ValueError, match="`folder`.*holds something already"):
                export(pipe, tmp_path, overwrite=overwrite)
        assert content(tmp_path) == {"notes.txt": b"mine"}

    def test_overwrite_replaces_an_earlier_export(self, pipe, copy):
        (copy / "stale.txt").write_text("old")
        with pytest.raises(ValueError, match="overwrite=True"):
            export(pipe, copy)
        export(pipe, copy, adaptation="gears", overwrite=True)
        assert set(content(copy)) == {"README.md", "adaptation.json", "adaptation.safetensors"}

    @pytest.mark.parametrize("adaptation", [None, "gears"])
    def test_a_full_disk_leaves_nothing_behind(self, pipe, copy, adaptation):
        before = content(copy.parent)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        try:
            with pytest.raises(ValueError, match="could not be written"):
                export(pipe, copy, adaptation=adaptation, overwrite=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert content(copy.parent) == before

    def test_an_error_leaves_nothing_behind(self, pipe, tmp_path):
        for bad in ({"figures": [{}]}, {"adaptation": "unheard of"}):
            with pytest.raises(ValueError):
                export(pipe, tmp_path / "new", **bad)
        assert not list(tmp_path.iterdir())


class TestUpload:
    def test_every_file_arrives_as_it_was(self, hub, copy):
        url = push(copy, "user/nuts", token=hub.token)
        files = hub.repositories["user/nuts"].branches["main"]
        here = content(copy)
        here["README.md"] = here["README.md"].replace(b"path/to/this/folder", b"user/nuts")
        assert files == here
        assert url == f"{hub.url}/user/nuts/commit/{hub.repositories['user/nuts'].sha('main')}"
        weights = {name for name in files if name.endswith(".safetensors")}
        assert len(weights) > 5
        assert {hashlib.sha256(files[name]).hexdigest() for name in weights} == set(hub.uploaded)

    @pytest.mark.parametrize("private", [True, False, None])
    def test_private_arrives(self, hub, copy, private):
        push(copy, "user/nuts", private=private, token=hub.token)
        assert hub.repositories["user/nuts"].private is bool(private)

    def test_pull_request(self, hub, copy):
        push(copy, "user/nuts", token=hub.token)
        main = dict(hub.repositories["user/nuts"].branches["main"])
        (copy / "README.md").write_text("---\nlicense: mit\n---\nNew.\n")
        url = push(copy, "user/nuts", create_pr=True, token=hub.token, commit_message="A new card")
        branches = hub.repositories["user/nuts"].branches
        assert url == f"{hub.url}/user/nuts/discussions/1"
        assert branches["main"] == main and branches["refs/pr/1"]["README.md"].endswith(b"New.\n")
        assert hub.repositories["user/nuts"].messages[-1] == "A new card"

    def test_the_login_of_the_environment_is_used(self, hub, copy, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", hub.token)
        push(copy, "user/nuts")
        assert "user/nuts" in hub.repositories

    def test_the_token_is_never_shown(self, hub, copy, capfd, caplog):
        caplog.set_level(logging.DEBUG)
        push(copy, "user/nuts", token=hub.token)
        hub.refusal = 403
        with pytest.raises(ValueError) as refused:
            push(copy, "user/nuts", token=hub.token)
        shown = capfd.readouterr()
        assert caplog.text
        assert hub.token not in caplog.text + shown.out + shown.err + str(refused.value)

    def test_what_is_missing_is_added_to_the_upload_alone(self, hub, pipe, tmp_path):
        pipe.save_pretrained(tmp_path / "plain")
        before = content(tmp_path / "plain")
        push(tmp_path / "plain", "user/nuts", token=hub.token)
        assert content(tmp_path / "plain") == before
        files = hub.repositories["user/nuts"].branches["main"]
        assert {"README.md", "pipeline.py", "bank/anomalysd_pipeline.models.bank.py"} <= set(files)
        assert b'from_pretrained("user/nuts")' in files["README.md"]

    def test_a_card_learns_where_it_is(self, hub, copy):
        assert "path/to/this/folder" in (copy / "README.md").read_text()
        before = content(copy)
        push(copy, "user/nuts", token=hub.token)
        card = hub.repositories["user/nuts"].branches["main"]["README.md"].decode()
        assert "path/to/this/folder" not in card and 'source = "user/nuts"' in card
        assert content(copy) == before

    def test_paths_of_this_machine_stay_here(self, hub, copy, tmp_path):
        AnomalySDPipeline.from_pretrained(copy).save_pretrained(tmp_path / "again")
        before = content(tmp_path / "again")
        assert str(tmp_path).encode() in before["model_index.json"]
        push(tmp_path / "again", "user/nuts", token=hub.token)
        assert content(tmp_path / "again") == before
        for name, data in hub.repositories["user/nuts"].branches["main"].items():
            assert str(tmp_path).encode() not in data, name

    def test_a_card_of_ones_own_stays(self, hub, copy):
        (copy / "README.md").write_text("---\nlicense: mit\n---\nMine.\n")
        push(copy, "user/nuts", token=hub.token)
        assert hub.repositories["user/nuts"].branches["main"]["README.md"].endswith(b"Mine.\n")

    def test_hidden_files_stay_behind(self, hub, copy):
        for name in (".env", "unet/.secret", ".git/config"):
            (copy / name).parent.mkdir(exist_ok=True)
            (copy / name).write_text("secret")
        push(copy, "user/nuts", token=hub.token)
        assert not [name for name in hub.repositories["user/nuts"].branches["main"] if "/." in f"/{name}"]

    def test_from_a_pipeline(self, hub, pipe):
        push_to_hub(pipe, "user/gears", adaptation="gears", private=True, token=hub.token)
        found = hub.repositories["user/gears"]
        assert found.private
        assert set(found.branches["main"]) == {"README.md", "adaptation.json", "adaptation.safetensors"}


class TestRefusals:
    """One sentence each, and for what this machine can know, before anything is sent."""

    @pytest.mark.parametrize(
        "repo_id", ["nuts", "user/", "/nuts", "a/b/c", "user/my nuts", "user/nuts.git", "--/..", ""]
    )
    def test_bad_repo_id(self, hub, pipe, copy, repo_id):
        for attempt in (lambda: push(copy, repo_id, token=hub.token), lambda: push_to_hub(pipe, repo_id)):
            with pytest.raises(ValueError, match="`repo_id` must be 'user/name'"):
                attempt()
        assert not hub.requests

    @pytest.mark.parametrize("name", ["unet/old.bin", "model.ckpt", "deep/er/optimizer.PT", "x.pkl"])
    def test_pickles(self, hub, copy, name):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(b"")
        with pytest.raises(ValueError, match="can run code"):
            push(copy, "user/nuts", token=hub.token)
        assert not hub.requests

    def test_no_checkpoint(self, hub, tmp_path):
        with pytest.raises(ValueError, match="must hold either model_index.json or adaptation.json"):
            push(tmp_path, "user/nuts", token=hub.token)

    def test_another_pipeline(self, hub, copy):
        index = copy / "model_index.json"
        index.write_text(index.read_text().replace('"AnomalySDPipeline"', '"StableDiffusionPipeline"'))
        with pytest.raises(ValueError, match="holds a StableDiffusionPipeline"):
            push(copy, "user/nuts", token=hub.token)

    def test_a_component_that_is_missing(self, hub, copy):
        shutil.rmtree(copy / "unet")
        with pytest.raises(ValueError, match="lacks its component 'unet'"):
            push(copy, "user/nuts", token=hub.token)
        assert not hub.requests

    def test_a_damaged_index(self, hub, copy):
        (copy / "model_index.json").write_text("{")
        with pytest.raises(ValueError, match="damaged model_index.json"):
            push(copy, "user/nuts", token=hub.token)

    def test_a_damaged_configuration(self, hub, copy):
        (copy / "unet" / "config.json").write_text("{")
        with pytest.raises(ValueError, match=r"`folder`.*damaged unet/config\.json"):
            push(copy, "user/nuts", token=hub.token)
        assert not hub.requests

    @pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="needs a file that nobody can read")
    def test_a_file_that_cannot_be_read(self, hub, copy):
        (copy / "notes.txt").symlink_to("/proc/self/mem")
        with pytest.raises(ValueError, match="`folder`.*cannot be read"):
            push(copy, "user/nuts", token=hub.token)
        assert not hub.requests

    def test_metadata_that_the_hub_cannot_read(self, hub, copy):
        (copy / "README.md").write_text("---\nlicense: [\n---\n")
        with pytest.raises(ValueError, match="`folder`.*is refused.*README.md"):
            push(copy, "user/nuts", token=hub.token)

    @pytest.mark.parametrize("token", [None, "hf_wrong"])
    def test_no_login(self, hub, copy, token):
        said = r"'user/nuts' is refused by the Hub \(401: Invalid username or password\); .*`hf auth login` or set HF"
        with pytest.raises(ValueError, match=said):
            push(copy, "user/nuts", token=token)

    def test_no_right(self, hub, copy):
        said = r"'other/nuts' is refused by the Hub \(403: You have no rights in this namespace\); .*may write there"
        with pytest.raises(ValueError, match=said):
            push(copy, "other/nuts", token=hub.token)

    @pytest.mark.parametrize(
        ("status", "words"),
        [(404, "; check the name"), (410, r"\.$"), (429, "; wait some minutes"), (500, "; wait some minutes")],
    )
    def test_other_answers(self, hub, copy, status, words):
        hub.refusal = status
        with pytest.raises(ValueError, match=rf"refused by the Hub \({status}: refused\){words}") as refused:
            push(copy, "user/nuts", token=hub.token)
        assert "\n" not in str(refused.value)

    def test_offline(self, hub, copy, monkeypatch):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        close_session()
        with pytest.raises(ValueError, match="unset HF_HUB_OFFLINE"):
            push(copy, "user/nuts", token=hub.token)

    def test_no_connection(self, hub, copy, monkeypatch):
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        with pytest.raises(ValueError, match="'user/nuts' cannot be reached .*check the connection"):
            push(copy, "user/nuts", token=hub.token)


class TestLoading:
    """What was published gives the same maps and verdicts, with this package and without it."""

    def check(self, pipe, picture, category, facts, found):
        expected = pipe(Image.open(picture), category=category)
        assert np.array_equal(found["maps"], expected.anomaly_maps)
        assert np.array_equal(found["scores"], expected.pred_scores)
        assert facts["labels"] == expected.pred_labels
        assert expected.pred_labels != [None]

    @pytest.mark.parametrize("category", ["hex nut", pytest.param("gear", marks=pytest.mark.full)])
    def test_from_a_folder_without_the_package(self, pipe, exported, picture, tmp_path, category):
        facts, found = run_loader(tmp_path, str(exported), str(picture), category)
        assert not facts["installed"]
        self.check(pipe, picture, category, facts, found)

    def test_a_folder_that_was_only_saved_without_the_package(self, pipe, picture, tmp_path):
        pipe.save_pretrained(tmp_path / "saved")
        facts, found = run_loader(tmp_path, str(tmp_path / "saved"), str(picture), "hex nut")
        assert not facts["installed"]
        self.check(pipe, picture, "hex nut", facts, found)

    def test_a_folder_that_was_only_saved_by_diffusers_with_the_package(self, pipe, picture, tmp_path):
        pipe.save_pretrained(tmp_path / "saved")
        (tmp_path / "saved" / "pipeline.py").write_text("raise RuntimeError")
        loaded = DiffusionPipeline.from_pretrained(tmp_path / "saved")
        assert type(loaded) is AnomalySDPipeline
        expected = pipe(Image.open(picture), category="hex nut")
        assert np.array_equal(loaded(Image.open(picture), category="hex nut").anomaly_maps, expected.anomaly_maps)

    @pytest.mark.full
    def test_all_that_a_pipeline_does_without_the_package(self, exported, picture, tmp_path):
        facts, _ = run_loader(tmp_path, str(exported), str(picture), "hex nut", "--all")
        assert not facts["installed"]
        assert (tmp_path / "published" / "README.md").is_file()

    @pytest.mark.full
    def test_from_the_hub_without_the_package(self, hub, pipe, copy, picture, tmp_path):
        pipe_without = AnomalySDPipeline.from_pretrained(copy)
        pipe_without.remove_adaptation("gears")
        push_to_hub(pipe_without, "user/nuts", private=True, token=hub.token)
        push_to_hub(pipe, "user/gears", adaptation="gears", token=hub.token)
        arguments = ("user/nuts", str(picture), "gear", "--adaptation", "user/gears")
        facts, found = run_loader(tmp_path, *arguments, hub=hub)
        assert not facts["installed"]
        self.check(pipe, picture, "gear", facts, found)

    @pytest.mark.full
    def test_from_the_hub_with_the_package(self, hub, pipe, copy, picture, tmp_path):
        push(copy, "user/nuts", token=hub.token)
        facts, found = run_loader(tmp_path, "user/nuts", str(picture), "hex nut", hub=hub, package=True)
        assert facts["module"] == "anomalysd_pipeline.pipeline"
        self.check(pipe, picture, "hex nut", facts, found)

    def test_from_a_folder_with_the_package_no_code_of_it_runs(self, pipe, copy, picture):
        for path in copy.rglob("*.py"):
            path.write_text("raise RuntimeError")
        loaded = AnomalySDPipeline.from_pretrained(copy)
        assert type(loaded.extractor).__module__ == "anomalysd_pipeline.models.extractor"
        expected = pipe(Image.open(picture), category="hex nut")
        found = loaded(Image.open(picture), category="hex nut")
        assert np.array_equal(found.anomaly_maps, expected.anomaly_maps)

    def test_dtype_and_variant_reach_components_with_code(self, pipe, copy, tmp_path):
        import torch

        pipe.save_pretrained(tmp_path / "half", variant="fp16")
        shutil.copytree(copy / "extractor", tmp_path / "half" / "extractor", dirs_exist_ok=True)
        (tmp_path / "half" / "extractor" / "diffusion_pytorch_model.safetensors").unlink()
        loaded = AnomalySDPipeline.from_pretrained(tmp_path / "half", variant="fp16", dtype=torch.bfloat16)
        assert loaded.extractor.dtype == loaded.unet.dtype == torch.bfloat16
        weights = load_file(tmp_path / "half" / "extractor" / "diffusion_pytorch_model.fp16.safetensors")
        name, weight = next(iter(weights.items()))
        assert torch.equal(loaded.extractor.state_dict()[name], weight.to(torch.bfloat16))
