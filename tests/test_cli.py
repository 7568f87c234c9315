"""The command line and the room behind it, with a tiny pipeline on drawn parts."""

import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anomalysd_pipeline import __version__, synthetic
from anomalysd_pipeline.cli import main
from anomalysd_pipeline.inspection.result import Inspection, write_table

pytestmark = pytest.mark.timeout(120)  # starts Python anew for each command

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Drawn rings: two in `normal`, and a good and a defective one of equal names, in `test/a` and `test/b`."""
    folder = tmp_path_factory.mktemp("parts")
    for index, image in enumerate(synthetic.normal_images("ring", 2, seed=3, size=64)):
        (folder / "normal").mkdir(exist_ok=True)
        image.save(folder / "normal" / f"{index}.png")
    for name, sample in zip("ab", synthetic.test_samples("ring", 1, 1, seed=3, size=80), strict=True):
        (folder / "test" / name).mkdir(parents=True)
        Image.fromarray(sample.image).save(folder / "test" / name / "0.png")
    return folder


@pytest.fixture(scope="module")
def detected(parts, tiny_pipeline_folder, tmp_path_factory):
    """One run of `detect` over two good files, a text file called .png and a file that is not there."""
    (parts / "test" / "a" / "notes.png").write_text("not a picture")
    out = tmp_path_factory.mktemp("detect") / "out"
    status = detect(parts, tiny_pipeline_folder, out, "--test", parts / "test", parts / "gone.png", "--maps")
    return status, out


def detect(parts, base, out, *arguments, normal=True):
    shots = ["--normal", parts / "normal"] if normal else []
    fixed = ["--category", "ring", "--base", base, "--device", "cpu"]
    return main(["detect", *map(str, [*shots, "--out", out, *fixed, *arguments])])


def read_table(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def result(score=0.5, threshold=1.0, size=(20, 16), peak=None):
    picture = Image.new("RGB", size, (90, 120, 150))
    anomaly_map = np.full(size[::-1], 0.1, np.float32)
    anomaly_map[4:8, 4:8] = score if peak is None else peak
    return Inspection(
        picture, picture, anomaly_map, score, threshold, None if threshold is None else score > threshold, 0.25
    )


class TestArguments:
    def test_help_needs_no_torch(self):
        code = (
            "import sys; from anomalysd_pipeline.cli import main\n"
            "for arguments in (['--help'], ['adapt', '--help'], ['detect', '--help'], ['evaluate', '--help']):\n"
            "    try: main(arguments)\n"
            "    except SystemExit as stop: assert stop.code == 0\n"
            "assert not {'torch', 'diffusers', 'numpy'} & set(sys.modules), 'heavy import'\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        assert all(command in done.stdout for command in ("demo", "detect", "adapt", "evaluate", "publish", "synth"))
        assert "--resume_from_checkpoint" in done.stdout and "--resume " in done.stdout

    @pytest.mark.parametrize(
        ("arguments", "part"),
        [
            (["paint"], "paint"),
            (["synth", "x", "--seed", "-1"], "--seed"),
            (["adapt", "--output_dir", "x"], "--normal"),
            (["adapt", "--synthetic", "ring"], "--output_dir"),
            (["publish", "x"], "USER/NAME"),
            (["synth", "x", "--families", " , "], "--families"),
            (["detect", "--out", "x", "--category", "ring"], "--test"),
            (["evaluate", "--data", "x"], "--out"),
            (["evaluate", "--out", "x"], "--data"),
            (["evaluate", "--out", "x", "--data", "y", "--map_resolution", "0"], "--map_resolution"),
            (["detect", "--out", "x", "--category", "ring", "--test", "y", "--resume", "--overwrite"], "--overwrite"),
        ],
    )
    def test_wrong_arguments_exit_with_2(self, arguments, part, capsys):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
        assert part in capsys.readouterr().err

    def test_without_arguments_it_prints_its_help(self, capsys):
        assert main([]) == 0
        assert "usage: anomalysd" in capsys.readouterr().out

    def test_version(self, capsys):
        with pytest.raises(SystemExit) as stop:
            main(["--version"])
        assert stop.value.code == 0 and capsys.readouterr().out == f"anomalysd {__version__}\n"

    @pytest.mark.parametrize(
        ("command", "option"),
        [
            (["synth", "{file}", "--families", "ring"], "OUT"),
            (["synth", "{file}/below", "--families", "ring"], "OUT"),
            (["demo", "--out", "{file}", "--families", "ring"], "--out"),
            (["demo", "--out", "{file}/below", "--families", "ring"], "--out"),
            (
                ["detect", "--out", "{file}/below", "--category", "ring", "--test", "{parts}", "--base", "{base}"],
                "--out",
            ),
        ],
    )
    def test_a_folder_that_cannot_be_written(self, command, option, parts, tiny_pipeline_folder, tmp_path, capsys):
        file = tmp_path / "file"
        file.write_text("mine")
        names = {"file": file, "parts": parts / "normal", "base": tiny_pipeline_folder}
        assert main([word.format(**names) for word in command]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"anomalysd: error: `{option}` '{file}") and "could not be written" in error
        assert file.read_text() == "mine"

    def test_evaluate_runs_what_its_options_say(self, tmp_path, capsys):
        common = ["--shots", "1", "--seeds", "0", "--limit", "1", "--peer", "color_patches", "--out", str(tmp_path)]
        assert main(["evaluate", "--synthetic", "ring", *common]) == 0
        assert (tmp_path / "report.md").is_file()
        assert main(["evaluate", "--synthetic", "ring", *common, "--connectivity", "4"]) == 2
        assert "connectivity" in capsys.readouterr().err

    @pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C is no signal there")
    def test_interrupt_exits_with_130(self, tmp_path):
        many = ["--train", "1000", "--size", "48"]
        command = [sys.executable, "-m", "anomalysd_pipeline", "synth", str(tmp_path / "out"), *many]

        def hear_interrupts():  # which programs that a shell has put in the background do not
            signal.signal(signal.SIGINT, signal.SIG_DFL)

        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, preexec_fn=hear_interrupts)
        try:
            while process.poll() is None and not (tmp_path / "out").exists():
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            _, error = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode == 130
        assert "interrupted" in error and "Traceback" not in error


class TestSynth:
    def test_writes_the_layout(self, tmp_path, capsys):
        counts = ["--train", "2", "--good", "1", "--defective", "2", "--size", "48", "--seed", "5"]
        assert main(["synth", str(tmp_path), "--families", "wood,ring", *counts]) == 0
        assert "2 families" in capsys.readouterr().out
        assert sorted(folder.name for folder in tmp_path.iterdir()) == ["ring", "wood"]
        assert len(list((tmp_path / "wood" / "train" / "good").iterdir())) == 2
        assert len(list((tmp_path / "wood" / "ground_truth").rglob("*_mask.png"))) == 2
        drawn = synthetic.normal_images("wood", 1, seed=5, size=48)[0]
        assert np.array_equal(np.asarray(Image.open(tmp_path / "wood/train/good/000.png")), np.asarray(drawn))

    def test_unknown_family_is_one_line(self, tmp_path, capsys):
        assert main(["synth", str(tmp_path), "--families", "spoon"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("anomalysd: error: `--families` is 'spoon'")
        assert error.count("\n") == 1


class TestDemo:
    @pytest.mark.timeout(300)  # the embedded checkpoint learns a part and inspects eight pictures
    def test_writes_montage_and_table(self, tiny_pipeline_folder, tmp_path, capsys):
        arguments = ["--families", "ring", "--base", str(tiny_pipeline_folder), "--device", "cpu"]
        assert main(["demo", "--out", str(tmp_path / "demo"), *arguments]) == 0
        rows = read_table(tmp_path / "demo" / "results.csv")
        assert [row["label"] for row in rows] == ["0"] * 4 + ["1"] * 4
        assert all(row["family"] == "ring" and float(row["threshold"]) > 0 for row in rows)
        for row in rows:
            assert (row["verdict"] == "defective") == (float(row["score"]) > float(row["threshold"]))
        with Image.open(tmp_path / "demo" / "montage.png") as figure:
            assert figure.height > 8 * 144
        header, line = capsys.readouterr().out.splitlines()[:2]
        assert "image AUROC" in header and "pixel AUROC" in header
        alarms = sum(row["verdict"] == "defective" for row in rows[:4])
        misses = sum(row["verdict"] == "normal" for row in rows[4:])
        assert f"{alarms} of 4" in line and f"{misses} of 4" in line


class TestDetect:
    def test_bad_files_are_reported_and_the_others_inspected(self, detected):
        status, out = detected
        assert status == 0
        rows = {
            Path(row["file"]).as_posix().split("/")[-2:][0] + "/" + Path(row["file"]).name: row
            for row in read_table(out / "results.csv")
        }
        good = [row for row in rows.values() if not row["error"]]
        assert len(rows) == 4 and len(good) == 2
        assert all(float(row["score"]) > 0 and row["verdict"] in ("normal", "defective") for row in good)
        assert "notes.png" in rows["a/notes.png"]["error"] and not rows["a/notes.png"]["score"]
        gone = next(row for name, row in rows.items() if name.endswith("gone.png"))
        assert "`--test`" in gone["error"] and "does not exist" in gone["error"]

    def test_equal_names_do_not_overwrite_each_other(self, detected):
        _, out = detected
        for folder, suffix in (("heatmaps", "png"), ("maps", "npy")):
            found = sorted(path.relative_to(out / folder).as_posix() for path in (out / folder).rglob("*.*"))
            assert found == [f"a/0.{suffix}", f"b/0.{suffix}"]
        anomaly_map = np.load(out / "maps" / "a" / "0.npy")
        assert anomaly_map.shape == (80, 80) and anomaly_map.dtype == np.float32
        assert (out / "montage.png").is_file()

    def test_results_are_not_overwritten_unasked(self, detected, parts, tiny_pipeline_folder, capsys):
        _, out = detected
        before = (out / "results.csv").read_bytes()
        assert detect(parts, tiny_pipeline_folder, out, "--test", parts / "test") == 2
        assert "--overwrite" in capsys.readouterr().err
        assert (out / "results.csv").read_bytes() == before

    def test_same_seed_same_scores_whatever_else_is_inspected(self, detected, parts, tiny_pipeline_folder):
        _, out = detected
        first = {Path(row["file"]): row["score"] for row in read_table(out / "results.csv")}
        target = parts / "test" / "b" / "0.png"
        assert detect(parts, tiny_pipeline_folder, out, "--test", target, "--overwrite") == 0
        (row,) = read_table(out / "results.csv")
        assert row["score"] == first[target]

    def test_without_normal_pictures_there_is_no_verdict(self, parts, tiny_pipeline_folder, tmp_path, capsys):
        target = parts / "test" / "b" / "0.png"
        assert detect(parts, tiny_pipeline_folder, tmp_path, "--test", target, normal=False) == 0
        (row,) = read_table(tmp_path / "results.csv")
        assert float(row["score"]) > 0 and row["threshold"] == row["verdict"] == ""
        assert "without --normal" in capsys.readouterr().out

    def test_options_reach_the_pipeline(self, parts, tiny_pipeline_folder, tmp_path, capsys):
        target = parts / "test" / "b" / "0.png"
        options = ["--test", target, "--noise-strength", "1.5"]
        assert detect(parts, tiny_pipeline_folder, tmp_path / "out", *options) == 2
        assert "`--noise-strength`" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("arguments", "part"),
        [
            (["--test", "gone"], "`--test`"),
            (["--test", "empty"], "no pictures"),
            (["--test", "text.png", "--normal", "gone"], "`--normal` 'gone' does not exist"),
            (["--test", "text.png", "--normal", "text.png"], "`--normal` holds no picture that can be read"),
            (["--test", "text.png", "--category", "a/b"], "`--category`"),
            (["--test", "text.png", "--out", "text.png"], "is a file"),
        ],
    )
    def test_refused_before_a_model_is_loaded(self, arguments, part, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "empty").mkdir()
        (tmp_path / "text.png").write_text("not a picture")
        # The base does not exist: loading it would be another error.
        assert main(["detect", "--out", "out", "--category", "ring", "--base", "no-model", *arguments]) == 2
        error = capsys.readouterr().err
        assert part in error and "no-model" not in error and "Traceback" not in error
        assert not (tmp_path / "out").exists()

    def test_nothing_readable_exits_with_2(self, tiny_pipeline_folder, tmp_path, capsys):
        (tmp_path / "text.png").write_text("not a picture")
        arguments = ["--test", str(tmp_path / "text.png"), "--out", str(tmp_path / "out"), "--category", "ring"]
        assert main(["detect", *arguments, "--base", str(tiny_pipeline_folder), "--device", "cpu"]) == 2
        assert "text.png" in capsys.readouterr().err
        (row,) = read_table(tmp_path / "out" / "results.csv")
        assert row["error"]


class TestResults:
    def test_table_is_complete_or_not_there(self, tmp_path):
        path = tmp_path / "results.csv"
        write_table(path, [{"file": "ä, b.png", "score": 1}], ["file", "score", "error"])
        assert read_table(path) == [{"file": "ä, b.png", "score": "1", "error": ""}]
        before = path.read_bytes()
        with pytest.raises(ValueError, match="colour"):
            write_table(path, [{"file": "c.png"}, {"colour": "red"}], ["file", "score", "error"])
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]

    def test_overlay_is_calm_below_the_threshold(self):
        normal, defective = result(score=0.2), result(score=1.9)
        assert np.array_equal(np.asarray(normal.overlay()), np.asarray(normal.image))
        changed = (np.asarray(defective.overlay()) != np.asarray(defective.image)).any(-1)
        assert changed[5, 5] and not changed[14, 14]

    def test_words(self):
        assert (result(0.5).verdict, result(1.5).verdict, result(1.5, None).verdict) == ("normal", "defective", "")
        assert result(1.5).sentence.startswith("Defect likely")


def test_space_installs_what_the_package_needs():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 or newer")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    listed = {line for line in lines if line and not line.startswith("#")}
    assert listed == set(project["dependencies"]) | set(project["optional-dependencies"]["app"])


@pytest.mark.full
def test_the_app_and_the_demo_start_from_an_installed_package_elsewhere(tiny_pipeline_folder, tmp_path):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    shutil.copytree(ROOT / "anomalysd_pipeline", site / "anomalysd_pipeline")
    shutil.copy(ROOT / "prompts.json", site / "anomalysd_pipeline")  # as a wheel has it
    elsewhere.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(site), "ANOMALYSD_MODEL": str(tiny_pipeline_folder)}
    command = [sys.executable, "-m", "anomalysd_pipeline"]
    start = {
        "cwd": elsewhere,
        "env": environment,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
    }
    demo = [*command, "demo", "--families", "ring", "--base", str(tiny_pipeline_folder), "--device", "cpu"]
    assert "image AUROC" in subprocess.run(demo, **start, check=True).stdout
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([*command, "app", "--port", str(port)], **start)
    try:
        straight = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # past any proxy
        deadline = time.monotonic() + 90
        while True:
            try:
                with straight.open(f"http://127.0.0.1:{port}/config") as answer:
                    assert "AnomalySD" in json.load(answer)["title"]
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.2)
    finally:
        process.kill()
        process.communicate()
