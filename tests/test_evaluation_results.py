"""The table of an evaluation, and a folder written when it was `results.parquet`."""

import csv
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from anomalysd_pipeline import synthetic
from anomalysd_pipeline.evaluation.results import read_results, write_results
from anomalysd_pipeline.evaluation.store import Store

from .tiny_evaluation import contents, run

EARLIER = Path(__file__).parent / "data" / "evaluation_before_csv"
"""Written by `evaluate --data parts --peer color_patches --map_resolution 16 --seeds 0 1 --cpu`, without figures."""


def row(**given):
    found = {"shots": 1, "seed": 3, "category": "nut", "image": "nut/test/bent/1.png", "defect": "bent", "label": True}
    return found | {"score": 0.1 + 0.2, "threshold": 1e-17, "seconds": 12.5} | given


class TestTable:
    @pytest.mark.parametrize(
        "given",
        [
            {},
            {"label": False, "threshold": None},
            {"category": 'a "nut", M5', "image": "a, b/\nc\r.png", "defect": "=1+1"},
            {"category": "écrou", "image": os.fsdecode(b"\xff.png")},
            {"score": float("inf"), "threshold": float("-inf")},
        ],
    )
    def test_rows_come_back_as_they_were(self, tmp_path, given):
        rows = [row(**given), row(seed=4)]
        write_results(tmp_path, [{**each, "number": 0, "index": 1} for each in rows])
        assert read_results(tmp_path) == rows
        assert [path.name for path in tmp_path.iterdir()] == ["results.csv"]

    def test_other_programs_read_it(self, tmp_path):
        write_results(tmp_path, [row(), row(label=False, threshold=None)])
        with open(tmp_path / "results.csv", newline="", encoding="utf-8") as file:
            first, second = csv.DictReader(file)
        assert list(first) == list(row()) and first["score"] == repr(0.1 + 0.2)
        assert (first["label"], second["label"], second["threshold"]) == ("True", "False", "")

    def test_a_row_without_a_value_leaves_the_table_before(self, tmp_path):
        write_results(tmp_path, [row()])
        with pytest.raises(KeyError):
            write_results(tmp_path, [row(seed=9), {"shots": 1}])
        assert read_results(tmp_path) == [row()] and len(list(tmp_path.iterdir())) == 1

    def test_no_table(self, tmp_path):
        with pytest.raises(ValueError, match="`folder` must hold the 'results.csv' of an evaluation, got '.*'."):
            read_results(tmp_path)


@pytest.fixture
def earlier(tmp_path):
    """The pictures that it was of, and the folder."""
    synthetic.write_dataset(tmp_path / "parts", ["ring"], train=2, good=1, defective=1, seed=3, size=64)
    shutil.copytree(EARLIER, tmp_path / "out")
    given = ["--data", tmp_path / "parts", "--peer", "color_patches", "--map_resolution", "16", "--seeds", "0", "1"]
    return tmp_path / "out", [*given, "--out", tmp_path / "out"]


class TestEarlierFolders:
    def test_with_pyarrow(self):
        pytest.importorskip("pyarrow.parquet")
        names = list(row())
        kept = [{name: each[name] for name in names} for each in Store(EARLIER).rows().values()]
        assert len(kept) == 4 and read_results(EARLIER) == kept

    def test_without_pyarrow(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(ValueError, match="'results.parquet' of an earlier version.*run `pip install pyarrow`.$"):
            read_results(EARLIER)

    def test_it_is_complete_for_the_same_command(self, earlier, monkeypatch):
        """And gets the table that is written now, without pyarrow."""
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        out, given = earlier
        assert run(*given) == 0
        now = contents(out)
        for path, content in contents(EARLIER).items():
            if path.name != "report.md":  # without matplotlib it had no curves
                assert now[out / path.relative_to(EARLIER)] == content, path
        names = list(row())
        assert read_results(out) == [{name: each[name] for name in names} for each in Store(out).rows().values()]

    def test_it_is_gone_on_with(self, earlier):
        """As if killed before the metrics of its second draw, whose maps must then be found again."""
        out, given = earlier
        for name in ("summary.json", "report.md", "results.parquet", "classes/k1-s1/0.json"):
            (out / name).unlink()
        assert run(*given) == 0
        before, now = (json.loads((folder / "summary.json").read_text()) for folder in (EARLIER, out))
        assert [each["seed"] for each in read_results(out)] == [0, 0, 1, 1]
        assert {key: now[key] for key in now if key != "results"} == {k: before[k] for k in before if k != "results"}
        before, now = (found["results"][0]["categories"]["ring"] for found in (before, now))
        for metric, found in before.items():
            assert now[metric]["values"][0] == found["values"][0]
            # What is inspected again may be rounded otherwise on another processor.
            assert now[metric]["values"][1] == pytest.approx(found["values"][1], abs=0.02)

    def test_overwriting_leaves_no_table_of_another_run(self, earlier):
        out, given = earlier
        assert run(*given, "--limit", "1", "--shots", "2", "--overwrite") == 0
        assert {each["shots"] for each in read_results(out)} == {2} and not (out / "results.parquet").exists()
