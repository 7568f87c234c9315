"""A fine-tuning that is killed with SIGKILL, at random times and in every state of writing a checkpoint, resumes from
its last complete checkpoint and ends with the bits of an uninterrupted one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .kill_driver import STEPS

pytestmark = [pytest.mark.full, pytest.mark.skipif(not hasattr(os, "fork"), reason="the driver forks")]


def drive(work, *options):
    run = subprocess.run(
        [sys.executable, "-m", "tests.kill_driver", str(work), *options],
        cwd=Path(__file__).resolve().parent.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


@pytest.mark.canary
@pytest.mark.timeout(300)  # five runs, each in a process
def test_two_kills_change_no_bit(tmp_path):
    told = drive(tmp_path, "--kills", "2")["random"]
    assert len(told["kills"]) == 2 and told["equal"] and all(told["equal"])


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    return drive(tmp_path_factory.mktemp("killed"), "--kills", "20", "--states")


class TestRandomKills:
    def test_twenty_of_them_change_no_bit(self, told):
        assert len(told["random"]["kills"]) == 20
        assert len(told["random"]["equal"]) >= 10 and all(told["random"]["equal"])

    def test_they_fall_into_writing_and_training(self, told):
        kills = told["random"]["kills"]
        assert sum(kill["writing"] for kill in kills) >= 3
        assert sum(not kill["writing"] for kill in kills) >= 3

    def test_they_fall_into_both_stages(self, told):
        reached = [kill["step"] for kill in told["random"]["kills"]]
        assert min(reached) < STEPS <= max(reached)


class TestKillsWhileWriting:
    """In every state that the folder goes through while checkpoint 3 is written and checkpoint 1 is removed."""

    def test_every_one_changes_no_bit(self, told):
        for each in told["states"]:
            assert each["killed"], each
            assert each["equal"], each

    def test_the_run_goes_on_from_the_last_complete_checkpoint(self, told):
        for each in told["states"]:
            last = "checkpoint-3" if "checkpoint-3/training.json" in each["state"] else "checkpoint-2"
            assert each["there"][-1] == last, each
            assert each["steps"] == STEPS - int(last[-1]), each

    def test_nothing_half_written_or_half_deleted_is_left(self, told):
        assert all(each["left"] == ["checkpoint-4", "checkpoint-5"] for each in told["states"])

    def test_the_states_are_those_of_writing_and_deleting(self, told):
        states = [set(each["state"]) for each in told["states"]]
        partial, deleted = ".checkpoint-3.partial", ".checkpoint-1.deleted"
        for file in ("trained.safetensors", "optimizer.bin", "random_states_0.pkl", "training_state.json"):
            assert any(f"{partial}/{file}" in state and f"{partial}/training.json" not in state for state in states)
        assert any(f"{partial}/optimizer.bin (empty)" in state for state in states)
        assert any(f"{partial}/training.json" in state for state in states)
        assert any({"checkpoint-1", "checkpoint-2", "checkpoint-3"} <= state for state in states)
        assert any(deleted in state and f"{deleted}/trained.safetensors" not in state for state in states)
        # A checkpoint under its own name always has all of its files.
        files = {
            "trained.safetensors",
            "optimizer.bin",
            "random_states_0.pkl",
            "training_state.json",
            "average.safetensors",
            "training.json",
        }
        for state in states:
            for name in (f"checkpoint-{number}" for number in range(1, 4)):
                inside = {entry.partition("/")[2] for entry in state if entry.startswith(f"{name}/")}
                assert inside == (files if name in state else set())
