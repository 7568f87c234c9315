"""`anomalysd adapt`, what `detect` does with its result, and `publish`."""

import argparse
import csv
import shutil
from pathlib import Path

import pytest
from huggingface_hub import close_session, constants
from PIL import Image

from anomalysd_pipeline import synthetic
from anomalysd_pipeline.cli import _parser, main
from anomalysd_pipeline.training.options import add_arguments

from .conftest import make_tiny_pipeline
from .hub_server import HubServer
from .tiny import tiny_components

SHORT = "--max_train_steps 2 --max_decoder_steps 1 --train_batch_size 2 --mixed_precision no --cpu"


@pytest.fixture(scope="module")
def adapted(tiny_pipeline_folder, tmp_path_factory):
    """The folder of a run on two rings, and what was printed."""
    folder = tmp_path_factory.mktemp("adapted")
    (folder / "good").mkdir()
    for index, image in enumerate(synthetic.normal_images("ring", 2, seed=3, size=64)):
        image.save(folder / "good" / f"{index}.png")
    source = ["--normal", str(folder / "good"), "--category", "my ring", "--base", str(tiny_pipeline_folder)]
    assert main(["adapt", *source, *SHORT.split(), "--output_dir", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "part.png"
    Image.fromarray(synthetic.test_samples("ring", 0, 1, seed=3, size=64)[0].image).save(path)
    return path


def detect(base, out, *arguments):
    fixed = ["--base", base, "--out", out, "--device", "cpu"]
    return main(["detect", *map(str, [*fixed, *arguments])])


class TestAdapt:
    def test_it_takes_the_options_of_the_training(self):
        training = argparse.ArgumentParser()
        add_arguments(training, report_to="tensorboard")
        (commands,) = [action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction)]
        assert commands.choices["adapt"]._option_string_actions.keys() == training._option_string_actions.keys()

    def test_its_result_gives_verdicts(self, adapted, tiny_pipeline_folder, picture, tmp_path):
        out = tmp_path / "results"
        arguments = ["--adaptation", adapted / "adaptation", "--category", "my ring", "--test", picture]
        assert detect(tiny_pipeline_folder, out, *arguments) == 0
        with open(out / "results.csv", newline="", encoding="utf-8") as file:
            (row,) = csv.DictReader(file)
        assert float(row["threshold"]) > 0 and row["verdict"] in ("normal", "defective")

    def test_no_tracker_is_needed(self, adapted):
        assert not (adapted / "logs").exists()

    def test_bad_settings_are_one_sentence(self, tmp_path, capsys):
        arguments = ["--synthetic", "ring", "--output_dir", str(tmp_path / "run"), "--num_train_epochs", "0"]
        assert main(["adapt", *arguments]) == 2
        # The first command of a process imports PyTorch, and says that it is starting.
        (error,) = [line for line in capsys.readouterr().err.splitlines() if "starting [" not in line]
        assert error.startswith("anomalysd: error: `--num_train_epochs` must be")
        assert not (tmp_path / "run").exists()

    def test_another_base_is_refused(self, adapted, picture, tmp_path, capsys):
        make_tiny_pipeline(**tiny_components(seed=1)).save_pretrained(tmp_path / "base")
        arguments = ["--adaptation", adapted / "adaptation", "--category", "my ring", "--test", picture]
        assert detect(tmp_path / "base", tmp_path / "results", *arguments) == 2
        assert "`--adaptation`" in capsys.readouterr().err
        assert not (tmp_path / "results").exists()

    def test_a_missing_adaptation_is_one_sentence(self, tiny_pipeline_folder, picture, tmp_path, capsys):
        arguments = ["--adaptation", tmp_path / "gone", "--category", "my ring", "--test", picture]
        assert detect(tiny_pipeline_folder, tmp_path / "results", *arguments) == 2
        assert "anomalysd: error: `--adaptation`" in capsys.readouterr().err.splitlines()[-1]


class TestPublish:
    @pytest.fixture
    def hub(self, monkeypatch, tmp_path):
        """A Hub on this machine, to which its own user is logged in."""
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        close_session()
        with HubServer() as server:
            monkeypatch.setenv("HF_TOKEN", server.token)
            monkeypatch.setattr(constants, "ENDPOINT", server.url)
            yield server
        close_session()

    @pytest.fixture
    def folder(self, adapted, tmp_path):
        return Path(shutil.copytree(adapted / "adaptation", tmp_path / "adaptation"))

    def test_the_folder_arrives(self, hub, folder, capsys):
        assert main(["publish", str(folder), "user/ring", "--private"]) == 0
        assert f"{hub.url}/user/ring" in capsys.readouterr().out
        repository = hub.repositories["user/ring"]
        assert repository.private
        assert set(repository.branches["main"]) >= {"README.md", "adaptation.json", "adaptation.safetensors"}

    def test_as_a_pull_request(self, hub, folder, capsys):
        assert main(["publish", str(folder), "user/ring"]) == 0
        assert main(["publish", str(folder), "user/ring", "--create-pr"]) == 0
        assert "/discussions/1" in capsys.readouterr().out
        assert not hub.repositories["user/ring"].private

    @pytest.mark.parametrize(("repo_id", "part"), [("ring", "`USER/NAME` must be"), ("a/b/c", "`USER/NAME` must be")])
    def test_a_bad_name_is_one_sentence(self, repo_id, part, hub, folder, capsys):
        assert main(["publish", str(folder), repo_id]) == 2
        error = capsys.readouterr().err
        assert part in error and error.count("\n") == 1 and not hub.requests

    def test_a_run_is_not_its_result(self, hub, adapted, capsys):
        assert main(["publish", str(adapted), "user/ring"]) == 2
        assert "adaptation.json" in capsys.readouterr().err and not hub.requests
