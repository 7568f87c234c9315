"""The table of what the embedded checkpoint is worth: its figures, and what is in the file is not computed again."""

import argparse
import sys

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from anomalysd_pipeline import AnomalySDPipeline
from scripts import benchmark_embedded
from scripts.ablations import append, finished
from scripts.evaluate_embedded import drawn, judge

pytestmark = pytest.mark.full


def result(system, seed, category, image, pixel=0.5, pro=0.25):
    figures = {"image": str(image), "pixel": str(pixel), "pro": str(pro), "adapt_seconds": "1", "seconds": "1"}
    return {"system": system, "seed": str(seed), "category": category, **figures}


@pytest.mark.canary
def test_cells_are_mean_and_spread_over_seeds_and_the_mean_is_over_categories():
    results = [
        result("AnomalySD", seed, category, image, pixel="nan" if category == "b" else 0.5)
        for seed, category, image in [(0, "a", 0.9), (1, "a", 0.7), (0, "b", 0.5), (1, "b", 0.5)]
    ]
    row = benchmark_embedded.table(results).splitlines()[2].split(" | ")
    assert row[1] == "0.800 ± 0.100 / 0.500 ± 0.000 / 0.250 ± 0.000"
    assert row[2] == "0.500 ± 0.000 / - / 0.250 ± 0.000"
    assert row[3] == "0.650 ± 0.050 / 0.500 ± 0.000 / 0.250 ± 0.000" and row[4] == "2 |"


@pytest.mark.canary
def test_pictures_without_masks_count_for_the_image_figure_alone():
    _, tests = drawn("ring", 1, 0, 3)
    rng = np.random.default_rng(0)
    maps = rng.random((6, 256, 256), dtype=np.float32)
    scores = rng.random(6)
    figures = judge(maps, scores, [(image, label, None) for image, label, _ in tests])
    assert figures["image"] == pytest.approx(roc_auc_score([label for _, label, _ in tests], scores))
    assert np.isnan(figures["pixel"]) and np.isnan(figures["pro"])
    masked = judge(maps, scores, tests)
    truth = np.stack([mask for _, _, mask in tests])
    assert masked["pixel"] == pytest.approx(roc_auc_score(truth.ravel(), maps.ravel()), abs=1e-6)


def test_what_is_in_the_file_is_not_computed_again(tmp_path, monkeypatch, capsys):
    path = tmp_path / "benchmark.csv"
    for name in ("AnomalySD", "color patches"):
        append(path, result(name, 10, "gear", 0.75), benchmark_embedded.COLUMNS)
    options = ["--out", str(path), "--synthetic", "gear", "--seeds", "10", "--limit", "1"]
    rows = ["--rows", "not adapted", "color patches"]
    # A checkpoint that does not exist: to compute anything of ours would fail.
    monkeypatch.setattr(sys, "argv", ["benchmark", *options, *rows, "--model", str(tmp_path / "nothing")])
    benchmark_embedded.main()
    assert "0.750 ± 0.000" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--seeds", "11"])
    with pytest.raises((OSError, ValueError)):
        benchmark_embedded.main()
    assert len(finished(path)) == 2


@pytest.mark.parametrize("option", ["--max_train_steps", "--max_decoder_steps"])
def test_the_length_of_adapting_can_be_given(option, tmp_path, monkeypatch):
    options = ["--synthetic", "gear", "--limit", "1", "--rows", "adapted", "--out", str(tmp_path / "benchmark.csv")]
    monkeypatch.setattr(sys, "argv", ["benchmark", *options, option, "-3"])
    with pytest.raises(ValueError, match="steps.*-3"):  # so it got as far as `pipe.adapt`
        benchmark_embedded.main()


def test_a_floor_fills_its_row(tmp_path, monkeypatch, capsys):
    path = tmp_path / "benchmark.csv"
    options = ["--synthetic", "gear", "--seeds", "10", "--limit", "2", "--rows", "color patches", "--out", str(path)]
    monkeypatch.setattr(sys, "argv", ["benchmark", *options])
    benchmark_embedded.main()
    (found,) = finished(path)
    assert found["system"] == "color patches" and 0 <= float(found["image"]) <= 1 and float(found["pixel"]) > 0.5
    assert "| color patches | " in capsys.readouterr().out


@pytest.mark.parametrize("start", [None, "image"])
def test_rows_of_our_own_are_those_of_inspections(start):
    """The three ways of scoring come from one run; each equals that of a call with its settings."""
    normals, tests = drawn("gear", 1, 0, 2)
    arguments = argparse.Namespace(model=None, mixed_precision="no", start=start)
    found = benchmark_embedded.run_own(arguments, False, 0, "gear", normals, tests)
    pipe = AnomalySDPipeline.from_pretrained()
    pipe.add_category("gear", normals)
    for name, options in {
        "AnomalySD": {},
        "AnomalySD, the paper's score": {"feature_weight": 0.0, "top_share": 0.0},
    }.items():
        output = pipe([image for image, _, _ in tests], category="gear", start=start, **options)
        own = judge(output.anomaly_maps, output.pred_scores, tests)
        assert {key: found[name][key] for key in own} == pytest.approx(own, abs=1e-6)
