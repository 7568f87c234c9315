"""Draw the curves of an evaluation, and a montage of its best and worst cases.

The same input and versions of the libraries give the same bytes: files hold no time and no version.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ..common.drawing import contour, montage, overlay, verdict_text
from ..inspection.result import UNCALIBRATED_MAXIMUM

COLORS = (
    "#1f77b4",
    "#d62728",
    "#2ca02c",
    "#ff7f0e",
    "#9467bd",
    "#17becf",
    "#8c564b",
    "#e377c2",
    "#7f7f7f",
    "#bcbd22",
)
"""Colors of the lines, in turn; after the last they start over with another dash."""

_DASHES = ("-", "--", ":")
_DPI = 120
_PANEL = 3.6  # inches, a panel's side
_NAME_LENGTH = 26  # of a name in the legend
_CELL = 208  # pixels, the side of a picture in the montage
_CAPTION_LENGTH = 64

# Curve: title, horizontal axis, vertical axis.
_PANELS = {
    "image_roc": ("Image ROC", "false positive rate", "true positive rate"),
    "image_pr": ("Image PR", "recall", "precision"),
    "pixel_roc": ("Pixel ROC", "false positive rate", "true positive rate"),
    "pixel_pr": ("Pixel PR", "recall", "precision"),
    "pro": ("PRO", "false positive rate of the pixels", "mean overlap of the regions"),
}


def can_draw_curves() -> bool:
    """Tells whether matplotlib, needed by `draw_curves`, is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw_curves(curves: Mapping[str, Mapping[str, Sequence]], path: Path, title: str = "") -> Path | None:
    """Draws the curves of a draw, a line for each name and a panel for each kind of curve with points.

    Args:
        curves: name (a category) to its curves: "image_roc", "image_pr", "pixel_roc", "pixel_pr" and "pro", each
            [2, P], the horizontal values and the vertical ones, all in [0, 1]; missing or without points where
            undefined.
        path: of the PNG file; its folder exists.
        title: over the figure, such as the number of shots and the seed.

    Returns:
        `path`; None, and no file, where no curve has a point.

    Raises:
        ValueError: if matplotlib is missing, or a curve is not [2, P].
    """
    if not can_draw_curves():
        raise ValueError(
            "Curves are drawn with matplotlib, which is not installed; `pip install 'anomalysd-pipeline[evaluate]'`."
        )
    # Without pyplot, which would choose a backend and keep the figure for the whole process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    points = {
        kind: {name: _points(found[kind], name, kind) for name, found in curves.items() if kind in found}
        for kind in _PANELS
    }
    image_level = [kind for kind in ("image_roc", "image_pr") if _drawn(points[kind])]
    pixel_level = [kind for kind in ("pixel_roc", "pixel_pr", "pro") if _drawn(points[kind])]
    rows = [row for row in (image_level, pixel_level) if row]
    if not rows:
        return None
    # The names have a place of their own, at the end of the first row, where they hide no line.
    columns = max(len(rows[0]) + 1, *(len(row) for row in rows))
    figure = Figure(figsize=(columns * _PANEL, len(rows) * (_PANEL + 0.2) + 0.4), dpi=_DPI, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    grid = figure.add_gridspec(len(rows), columns)
    styles = {name: (COLORS[i % 10], _DASHES[i // 10 % 3]) for i, name in enumerate(curves)}
    for i, row in enumerate(rows):
        for j, kind in enumerate(row):
            _draw_panel(figure.add_subplot(grid[i, j]), kind, points[kind], styles)
    drawn = {name for lines in points.values() for name, line in lines.items() if line.size}
    names = {name: style for name, style in styles.items() if name in drawn}
    _draw_names(figure.add_subplot(grid[0, len(rows[0]) :]), names)
    figure.suptitle(_short(title, 100), fontsize=11, parse_math=False)
    with warnings.catch_warnings():
        # A name in a script that the font lacks is drawn as boxes, which needs no warning.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        canvas.print_png(path, metadata={"Software": None})
    return path


def draw_cases(cases: Sequence[Mapping], path: Path) -> Path:
    """Draws a row for each case: the picture, its true mask, and its heatmap with outlined defects.

    Heat has the fixed scale of `Inspection.overlay`, with the category's threshold in the middle. Without a threshold,
    the hottest color stands for the case's `maximum`.

    Args:
        cases: each with `category`, `image` (PIL), `mask` (bool [H, W], or None), `anomaly_map` ([h, w] of any size, 0
            or more), `score`, `threshold` (above 0, or None), `label` (true for defective), `caption` and, if wanted,
            `maximum` (above 0, the same for all of a category's cases; default: that of uncalibrated heatmaps
            elsewhere).
        path: of the PNG file; its folder exists.

    Returns:
        `path`.

    Raises:
        ValueError: if there is no case, or for a map, threshold or score that `common.drawing` refuses.
    """
    if not cases:
        raise ValueError("`cases` must hold at least one case, but it is empty.")
    rows = [[_fitted(case["image"]), _truth(case), _heat(case)] for case in cases]
    figure = montage(rows, ["picture", "true defect", "heatmap"], [_case_label(case) for case in cases], cell=_CELL)
    figure.save(path)
    return path


def best_and_worst(rows: Sequence[Mapping], count: int) -> dict[str, list[int]]:
    """Chooses the pictures to show: defects that stand out most and least, and the oddest normal parts.

    To compare categories with different scales, a score is taken as its distance from the median of the normal
    pictures of its category, in their standard deviations. If these do not spread, the deviation of all scores of the
    category is taken; if a category has no normal picture, median and deviation are those of all its scores. No
    picture is chosen twice, and pictures without a score are left out.

    Args:
        rows: per picture `category`, `label` (true for defective) and `score` (None where it failed).
        count: of pictures of each kind, at least 1.

    Returns:
        Indices into `rows`: "found", the defective pictures that stand out, the most first; "missed", those that stand
        out least, the least first; "false_alarms", the normal pictures that stand out, the most first.

    Raises:
        ValueError: if `count` is below 1, or a score is not finite.
    """
    if count < 1:
        raise ValueError(f"`count` must be at least 1, but {count} was given.")
    scored = [i for i, row in enumerate(rows) if row["score"] is not None]
    for i in scored:
        if not math.isfinite(rows[i]["score"]):
            raise ValueError(f"`rows` must hold finite scores, but {rows[i]['score']} was given in row {i}.")
    distance = {}
    for category in dict.fromkeys(rows[i]["category"] for i in scored):
        members = [i for i in scored if rows[i]["category"] == category]
        distance.update(zip(members, _distances([rows[i] for i in members]), strict=True))
    order = sorted(scored, key=lambda i: (-distance[i], i))
    defective = [i for i in order if rows[i]["label"]]
    found = defective[: min(count, (len(defective) + 1) // 2)]
    missed = defective[len(found) :][-count:][::-1]
    return {"found": found, "missed": missed, "false_alarms": [i for i in order if not rows[i]["label"]][:count]}


def _distances(rows: Sequence[Mapping]) -> np.ndarray:
    scores = np.array([row["score"] for row in rows], dtype=np.float64)
    normal = scores[[not row["label"] for row in rows]]
    reference = normal if normal.size else scores
    spread = reference.std() or scores.std() or 1.0
    return (scores - np.median(reference)) / spread


def _points(curve: Sequence, name: str, kind: str) -> np.ndarray:
    points = np.asarray(curve, dtype=np.float64)
    if points.size == 0:
        return np.empty((2, 0))
    if points.ndim != 2 or points.shape[0] != 2:
        raise ValueError(
            f"`curves` must be [2, P] each, but '{kind}' of '{name}' has the shape {list(points.shape)}; give the "
            "horizontal values and then the vertical ones."
        )
    return points


def _drawn(lines: Mapping[str, np.ndarray]) -> bool:
    return any(points.size for points in lines.values())


def _draw_panel(axes, kind: str, lines: Mapping[str, np.ndarray], styles: Mapping[str, tuple[str, str]]) -> None:
    title, horizontal, vertical = _PANELS[kind]
    for name, points in lines.items():
        color, dash = styles[name]
        # Lines at the frame, where good curves run, stay whole.
        axes.plot(*points, color=color, linestyle=dash, linewidth=1.6, clip_on=False, zorder=3)
    right = max(points[0].max() for points in lines.values() if points.size) if kind == "pro" else 1.0
    if horizontal == "false positive rate":
        axes.plot([0, 1], [0, 1], color="#b0b0b0", linestyle=":", linewidth=1)
    axes.set(xlim=(0, right or 1.0), ylim=(0, 1))
    axes.set_xlabel(horizontal, fontsize=9)
    axes.set_ylabel(vertical, fontsize=9)
    axes.set_title(title, fontsize=10)
    axes.set_box_aspect(1)
    axes.tick_params(labelsize=8)
    axes.grid(color="#e6e6e6", linewidth=0.6)


def _draw_names(axes, styles: Mapping[str, tuple[str, str]]) -> None:
    from matplotlib.lines import Line2D

    axes.set_axis_off()
    lines = [Line2D([], [], color=color, linestyle=dash, linewidth=1.8) for color, dash in styles.values()]
    legend = axes.legend(
        lines,
        [_short(name, _NAME_LENGTH) for name in styles],
        loc="upper left",
        fontsize=9 if len(styles) <= 14 else 7,
        ncols=1 if len(styles) <= 18 else 2,
        frameon=False,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def _short(text: str, length: int) -> str:
    text = " ".join(str(text).split())
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _fitted(image: Image.Image, resampling: Image.Resampling = Image.Resampling.LANCZOS) -> Image.Image:
    """Copies a picture at the size of a montage's cell."""
    image, ratio = image.convert("RGB"), _CELL / max(image.size)
    return image.resize([max(1, round(side * ratio)) for side in image.size], resampling)


def _truth(case: Mapping) -> Image.Image | None:
    """Draws the true mask in white on black; None for a defective picture without a mask."""
    if case["mask"] is None:
        return None if case["label"] else Image.new("RGB", _fitted(case["image"]).size)
    return _fitted(Image.fromarray(np.asarray(case["mask"], dtype=bool)), Image.Resampling.BOX)


def _heat(case: Mapping) -> Image.Image:
    small, values = _fitted(case["image"]), np.asarray(case["anomaly_map"], dtype=np.float32)
    if values.ndim != 2:
        raise ValueError(f"`cases` must hold maps [h, w], but one of shape {list(values.shape)} was given.")
    resized = np.asarray(Image.fromarray(values).resize(small.size, Image.Resampling.BILINEAR))
    if case["threshold"] is None:
        return overlay(small, resized, maximum=case.get("maximum") or UNCALIBRATED_MAXIMUM)
    # Compared with the threshold at the map's own size, so that the smallest spot keeps its outline. Nothing is marked
    # in a picture that is normal as a whole.
    above = (values > case["threshold"]) & (case["score"] > case["threshold"])
    above = Image.fromarray(above.astype(np.float32))
    above = np.asarray(above.resize(small.size, Image.Resampling.BOX)) > 0
    return contour(overlay(small, resized, case["threshold"]), above, width=1)


def _case_label(case: Mapping) -> str:
    truth = "Defective" if case["label"] else "Normal"
    if case["label"] and case["mask"] is None:
        truth += ", no mask"
    lines = [case["caption"], f"{truth}.", verdict_text(case["score"], case["threshold"])]
    if case["category"] not in case["caption"]:
        lines.insert(0, case["category"])
    return "\n".join(_short(line, _CAPTION_LENGTH) for line in lines)
