"""Evaluations that are interrupted, and those of several processes: the same tables as of one that was left alone."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from anomalysd_pipeline import AnomalySDPipeline, evaluate, synthetic
from anomalysd_pipeline.evaluation.results import read_results

from .evaluate_driver import TWICE
from .tiny_adaptations import SHORT
from .tiny_evaluation import BRIEF, FLOOR

ROOT = Path(__file__).resolve().parents[1]
ALONE = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
pytestmark = [pytest.mark.full, pytest.mark.skipif(not hasattr(os, "fork"), reason="the driver forks")]


def drive(command, timeout=1500):
    environment = {**os.environ, **ALONE, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two categories; and the ring again, with a picture that cannot be read."""
    root = tmp_path_factory.mktemp("data")
    for name in ("data", "damaged"):
        families = ["hex_nut", "ring"][name == "damaged" :]
        synthetic.write_dataset(root / name, families, train=2, good=1, defective=2, seed=3, size=64)
    second = sorted((root / "damaged" / "ring" / "test").rglob("*.png"))[1]
    second.write_bytes(second.read_bytes()[:500])
    return root


@pytest.fixture(scope="module")
def ours(data, tiny_pipeline_folder):
    """Options with which the tiny pipeline finds thresholds too."""
    given = ["--data", data / "data", "--base", tiny_pipeline_folder, "--seeds", 0, 1, *BRIEF, "--cpu"]
    return list(map(str, given))


@pytest.fixture(scope="module")
def adapted(ours):
    """Options with which it is fine-tuned first."""
    given = [*ours[: ours.index("--seeds")], "--seeds", "0", "--limit", "1", *BRIEF, "--cpu"]
    return [*given, "--adapt", "--adapt_steps", "1", "--adapt_decoder_steps", "1"]


@pytest.fixture(scope="module")
def killed(data, ours, adapted, tmp_path_factory):
    """The folder with all runs that were killed, and what the driver told."""
    work = tmp_path_factory.mktemp("killed")
    floor = ["--data", str(data / "data"), "--categories", "ring", *FLOOR, "--seeds", "0", "--cpu"]
    ended = drive(["-m", "tests.evaluate_driver", "kill", work, json.dumps([floor, ours, adapted])])
    assert ended.returncode == 0, ended.stderr[-4000:]
    return work, json.loads(ended.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def together(data, ours, adapted, killed, tmp_path_factory):
    """Several evaluations by two processes, the last of which cannot be finished by the second."""
    work = tmp_path_factory.mktemp("together")
    floor = ["--data", str(data / "data"), *FLOOR, "--cpu"]
    runs = {
        "resumed": [*ours, "--out", str(killed[0] / "twice")],
        "drawn": [
            "--synthetic",
            "ring",
            "--limit",
            "1",
            *FLOOR,
            "--seeds",
            "0",
            "--cpu",
            "--out",
            str(work / "drawn"),
        ],
        "first": [*floor, "--seeds", "5", "--out", str(work / "over")],
        "overwritten": [*floor, "--seeds", "0", "1", "--overwrite", "--out", str(work / "over")],
        "adapted": [*adapted, "--out", str(work / "adapted")],
        "damaged": ["--data", str(data / "damaged"), *FLOOR, "--seeds", "0", "--cpu", "--out", str(work / "damaged")],
    }
    (work / "runs.json").write_text(json.dumps(list(runs.values())))
    before = {path.name: path.read_bytes() for path in (killed[0] / "twice" / "rows").iterdir()}
    # Above one process, the launcher only knows this word for CPUs, too.
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0"
    ended = drive([*launch.split(), "-m", "tests.evaluate_driver", "together", work / "runs.json"])
    statuses = [json.loads((work / f"statuses-{rank}.json").read_text()) for rank in (0, 1)]
    return {"work": work, "runs": runs, "before": before, "ended": ended, "statuses": statuses}


def rows_of(out):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in read_results(out)]


class TestKilled:
    def test_twice(self, killed):
        work, told = killed
        assert told["twice"] == [None, None]
        lines = [path.read_bytes().count(b"\n") for path in (work / "twice" / "rows").iterdir()]
        assert sorted(lines) == sorted(TWICE) and not (work / "twice" / "summary.json").exists()

    def test_before_every_kind_of_operation(self, killed):
        told = killed[1]["operations"]
        kinds = {each["operation"] for each in told}
        for name in ("run", "shots", "prepared", "maps", "classes", "results", "report", "summary"):
            assert f"os.rename {name}" in kinds, kinds
        assert {"open rows", "open costs", "shutil.rmtree prepared", "shutil.rmtree maps"} <= kinds
        for each in told:
            assert each["killed"] and each["status"] == 0 and each["equal"] and not each["unfinished"], each


class TestTwoProcesses:
    def test_all_but_the_last_succeed(self, together):
        assert together["statuses"][0][:5] == together["statuses"][1][:5] == [0] * 5, together["ended"].stderr[-4000:]

    def test_a_run_killed_twice_gives_the_bytes_of_a_whole_one(self, together, killed):
        work = killed[0]
        assert (work / "twice" / "summary.json").read_bytes() == (work / "whole" / "summary.json").read_bytes()
        rows = rows_of(work / "whole")
        assert rows_of(work / "twice") == rows and len(rows) == 2 * 2 * 3
        assert all(row["threshold"] is not None for row in rows)

    def test_nothing_is_done_again(self, together, killed):
        now = {path.name: path.read_bytes() for path in (killed[0] / "twice" / "rows").iterdir()}
        assert all(now.pop(name) == content for name, content in together["before"].items())
        counts = [content.count(b"\n") for content in now.values()]
        assert len(counts) == 2 and sum(counts) == 2 * 2 * 3 - sum(TWICE)  # both had some

    def test_reports_differ_in_costs_alone(self, together, killed):
        reports = [(killed[0] / name / "report.md").read_text() for name in ("whole", "twice")]
        costs = re.compile(r"## Cost.*?(?=## Notes)", re.DOTALL)
        assert costs.sub("", reports[0]) == costs.sub("", reports[1])
        assert re.search(r"Processes +\| +2 ", reports[1])

    def test_parts_are_drawn_by_one(self, together):
        out = together["work"] / "drawn"
        assert len(rows_of(out)) == 2
        assert len(list(out.glob("pictures/ring/**/*.png"))) == 16 + 2 * 12 + 12
        assert not [path for path in (out / "pictures").iterdir() if path.name != "ring"]

    def test_starting_anew(self, together):
        out = together["work"] / "over"
        assert {row["seed"] for row in rows_of(out)} == {0, 1} and len(rows_of(out)) == 12
        written = [json.loads(line) for path in (out / "rows").iterdir() for line in path.read_text().splitlines()]
        assert {row["seed"] for row in written} == {0, 1}

    def test_one_adapts_for_all(self, together, killed):
        whole, found = killed[0] / "adapted", together["work"] / "adapted"
        assert (found / "summary.json").read_bytes() == (whole / "summary.json").read_bytes()
        assert rows_of(found) == rows_of(whole) and len(rows_of(found)) == 4
        plain = {(row["image"], row["seed"]): row["score"] for row in rows_of(killed[0] / "whole")}
        assert all(row["score"] != plain[row["image"], row["seed"]] for row in rows_of(found))

    def test_a_failure_of_one_ends_the_other(self, together):
        ended = together["ended"]
        assert ended.returncode != 0
        assert "is cut short or damaged" in ended.stderr and "damaged/ring/test" in ended.stderr
        # The other one was still waiting.
        assert sorted(len(statuses) for statuses in together["statuses"]) == [5, 6]
        assert not (together["work"] / "damaged" / "summary.json").exists()


@pytest.fixture(scope="module")
def learned(data, tiny_pipeline_folder, tmp_path_factory):
    """Adaptations to one picture of the ring, one for each seed."""
    folder = tmp_path_factory.mktemp("learned")
    pictures = sorted((data / "data" / "ring" / "train" / "good").iterdir())
    for seed in (0, 1):
        pipe = AnomalySDPipeline.from_pretrained(tiny_pipeline_folder)
        pipe.set_progress_bar_config(disable=True)
        pipe.adapt({"ring": pictures[seed : seed + 1]}, **SHORT, calibrate=False, seed=seed)
        pipe.calibrate("ring", pictures[:1], num_inference_steps=3, mask_scales=(1,))
        pipe.save_adaptation(folder / f"ring-k1-s{seed}")
    return folder


class TestAdaptations:
    def test_each_draw_has_its_own(self, learned, data, tiny_pipeline_folder, tmp_path):
        given = ["--data", data / "data", "--categories", "ring", "--seeds", 0, 1, "--base", tiny_pipeline_folder]
        given += ["--adaptation", learned / "ring-k{shots}-s{seed}", *BRIEF, "--cpu", "--out", tmp_path / "out"]
        assert evaluate.main(list(map(str, given))) == 0
        rows = rows_of(tmp_path / "out")
        thresholds = [{row["threshold"] for row in rows if row["seed"] == seed} for seed in (0, 1)]
        assert len(thresholds[0]) == len(thresholds[1]) == 1 and thresholds[0] != thresholds[1]
        for seed in (0, 1):
            facts = json.loads((learned / f"ring-k1-s{seed}" / "adaptation.json").read_text())
            assert thresholds[seed] == {facts["categories"]["ring"]["calibration"]["threshold"]}
        system = json.loads((tmp_path / "out" / "summary.json").read_text())["system"]
        assert system["adaptation"].endswith("ring-k{shots}-s{seed}") and system["learned before"] == ["ring"]

    @pytest.mark.parametrize("shots", [0, 2])
    def test_other_shots_than_it_was_learned_from(self, learned, data, tiny_pipeline_folder, tmp_path, capfd, shots):
        given = ["--data", data / "data", "--seeds", 0, "--shots", shots, "--base", tiny_pipeline_folder]
        given += ["--adaptation", learned / "ring-k1-s0", *BRIEF, "--cpu", "--out", tmp_path / "out"]
        assert evaluate.main(list(map(str, given))) == 2
        assert f"`--shots` is {shots}, but 'ring' was learned from 1 picture before; " in capfd.readouterr().err
        assert not (tmp_path / "out").exists()

    def test_weights_are_adapted_to_all_categories_together(self, together):
        system = json.loads((together["work"] / "adapted" / "summary.json").read_text())["system"]
        assert system["adapted"]["steps"] == 1 and system["adapted"]["method"] == "lora"
        maps = [np.load(path)["anomaly_map"] for path in (together["work"] / "adapted" / "cases").glob("*.npz")]
        assert maps and all(np.isfinite(found).all() for found in maps)
