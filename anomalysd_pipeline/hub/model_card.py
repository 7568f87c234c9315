"""The README.md of a published checkpoint: what is in it, what was measured, how to load it, and what it cannot do."""

from __future__ import annotations

import html
import json
import math
import os
import re
from collections.abc import Mapping, Sequence

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .. import EMBEDDED, __version__
from ..method.settings import InspectionSettings, checkpoint_settings

PLACEHOLDER = "path/to/this/folder"
"""Stands in the code of a card where no repository is known yet."""

EMBEDDED_NAME = "embedded"
KINDS = ("pipeline", "adaptation")
LICENSES = {
    EMBEDDED_NAME: "apache-2.0",
    "stable-diffusion-v1-5/stable-diffusion-inpainting": "creativeml-openrail-m",
    "runwayml/stable-diffusion-inpainting": "creativeml-openrail-m",
    "stabilityai/stable-diffusion-2-inpainting": "openrail++",
}
"""Licenses of well-known bases, which what is made from them must keep."""

_TAGS = ["anomaly-detection", "anomaly-localization", "few-shot", "industrial-inspection", "inpainting", "anomalysd"]
_METRIC_TYPES = {"AUROC": "roc_auc", "AUPR": "average_precision", "F1-max": "f1"}
_FIGURE_KEYS = {"category", "dataset", "metric", "value", "std", "shots", "seeds"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def hub_id(name: object) -> str | None:
    """`name` if it reads as the id of a repository and not as a folder of this machine, else None."""
    return name if isinstance(name, str) and _HUB_ID.fullmatch(name) and not os.path.exists(name) else None


def base_of(facts: Mapping) -> str | None:
    """The base that a checkpoint names: a Hub id, "embedded", or None where it is unknown."""
    name = facts.get("base_model", facts.get("_name_or_path"))
    return EMBEDDED_NAME if name in (EMBEDDED, EMBEDDED_NAME) else hub_id(name)


def model_card(
    facts: Mapping,
    kind: str,
    repo_id: str | None = None,
    figures: Sequence[Mapping] | None = None,
    base_model: str | None = None,
    license: str | None = None,
) -> str:
    """Writes a card with the Hub's metadata in front.

    Names and prompts are people's own text: they are quoted for YAML and escaped for Markdown and HTML.

    Args:
        facts: the content of `model_index.json` (the pipeline's config) or of `adaptation.json`.
        kind: "pipeline" or "adaptation": which of the two.
        repo_id: where it will be, for the code that loads it; None: a placeholder.
        figures: what was measured, one row each: `metric` (such as "image AUROC") and `value`, with `dataset`,
            `category` or both, and if known `std`, `shots` and `seeds`.
        base_model: Hub id of the checkpoint it was made from, or "embedded"; None: what `facts` say.
        license: a license identifier of the Hub; None: that of a well-known base (`LICENSES`), else "other".

    Returns:
        Markdown.

    Raises:
        ValueError: for an unknown kind or a bad row in `figures`.
    """
    if kind not in KINDS:
        raise ValueError(f"`kind` must be one of {', '.join(map(repr, KINDS))}, got {kind!r}.")
    figures = [_check_figure(figure) for figure in figures or []]
    base = base_model or base_of(facts)
    name = (repo_id or "anomalysd").split("/")[-1]
    data = ModelCardData(
        license=license or LICENSES.get(base, "other"),
        library_name="diffusers",
        pipeline_tag="image-segmentation",
        base_model=hub_id(base),
        base_model_relation="adapter" if kind == "adaptation" and hub_id(base) else None,
        tags=_TAGS + (["lora"] if kind == "adaptation" else []),
        metrics=sorted({_metric_type(figure["metric"]) for figure in figures}) or None,
        model_name=name if figures else None,
        eval_results=[_eval_result(figure) for figure in figures] or None,
    )
    sections = [
        f"# {_plain(name)}",
        _introduction(facts, kind, base),
        f"## Parts it knows\n\n{_categories(facts)}",
        f"## Settings\n\n{_settings(facts, kind)}",
        f"## Measured\n\n{_measured(figures)}",
        f"## How to load it\n\n{_loading(facts, kind, repo_id or PLACEHOLDER, base)}",
        f"## Limits\n\n{_limits(facts, base)}",
        f"Made by anomalysd-pipeline {__version__}, after *AnomalySD: Few-Shot Multi-Class Anomaly Detection with "
        "Stable Diffusion Model* ([arXiv 2408.01960](https://arxiv.org/abs/2408.01960)).",
    ]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"))


def _plain(text: object) -> str:
    """Text that Markdown and HTML show as it is, on one line."""
    return re.sub(r"([\\`*_{}\[\]|~$])", r"\\\1", html.escape(" ".join(str(text).split()), quote=False))


def _quoted(text: str) -> str:
    """A Python string."""
    return json.dumps(text, ensure_ascii=False)


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else _plain(value)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _check_figure(figure: Mapping) -> Mapping:
    fits = isinstance(figure, Mapping) and set(figure) <= _FIGURE_KEYS and isinstance(figure.get("metric"), str)
    if fits:
        numbers = (figure.get("value"), figure.get("std", 0.0))
        fits = all(isinstance(number, (int, float)) and math.isfinite(number) for number in numbers)
    if not fits or not (figure.get("dataset") or figure.get("category")):
        raise ValueError(
            "`figures` must hold a `metric`, a finite `value`, and a `dataset` or `category` in each row, and besides "
            f"them only `std`, `shots` and `seeds`, got {figure!r}."
        )
    return figure


def _metric_type(metric: str) -> str:
    return next((t for word, t in _METRIC_TYPES.items() if word in metric), re.sub(r"\W+", "_", metric).lower())


def _eval_result(figure: Mapping) -> EvalResult:
    dataset = ", ".join(str(figure[key]) for key in ("dataset", "category") if figure.get(key))
    return EvalResult(
        task_type="image-segmentation",
        task_name="anomaly detection",
        dataset_type=re.sub(r"[^a-z0-9]+", "-", str(figure.get("dataset") or figure["category"]).lower()).strip("-")
        or "own",
        dataset_name=dataset,
        metric_type=_metric_type(figure["metric"]),
        metric_name=figure["metric"],
        metric_value=figure["value"],
    )


def _introduction(facts: Mapping, kind: str, base: str | None) -> str:
    made = {EMBEDDED_NAME: "the embedded checkpoint of the package anomalysd-pipeline", None: "a local checkpoint"}
    origin = made[base] if base in made else f"[{_plain(base)}](https://huggingface.co/{base})"
    what = (
        "Finds defects on industrial parts: the part is repainted as a good one would look, and where the picture and "
        "its repainted self differ, a defect is likely. It gives each picture a score, a map, and where a threshold "
        "is set, a verdict."
    )
    if kind == "adaptation":
        return (
            f"{what}\n\nThis is an adaptation of {origin}: low-rank weights, the features of the normal pictures, "
            "prompts and thresholds. It holds no base weights and works with that base alone."
        )
    learned = facts.get("adaptations") or {}
    also = f" It holds {len(learned)} fine-tuned adaptation{'s'[: len(learned) != 1]}." if learned else ""
    return f"{what}\n\nThis is a whole pipeline, made from {origin}.{also}"


def _categories(facts: Mapping) -> str:
    categories = facts.get("categories") or {}
    if not categories:
        return "None yet: it inspects any part by name, without normal pictures, and gives scores but no verdicts."
    rows, prompts = [], []
    own_prompts = facts.get("prompts", {})
    own_prompts = own_prompts.get("categories", own_prompts) if "generic" in own_prompts else own_prompts
    for category, record in sorted(categories.items()):
        calibration = record.get("calibration")
        if calibration is None:
            threshold = ["not calibrated", "", ""]
        else:
            held_out = ", each scored without itself" if calibration["held_out"] else ""
            threshold = [
                _number(calibration["threshold"]),
                f"{100 * calibration['false_alarm_rate']:g} %",
                f"{calibration['pictures']} normal picture{'s'[: calibration['pictures'] != 1]}{held_out}",
            ]
        rows.append([_plain(category), str(record.get("shots", "")), *threshold])
        levels = own_prompts.get(category, {})
        texts = " · ".join(_plain(text) for level in ("coarse", "fine") for text in levels.get(level, []))
        if texts:
            prompts.append(f"- **{_plain(category)}**: {texts}")
    table = _table(["part", "shots", "threshold", "expected false alarms", "threshold set from"], rows)
    return "\n\n".join(filter(None, [table, "Prompts:" if prompts else "", "\n".join(prompts)]))


def _settings(facts: Mapping, kind: str) -> str:
    """Those of an inspection, and those with which the adaptations were made."""
    rows = []
    if kind == "pipeline":
        preset = facts["default_preset"]
        overrides = facts["preset_overrides"].get(preset, {})
        chosen = InspectionSettings.resolve(preset, [{"guidance_scale": 1.0}, checkpoint_settings(facts), overrides])
        common = {"preset": preset, "resolution": f"{facts['resolution']} px", "rotations": facts["rotations"]}
        rows = [[f"`{key}`", value] for key, value in {**common, **chosen.to_dict()}.items()]
    own = {c: r["noise_strength"] for c, r in (facts.get("categories") or {}).items() if r.get("noise_strength")}
    rows += [[f"`noise_strength` of {_plain(category)}", value] for category, value in sorted(own.items())]
    learned = facts.get("adaptations") or {}
    if kind == "adaptation":
        learned = {facts["name"]: facts["record"]}
    for name, record in sorted(learned.items()):
        settings = record.get("settings", {})
        shown = ("method", "steps", "epochs", "decoder_steps", "rank", "learning_rate", "mask_design", "prompt_design")
        text = ", ".join(f"{key} {settings[key]}" for key in (*shown, "seed") if settings.get(key) is not None)
        rows.append([f"adaptation {_plain(name)}", text])
    if not rows:
        return "Those of the base."
    return _table(["setting", "value"], [[key, _number(value)] for key, value in rows])


def _measured(figures: Sequence[Mapping]) -> str:
    if not figures:
        return "Nothing was measured for this checkpoint."
    rows = []
    for figure in figures:
        seeds = figure.get("seeds", "")
        rows.append(
            [
                *(_plain(figure.get(key, "")) for key in ("dataset", "category", "metric")),
                f"{figure['value']:.3f}" + (f" ± {figure['std']:.3f}" if "std" in figure else ""),
                _plain(figure.get("shots", "")),
                _plain(", ".join(map(str, seeds)) if isinstance(seeds, (list, tuple)) else seeds),
            ]
        )
    return _table(["dataset", "part", "metric", "value", "shots", "seeds"], rows)


def _loading(facts: Mapping, kind: str, source: str, base: str | None) -> str:
    category = next(iter(sorted(facts.get("categories") or {})), "hex nut")
    use = (
        f'out = pipe("part.png", category={_quoted(category)})\n'
        "print(out.pred_scores[0], out.pred_labels[0], out.thresholds[0])  # score, verdict, threshold\n"
        "out.anomaly_maps[0]  # float32 [H, W], at the picture's own size"
    )
    start = "from anomalysd_pipeline import AnomalySDPipeline\n\n"
    if kind == "adaptation":
        argument = "" if base == EMBEDDED_NAME else _quoted(base or "path/to/the/base")
        load = f"pipe = AnomalySDPipeline.from_pretrained({argument})\npipe.load_adaptation({_quoted(source)})"
        return f"With the package anomalysd-pipeline:\n\n```python\n{start}{load}\n{use}\n```"
    needed = "accelerate 'diffusers>=0.42' scipy timm torch torchvision transformers"
    needed += " peft" if facts.get("adaptations") else ""
    return (
        f"With the package anomalysd-pipeline:\n\n```python\n{start}"
        f"pipe = AnomalySDPipeline.from_pretrained({_quoted(source)})\n{use}\n```\n\n"
        f"Without it, after `pip install {needed}`:\n\n```python\nfrom diffusers import DiffusionPipeline\n\n"
        f"source = {_quoted(source)}\n"
        "pipe = DiffusionPipeline.from_pretrained(source, custom_pipeline=source, trust_remote_code=True)\n"
        f"{use}\n```\n\n"
        "`trust_remote_code=True` runs `pipeline.py` from this repository: read it first. It inspects, adds parts and "
        "calibrates; fine-tuning and publishing need the package."
    )


def _limits(facts: Mapping, base: str | None) -> str:
    calibrated = any(record.get("calibration") for record in (facts.get("categories") or {}).values())
    limits = [
        "Pictures must look like the normal ones it was shown: the same camera, distance, light and background.",
        "Defects that the repainting keeps, because they are faint, smaller than a cell of the latent grid, or look "
        "like a normal variation, are missed; so are errors of logic, such as a correct part in a wrong place.",
    ]
    if calibrated:
        limits += [
            "Thresholds come from good parts alone. They bound false alarms, roughly where there were few pictures, "
            "and say nothing of the share of defects that is found.",
            "A threshold holds for the settings it was set with; with others there is a score but no verdict.",
        ]
    if not (facts.get("categories") and calibrated):
        limits.append("Parts without a threshold get scores and maps but no verdict.")
    if base == EMBEDDED_NAME:
        limits.append(
            "The base is a small model for 256 px, trained on drawn parts: it shows the method, not its accuracy."
        )
    limits.append("Do not let it be the only check where a missed defect can hurt someone.")
    return "\n".join(f"- {limit}" for limit in limits)
