"""Benchmarks at the size of a trial."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from PIL import Image

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
PROGRAM = BENCHMARKS / "full_size.py"


def test_few_calls_are_extrapolated_to_all_and_the_maps_are_those_of_diffusers(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(PROGRAM), "--tiny", "--device", "cpu", "--calls", "2", "--dtype", "float32"])
    runpy.run_path(str(PROGRAM), run_name="__main__")
    said = capsys.readouterr().out
    rows = {
        name: re.search(rf"{name} +(\S+) +(\S+) +(\d+) +\S+ +\S+ +(\S+) of (\S+)", said).groups()
        for name in ("plain diffusers loop", "paper", "fast")
    }
    # 1 + 4 + 16 + 64 masks and that of the prototypes, 20 of 50 steps; 1 + 4 + 4 + 4 and that, 8 of 20.
    assert [int(row[2]) for row in rows.values()] == [86 * 20, 86 * 20, 14 * 8]
    assert all(float(row[0]) > 0 for row in rows.values())
    assert float(rows["paper"][3]) < 1e-4 * float(rows["paper"][4])
    assert "Extrapolated: 2 calls" in said


def test_a_count_that_is_too_small_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(PROGRAM), "--tiny", "--calls", "1"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(PROGRAM), run_name="__main__")
    assert "`--calls` must be at least 2" in capsys.readouterr().err


def test_scaling_prints_and_draws_every_series(tiny_pipeline_folder, monkeypatch, capsys, tmp_path):
    program, out = BENCHMARKS / "scaling.py", tmp_path / "cost.png"
    few = ["--model", str(tiny_pipeline_folder), "--pictures", "1", "2", "3", "--shots", "1", "2", "3"]
    monkeypatch.setattr(sys, "argv", [str(program), *few, "--repeat", "1", "--out", str(out)])
    runpy.run_path(str(program), run_name="__main__")
    said = capsys.readouterr().out
    for name, last in (("pictures", 3), ("masks", 85), ("registering shots", 3), ("inspecting with shots", 3)):
        assert re.search(rf"{name}: +\d+\.\d\d of a straight line at {last}", said)
    with Image.open(out) as plot:
        assert plot.format == "PNG" and plot.width > 500


LINE = r"(\w+) step (\d): (\d+) s, loss (\S+), peak (\S+) GiB"


def check_steps(said):
    first, second = said.split("resumed")
    assert [match[:2] for match in re.findall(LINE, first)] == [("denoiser", "1"), ("decoder", "1")]
    assert [match[:2] for match in re.findall(LINE, second)] == [("denoiser", "2")]
    assert int(re.search(r"(\d+) tensors of the denoiser differ", said)[1]) > 0


def test_a_training_goes_on_with_the_next_step_of_the_denoiser(monkeypatch, capsys):
    program = BENCHMARKS / "full_size_training.py"
    monkeypatch.setattr(sys, "argv", [str(program), "--tiny", "--device", "cpu"])
    runpy.run_path(str(program), run_name="__main__")
    check_steps(capsys.readouterr().out)


@pytest.mark.full
@pytest.mark.timeout(7200)
def test_lora_at_the_size_of_stable_diffusion_takes_less_than_20_gb():
    free = psutil.virtual_memory().available / 2**30
    if free < 8:
        pytest.skip(f"needs 8 GiB of free memory, there are {free:.1f}")
    command = [sys.executable, str(BENCHMARKS / "full_size_training.py"), "--device", "cpu"]
    done = subprocess.run(command, cwd=BENCHMARKS.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    check_steps(done.stdout)
    peaks = [float(peak) * 2**30 / 1e9 for *_, peak in re.findall(LINE, done.stdout)]
    assert max(peaks) < 20


@pytest.mark.full
@pytest.mark.timeout(600)  # starts four processes
def test_a_killed_shard_goes_on_and_no_picture_is_missing_or_there_twice():
    command = [sys.executable, str(BENCHMARKS / "shards.py"), "--pictures", "80"]
    done = subprocess.run(command, cwd=BENCHMARKS.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    kept, lost = re.search(r"killed with (\d+) rows: (\d+) pictures begun and lost", done.stdout).groups()
    assert 20 <= int(kept) < 40 and int(lost) <= 1
    assert "rows that are missing: 0, twice: 0; in order: True" in done.stdout
