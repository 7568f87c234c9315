"""The commands that print tables of several evaluations."""

import sys

import pytest

from anomalysd_pipeline.evaluation.options import PEERS
from scripts import compare, inference_ablations

pytestmark = pytest.mark.full

COMMON = ["--synthetic", "ring", "--limit", "1", "--shots", "1", "--seeds", "0"]
TINY = ["--resolution", "64", "--mask_grouping", "grouped"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("comparison")
    systems = {"color patches": ["--peer", "color_patches"], "no such base": ["--base", str(out / "missing")]}
    return out, *compare.run_systems(systems, COMMON, out)


class TestCompare:
    def test_every_peer_is_in_the_table_unasked(self):
        unasked = [options for name, options in compare.SYSTEMS.items() if name not in compare.EXTRA]
        assert {options[1] for options in unasked if "--peer" in options} == set(PEERS)
        assert set(compare.EXTRA) < set(compare.SYSTEMS)

    def test_systems_have_folders_of_their_own(self):
        assert len({compare.folder_name(name) for name in compare.SYSTEMS}) == len(compare.SYSTEMS)
        assert compare.folder_name("PaDiM, ImageNet") == "padim-imagenet"

    def test_a_system_that_fails_does_not_stop_the_others(self, finished):
        out, summaries, failures = finished
        assert list(summaries) == ["color patches"]
        assert "missing" in failures["no such base"]
        assert (out / "color-patches" / "report.md").is_file()

    def test_table_has_the_figures_of_the_summaries(self, finished):
        _, summaries, failures = finished
        text = compare.comparison(summaries, failures)
        figures = summaries["color patches"]["results"][0]["categories"]["ring"]
        cell = " / ".join(f"{100 * figures[name]['mean']:.1f}" for name in compare.COLUMNS)
        row = next(line for line in text.splitlines() if line.startswith("| color patches"))
        assert [part.strip() for part in row.strip("|").split("|")] == ["color patches", cell, cell]
        missing = next(line for line in text.splitlines() if line.startswith("| no such base"))
        assert [part.strip() for part in missing.strip("|").split("|")] == ["no such base", "not run", "not run"]
        assert "1 shot " in text and "no such base was not run: " in text

    def test_the_length_of_a_peers_training_is_said(self, finished):
        _, summaries, _ = finished
        facts = {"detector": "draem", "steps": 7, "batch_size": 3, "resolution": 64}
        trained = {"DRAEM": {**summaries["color patches"], "system": facts}}
        assert "DRAEM was trained for 7 steps of 3 pictures of 64 px" in compare.comparison(trained, {})

    def test_thresholds_are_judged_where_there_are_some(self, finished):
        _, summaries, _ = finished
        summary = summaries["color patches"]
        assert "false alarms" not in compare.comparison(summaries, {})
        (result,) = summary["results"]

        def stat(*values):
            return {"mean": sum(values) / 2, "std": abs(values[0] - values[1]) / 2, "values": values}

        mean = {**result["mean"], "false_alarms": stat(0.05, 0.07), "misses": stat(0.2, 0.2)}
        own = {"system": {**summary["system"], "false_alarm_rate": 0.05}, "results": [{**result, "mean": mean}]}
        text = compare.comparison({"ours": {**summary, **own}}, {})
        assert "ours, thresholds for 5 % false alarms: 6.0 ± 1.0 % false alarms, 20.0 ± 0.0 % misses." in text

    def test_command(self, tmp_path, monkeypatch, capsys):
        arguments = ["compare", *COMMON, "--systems", "color patches", "--out", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", arguments)
        compare.main()
        assert (tmp_path / "comparison.md").read_text(encoding="utf-8").strip() in capsys.readouterr().out


class TestInferenceAblations:
    def test_tables_and_picture(self, tmp_path, monkeypatch):
        given = ["--strengths", "0.5", "1", "--sweep_steps", "2", "--num_inference_steps", "4"]
        monkeypatch.setattr(sys, "argv", ["ablations", *COMMON, *TINY, *given, "--out", str(tmp_path)])
        inference_ablations.main()
        text = (tmp_path / "ablations.md").read_text(encoding="utf-8")
        names = [*inference_ablations.MASKS, *inference_ablations.PROMPTS, "λ = 0.5", "λ = 1"]
        assert all(f"| {name} " in text for name in names)
        # One full mask has no other scale and no prototype mask; hierarchical prompts are what the others have.
        cells = [[cell.strip() for cell in line.split("|")] for line in text.splitlines()]
        rows = {line[2]: line[3:] for line in cells if line[1:2] == ["1"]}
        same = "multi-scale and prototype-guided masks"
        assert rows["hierarchical prompts"] == rows[same]
        assert (tmp_path / "noise_strength.png").read_bytes().startswith(b"\x89PNG")
