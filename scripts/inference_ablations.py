"""Ablate the inspection as in the paper's Tables 5 and 4 (prompts) and Figure 4 (noise strength).

    python -m scripts.inference_ablations --synthetic gear capsule perforated_sheet --shots 1 --sweep_steps 10

The score is the paper's (`feature_weight` 0) unless `--feature_weight` is given. Every row is an evaluation in a
folder of its own, and nothing is computed twice.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from anomalysd_pipeline.evaluation.markdown import percent, table
from scripts.compare import run_systems

MASKS = {
    "one full mask": ["--mask_scales", "1", "--prototype_weight", "0"],
    "multi-scale masks": ["--prototype_weight", "0"],
    "multi-scale and prototype-guided masks": [],
}
PROMPTS = {
    "no prompts": ["--prompt_design", "none"],
    "simple prompts": ["--prompt_design", "simple"],
    "hierarchical prompts": ["--prompt_design", "hierarchical"],
}
STRENGTHS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
COLUMNS = {
    "image_auroc": "Image AUROC",
    "image_aupr": "Image AUPR",
    "image_f1_max": "Image F1-max",
    "pixel_auroc": "Pixel AUROC",
    "pixel_pro": "PRO",
}


def rows_of(title: str, names: Sequence[str], summaries: Mapping[str, Mapping]) -> str:
    """Writes a Markdown table with a row for each name and number of shots."""
    shots = [result["shots"] for result in summaries[names[0]]["results"]]
    rows = []
    for place, count in enumerate(shots):
        for name in names:
            mean = summaries[name]["results"][place]["mean"]
            rows.append([f"{count}", name, *(percent(mean[metric]) for metric in COLUMNS)])
    return table(rows, ["Shots", title, *COLUMNS.values()])


def draw_strengths(curves: Mapping[float, Mapping], path: Path) -> None:
    """Draws image and pixel AUROC of each category, and their mean, against the noise strength.

    Args:
        curves: noise strength to a summary.
        path: of the PNG file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    strengths = sorted(curves)
    last = {strength: curves[strength]["results"][-1] for strength in strengths}
    figure = Figure(figsize=(9, 3.6), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for axes, metric in zip(figure.subplots(1, 2), ("image_auroc", "pixel_auroc"), strict=True):
        for category in last[strengths[0]]["categories"]:
            values = [last[strength]["categories"][category][metric]["mean"] for strength in strengths]
            if None not in values:
                axes.plot(strengths, [100 * value for value in values], marker="o", markersize=3, label=category)
        means = [last[strength]["mean"][metric]["mean"] for strength in strengths]
        if None not in means:
            axes.plot(strengths, [100 * value for value in means], color="black", linewidth=2, label="mean")
        axes.set_xlabel("noise strength λ")
        axes.set_ylabel(f"{COLUMNS[metric]}, %")
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    shots = last[strengths[0]]["shots"]
    figure.suptitle(f"{shots} shot{'s' * (shots != 1)}", fontsize=10)
    canvas.print_png(path, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Other options are those of anomalysd_pipeline.evaluate.",
    )
    parser.add_argument("--out", type=Path, default=Path("inference-ablations"))
    parser.add_argument("--feature_weight", default="0")
    parser.add_argument("--strengths", nargs="*", type=float, default=STRENGTHS, metavar="X", help="none: no sweep")
    parser.add_argument(
        "--sweep_steps",
        metavar="N",
        help="length of the schedule in the sweep, at least 10 for a strength of 0.1 (default: the preset's)",
    )
    arguments, common = parser.parse_known_args()
    common += ["--feature_weight", arguments.feature_weight, "--no_calibration"]
    steps = ["--num_inference_steps", arguments.sweep_steps] if arguments.sweep_steps else []
    sweep = {f"λ = {strength:g}": ["--noise_strength", f"{strength:g}", *steps] for strength in arguments.strengths}
    summaries, failures = run_systems({**MASKS, **PROMPTS, **sweep}, common, arguments.out)
    if failures:
        raise SystemExit(f"Left out, so there are no tables: {'; '.join(failures)}. See the sentences above.")
    tables = {"Masks": MASKS, "Prompts": PROMPTS, "Noise strength": sweep}
    text = "\n\n".join(rows_of(title, list(names), summaries) for title, names in tables.items() if names)
    (arguments.out / "ablations.md").write_text(text + "\n", encoding="utf-8")
    if sweep:
        curves = {strength: summaries[name] for strength, name in zip(arguments.strengths, sweep, strict=True)}
        draw_strengths(curves, arguments.out / "noise_strength.png")
    print(f"\n{text}")


if __name__ == "__main__":
    main()
