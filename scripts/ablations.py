"""Ablate the fine-tuning as in the paper's Tables 3 and 4, on parts unknown to the checkpoint.

    python -m scripts.ablations --out ablations.csv
    python -m scripts.ablations --rows none both --data FOLDER --categories metal_plate cookies --out photographs.csv

Every row is one model for all given families: a pipeline is adapted to the shots of all of them (of each by itself
with `--each`), and then inspects their test pictures. Results are appended one by one and never computed twice: an
interrupted run goes on where it was.
"""

import argparse
import csv
import time
from pathlib import Path

import numpy as np
import torch

from anomalysd_pipeline import AnomalySDPipeline
from anomalysd_pipeline.common.devices import resolve_precision
from anomalysd_pipeline.synthetic import UNSEEN
from scripts.evaluate_embedded import drawn, evaluate, from_folder

ROWS = {
    "none": None,
    "decoder": {"train_denoiser": False},
    "denoiser": {"train_decoder": False},
    "both": {},
    "random masks": {"mask_design": "random"},
    "foreground masks": {"mask_design": "foreground"},
    "no prompts": {"prompt_design": "none"},
    "simple prompts": {"prompt_design": "simple"},
}
"""Row to its changes of the checkpoint's adaptation settings; None: no adaptation."""

TABLES = {
    "Fine-tuned parts": ("none", "decoder", "denoiser", "both"),
    "Training masks": ("random masks", "foreground masks", "both"),
    "Prompts": ("no prompts", "simple prompts", "both"),
}
COLUMNS = ("row", "seed", "category", "image", "pixel", "image_0", "pixel_0", "adapt_seconds", "adapted_to")


def finished(path: Path) -> list[dict]:
    """Reads the results in the file."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def append(path: Path, result: dict, columns: tuple[str, ...] = COLUMNS) -> None:
    """Appends a result, after a header if the file is new."""
    new = not path.exists()
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        if new:
            writer.writeheader()
        writer.writerow(result)


def run(arguments, row: str, seed: int, jobs: dict[str, tuple]) -> None:
    """Adapts to the categories in `jobs` and inspects their test pictures."""
    pipe = AnomalySDPipeline.from_pretrained(arguments.model)
    pipe.set_progress_bar_config(disable=True)
    pipe.mixed_precision = resolve_precision(arguments.mixed_precision, pipe.device)
    changes, began = ROWS[row], time.perf_counter()
    if changes is not None:
        given = {"steps": arguments.steps, "decoder_steps": arguments.decoder_steps, **changes}
        pipe.adapt({c: normals for c, (normals, _) in jobs.items()}, seed=seed, calibrate=False, **given)
    seconds = time.perf_counter() - began
    for category, (normals, tests) in jobs.items():
        if changes is None:
            pipe.add_category(category, normals)
        found, _ = evaluate(pipe, category, tests, pipe.settings(category=category))
        figures = {"image_0": found["paper"]["image"], "pixel_0": found["paper"]["pixel"]}
        figures |= {name: found["fused"][name] for name in ("image", "pixel")} | {"adapt_seconds": seconds}
        result = {"row": row, "seed": seed, "category": category, "adapted_to": len(jobs)}
        append(arguments.out, {**result, **{key: f"{value:.4f}" for key, value in figures.items()}})
        print(row, seed, category, *(f"{key} {value:.3f}" for key, value in figures.items()), flush=True)


def table(results: list[dict], rows: tuple[str, ...]) -> list[str]:
    """Writes the lines of a Markdown table, AUROC as image / pixel.

    A figure is the mean over categories, then mean and spread over the seeds that have all categories. The difference
    is to the row "none" of the same seeds, hence of the same pictures.
    """
    categories = {result["category"] for result in results}
    by_seed = {row: _by_seed(results, row, categories) for row in {*rows, "none"}}
    lines = []
    for row in rows:
        own, plain = by_seed[row], by_seed["none"]
        if not own:
            continue
        both = [seed for seed in own if seed in plain and row != "none"]
        differences = {seed: own[seed] - plain[seed] for seed in both}
        cells = [_cell(own, 0), _cell(differences, 0, "+"), _cell(own, 2)]
        lines.append(f"| {row} | {' | '.join(cells)} | {len(own)} |")
    return lines


def _by_seed(results: list[dict], row: str, categories: set[str]) -> dict[str, np.ndarray]:
    """Computes image and pixel AUROC, then both with `feature_weight` 0, of each seed with all categories."""
    keys = ("image", "pixel", "image_0", "pixel_0")
    found: dict[str, dict[str, list[float]]] = {}
    for result in results:
        if result["row"] == row:
            found.setdefault(result["seed"], {})[result["category"]] = [float(result[key]) for key in keys]
    return {seed: np.mean(list(own.values()), axis=0) for seed, own in found.items() if own.keys() == categories}


def _cell(by_seed: dict[str, np.ndarray], first: int, sign: str = "") -> str:
    """Writes two figures, with their spread if there are several seeds; differences have one digit more."""
    if not by_seed:
        return ""
    digits = 4 if sign else 3
    values = np.stack(list(by_seed.values()))[:, first : first + 2]
    spread = [f" ± {value:.{digits}f}" if len(values) > 1 else "" for value in values.std(axis=0)]
    return " / ".join(f"{mean:{sign}.{digits}f}{own}" for mean, own in zip(values.mean(axis=0), spread, strict=True))


def report(results: list[dict]) -> str:
    """Writes all tables with results, and a table for each category."""
    columns = ["{}", "image / pixel AUROC", "against none", "the same with `feature_weight` 0", "seeds"]
    head = f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|"
    parts = []
    for title, rows in TABLES.items():
        lines = table(results, rows)
        if len(lines) > 1:
            parts.append("\n".join([head.format(title), *lines]))
    for category in dict.fromkeys(result["category"] for result in results):
        own = [result for result in results if result["category"] == category]
        parts.append("\n".join([head.format(category), *table(own, tuple(ROWS))]))
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("ablations.csv"))
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--synthetic", nargs="*", default=None, help="default: the unseen families, without --data")
    parser.add_argument("--data", type=Path, help="folder of categories in MVTec-AD's layout")
    parser.add_argument("--categories", nargs="*", default=[])
    parser.add_argument("--shots", type=int, default=4)
    parser.add_argument("--limit", type=int, default=None, help="test pictures of each label (drawn parts: 12)")
    parser.add_argument("--each", action="store_true", help="an adaptation for each category, not one for all")
    parser.add_argument("--model", default=None, help="folder of a pipeline; default: the embedded checkpoint")
    parser.add_argument("--steps", type=int, default=None, help="of the denoiser; default: the checkpoint's own")
    parser.add_argument("--decoder_steps", type=int, default=None)
    parser.add_argument(
        "--mixed_precision",
        choices=("auto", "no", "bf16", "fp16"),
        default="auto",
        help="of inspections; auto: bf16 where the processor computes in it (default: %(default)s)",
    )
    parser.add_argument("--threads", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    families = arguments.synthetic
    if families is None:
        families = [] if arguments.data else UNSEEN
    for seed in arguments.seeds:
        jobs = {f: drawn(f, arguments.shots, seed, arguments.limit) for f in families}
        jobs |= {
            c: from_folder(arguments.data, c, arguments.shots, arguments.limit, seed) for c in arguments.categories
        }
        groups = [{category: job} for category, job in jobs.items()] if arguments.each else [jobs]
        for row in arguments.rows:
            for group in groups:
                done = {(r["row"], r["seed"], r["category"]) for r in finished(arguments.out)}
                if any((row, str(seed), category) not in done for category in group):
                    run(arguments, row, seed, group)
    print(report(finished(arguments.out)))


if __name__ == "__main__":
    main()
