import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from anomalysd_pipeline.adaptation.checkpoints import (
    check_checkpoint,
    checkpoint_step,
    find_checkpoints,
    list_checkpoints,
    save_checkpoint,
)

from .tiny_training import own_accelerator

FACTS = {"learning_rate": 1e-4, "noise_range": (0.0, 1.0), "seed": 3}


class Training:
    """A linear layer under an accelerator, and what a checkpoint of it must bring back."""

    def __init__(self, accelerator):
        self.accelerator = accelerator
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 2)
        self.layer, self.optimizer = accelerator.prepare(layer, torch.optim.Adam(layer.parameters(), lr=0.1))

    def step(self):
        self.accelerator.backward((self.layer(torch.ones(1, 3)) ** 2).sum())
        self.optimizer.step()
        self.optimizer.zero_grad()

    def values(self):
        moments = [state["exp_avg"] for state in self.optimizer.state.values()]
        return [value.detach().clone() for value in (*self.layer.parameters(), *moments)]


@pytest.fixture
def training():
    with own_accelerator() as accelerator:
        yield Training(accelerator)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def load_checkpoint(accelerator, path, facts):
    check_checkpoint(path, facts, steps=100)
    accelerator.load_state(str(path))
    return checkpoint_step(path)


def equal(first, second):
    return len(first) == len(second) and all(map(torch.equal, first, second))


class TestSaveAndLoad:
    def test_brings_back_weights_optimizer_and_step(self, training, tmp_path):
        training.step()
        saved = training.values()
        save_checkpoint(training.accelerator, tmp_path / "new" / "folder", 7, FACTS)
        training.step()
        assert not equal(training.values(), saved)
        (path,) = list_checkpoints(tmp_path / "new" / "folder")
        assert load_checkpoint(training.accelerator, path, FACTS) == 7
        assert equal(training.values(), saved) and len(saved) == 4

    def test_nothing_else_is_left_in_the_folder(self, training, tmp_path):
        save_checkpoint(training.accelerator, tmp_path, 1, FACTS)
        save_checkpoint(training.accelerator, tmp_path, 2, FACTS, total_limit=1)
        assert names(tmp_path) == ["checkpoint-2"]

    def test_one_of_the_same_step_is_replaced(self, training, tmp_path):
        save_checkpoint(training.accelerator, tmp_path, 1, FACTS)
        training.step()
        changed = training.values()
        save_checkpoint(training.accelerator, tmp_path, 1, {**FACTS, "seed": 4})
        training.step()
        assert names(tmp_path) == ["checkpoint-1"]
        load_checkpoint(training.accelerator, tmp_path / "checkpoint-1", {**FACTS, "seed": 4})
        assert equal(training.values(), changed)

    @pytest.mark.parametrize("limit, kept", [(None, [1, 2, 9, 10]), (2, [9, 10]), (1, [10])])
    def test_total_limit_keeps_the_latest(self, training, tmp_path, limit, kept):
        for step in (1, 2, 9, 10):
            save_checkpoint(training.accelerator, tmp_path, step, FACTS, limit)
        assert [path.name for path in list_checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in kept]
        assert len(names(tmp_path)) == len(kept)


class TestOtherFacts:
    def test_fewer_steps_than_a_checkpoint_has_are_refused(self, training, tmp_path):
        save_checkpoint(training.accelerator, tmp_path, 5, FACTS)
        check_checkpoint(tmp_path / "checkpoint-5", FACTS, steps=5)
        with pytest.raises(ValueError, match="`steps` leads to 4 steps, but .*give at least 5"):
            check_checkpoint(tmp_path / "checkpoint-5", FACTS, steps=4)

    @pytest.mark.parametrize(
        "facts, sentence",
        [
            ({**FACTS, "learning_rate": 2e-4}, "`learning_rate` is 0.0002, but '.*checkpoint-1' was .* with 0.0001"),
            ({**FACTS, "noise_range": (0.0, 0.5)}, r"`noise_range` is \[0.0, 0.5\]"),
            ({key: value for key, value in FACTS.items() if key != "seed"}, "`seed` is None, but .* with 3"),
            ({**FACTS, "rank": 4}, "`rank` is 4, but .* with None"),
        ],
    )
    def test_are_refused_before_anything_is_loaded(self, training, tmp_path, facts, sentence):
        save_checkpoint(training.accelerator, tmp_path, 1, FACTS)
        training.step()
        before = training.values()
        with pytest.raises(ValueError, match=sentence):
            load_checkpoint(training.accelerator, tmp_path / "checkpoint-1", facts)
        assert equal(training.values(), before)


class TestFind:
    def folder(self, path, *numbers):
        for number in numbers:
            (path / f"checkpoint-{number}").mkdir(parents=True)
        return path

    def test_lists_complete_ones_by_number(self, tmp_path):
        self.folder(tmp_path, 10, 9)
        for name in ("checkpoint-", "checkpoint-last", "checkpoint-1a", "logs"):
            (tmp_path / name).mkdir()
        for name in (".checkpoint-11.partial", ".checkpoint-8.deleted"):
            (tmp_path / name).mkdir()
        assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]
        assert list_checkpoints(tmp_path / "missing") == []

    def test_latest_is_that_of_each_folder(self, tmp_path):
        first, second = self.folder(tmp_path / "first", 9, 10), self.folder(tmp_path / "second", 3)
        found = find_checkpoints([first, second, tmp_path / "missing"], "latest")
        assert found == [first / "checkpoint-10", second / "checkpoint-3", None]
        assert find_checkpoints([tmp_path / "missing"], None) == [None]
        with pytest.raises(ValueError, match="`output_dir`.* holds checkpoints of an earlier run"):
            find_checkpoints([first, second], None)

    def test_a_name_applies_to_the_folders_that_have_it(self, tmp_path):
        first, second = self.folder(tmp_path / "first", 9, 10), self.folder(tmp_path / "second", 3, 9, 12)
        third = self.folder(tmp_path / "third", 4)
        expected = [first / "checkpoint-9", second / "checkpoint-9", third / "checkpoint-4", None]
        folders = [first, second, third, tmp_path / "missing"]
        assert find_checkpoints(folders, "checkpoint-9") == expected
        assert find_checkpoints(folders, str(first / "checkpoint-9")) == expected

    def test_another_name_is_refused_with_those_that_are_there(self, tmp_path):
        with pytest.raises(ValueError, match=r"`resume_from_checkpoint`.*\(none\), got 'checkpoint-3'"):
            find_checkpoints([tmp_path / "first"], "checkpoint-3")
        self.folder(tmp_path / "first", 2)
        with pytest.raises(ValueError, match=r"`resume_from_checkpoint`.*\(checkpoint-2\), got 'newest'"):
            find_checkpoints([tmp_path / "first", tmp_path / "second"], "newest")


class TestFailedWriting:
    def fail(self, accelerator, error):
        """Makes the next `save_state` fail when a part of it is written."""

        def hook(models, weights, output_dir):
            Path(output_dir, "half").write_text("written")
            handle.remove()
            raise error

        handle = accelerator.register_save_state_pre_hook(hook)

    @pytest.mark.parametrize("number, words", [(errno.ENOSPC, "No space left"), (errno.EACCES, "Permission denied")])
    def test_of_the_disk_is_one_sentence_and_keeps_the_old(self, training, tmp_path, number, words):
        save_checkpoint(training.accelerator, tmp_path, 1, FACTS)
        saved = training.values()
        self.fail(training.accelerator, OSError(number, words))
        with pytest.raises(ValueError, match=f"`output_dir` '.*' could not be written \\({words}.*latest") as caught:
            save_checkpoint(training.accelerator, tmp_path, 2, FACTS, total_limit=1)
        assert "\n" not in str(caught.value)
        assert names(tmp_path) == ["checkpoint-1"]
        load_checkpoint(training.accelerator, tmp_path / "checkpoint-1", FACTS)
        assert equal(training.values(), saved)
        save_checkpoint(training.accelerator, tmp_path, 2, FACTS, total_limit=1)
        assert names(tmp_path) == ["checkpoint-2"]

    @pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("shape mismatch")])
    def test_for_other_reasons_leaves_nothing_and_is_passed_on(self, training, tmp_path, error):
        self.fail(training.accelerator, error)
        with pytest.raises(type(error)) as caught:
            save_checkpoint(training.accelerator, tmp_path, 2, FACTS)
        assert caught.value is error and names(tmp_path) == []

    def test_a_file_in_the_place_of_the_folder(self, training, tmp_path):
        (tmp_path / "taken").write_text("mine")
        with pytest.raises(ValueError, match="`output_dir` '.*taken' could not be written"):
            save_checkpoint(training.accelerator, tmp_path / "taken", 1, FACTS)
        assert (tmp_path / "taken").read_text() == "mine"

    def test_what_a_killed_run_left_is_cleaned_up(self, training, tmp_path):
        for name in (".checkpoint-2.partial", ".checkpoint-1.deleted"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "random_states_0.pkl").write_bytes(b"half")
        assert find_checkpoints([tmp_path], "latest") == [None]
        save_checkpoint(training.accelerator, tmp_path, 2, FACTS)
        assert names(tmp_path) == ["checkpoint-2"]
        assert load_checkpoint(training.accelerator, tmp_path / "checkpoint-2", FACTS) == 2


FULL_DISK = """
import json, resource, signal, sys
from pathlib import Path
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from anomalysd_pipeline.adaptation.checkpoints import list_checkpoints, save_checkpoint

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit then fails as on a full disk
accelerator = Accelerator(cpu=True)
layer = torch.nn.Linear(100, 100)
layer, optimizer = accelerator.prepare(layer, torch.optim.Adam(layer.parameters()))
accelerator.backward(layer(torch.ones(1, 100)).sum())
optimizer.step()
for number, (limit, text) in enumerate(json.loads(sys.argv[2])):
    folder = Path(sys.argv[1], str(number))
    save_checkpoint(accelerator, folder, 1, {})
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        save_checkpoint(accelerator, folder, 2, {"text": "x" * text}, total_limit=1)
        said = None
    except ValueError as error:
        said = str(error)
    except BaseException as error:
        said = repr(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(json.dumps([said, sorted(path.name for path in folder.iterdir())]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits on file sizes are a Unix matter")
def test_a_full_disk_is_one_sentence_and_keeps_the_old(tmp_path):
    """Writes that truly fail, at the start and in the middle of each kind of file: weights (40 KB), optimizer (82 KB)
    and facts (200 KB)."""
    cases = [(limit, 0) for limit in (0, 100, 500, 5000, 30_000, 42_000, 60_000, 70_000, 81_000)] + [
        (150_000, 200_000)
    ]
    run = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path), json.dumps(cases)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    answers = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(answers) == len(cases)
    for case, (said, left) in zip(cases, answers, strict=True):
        assert said is not None and said.startswith("`output_dir` '"), (case, said)
        assert "could not be written (" in said and "\n" not in said, (case, said)
        assert left == ["checkpoint-1"], case
