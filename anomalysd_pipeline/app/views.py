"""Contents of the page: results as HTML, and losses as tables.

Texts of visitors are escaped. Pictures are part of the HTML, so that none of them has an address.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    import pandas as pd

    from .lessons import LessonState
    from .model import ModelFacts

SHOWN = 768
"""Longest side in pixels of a picture on the page; files to take home keep the full size."""

STAGES = {
    "waiting": "Waiting for a turn",
    "preparing": "Reading the pictures",
    "denoiser": "Learning to repaint (denoiser)",
    "decoder": "Learning to draw (decoder)",
    "calibrating": "Setting the threshold",
    "done": "Done",
}
_SMOOTHING, _POINTS = 0.85, 200


def verdict(sentence: str, is_defective: bool | None, note: str = "") -> str:
    """Shows the verdict in words, colored by the verdict."""
    kind = {True: "defective", False: "normal", None: "open"}[is_defective]
    sign = {True: "▲", False: "✓", None: "○"}[is_defective]
    text = f"<p class='note'>{html.escape(note)}</p>" if note else ""
    return (
        f"<div class='verdict {kind}' role='status' aria-live='polite'><p class='words'>"
        f"<span aria-hidden='true'>{sign}</span> {html.escape(sentence)}</p>{text}</div>"
    )


def depth_note(bit_depth: int | None) -> str:
    """Tells at how many bits 16-bit gray was read where a largest value may mislead; "" elsewhere."""
    if bit_depth is None or bit_depth in (8, 16):
        return ""
    return f" Its 16-bit gray was read as {bit_depth} bits; if the camera has others, teach it again with its depth."


def verdict_at(score: float, threshold: float, note: str = "") -> str:
    """Shows the verdict that a score has at a threshold."""
    from .report import verdict_words

    return verdict(verdict_words(score, threshold), score > threshold, note)


def fault(text: str) -> str:
    """Shows what is wrong with a field."""
    return f"<p class='fault' role='alert'><span aria-hidden='true'>▲</span> {html.escape(text)}</p>"


def waiting(text: str) -> str:
    """Shows a text in the place of a later verdict."""
    return (
        f"<div class='verdict empty' role='status' aria-live='polite'><p class='words'>{html.escape(text)}</p></div>"
    )


def gauge(score: float | None = None, threshold: float | None = None) -> str:
    """Shows the score on a scale from 0 to twice the threshold, with the threshold in its middle."""
    if score is None:
        words, values, place = "No score yet", "Score –", None
    elif threshold is None:
        words = f"Score {score:.3f}; no threshold"
        values, place = f"Score {score:.3f}", None
    else:
        words = f"Score {score:.3f}, threshold {threshold:.3f}; the scale ends at twice the threshold"
        values, place = f"Score {score:.3f} · threshold {threshold:.3f}", min(100.0, 50 * score / threshold)
    needle = "" if place is None else f"<span class='needle' style='left:{place:.2f}%'></span>"
    labels = "" if threshold is None else "<span>0</span><span>threshold</span><span>2 × or more</span>"
    mark = "" if threshold is None else "<span class='mark'></span>"
    scale = "scale" if threshold is not None else "scale blank"
    return (
        f"<div class='gauge' role='img' aria-label='{html.escape(words)}'><div class='{scale}'>{mark}{needle}</div>"
        f"<div class='labels' aria-hidden='true'>{labels}</div><div class='values'>{html.escape(values)}</div></div>"
    )


def no_heatmap(text: str = "The heatmap will appear here.") -> str:
    """Shows a text in the place of a later heatmap, at the same height."""
    return (
        f"<figure class='heat-view'><div class='stack empty'><p>{html.escape(text)}</p></div><figcaption>"
        "<div class='colors' aria-hidden='true'></div><div class='labels'><span>0</span><span>threshold</span>"
        "<span>2 × or more</span></div></figcaption></figure>"
    )


def progress(state: LessonState | None = None, text: str = "") -> str:
    """Shows the progress of a teaching, or a text where nothing is known of it."""
    if state is None:
        return bar(0.0, text or "Nothing is being taught.")
    words = STAGES[state.stage]
    if state.stage in ("denoiser", "decoder"):
        words += f", step {state.step} of {state.steps}"
    if state.seconds_left and state.stage != "done":
        words += f" · {time_left(state.seconds_left)}"
    return bar(state.share, words)


def bar(share: float, words: str) -> str:
    """Shows a progress bar and words under it."""
    percent = round(100 * share)
    return (
        f"<div class='progress'><div class='track' role='progressbar' aria-valuemin='0' aria-valuemax='100' "
        f"aria-valuenow='{percent}' aria-label='Progress'><div class='done' style='width:{percent}%'></div></div>"
        f"<p role='status' aria-live='polite'>{html.escape(words)}</p></div>"
    )


def time_left(seconds: float) -> str:
    """Puts an estimated time in words."""
    return f"{about(seconds)} left"


def about(seconds: float) -> str:
    """Puts an estimated time in words, rounded as far as an estimate deserves."""
    if seconds < 58:
        return f"about {max(5, 5 * round(seconds / 5))} s"
    if seconds < 3600:
        return f"about {seconds / 60:.0f} min" if seconds >= 180 else f"about {seconds / 60:.1f} min"
    return f"about {seconds / 3600:.1f} h"


def thumbnails(shown: Sequence[tuple[str, Image.Image | None, str]], more: int = 0) -> str:
    """Shows small pictures in a row, each with its name.

    Args:
        shown: name, picture and fault of each; the picture is None where there is a fault.
        more: number of further ones that are not shown.
    """
    cells = []
    for name, picture, fault in shown:
        text, hint = html.escape(name), html.escape(fault or name, quote=True)
        drawn = f"<img src='{data_uri(picture)}' alt=''>" if picture is not None else "<span class='none'>▲</span>"
        cells.append(f"<figure title='{hint}'{' class=bad' if fault else ''}>{drawn}<figcaption>{text}</figcaption>")
    tail = f"<p>and {more} more</p>" if more else ""
    return f"<div class='thumbnails'>{'</figure>'.join([*cells, ''])}{tail}</div>" if cells else ""


def loss_curve(losses: Sequence[float]) -> pd.DataFrame:
    """Makes the table that a plot of a stage's loss shows.

    Args:
        losses: the loss of each step, in order.

    Returns:
        Columns "step", from 1 on, and "loss", an exponential mean that starts without a lag; at most about 200 rows.
    """
    import pandas as pd

    mean = total = 0.0
    smooth = []
    for value in losses:
        mean, total = _SMOOTHING * mean + (1 - _SMOOTHING) * value, _SMOOTHING * total + 1 - _SMOOTHING
        smooth.append(mean / total)
    stride = max(1, len(losses) // _POINTS)
    return pd.DataFrame({"step": range(1, len(losses) + 1, stride), "loss": smooth[::stride]})


def validation(picture: Image.Image | None = None) -> str:
    """Shows the latest validation picture."""
    if picture is None:
        told = "While fine-tuning, a good part with its middle repainted appears here."
        shown = f"<div class='stack empty'><p>{told}</p></div>"
    else:
        alt = "A good part, and beside it the same with its middle repainted"
        shown = f"<div class='stack'><img src='{data_uri(picture)}' alt='{alt}'></div>"
    return f"<figure class='validation'>{shown}<figcaption>Good part · its middle repainted</figcaption></figure>"


def model_card(facts: ModelFacts, is_embedded: bool) -> str:
    """Shows the facts of a base: its state, device, resolution and size."""
    state = {
        "ready": "Loaded",
        "loading": "Loading …",
        "not loaded": "Loaded at first use",
        "failed": facts.error or "Could not be loaded",
    }[facts.state]
    rows = {"Base": facts.title, "State": state, "Device": facts.device or "–"}
    rows["Works at"] = f"{facts.resolution} × {facts.resolution} pixels" if facts.resolution else "–"
    rows["Size"] = f"{facts.parameters / 1e6:.0f} million weights" if facts.parameters else "–"
    cells = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in rows.items())
    return f"<dl class='facts' aria-live='polite'>{cells}</dl>"


def shrunk(image: Image.Image, side: int = SHOWN) -> Image.Image:
    """Scales a picture down to at most `side` pixels a side, as RGB, proportions kept."""
    if max(image.size) <= side:
        return image.convert("RGB")
    ratio = side / max(image.size)
    size = tuple(max(1, round(length * ratio)) for length in image.size)
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS, reducing_gap=2)


def data_uri(image: Image.Image) -> str:
    """Encodes a picture as an address that holds the picture itself."""
    data = io.BytesIO()
    image.save(data, "WEBP", quality=88, method=2)
    return f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"
