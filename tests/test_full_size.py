"""`benchmarks/full_size.py` at the size of its own trial."""

import re
import runpy
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).resolve().parents[1] / "benchmarks" / "full_size.py"


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
