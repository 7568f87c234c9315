"""Benchmarks at the size of a trial."""

import re
import runpy
import sys
from pathlib import Path

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
    assert "Extrapolated: of each, 2 calls" in said


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
