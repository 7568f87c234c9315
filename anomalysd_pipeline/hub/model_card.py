"""Write the README.md of a published checkpoint."""

from __future__ import annotations

import html
import json
import math
import os
import pkgutil
import re
from collections.abc import Mapping, Sequence

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .. import EMBEDDED, __version__
from ..method.settings import InspectionSettings, checkpoint_settings

PLACEHOLDER = "path/to/this/folder"
"""Stands for the repository in the code of a card until it is known."""

EMBEDDED_NAME = "embedded"
KINDS = ("pipeline", "adaptation")
LICENSES = {
    EMBEDDED_NAME: "apache-2.0",
    "stable-diffusion-v1-5/stable-diffusion-inpainting": "creativeml-openrail-m",
    "runwayml/stable-diffusion-inpainting": "creativeml-openrail-m",
    "stabilityai/stable-diffusion-2-inpainting": "openrail++",
}
"""Licenses of well-known bases; checkpoints made from them must keep these."""

_TAGS = ["anomaly-detection", "anomaly-localization", "few-shot", "industrial-inspection", "inpainting", "anomalysd"]
_LEARNING = (
    "method",
    "steps",
    "epochs",
    "decoder_steps",
    "rank",
    "learning_rate",
    "mask_design",
    "prompt_design",
    "seed",
)
_METRIC_TYPES = {"AUROC": "roc_auc", "AUPR": "average_precision", "F1-max": "f1"}
_FIGURE_KEYS = {"category", "dataset", "metric", "value", "std", "shots", "seeds"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def hub_id(name: object) -> str | None:
    """Returns `name` if it reads as the id of a repository and not as a folder of this machine, else None."""
    return name if isinstance(name, str) and _HUB_ID.fullmatch(name) and not os.path.exists(name) else None


def base_of(facts: Mapping) -> str | None:
    """Finds the base that a checkpoint names: a Hub id, "embedded", or None where it is unknown."""
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
    """Writes a card with the Hub's metadata in front, from `template.md`.

    Names and prompts are people's own text: they are quoted for YAML and escaped for Markdown and HTML.

    Args:
        facts: the content of `model_index.json` (the pipeline's config) or of `adaptation.json`.
        kind: "pipeline" or "adaptation".
        repo_id: "user/name", for the code that loads it; None: a placeholder.
        figures: rows of a table of measurements: `metric` (such as "image AUROC") and `value`, with `dataset`,
            `category` or both, and if known `std`, `shots` and `seeds`.
        base_model: Hub id of the checkpoint it was made from, or "embedded"; None: the base that `facts` name.
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
    categories = dict(sorted((facts.get("categories") or {}).items()))
    card = ModelCard.from_template(
        data,
        template_str=template_text(),
        kind=kind,
        title=_plain(name),
        origin=_origin(base),
        adaptations=len(facts.get("adaptations") or {}),
        parts=_parts(categories, facts.get("prompts", {})),
        settings=_settings(facts, kind),
        figures=[_figure_cells(figure) for figure in figures],
        category=_quoted(next(iter(categories), "hex nut")),
        source=_quoted(repo_id or PLACEHOLDER),
        base="" if base == EMBEDDED_NAME else _quoted(base or "path/to/the/base"),
        calibrated=any(record.get("calibration") for record in categories.values()),
        embedded=base == EMBEDDED_NAME,
        version=__version__,
    )
    return str(card)


def template_text() -> str:
    """Reads the Jinja template of a card, from the package or from a pipeline.py that carries it."""
    return pkgutil.get_data(__package__, "template.md").decode()


def _plain(text: object) -> str:
    """Escapes text for Markdown and HTML, on a single line."""
    return re.sub(r"([\\`*_{}\[\]|~$])", r"\\\1", html.escape(" ".join(str(text).split()), quote=False))


def _quoted(text: str) -> str:
    """Writes text as a Python string."""
    return json.dumps(text, ensure_ascii=False)


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else _plain(value)


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


def _origin(base: str | None) -> str:
    """Names the base in Markdown, with a link where it is on the Hub."""
    if base == EMBEDDED_NAME:
        return "the embedded checkpoint of the package anomalysd-pipeline"
    return f"[{_plain(base)}](https://huggingface.co/{base})" if base else "a local checkpoint"


def _parts(categories: Mapping, prompts: Mapping) -> list[dict]:
    """Lists each part's name, shots, calibration and own prompts."""
    prompts = prompts.get("categories", prompts) if "generic" in prompts else prompts
    parts = []
    for category, record in categories.items():
        calibration = record.get("calibration")
        if calibration is not None:
            calibration = {
                "threshold": _number(calibration["threshold"]),
                "false_alarms": f"{100 * calibration['false_alarm_rate']:g} %",
                "pictures": calibration["pictures"],
                "held_out": calibration["held_out"],
            }
        levels = prompts.get(category, {})
        texts = [_plain(text) for level in ("coarse", "fine") for text in levels.get(level, [])]
        shots = _plain(record.get("shots", ""))
        parts.append({"name": _plain(category), "shots": shots, "calibration": calibration, "prompts": texts})
    return parts


def _settings(facts: Mapping, kind: str) -> list[tuple[str, str]]:
    """Lists the settings of an inspection, and those with which the adaptations were made."""
    rows = []
    if kind == "pipeline":
        preset = facts["default_preset"]
        overrides = facts["preset_overrides"].get(preset, {})
        chosen = InspectionSettings.resolve(preset, [{"guidance_scale": 1.0}, checkpoint_settings(facts), overrides])
        chosen = chosen.with_exemplars(facts["preset_overrides"])
        common = {"preset": preset, "resolution": f"{facts['resolution']} px", "rotations": facts["rotations"]}
        rows = [(f"`{key}`", value) for key, value in {**common, **chosen.to_dict()}.items()]
    own = {c: r["noise_strength"] for c, r in (facts.get("categories") or {}).items() if r.get("noise_strength")}
    rows += [(f"`noise_strength` of {_plain(category)}", value) for category, value in sorted(own.items())]
    learned = {facts["name"]: facts["record"]} if kind == "adaptation" else facts.get("adaptations") or {}
    for name, record in sorted(learned.items()):
        settings = record.get("settings", {})
        text = ", ".join(f"{key} {settings[key]}" for key in _LEARNING if settings.get(key) is not None)
        rows.append((f"adaptation {_plain(name)}", text))
    return [(key, _number(value)) for key, value in rows]


def _figure_cells(figure: Mapping) -> dict[str, str]:
    cells = {key: _plain(figure.get(key, "")) for key in ("dataset", "category", "metric", "shots")}
    seeds = figure.get("seeds", "")
    cells["seeds"] = _plain(", ".join(map(str, seeds)) if isinstance(seeds, (list, tuple)) else seeds)
    cells["value"] = f"{figure['value']:.3f}" + (f" ± {figure['std']:.3f}" if "std" in figure else "")
    return cells
