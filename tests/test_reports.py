import re
import sys

import numpy as np
import pytest
from PIL import Image

from anomalysd_pipeline.evaluation import paper
from anomalysd_pipeline.evaluation.figures import draw_curves
from anomalysd_pipeline.evaluation.markdown import percent, plain, table
from anomalysd_pipeline.evaluation.report import METRICS, write_report

IMAGE = [metric for metric in METRICS if metric.startswith("image")]
PIXEL = [metric for metric in METRICS if metric.startswith("pixel")]
RATES = ["false_alarms", "misses"]
SEEDS = [0, 1, 2]


def stat(values):
    known = [value for value in values if value is not None]
    mean = float(np.mean(known)) if known else None
    return {"mean": mean, "std": float(np.std(known)) if known else None, "values": values}


def summary(counts, figures=None, shots=(1,), seeds=SEEDS, name="anomalysd"):
    """`counts`: category to normal, defective and masked pictures. `figures`: (shots, category, metric) to values that
    are not drawn at random."""
    rng = np.random.default_rng(0)
    results = []
    for count in shots:
        found = {}
        for category in counts:
            found[category] = {metric: stat(rng.uniform(0.5, 1, len(seeds)).tolist()) for metric in [*METRICS, *RATES]}
            for (k, c, metric), values in (figures or {}).items():
                if (k, c) == (count, category):
                    found[category][metric] = stat(values)
        mean = {}
        for metric in [*METRICS, *RATES]:
            known = [f[metric]["values"] for f in found.values() if None not in f[metric]["values"]]
            mean[metric] = stat(np.mean(known, axis=0).tolist() if known else [None])
        results.append({"shots": count, "seeds": list(seeds), "categories": found, "mean": mean})
    return {
        "system": {"name": name, "base": "embedded", "settings": {"noise_strength": 0.4, "grouped": True}},
        "dataset": {
            "name": "parts",
            "categories": {c: dict(zip(("normal", "defective", "masks"), n, strict=True)) for c, n in counts.items()},
        },
        "protocol": {
            "resolution": 256,
            "fpr_limit": 0.3,
            "connectivity": 8,
            "shots": list(shots),
            "seeds": list(seeds),
            "settings": {"preset": "fast"},
        },
        "results": results,
    }


def report(folder, *args, costs=None, curves=None, cases=(), **options):
    return write_report(folder, *args, costs or {}, curves or {}, cases, **options).read_text(encoding="utf-8")


def gear():
    return {"category": "gear", "label": True, "caption": "dent/000.png", "score": 0.8, "threshold": 0.4} | {
        "image": Image.new("RGB", (90, 60), (120, 120, 120)),
        "mask": None,
        "anomaly_map": np.full((30, 45), 0.8, np.float32),
    }


def cells(text, section, *starts):
    """The cells of the one row in a section that starts with these cells."""
    part = text.split(f"\n{section}\n")[1].split("\n#")[0]
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in part.splitlines() if "|" in line]
    (row,) = [row for row in rows if row[: len(starts)] == list(starts)]
    return row


class TestPaper:
    def figure(self, dataset, setup, method, metric="image_auroc"):
        (row,) = [row for row in paper.table_1(dataset, setup) if row.method == method]
        return row.figures[metric]

    def ablation(self, topic):
        return {
            r.method: (r.figures["image_auroc"], r.figures["pixel_auroc"]) for r in paper.ABLATIONS if r.topic == topic
        }

    def test_table_1_agrees_with_the_text(self):
        # "on the VisA dataset, AnomalySD surpasses WinCLIP a lot, by 2.3%, 2.8%, and 1.6% in AUC in image level"
        for setup, gain in (("1-shot", 2.3), ("2-shot", 2.8), ("4-shot", 1.6)):
            ours, other = (self.figure("VisA", setup, method) for method in ("AnomalySD", "WinCLIP"))
            assert ours - other == pytest.approx(gain)
        assert len(paper.TABLE_1) == 2 * (3 + 5 + 5 + 5)
        assert all(list(row.figures) == list(paper.TABLE_1_METRICS) for row in paper.TABLE_1)

    def test_tables_agree_with_each_other(self):
        for row in paper.TABLE_2:
            if row.method == paper.OURS:
                for metric, value in row.figures.items():
                    assert value == self.figure("MVTec-AD", row.setup, paper.OURS, metric)
        one_shot = tuple(self.figure("MVTec-AD", "1-shot", paper.OURS, m) for m in ("image_auroc", "pixel_auroc"))
        assert {self.ablation(r.topic)[m] for r in paper.ABLATIONS for m in [list(self.ablation(r.topic))[-1]]} == {
            one_shot
        }
        assert self.ablation("fine-tuned modules")["none"] == (86.6, 87.6)  # the 0-shot row of Table 1

    def test_ablations_agree_with_the_text(self):
        def gain(topic, better, worse):
            return np.subtract(self.ablation(topic)[better], self.ablation(topic)[worse])

        assert gain("fine-tuned modules", "decoder", "none") == pytest.approx([0.6, 1.3])
        assert gain("training mask", "designed", "random") == pytest.approx([0.6, 0.9])
        assert gain("prompts", "designed", "simple") == pytest.approx([1.2, 1.5])
        assert gain("inference masks", "multi-scale", "one full mask") == pytest.approx([8.2, 4.6])

    def test_sources(self):
        assert paper.ABLATIONS[-1].source == "arXiv 2408.01960, Table 5"

    def test_data_sets_are_recognized_by_all_of_their_categories(self):
        mvtec, visa = (sorted(paper.DATASETS[name]) for name in ("MVTec-AD", "VisA"))
        assert (len(mvtec), len(visa)) == (15, 12)
        assert paper.paper_dataset(mvtec) == "MVTec-AD"
        assert paper.paper_dataset(name.replace("_", " ").title() for name in visa) == "VisA"
        for other in (mvtec[:-1], [*mvtec, "gear"], mvtec + visa, []):
            assert paper.paper_dataset(other) is None
        assert paper.part_of(["bottle", "metal nut"]) == "MVTec-AD"
        assert paper.part_of(["bottle", "candle"]) is None
        assert paper.part_of([]) is None


class TestMarkdown:
    def test_table(self):
        text = table([["cookies", "9.5", "a"], ["b", "93.6 ± 0.4", "-"]], ["Part", "AUROC", "Note"])
        assert text.splitlines() == [
            "| Part    |      AUROC | Note |",
            "| ------- | ---------: | ---- |",
            "| cookies |        9.5 | a    |",
            "| b       | 93.6 ± 0.4 | -    |",
        ]

    def test_table_without_rows(self):
        assert table([], ["A", "Part"]).splitlines() == ["| A   | Part |", "| --- | ---- |"]

    def test_row_of_another_length_is_refused(self):
        with pytest.raises(ValueError, match="`rows` must have 2 cells each"):
            table([["a"]], ["A", "B"])

    @pytest.mark.parametrize(
        ("values", "text"),
        [
            ([0.934, 0.936, 0.938], "93.6 ± 0.2"),
            ([0.5], "50.0"),
            ([None, 0.25, None], "25.0"),
            ([None, None], "-"),
            ([1.0, 1.0], "100.0 ± 0.0"),
        ],
    )
    def test_percent(self, values, text):
        assert percent(stat(values)) == text

    def test_percent_of_nothing(self):
        assert percent(None) == percent({"mean": float("nan"), "std": None, "values": []}) == "-"

    def test_plain(self):
        assert plain("a|b\n `c` <d> _e_ $f$ *g*") == r"a\|b \`c\` &lt;d&gt; \_e\_ \$f\$ \*g\*"
        assert plain("metal_nut") == "metal_nut"


class TestReport:
    def test_own_data_set(self, tmp_path):
        values = {(1, "cookies", "image_auroc"): [0.9, 0.92, 0.97], (1, "gear", "image_auroc"): [0.5, 0.6, 0.8]}
        text = report(tmp_path / "new", summary({"cookies": (14, 32, 32), "gear": (5, 6, 6)}, values, shots=(0, 1)))
        assert text.startswith(
            "# Evaluation of anomalysd on parts\n\n2 categories; 19 normal and 38 defective test pictures"
        )
        assert cells(text, "### 1-shot", "cookies")[1] == f"93.0 ± {100 * np.std([0.9, 0.92, 0.97]):.1f}"
        means = [0.7, 0.76, 0.885]
        expected = f"{100 * np.mean(means):.1f} ± {100 * np.std(means):.1f}"
        assert cells(text, "### 1-shot", "**Mean**")[1] == expected
        assert cells(text, "## Results", "1-shot", "**anomalysd** (measured)")[2] == expected
        assert "mean ± standard deviation over 3 seeds" in text
        # At zero shots there is nothing to draw.
        mixed = summary({"cookies": (14, 32, 32)}, shots=(0, 1))
        mixed["results"][0]["seeds"] = [0]
        assert "over 3 seeds; 0-shot: one seed." in report(tmp_path, mixed)
        assert "has no figures for these categories" in text
        assert "(paper)" not in text
        assert "at 256 px" in text
        assert "false positive rate of 0.3" in text
        assert "8-connected" in text
        assert cells(text, "## Settings", "settings.noise_strength") == ["settings.noise_strength", "0.4"]
        assert cells(text, "## Settings", "settings.grouped")[1] == "yes"
        assert "undefined" not in text

    def test_paper_data_set(self, tmp_path):
        counts = dict.fromkeys(sorted(paper.DATASETS["VisA"]), (10, 100, 100))
        text = report(tmp_path, summary(counts, shots=(8, 0, 1)))
        assert text.startswith("# Evaluation of anomalysd on VisA\n")
        row = cells(text, "## Results", "1-shot", "AnomalySD (paper)")
        assert row == ["1-shot", "AnomalySD (paper)", "86.1", "89.1", "83.4", "96.5", "-", "93.9"]
        assert cells(text, "## Results", "0-shot", "SD (paper)")[2] == "55.7"
        assert len(re.findall(r"\(paper\)", text.split("## By category")[0])) == 3 + 5 + 1  # and once in the text
        assert "compare only roughly" not in text
        # By shots, the measured row first.
        setups = re.findall(r"^\| (\d-shot) +\| (\S+)", text.split("## By category")[0], re.MULTILINE)
        assert [setup for setup, _ in setups] == ["0-shot"] * 4 + ["1-shot"] * 6 + ["8-shot"]
        assert [method for setup, method in setups][4] == "**anomalysd**"

    def test_part_of_the_paper_data_set(self, tmp_path):
        counts = dict.fromkeys(sorted(paper.DATASETS["VisA"]), (10, 50, 50))
        assert "Measured here on 600 defective pictures where VisA has 1200" in report(tmp_path, summary(counts))
        text = report(tmp_path, summary({"bottle": (20, 63, 63), "screw": (41, 119, 119)}))
        assert "means over all 15 categories of MVTec-AD only" in text
        assert "(paper)" not in text
        assert "no figures for these numbers of shots" in report(tmp_path, summary(counts, shots=(8,)))

    def test_missing_masks(self, tmp_path):
        none = {(1, "aliens", metric): [None] * 3 for metric in PIXEL}
        text = report(tmp_path, summary({"aliens": (18, 20, 0), "cookies": (14, 32, 30)}, none))
        assert cells(text, "### 1-shot", "aliens")[4:] == ["-"] * 4
        assert "-" not in cells(text, "### 1-shot", "cookies")
        assert "- No masks for aliens: image metrics only." in text
        assert "- cookies: masks for only 30 of the 32 defective pictures." in text
        assert "Pixel PRO are over the 1 of 2 categories that have them" in text
        assert "undefined" not in text

    def test_undefined_metrics(self, tmp_path):
        figures = {(1, "good", metric): [None] * 3 for metric in METRICS}
        figures |= {(1, "bad", metric): [None] * 3 for metric in IMAGE}
        figures |= {(1, "odd", "pixel_pro"): [0.5, None, 0.6]}
        text = report(tmp_path, summary({"good": (4, 0, 0), "bad": (0, 5, 5), "odd": (4, 4, 4)}, figures))
        three = "Image AUROC, Image AUPR and Image F1-max undefined, one class only"
        assert f"- good, 1-shot: {three} (no defective picture)." in text
        assert "Pixel F1-max and Pixel PRO undefined, one class only (no defective picture)." in text
        assert f"- bad, 1-shot: {three} (no normal picture)." in text
        assert (
            "- odd, 1-shot (seeds 1): Pixel PRO undefined, one class only (no defective or no normal pixel)." in text
        )
        assert "No masks" not in text

    def test_one_seed_and_one_category(self, tmp_path):
        text = report(tmp_path, summary({"cookies": (14, 32, 32)}, {(1, "cookies", "image_aupr"): [0.987]}, seeds=[7]))
        assert "±" not in text
        assert "of one seed (7)" in text
        assert cells(text, "### 1-shot", "cookies")[2] == "98.7"
        assert "**Mean**" not in text

    def test_false_alarms_and_misses(self, tmp_path):
        figures = {(0, "cookies", rate): [None] * 3 for rate in RATES}
        figures |= {(1, "cookies", "false_alarms"): [0.1, 0.2, 0.3], (1, "cookies", "misses"): [0.0, 0.0, 0.0]}
        text = report(tmp_path, summary({"cookies": (10, 10, 10)}, figures, shots=(0, 1)))
        spread = f"20.0 ± {100 * np.std([0.1, 0.2, 0.3]):.1f}"
        assert cells(text, "## False alarms and misses", "cookies") == ["cookies", "-", "-", spread, "0.0 ± 0.0"]
        only_zero = {(0, "cookies", rate): [None] * 3 for rate in RATES}
        text = report(tmp_path, summary({"cookies": (10, 10, 10)}, only_zero, shots=(0,)))
        assert "No category has a calibrated threshold" in text

    def test_names_are_escaped(self, tmp_path):
        name = "a|b\n`c` <i>"
        text = report(tmp_path, summary({name: (3, 4, 0)}, {(1, name, m): [None] * 3 for m in PIXEL}))
        escaped = r"a\|b \`c\` &lt;i&gt;"
        assert cells(text, "### 1-shot", escaped)[0] == escaped
        assert f"No masks for {escaped}:" in text
        assert name not in text

    def test_cost(self, tmp_path):
        costs = {"seconds_per_image": 2.345, "fit_seconds": None, "device": "CPU | 2 threads", "workers": 3}
        text = report(tmp_path, summary({"gear": (1, 1, 1)}), costs=costs)
        assert cells(text, "## Cost", "Seconds per picture")[1] == "2.35"
        assert cells(text, "## Cost", "Device")[1] == r"CPU \| 2 threads"
        assert cells(text, "## Cost", "workers")[1] == "3"
        assert "to learn" not in text
        assert "## Cost\n\nNot measured." in report(tmp_path, summary({"gear": (1, 1, 1)}))

    def test_systems_side_by_side(self, tmp_path):
        counts = {"gear": (5, 5, 5)}
        peer = summary(counts, {(1, "gear", "image_auroc"): [0.75] * 3}, name="patchcore")
        text = report(tmp_path, summary(counts), beside=[peer])
        assert cells(text, "## Results", "1-shot", "**patchcore** (measured)")[2] == "75.0 ± 0.0"
        assert cells(text, "## Settings", "System") == ["System", "anomalysd", "patchcore"]
        with pytest.raises(ValueError, match="`beside` must be of the same categories.*'patchcore' is of gear"):
            report(tmp_path, summary({"ring": (5, 5, 5)}), beside=[peer])

    def test_no_results_are_refused(self, tmp_path):
        with pytest.raises(ValueError, match="`summary` must hold at least one entry in `results`"):
            report(tmp_path, summary({"gear": (5, 5, 5)}, shots=()))

    def test_figures_are_shown(self, tmp_path):
        pytest.importorskip("matplotlib")
        line = {"image_roc": [[0, 0.5, 1], [0, 0.9, 1]]}
        curves = {(1, 1, "gear"): line, (1, 2, "gear"): line, (4, 0, "gear"): {"image_roc": [[], []]}}
        text = report(tmp_path, summary({"gear": (5, 5, 5)}, shots=(1, 4)), curves=curves, cases=[gear()])
        shown = re.findall(r"!\[(.*)\]\((.*)\)", text)
        assert shown == [
            ("Curves, 1-shot, seed 1", "figures/curves_1-shot.png"),
            ("Best and worst cases", "figures/cases.png"),
        ]
        assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == ["cases.png", "curves_1-shot.png"]

    def test_without_matplotlib_all_else_is_there(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        curves = {(1, 0, "gear"): {"image_roc": [[0, 1], [0, 1]]}}
        text = report(tmp_path, summary({"gear": (5, 5, 5)}), curves=curves, cases=[gear()])
        assert "Not drawn: matplotlib is not installed; `pip install 'anomalysd-pipeline[evaluate]'`." in text
        assert "figures/cases.png" in text
        with pytest.raises(ValueError, match="pip install"):
            draw_curves({"gear": curves[1, 0, "gear"]}, tmp_path / "curves.png")
