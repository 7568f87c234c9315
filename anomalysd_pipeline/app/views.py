"""Contents of the page: results as HTML, and losses as tables.

Texts of visitors are escaped. Pictures are part of the HTML, so that none of them has an address.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
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


def heatmap(
    image: Image.Image,
    anomaly_map: np.ndarray,
    threshold: float | None,
    maximum: float | None = None,
    region: np.ndarray | None = None,
) -> str:
    """Shows the picture under its heatmap, and the outline of the predicted region.

    The page sets the opacity of the heatmap.

    Args:
        image: RGB, W x H.
        anomaly_map: float [H, W], 0 or more.
        threshold, maximum: ends of the color scale, see `drawing.heatmap`.
        region: bool [H, W], to be outlined; None: nothing.
    """
    from ..common.drawing import contour
    from ..common.drawing import heatmap as colored

    small = shrunk(image)
    values = np.asarray(Image.fromarray(np.asarray(anomaly_map, dtype=np.float32)).resize(small.size))
    top = 2 * threshold if threshold is not None else maximum
    # As in `drawing.overlay`: invisible up to a quarter of the scale, opaque from its middle on.
    alpha = np.clip(values / top * 4 - 1, 0, 1)
    heat = colored(values.clip(0), threshold, maximum)
    heat.putalpha(Image.fromarray(np.rint(alpha * 255).astype(np.uint8)))
    layers = f"<img src='{data_uri(small)}' alt='The inspected picture'>"
    layers += f"<img class='heat' src='{data_uri(heat)}' alt='Heatmap over the picture'>"
    if region is not None and region.any():
        blank = Image.new("RGB", small.size)
        # Shrunk in gray, so that a region narrower than a pixel of the page leaves a line.
        shrunken = np.asarray(Image.fromarray(region.astype(np.float32)).resize(small.size, Image.Resampling.BOX))
        line = np.asarray(contour(blank, shrunken > 0))
        edge = Image.fromarray(np.dstack([line, np.where(line.any(axis=2), 255, 0).astype(np.uint8)]))
        layers += f"<img src='{data_uri(edge)}' alt='Outline of the region above the threshold'>"
    ends = ("0", "threshold", "2 × or more") if threshold is not None else ("0", f"{top / 2:g}", f"{top:g} or more")
    legend = "".join(f"<span>{end}</span>" for end in ends)
    return (
        f"<figure class='heat-view'><div class='stack'>{layers}</div><figcaption><div class='colors' "
        f"aria-hidden='true'></div><div class='labels'>{legend}</div></figcaption></figure>"
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
    """Puts an estimated time in words, rounded as far as an estimate deserves."""
    if seconds < 60:
        return f"about {max(5, 5 * round(seconds / 5))} s left"
    return f"about {seconds / 60:.0f} min left" if seconds >= 180 else f"about {seconds / 60:.1f} min left"


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
        shown = "<div class='stack empty'><p>A good part with its middle repainted will appear here.</p></div>"
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
