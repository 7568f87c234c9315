"""The one-page report of an inspection, as a picture and as a PDF."""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .. import __version__
from ..common.drawing import contour, heatmap, overlay, verdict_text

if TYPE_CHECKING:
    from ..inspection.result import Inspection

DPI = 150
PAGE = (1240, 1754)
"""A4 portrait at `DPI`."""
_MARGIN, _GAP = 90, 40
_INK, _FAINT, _LINE = (33, 37, 41), (108, 117, 125), (206, 212, 218)
_COLORS = {True: (176, 24, 36), False: (22, 110, 70), None: _FAINT}
_PICTURE_HEIGHT = 460


@dataclass(frozen=True)
class ReportFacts:
    """Holds the facts of a report besides the result.

    Attributes:
        part: name of the part.
        file: the visitor's name for the picture.
        model: words for the base, such as "embedded (small)".
        settings: settings of the inspection, `InspectionSettings.to_dict()` or any names and values.
        date: date as text; None: now, in UTC.
    """

    part: str
    file: str
    model: str
    settings: dict = field(default_factory=dict)
    date: str | None = None


def verdict_words(score: float, threshold: float | None) -> str:
    """Puts the verdict in words, such as "Defect likely: 2.3 × the threshold"."""
    return "No verdict: this part has no threshold yet" if threshold is None else verdict_text(score, threshold)


def gauge(score: float, threshold: float | None, width: int = 600, height: int = 60) -> Image.Image:
    """Draws the score on a scale from 0 to twice the threshold; without a threshold, an empty scale.

    Args:
        score: 0 or more; one beyond the scale stands at its end.
        threshold: above 0, or None.
        width, height: in pixels.

    Returns:
        An RGB picture on white.
    """
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    edge, top, bottom = height // 4, height // 3, 2 * height // 3
    if threshold is None:
        draw.rectangle((edge, top, width - edge - 1, bottom), fill=_LINE)
        return picture
    scale = np.linspace(0, 2 * threshold, width - 2 * edge)[None]
    picture.paste(heatmap(np.repeat(scale, bottom - top + 1, axis=0), threshold), (edge, top))
    draw.line((width // 2, height // 6, width // 2, 5 * height // 6), fill=_INK, width=max(2, height // 20))
    x = edge + (width - 2 * edge - 1) * min(1.0, score / (2 * threshold))
    draw.polygon([(x, top + height // 6), (x - edge + 2, 0), (x + edge - 2, 0)], fill=_INK, outline="white")
    return picture


def report(result: Inspection, facts: ReportFacts) -> Image.Image:
    """Draws the page: verdict, score, gauge, pictures (given, heatmap, contour, repainted), settings.

    Args:
        result: an `Inspection`, or an object with its attributes and `predicted`.
        facts: further facts.

    Returns:
        One page, A4 portrait at 150 dots per inch: RGB, 1240 x 1754 pixels.
    """
    page = Image.new("RGB", PAGE, "white")
    width = PAGE[0] - 2 * _MARGIN
    y = _write(page, "AnomalySD inspection report", _MARGIN, _MARGIN, 40, _INK, width)
    date = facts.date or datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    for name, value in (("Part", facts.part), ("Picture", facts.file), ("Date", date)):
        y = _write(page, f"{name}: {value}", _MARGIN, y + 6, 22, _FAINT, width)
    y = _rule(page, y + 24)
    verdict = verdict_words(result.score, result.threshold)
    y = _write(page, verdict, _MARGIN, y + 24, 38, _COLORS[result.is_defective], width)
    threshold = "none" if result.threshold is None else f"{result.threshold:.4g}"
    numbers = f"Score {result.score:.4g}      Threshold {threshold}"
    if result.threshold is not None:
        numbers += "      (scale below: 0 to 2 × the threshold)"
    y = _write(page, numbers, _MARGIN, y + 12, 22, _INK, width)
    page.paste(gauge(result.score, result.threshold, width), (_MARGIN, y + 12))
    y = _pictures(page, result, y + 96)
    y = _rule(page, y + 16)
    settings = {**facts.settings, "seconds": f"{result.seconds:.1f}"}
    _settings(page, settings, y + 16)
    foot = f"Model: {facts.model}      anomalysd-pipeline {__version__}"
    _write(page, foot, _MARGIN, PAGE[1] - _MARGIN, 20, _FAINT, width)
    return page


def report_png(page: Image.Image) -> bytes:
    """Encodes a report as a PNG with its size on paper."""
    data = io.BytesIO()
    page.save(data, "PNG", dpi=(DPI, DPI))
    return data.getvalue()


def report_pdf(page: Image.Image) -> bytes:
    """Encodes a report as a PDF of one page, A4."""
    data = io.BytesIO()
    page.save(data, "PDF", resolution=DPI, quality=92, title="AnomalySD inspection report")
    return data.getvalue()


def _pictures(page: Image.Image, result: Inspection, y: int) -> int:
    """Draws the four pictures in two rows from `y` on; returns the y where they end."""
    if result.threshold is None:
        from ..inspection.result import UNCALIBRATED_MAXIMUM

        heat = overlay(result.image, result.anomaly_map, maximum=UNCALIBRATED_MAXIMUM)
        outlined, outline = result.image, "Contour: none without a threshold"
    else:
        heat = overlay(result.image, result.anomaly_map, result.threshold)
        outlined = contour(result.image, result.predicted, width=max(2, result.image.width // 256))
        outline = "Contour of what lies above the threshold"
    width = (PAGE[0] - 2 * _MARGIN - _GAP) // 2
    cells = [
        (result.image, "Picture"),
        (heat, "Heatmap"),
        (outlined, outline),
        (result.inpainted, "The part as it should look"),
    ]
    for index, (picture, title) in enumerate(cells):
        x = _MARGIN + (index % 2) * (width + _GAP)
        top = y + (index // 2) * (_PICTURE_HEIGHT + 50)
        ratio = min(width / picture.width, _PICTURE_HEIGHT / picture.height)
        size = tuple(max(1, round(side * ratio)) for side in picture.size)
        page.paste(picture.resize(size, Image.Resampling.LANCZOS), (x, top))
        _write(page, title, x, top + size[1] + 6, 20, _FAINT, width)
    return y + 2 * (_PICTURE_HEIGHT + 50)


def _settings(page: Image.Image, settings: dict, y: int) -> None:
    """Writes names and values in three columns, as many as the page has room for."""
    width = (PAGE[0] - 2 * _MARGIN) // 3
    for index, (name, value) in enumerate(settings.items()):
        row, column = divmod(index, 3)
        top = y + row * 32
        if top + 32 > PAGE[1] - _MARGIN - 10:
            return
        text = f"{str(name).replace('_', ' ')}: {value}"
        _write(page, text, _MARGIN + column * width, top, 20, _INK, width - 16)


def _rule(page: Image.Image, y: int) -> int:
    ImageDraw.Draw(page).line((_MARGIN, y, PAGE[0] - _MARGIN, y), fill=_LINE, width=2)
    return y


def _write(page: Image.Image, text: str, x: int, y: int, size: int, color: tuple, width: int) -> int:
    """Writes a line, cut at `width` pixels; returns the y of the next line."""
    font = _font(size)
    text = "".join(_drawable(font, character) for character in text[:500])
    if font.getlength(text) > width:
        while text and font.getlength(text + "...") > width:
            text = text[:-1]
        text += "..."
    ImageDraw.Draw(page).text((x, y), text, fill=color, font=font, anchor="la")
    return y + round(size * 1.25)


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    try:
        # For names in other scripts, where the system has it.
        return ImageFont.truetype("DejaVuSans.ttf", size)
    except OSError:
        return ImageFont.load_default(size)


@functools.lru_cache(maxsize=4096)
def _drawable(font: ImageFont.FreeTypeFont, character: str) -> str:
    """Returns the character, or a stand-in where the font lacks it."""
    if character.isspace():
        return " "
    # A noncharacter, which no font has.
    if bytes(font.getmask(character)) != bytes(font.getmask("\uffff")):
        return character
    return "x" if character == "×" else "?"
