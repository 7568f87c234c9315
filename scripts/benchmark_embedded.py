"""What the embedded checkpoint is worth, beside what needs no diffusion and what needs no network: one table.

    python -m scripts.benchmark_embedded --synthetic --out unseen.csv
    python -m scripts.benchmark_embedded --data FOLDER --categories cookies aliens --seeds 0 1 2 --out photographs.csv

4 shots, the checkpoint's own preset, the mean ± spread over seeds. `--synthetic` stands for the families that no
training has seen; the seed is that of a product, or of the draw of the shots from a folder. Results are appended one
by one, and what is in the file is not computed again.
"""

import argparse
import csv
import functools
import time
from pathlib import Path

import numpy as np
import torch

from anomalysd_pipeline import AnomalySDPipeline
from anomalysd_pipeline.common.devices import resolve_precision
from anomalysd_pipeline.data.tensors import resize
from anomalysd_pipeline.evaluation.floors import ColorPatchFloor, PlainInpaintingFloor
from anomalysd_pipeline.synthetic import UNSEEN
from scripts.ablations import append, finished
from scripts.evaluate_embedded import drawn, evaluate, from_folder, judge

SCORES = {"fused": "AnomalySD", "paper": "AnomalySD, the paper's score", "features": "prototype distance E alone"}
FLOORS = {"color patches": ColorPatchFloor, "plain inpainting": PlainInpaintingFloor}
ROWS = (
    *(f"{name}{suffix}" for suffix in ("", ", adapted") for name in SCORES.values()),
    *FLOORS,
)
COLUMNS = ("system", "seed", "category", "image", "pixel", "pro", "adapt_seconds", "seconds")


def run_own(arguments, adapted: bool, seed: int, category: str, normals: list, tests: list) -> dict[str, dict]:
    """Every way of scoring one inspection, by the name of its row."""
    pipe = AnomalySDPipeline.from_pretrained(arguments.model)
    pipe.set_progress_bar_config(disable=True)
    pipe.mixed_precision = resolve_precision(arguments.mixed_precision, pipe.device)
    began = time.perf_counter()
    if adapted:
        lengths = {"steps": arguments.max_train_steps, "decoder_steps": arguments.max_decoder_steps}
        given = {name: steps for name, steps in lengths.items() if steps is not None}
        pipe.adapt({category: normals}, seed=seed, calibrate=False, **given)
    else:
        pipe.add_category(category, normals)
    times = {"adapt_seconds": time.perf_counter() - began}
    figures, times["seconds"] = evaluate(
        pipe, category, tests, pipe.settings(category=category, start=arguments.start)
    )
    suffix = ", adapted" if adapted else ""
    return {f"{SCORES[name]}{suffix}": {**found, **times} for name, found in figures.items()}


def run_floor(arguments, name: str, seed: int, category: str, normals: list, tests: list) -> dict[str, dict]:
    """A floor on the same pictures."""
    detector = FLOORS[name]() if name == "color patches" else FLOORS[name](arguments.model)
    detector.fit(category, normals, seed)
    began = time.perf_counter()
    found = [detector.predict(category, image) for image, _, _ in tests]
    seconds = (time.perf_counter() - began) / len(tests)
    maps = torch.stack([resize(torch.from_numpy(p.anomaly_map)[None], (256, 256))[0] for p in found])
    return {name: {**judge(maps, [p.score for p in found], tests), "adapt_seconds": 0.0, "seconds": seconds}}


def table(results: list[dict]) -> str:
    """Markdown: systems by categories, image AUROC / pixel AUROC / PRO, and the mean over the categories of
    the seeds that have all of them, which the last column counts."""
    categories = list(dict.fromkeys(result["category"] for result in results))
    lines = [f"| | {' | '.join(categories)} | mean | seeds |", f"|{'---|' * (len(categories) + 3)}"]
    for system in ROWS:
        own = [result for result in results if result["system"] == system]
        if not own:
            continue
        by_seed: dict[str, dict[str, list[float]]] = {}
        for result in own:
            figures = [float(result[name]) for name in ("image", "pixel", "pro")]
            by_seed.setdefault(result["seed"], {})[result["category"]] = figures
        complete = [found for found in by_seed.values() if found.keys() == set(categories)]
        cells = [_cell([found[c] for found in by_seed.values() if c in found]) for c in categories]
        cells.append(_cell([_mean(list(found.values())) for found in complete]) if complete else "")
        lines.append(f"| {system} | {' | '.join(cells)} | {len(complete)} |")
    return "\n".join(lines)


def _mean(figures: list[list[float]]) -> list[float]:
    """Over the categories that have the figure."""
    columns = ([value for value in column if value == value] for column in zip(*figures, strict=True))
    return [float(np.mean(column)) if column else float("nan") for column in columns]


def _cell(by_seed: list[list[float]]) -> str:
    if not by_seed:
        return ""
    values = np.array(by_seed)
    parts = zip(values.mean(axis=0), values.std(axis=0), strict=True)
    return " / ".join("-" if mean != mean else f"{mean:.3f} ± {spread:.3f}" for mean, spread in parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmark.csv"))
    parser.add_argument("--synthetic", nargs="*", help="families of drawn parts; without a name the unseen ones")
    parser.add_argument("--data", type=Path, help="folder of categories in MVTec-AD's layout")
    parser.add_argument("--categories", nargs="*", default=[])
    parser.add_argument("--seeds", nargs="+", type=int, default=[10, 11, 12])
    parser.add_argument("--shots", type=int, default=4)
    parser.add_argument("--limit", type=int, default=None, help="test pictures of each label (drawn parts: 12)")
    parser.add_argument("--rows", nargs="+", choices=("not adapted", "adapted", *FLOORS), default=None)
    parser.add_argument("--model", default=None, help="folder of a pipeline; default: the embedded checkpoint")
    parser.add_argument("--start", choices=("image", "exemplar"), default=None, help="default: the checkpoint's own")
    parser.add_argument("--max_train_steps", type=int, default=None, help="of adapting; default: the checkpoint's")
    parser.add_argument("--max_decoder_steps", type=int, default=None, help="of adapting; default: the checkpoint's")
    parser.add_argument("--mixed_precision", choices=("auto", "no", "bf16", "fp16"), default="auto")
    parser.add_argument("--threads", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    families = [] if arguments.synthetic is None else arguments.synthetic or list(UNSEEN)
    jobs = [(name, seed) for seed in arguments.seeds for name in [*families, *arguments.categories]]
    systems = {
        "not adapted": (SCORES["fused"], functools.partial(run_own, arguments, False)),
        "adapted": (f"{SCORES['fused']}, adapted", functools.partial(run_own, arguments, True)),
        **{name: (name, functools.partial(run_floor, arguments, name)) for name in FLOORS},
    }
    rows = arguments.rows or list(systems)
    for category, seed in jobs:
        given = None
        for name in rows:
            row, function = systems[name]
            if any(
                (r["system"], r["seed"], r["category"]) == (row, str(seed), category) for r in finished(arguments.out)
            ):
                continue
            if given is None and category in families:
                given = drawn(category, arguments.shots, seed, arguments.limit)
            given = given or from_folder(arguments.data, category, arguments.shots, arguments.limit, seed)
            found = function(seed, category, *given)
            for system, figures in sorted(found.items(), key=lambda item: item[0] == row):
                # The row that says that all are there comes last.
                known = {"system": system, "seed": seed, "category": category}
                append(arguments.out, known | {k: f"{v:.4f}" for k, v in figures.items()}, COLUMNS)
                print(system, seed, category, *(f"{k} {v:.3f}" for k, v in figures.items()), flush=True)
    with open(arguments.out, newline="", encoding="utf-8") as file:
        print(table(list(csv.DictReader(file))))


if __name__ == "__main__":
    main()
