"""The ablation command: its table is the mean and spread over seeds, and what is in the file is not computed again."""

import sys

import numpy as np
import pytest

from anomalysd_pipeline.adaptation.settings import AdaptationSettings
from scripts import ablations


def result(row, seed, category, image, pixel=0.5):
    facts = {"row": row, "seed": str(seed), "category": category, "image": str(image), "pixel": str(pixel)}
    return facts | {"image_0": "0.5", "pixel_0": "0.5", "adapt_seconds": "1", "adapted_to": "1"}


def test_a_row_is_the_mean_over_categories_then_mean_and_spread_over_seeds():
    results = [
        result("both", seed, category, image)
        for seed, category, image in [(0, "a", 0.9), (0, "b", 0.7), (1, "a", 1.0), (1, "b", 0.8)]
    ]
    means = [np.mean([0.9, 0.7]), np.mean([1.0, 0.8])]
    still = "0.500 ± 0.000"
    assert ablations.table(results, ("both",)) == [
        f"| both | {np.mean(means):.3f} ± {np.std(means):.3f} / {still} |  | {still} / {still} | 2 |"
    ]
    # Against the row "none", seed by seed.
    results += [result("none", 0, "a", 0.5), result("none", 0, "b", 0.9, pixel=0.7), result("none", 1, "a", 0.1)]
    assert ablations.table(results, ("both",))[0].split(" | ")[2] == "+0.1000 / -0.1000"


def test_a_seed_counts_when_every_category_is_there():
    complete = [result("both", 0, "a", 0.9), result("both", 0, "b", 0.7)]
    expected = ["| both | 0.800 / 0.500 |  | 0.500 / 0.500 | 1 |"]
    assert ablations.table([*complete, result("both", 1, "a", 0.1)], ("both",)) == expected


def test_the_report_has_the_papers_tables_and_every_category():
    results = [result(row, 0, "a", 0.9) for row in ablations.ROWS]
    text = ablations.report(results)
    for title, rows in ablations.TABLES.items():
        table = next(part for part in text.split("\n\n") if part.startswith(f"| {title} |"))
        assert [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()[2:]] == list(rows)
    assert "| a |" in text


@pytest.mark.parametrize("row", list(ablations.ROWS))
def test_every_row_is_a_way_of_adapting(row):
    changes = ablations.ROWS[row]
    if changes is not None:
        settings = AdaptationSettings.resolve([changes])
        assert all(getattr(settings, name) == value for name, value in changes.items())


def test_finished_results_are_not_computed_again(tmp_path, monkeypatch, capsys):
    path = tmp_path / "results.csv"
    for seed in (0, 1):
        ablations.append(path, result("none", seed, "gear", 0.75))
    # A checkpoint that does not exist: to compute anything would fail.
    options = ["--out", str(path), "--rows", "none", "--seeds", "0", "1", "--synthetic", "gear", "--limit", "1"]
    monkeypatch.setattr(sys, "argv", ["ablations", *options, "--model", str(tmp_path / "nothing")])
    ablations.main()
    assert "0.750 ± 0.000" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--seeds", "2"])
    with pytest.raises((OSError, ValueError)):
        ablations.main()
    assert len(ablations.finished(path)) == 2
