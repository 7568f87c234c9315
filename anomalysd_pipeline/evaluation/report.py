"""Write the report of an evaluation as Markdown.

It has the paper's table layout with the paper's own figures beside ours, a table of categories for each number of
shots, false alarms and misses, curves, cases, settings, cost and notes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..common.files import write_whole
from . import paper
from .figures import can_draw_curves, draw_cases, draw_curves
from .markdown import UNDEFINED, is_defined, percent, plain, table

REPORT, FIGURES = "report.md", "figures"

METRICS = {
    "image_auroc": "Image AUROC",
    "image_aupr": "Image AUPR",
    "image_f1_max": "Image F1-max",
    "pixel_auroc": "Pixel AUROC",
    "pixel_aupr": "Pixel AUPR",
    "pixel_f1_max": "Pixel F1-max",
    "pixel_pro": "Pixel PRO",
}
"""Metric to its name in the tables, in the order of columns."""

_LAYOUT = tuple(metric for metric in METRICS if metric != "pixel_aupr")
_RATES = {"false_alarms": "false alarms", "misses": "misses"}
_COSTS = {
    "seconds_per_image": "Seconds per picture",
    "fit_seconds": "Seconds to learn from the shots",
    "peak_memory_gib": "Peak memory, GiB",
    "device": "Device",
    "processes": "Processes",
}


def write_report(
    folder: Path,
    summary: Mapping,
    costs: Mapping,
    curves: Mapping[tuple, Mapping],
    cases: Sequence[Mapping],
    beside: Sequence[Mapping] = (),
    notes: Sequence[str] = (),
) -> Path:
    """Writes `report.md` and its pictures under `figures/`.

    Args:
        folder: made if missing.
        summary: `system`, `dataset`, `protocol` and `results`, as in `summary.json`; figures in [0, 1], None where
            undefined.
        costs: `seconds_per_image`, `fit_seconds`, `peak_memory_gib`, `device`, `processes` and more facts; None values
            are left out.
        curves: `(shots, seed, category)` to curves, see `figures.draw_curves`; the first seed with any is drawn.
        cases: see `figures.draw_cases`; may be empty.
        beside: summaries of other systems on the same categories, for more rows of the main table.
        notes: further sentences about the data.

    Returns:
        The path of `report.md`. Without matplotlib the report has no curves, and says so.

    Raises:
        ValueError: if a summary has no results, `beside` has other categories, or as the functions in `figures`.
    """
    for given in (summary, *beside):
        if not given["results"]:
            raise ValueError("`summary` must hold at least one entry in `results`; evaluate at least one shots count.")
        if set(given["dataset"]["categories"]) != set(summary["dataset"]["categories"]):
            raise ValueError(
                f"`beside` must be of the same categories as `summary`, but '{given['system']['name']}' is of "
                f"{', '.join(given['dataset']['categories'])}; evaluate it on {', '.join(_categories(summary))}."
            )
    folder = Path(folder)
    figures = folder / FIGURES
    figures.mkdir(parents=True, exist_ok=True)
    sections = [
        _introduction(summary),
        f"## Results\n\n{_results(summary, beside)}",
        f"## By category\n\n{_by_category(summary)}",
        f"## False alarms and misses\n\n{_rates(summary)}",
        f"## Curves\n\n{_curves(summary, curves, figures)}",
    ]
    if cases:
        path = draw_cases(cases, figures / "cases.png")
        sections.append(f"## Best and worst cases\n\n{_picture('Best and worst cases', path)}")
    sections += [
        f"## Settings\n\n{_settings(summary, beside)}",
        f"## Cost\n\n{_cost(costs)}",
        f"## Notes\n\n{_notes(summary, notes)}",
    ]
    path = folder / REPORT
    write_whole(path, lambda partial: partial.write_text("\n\n".join(sections) + "\n", encoding="utf-8"))
    return path


def _categories(summary: Mapping) -> list[str]:
    return list(summary["dataset"]["categories"])


def _setup(shots: object) -> str:
    return f"{shots}-shot"


def _name(summary: Mapping) -> str:
    return plain(summary["system"]["name"])


def _count(number: int, noun: str, nouns: str | None = None) -> str:
    return f"{number} {noun if number == 1 else nouns or noun + 's'}"


def _list(items: Sequence[object]) -> str:
    texts = [str(item) for item in items]
    return " and ".join(filter(None, [", ".join(texts[:-1]), *texts[-1:]]))


def _picture(title: str, path: Path) -> str:
    return f"![{title}]({FIGURES}/{path.name})"


def _spread(summary: Mapping) -> str:
    seeds = max((result["seeds"] for result in summary["results"]), key=len)
    if len(seeds) == 1:
        return f"Figures in percent, of one seed ({seeds[0]})."
    text = f"Figures in percent: mean ± standard deviation over {len(seeds)} seeds"
    single = [_setup(result["shots"]) for result in summary["results"] if len(result["seeds"]) == 1]
    return f"{text}; {_list(single)}: one seed." if single else f"{text}."


def _introduction(summary: Mapping) -> str:
    counts, protocol = summary["dataset"]["categories"], summary["protocol"]
    dataset = paper.paper_dataset(counts) or summary["dataset"].get("name")
    title = f"# Evaluation of {_name(summary)}" + (f" on {plain(dataset)}" if dataset else "")
    normal, defective = (sum(count[key] for count in counts.values()) for key in ("normal", "defective"))
    of = _count(len(counts), "category", "categories")
    shots = f"{_list(protocol['shots'])} shot{'s' if list(protocol['shots']) != [1] else ''}"
    seeds = f"{'seed' if len(protocol['seeds']) == 1 else 'seeds'} {_list(protocol['seeds'])}"
    text = f"{of}; {normal} normal and {defective} defective test pictures; {shots} of each category; {seeds}."
    rows = [
        [plain(name), *(str(count[key]) for key in ("normal", "defective", "masks"))] for name, count in counts.items()
    ]
    return f"{title}\n\n{text}\n\n{table(rows, ['Category', 'Normal', 'Defective', 'With a mask'])}"


def _results(summary: Mapping, beside: Sequence[Mapping]) -> str:
    systems = [summary, *beside]
    dataset = paper.paper_dataset(_categories(summary))
    setups = dict.fromkeys(_setup(result["shots"]) for system in systems for result in system["results"])
    rows, published = [], 0
    for setup in sorted(setups, key=_setup_order):
        for system in systems:
            for result in system["results"]:
                if _setup(result["shots"]) == setup:
                    figures = [percent(result["mean"].get(metric)) for metric in _LAYOUT]
                    rows.append([setup, f"**{_name(system)}** (measured)", *figures])
        for row in paper.table_1(dataset, setup) if dataset else []:
            figures = [f"{row.figures[metric]:.1f}" if metric in row.figures else UNDEFINED for metric in _LAYOUT]
            rows.append([setup, f"{row.method} (paper)", *figures])
            published += 1
    header = ["Setup", "Method", *(METRICS[metric] for metric in _LAYOUT)]
    mean = f"Means over the {len(_categories(summary))} categories. " if len(_categories(summary)) > 1 else ""
    return f"{table(rows, header)}\n\n{mean}{_spread(summary)} {_comparison(summary, dataset, published)}"


def _setup_order(setup: str) -> tuple:
    shots = setup.split("-")[0]
    return (0, int(shots), setup) if shots.isdigit() else (1, 0, setup)


def _comparison(summary: Mapping, dataset: str | None, published: int) -> str:
    """Says how the paper's rows compare, or why there are none."""
    counts = summary["dataset"]["categories"]
    if dataset is None:
        whole = paper.part_of(counts)
        if whole:
            return (
                f"The paper gives means over all {len(paper.DATASETS[whole])} categories of {whole} only "
                f"({paper.SOURCE}, Table 1), which do not compare with {len(counts)} of them."
            )
        return f"The paper ({paper.SOURCE}) has no figures for these categories; its data sets are MVTec-AD and VisA."
    if not published:
        return f"The paper ({paper.SOURCE}, Table 1) has no figures for these numbers of shots."
    text = (
        f"Rows marked (paper) are printed in {paper.SOURCE}, Table 1: means over the same {len(counts)} categories at "
        f"{paper.RESOLUTION} px, without pixel F1-max; the paper names neither the limit nor the connectivity of PRO."
    )
    kind, expected = paper.COUNTS[dataset]
    found = sum(
        count["defective"] + (count["normal"] if dataset == paper.MVTEC_AD else 0) for count in counts.values()
    )
    if found != expected:
        text += f" Measured here on {found} {kind} where {dataset} has {expected}: the two compare only roughly."
    return text


def _by_category(summary: Mapping) -> str:
    parts = []
    for result in summary["results"]:
        rows = [
            [plain(category), *(percent(stats.get(metric)) for metric in METRICS)]
            for category, stats in result["categories"].items()
        ]
        if len(rows) > 1:
            rows.append(["**Mean**", *(percent(result["mean"].get(metric)) for metric in METRICS)])
        parts.append(f"### {_setup(result['shots'])}\n\n{table(rows, ['Category', *METRICS.values()])}")
    return "\n\n".join(parts)


def _rates(summary: Mapping) -> str:
    results = summary["results"]
    columns = [(result, rate) for result in results for rate in _RATES]
    rows = [
        [plain(category), *(percent(result["categories"].get(category, {}).get(rate)) for result, rate in columns)]
        for category in _categories(summary)
    ]
    if all(cell == UNDEFINED for row in rows for cell in row[1:]):
        return "No category has a calibrated threshold, so there are none to count."
    if len(rows) > 1:
        rows.append(["**Mean**", *(percent(result["mean"].get(rate)) for result, rate in columns)])
    header = ["Category", *(f"{_setup(result['shots'])} {_RATES[rate]}" for result, rate in columns)]
    text = (
        "At the threshold that was calibrated on the shots alone: the share of the normal pictures above it, and "
        f'of the defective ones that are not. "{UNDEFINED}": not calibrated, or no such picture.'
    )
    return f"{text} {_spread(summary)}\n\n{table(rows, header)}"


def _curves(summary: Mapping, curves: Mapping[tuple, Mapping], figures: Path) -> str:
    if not can_draw_curves():
        return "Not drawn: matplotlib is not installed; `pip install 'anomalysd-pipeline[evaluate]'`."
    parts = []
    for result in summary["results"]:
        shots = result["shots"]
        for seed in result["seeds"]:
            keys = [(shots, seed, category) for category in _categories(summary) if (shots, seed, category) in curves]
            title = f"{_setup(shots)}, seed {seed}"
            path = figures / f"curves_{re.sub(r'[^a-z0-9]+', '-', _setup(shots).lower())}.png"
            if draw_curves({key[2]: curves[key] for key in keys}, path, title):
                parts.append(_picture(f"Curves, {title}", path))
                break
    return "\n\n".join(parts) or "No curve is defined: each needs normal and defective pictures."


def _settings(summary: Mapping, beside: Sequence[Mapping]) -> str:
    systems = [summary, *beside]
    facts = [_flat({key: value for key, value in system["system"].items() if key != "name"}) for system in systems]
    rows = [[plain(key), *(fact.get(key, "") for fact in facts)] for key in dict.fromkeys(k for f in facts for k in f)]
    parts = [table(rows, ["System", *map(_name, systems)])] if rows else []
    protocol = {key: value for key, value in summary["protocol"].items() if key != "settings"}
    shared = _flat({**protocol, **(summary["protocol"].get("settings") or {})})
    parts.append(table([[plain(key), value] for key, value in shared.items()], ["Protocol", "Value"]))
    return "\n\n".join(parts)


def _flat(facts: Mapping, prefix: str = "") -> dict[str, str]:
    """Writes facts as cells; those of a nested mapping are named "outer.inner"."""
    cells = {}
    for key, value in facts.items():
        if isinstance(value, Mapping):
            cells.update(_flat(value, f"{prefix}{key}."))
        else:
            cells[f"{prefix}{key}"] = _value(value)
    return cells


def _value(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: UNDEFINED, True: "yes", False: "no"}[value]
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_value, value)) or UNDEFINED
    return plain(value)


def _cost(costs: Mapping) -> str:
    known = [key for key in (*_COSTS, *(key for key in costs if key not in _COSTS)) if costs.get(key) is not None]
    rows = []
    for key in known:
        value = costs[key]
        rows.append([_COSTS.get(key) or plain(key), f"{value:.3g}" if isinstance(value, float) else _value(value)])
    return table(rows, ["Cost", "Measured"]) if rows else "Not measured."


def _notes(summary: Mapping, more: Sequence[str]) -> str:
    protocol = summary["protocol"]
    resolution = protocol["resolution"]
    size = "the pictures' own size" if resolution == "original" else f"{resolution} px"
    notes = [
        f"Pixel metrics are over all pixels of a category's pictures together, at {size}. PRO is integrated up to a "
        f"false positive rate of {protocol['fpr_limit']:g} and divided by it; regions are "
        f"{protocol['connectivity']}-connected.",
        *_partial_means(summary),
        *_missing_masks(summary),
        *_undefined(summary),
        *more,
    ]
    return "\n".join(f"- {note}" for note in notes)


def _partial_means(summary: Mapping) -> list[str]:
    """Lists the means over some categories only, because their metric is undefined for others."""
    total, setups = len(_categories(summary)), {}
    for result in summary["results"]:
        names = {}
        for metric, name in METRICS.items():
            counted = sum(percent(stats.get(metric)) != UNDEFINED for stats in result["categories"].values())
            names.setdefault(counted, []).append(name)
        for counted, given in names.items():
            setups.setdefault((counted, tuple(given)), []).append(_setup(result["shots"]))
    return [
        f"{_list(shots)}: the means of {_list(names)} are over the {counted} of {total} categories that have them."
        for (counted, names), shots in setups.items()
        if 0 < counted < total
    ]


def _missing_masks(summary: Mapping) -> list[str]:
    counts = summary["dataset"]["categories"]
    without = [plain(name) for name, count in counts.items() if count["defective"] and not count["masks"]]
    notes = [f"No masks for {_list(without)}: image metrics only."] if without else []
    for name, count in counts.items():
        if 0 < count["masks"] < count["defective"]:
            notes.append(
                f"{plain(name)}: masks for only {count['masks']} of the {count['defective']} defective pictures."
            )
    return notes


def _undefined(summary: Mapping) -> list[str]:
    """Lists the undefined metrics by category and reason, other than missing masks."""
    counts, found = summary["dataset"]["categories"], {}
    for result in summary["results"]:
        seeds = result["seeds"]
        for category, stats in result["categories"].items():
            count = counts[category]
            for metric, name in METRICS.items():
                values = (stats.get(metric) or {}).get("values") or [None]
                missing = [i for i, value in enumerate(values) if not is_defined(value)]
                without_masks = metric.startswith("pixel") and count["defective"] and not count["masks"]
                if not missing or without_masks:
                    continue
                where = "" if len(missing) == len(values) else f" (seeds {_list([seeds[i] for i in missing])})"
                key = (category, metric.split("_")[0], where)
                found.setdefault(key, {}).setdefault(name, []).append(_setup(result["shots"]))
    notes = []
    for (category, level, where), names in found.items():
        setups = list(dict.fromkeys(setup for given in names.values() for setup in given))
        notes.append(
            f"{plain(category)}, {_list(setups)}{where}: {_list(list(names))} undefined, "
            f"{_reason(counts[category], level)}."
        )
    return notes


def _reason(count: Mapping, level: str) -> str:
    for kind in ("normal", "defective"):
        # Defective pictures have normal pixels too.
        if not count[kind] and (level == "image" or kind == "defective"):
            return f"one class only (no {kind} picture)"
    return "one class only (no defective or no normal pixel)" if level == "pixel" else "no score"
