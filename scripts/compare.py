"""Compare AnomalySD with other methods and two floors, on the same pictures and shots, in one table.

    python -m scripts.compare --data FOLDER --categories cookies metal_plate --shots 1 4 --seeds 0 1 2 --out comparison

`anomalysd_pipeline.evaluate` evaluates every system into a folder of its own and computes nothing twice.
`comparison.md` has the tables. Rows of `EXTRA`, which take longest, are computed only if named:

    python -m scripts.compare ... --systems AnomalySD "AnomalySD, adapted" PatchCore
"""

import argparse
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

from anomalysd_pipeline.evaluation.markdown import percent, plain, table
from anomalysd_pipeline.evaluation.options import add_arguments
from anomalysd_pipeline.evaluation.run import evaluate

SYSTEMS = {
    "AnomalySD": [],
    "AnomalySD, the paper's score": ["--feature_weight", "0", "--top_share", "0"],
    "AnomalySD, from the image": ["--start", "image"],
    "AnomalySD, adapted": ["--adapt"],
    "color patches": ["--peer", "color_patches"],
    "plain inpainting": ["--peer", "plain_inpainting"],
    "PatchCore": ["--peer", "patchcore"],
    "PaDiM": ["--peer", "padim"],
    "SPADE": ["--peer", "spade"],
    "PatchCore, ImageNet": ["--peer", "patchcore", "--backbone", "imagenet"],
    "PaDiM, ImageNet": ["--peer", "padim", "--backbone", "imagenet"],
    "SPADE, ImageNet": ["--peer", "spade", "--backbone", "imagenet"],
    "WinCLIP": ["--peer", "winclip"],
    "DRAEM": ["--peer", "draem"],
}
"""Name in the tables to further options of the evaluation."""

EXTRA = ("AnomalySD, adapted",)

COLUMNS = {"image_auroc": "image AUROC", "pixel_auroc": "pixel AUROC", "pixel_pro": "PRO"}


def run_systems(
    systems: Mapping[str, Sequence[str]], common: Sequence[str], out: Path
) -> tuple[dict[str, dict], dict[str, str]]:
    """Evaluates each system with its own and the common options.

    Args:
        systems: name to its own options.
        common: options of `anomalysd_pipeline.evaluate`, without `--out`.
        out: gets a folder for each system.

    Returns:
        Name to summary, and name to the sentence why there is none.
    """
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    summaries, failures = {}, {}
    for name, options in systems.items():
        print(f"{name} ...", flush=True)
        args = parser.parse_args([*common, *options, "--out", str(out / folder_name(name))])
        try:
            summaries[name] = evaluate(args, report=functools.partial(print, flush=True))
        except ValueError as error:
            failures[name] = " ".join(str(error).split())
            print(f"left out: {failures[name]}", flush=True)
    return summaries, failures


def folder_name(system: str) -> str:
    """Turns the name of a system into that of a folder."""
    return "-".join("".join(c if c.isalnum() else " " for c in system.lower()).split())


def comparison(summaries: Mapping[str, Mapping], failures: Mapping[str, str]) -> str:
    """Writes a table of all systems for each number of shots, in percent, mean ± spread over the seeds."""
    first = next(iter(summaries.values()))
    categories, parts = list(first["dataset"]["categories"]), []
    for entry in first["results"]:
        shots, rows = entry["shots"], []
        for name, summary in summaries.items():
            own = next((result for result in summary["results"] if result["shots"] == shots), None)
            if own is None:
                continue
            cells = [" / ".join(percent(own["categories"][c][m]) for m in COLUMNS) for c in categories]
            rows.append([name, *cells, " / ".join(percent(own["mean"][m]) for m in COLUMNS)])
        rows += [[name, *["not run"] * (len(categories) + 1)] for name in failures]
        header = [f"{shots} shot{'s' * (shots != 1)}", *map(plain, categories), "mean"]
        parts += [table(rows, header), *verdicts(summaries, shots)]
    parts.append(f"Each cell: {' / '.join(COLUMNS.values())}, in percent.")
    for name, summary in summaries.items():
        facts = summary["system"]
        if facts.get("detector") == "draem":
            parts.append(
                f"{name} was trained for {facts['steps']} steps of {facts['batch_size']} pictures of "
                f"{facts['resolution']} px."
            )
    parts += [f"{name} was not run: {sentence}" for name, sentence in failures.items()]
    return "\n\n".join(parts)


def verdicts(summaries: Mapping[str, Mapping], shots: int) -> list[str]:
    """Says of each system with thresholds how often they are wrong, mean ± spread over the seeds."""
    said = []
    for name, summary in summaries.items():
        means = next((result["mean"] for result in summary["results"] if result["shots"] == shots), {})
        if means.get("misses", {}).get("mean") is not None:
            rate = 100 * summary["system"]["false_alarm_rate"]
            said.append(
                f"{name}, thresholds for {rate:g} % false alarms: {percent(means['false_alarms'])} % false alarms, "
                f"{percent(means['misses'])} % misses."
            )
    return said


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Other options are those of anomalysd_pipeline.evaluate.",
    )
    parser.add_argument("--out", type=Path, default=Path("comparison"))
    usual = [name for name in SYSTEMS if name not in EXTRA]
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=usual, metavar="NAME")
    arguments, common = parser.parse_known_args()
    summaries, failures = run_systems({name: SYSTEMS[name] for name in arguments.systems}, common, arguments.out)
    if not summaries:
        raise SystemExit("No system could be evaluated; see the sentences above.")
    text = comparison(summaries, failures)
    (arguments.out / "comparison.md").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}")


if __name__ == "__main__":
    main()
