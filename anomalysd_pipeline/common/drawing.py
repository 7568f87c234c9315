"""Drawings of results: heatmaps on a fixed scale, overlays, contours, figures and a verdict in words.

Colors depend on a value and the threshold alone, never on other pixels or pictures: 0 is coldest, the threshold is the
middle of the scale, and twice the threshold and more is hottest. So the map of a normal part stays calm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Evenly spaced from coldest to hottest. Cool up to the middle and warm from there on, so that the threshold shows.
_ANCHORS = np.array(
    [
        (13, 20, 66),
        (18, 48, 118),
        (20, 88, 158),
        (28, 136, 176),
        (104, 190, 160),
        (246, 221, 92),
        (251, 160, 46),
        (232, 88, 34),
        (186, 18, 30),
    ],
    dtype=np.float64,
)
UNCALIBRATED_MAXIMUM = 1.0
"""The map value drawn in the hottest color where there is no threshold; fixed, so that such heatmaps compare."""

_INK = (33, 37, 41)
_PAPER = (255, 255, 255)
_GAP = 8


def heatmap(anomaly_map: np.ndarray, threshold: float | None = None, maximum: float | None = None) -> Image.Image:
    """Colors a map on a fixed scale.

    Args:
        anomaly_map: [H, W], finite, 0 or more.
        threshold: above 0; drawn in the middle color, and its double in the hottest.
        maximum: above 0; without a threshold, the value drawn in the hottest color. Ignored with one.

    Returns:
        An RGB picture of W × H pixels.

    Raises:
        ValueError: if the map is not a finite [H, W] array, or neither `threshold` nor `maximum` is a finite number
            above 0.
    """
    return Image.fromarray(np.rint(_colors(_scaled(anomaly_map, threshold, maximum))).astype(np.uint8))


def overlay(
    image: Image.Image | np.ndarray,
    anomaly_map: np.ndarray,
    threshold: float | None = None,
    maximum: float | None = None,
    opacity: float = 0.5,
) -> Image.Image:
    """Lays the heatmap over a picture where values approach the threshold.

    Args:
        image: PIL picture, or HWC uint8 in [0, 255].
        anomaly_map: [H, W] of the picture's size.
        threshold: as for `heatmap`; the heat is invisible up to half of it and at full `opacity` from it on.
        maximum: as for `heatmap`; half of it then stands for the threshold.
        opacity: in [0, 1], of the heat where it is strongest.

    Returns:
        An RGB picture of the input's size.

    Raises:
        ValueError: as `heatmap`, and if sizes differ or `opacity` is out of range.
    """
    if not 0 <= opacity <= 1:
        raise ValueError(f"`opacity` must lie in [0, 1], but {opacity} was given.")
    pixels = _pixels(image)
    position = _scaled(anomaly_map, threshold, maximum)
    _check_same_size(pixels, position, "anomaly_map")
    hot = position > 0.25  # [H, W]; most of a large picture is not
    position = position[hot]  # [P]
    alpha = opacity * np.clip(position * 4 - 1, 0, 1)[:, None]  # [P, 1]: 0 at a quarter, full from the middle on
    pixels[hot] = np.rint((1 - alpha) * pixels[hot] + alpha * _colors(position)).astype(np.uint8)
    return Image.fromarray(pixels)


def contour(
    image: Image.Image | np.ndarray, pred_mask: np.ndarray, color: tuple[int, int, int] = (255, 70, 60), width: int = 2
) -> Image.Image:
    """Draws the outline of a predicted region: a bright line just inside it, a dark line around it.

    Args:
        image: PIL picture, or HWC uint8 in [0, 255].
        pred_mask: bool [H, W] of the picture's size.
        color: RGB in [0, 255] of the bright line.
        width: width of each of the two lines, in pixels, at least 1.

    Returns:
        An RGB picture of the input's size; unchanged where there is no region.

    Raises:
        ValueError: if sizes differ, the mask is not boolean, or `width` is below 1.
    """
    if width < 1:
        raise ValueError(f"`width` must be at least 1 pixel, but {width} was given.")
    pixels, mask = _pixels(image), np.asarray(pred_mask)
    if mask.ndim != 2 or mask.dtype != bool:
        raise ValueError(f"`pred_mask` must be bool [H, W], but {mask.dtype} of shape {mask.shape} was given.")
    _check_same_size(pixels, mask, "pred_mask")
    if not mask.any():
        return Image.fromarray(pixels)
    # Padding counts as outside, so that a region cut by the border keeps a closed outline.
    inner = mask & _dilated(~np.pad(mask, width), width)[width:-width, width:-width]
    pixels[_dilated(mask, width) & ~mask] = (15, 15, 20)
    pixels[inner] = color
    return Image.fromarray(pixels)


def marked(
    image: Image.Image | np.ndarray,
    anomaly_map: np.ndarray,
    threshold: float | None,
    pred_mask: np.ndarray | None,
) -> Image.Image:
    """Lays the heatmap over a picture, and outlines the defect; arguments as of `overlay` and `contour`."""
    if threshold is None:
        return overlay(image, anomaly_map, maximum=UNCALIBRATED_MAXIMUM)
    return contour(overlay(image, anomaly_map, threshold), pred_mask)


def montage(
    rows: Sequence[Sequence[Image.Image | None]],
    titles: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    cell: int = 192,
) -> Image.Image:
    """Draws pictures in a grid on white, with a title over each column and a label beside each row.

    Args:
        rows: lists of pictures, `None` for an empty place; shorter rows are filled up with empty places.
        titles: one text for each column.
        labels: one text for each row.
        cell: side in pixels of the square into which each picture is fitted, proportions kept; at least 32.

    Returns:
        An RGB picture.

    Raises:
        ValueError: if there is no row or no column, the number of titles or labels does not match, or `cell` is below
            32.
    """
    columns = max((len(row) for row in rows), default=0)
    if columns == 0:
        raise ValueError("`rows` must hold at least one row with one picture, but it is empty.")
    if titles is not None and len(titles) != columns:
        raise ValueError(
            f"`titles` must hold one text for each of the {columns} columns, but {len(titles)} were given."
        )
    if labels is not None and len(labels) != len(rows):
        raise ValueError(
            f"`labels` must hold one text for each of the {len(rows)} rows, but {len(labels)} were given."
        )
    if cell < 32:
        raise ValueError(f"`cell` must be at least 32 pixels, but {cell} was given.")

    font = ImageFont.load_default(size=max(10, cell // 12))
    line = math.ceil(sum(font.getmetrics()) * 1.1)
    headers = [_wrapped(title, font, cell) for title in titles or []]
    captions = [_wrapped(label, font, cell) for label in labels or []]
    header_height = max((len(header) for header in headers), default=0) * line + (_GAP if headers else 0)
    heights = [max(cell, line * len(captions[i])) if captions else cell for i in range(len(rows))]
    lines = [text for caption in captions for text in caption]
    left = math.ceil(max(map(font.getlength, lines))) + _GAP if lines else 0

    size = (left + columns * (cell + _GAP) + _GAP, header_height + sum(heights) + (len(rows) + 1) * _GAP)
    figure = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(figure)
    for column, header in enumerate(headers):
        x = left + _GAP + column * (cell + _GAP) + cell / 2
        # Headers of fewer lines sit on the pictures, not at the figure's top.
        top = _GAP + header_height - _GAP - len(header) * line
        for i, text in enumerate(header):
            draw.text((x, top + i * line), text, fill=_INK, font=font, anchor="ma")
    top = header_height + _GAP
    for i, row in enumerate(rows):
        if captions:
            start = top + (heights[i] - len(captions[i]) * line) / 2
            for j, text in enumerate(captions[i]):
                draw.text((_GAP, start + j * line), text, fill=_INK, font=font, anchor="la")
        for column, picture in enumerate(row):
            if picture is None:
                continue
            ratio = cell / max(picture.size)
            fitted = tuple(max(1, round(side * ratio)) for side in picture.size)
            x = left + _GAP + column * (cell + _GAP) + (cell - fitted[0]) // 2
            y = top + (heights[i] - fitted[1]) // 2
            figure.paste(picture.convert("RGB").resize(fitted, Image.Resampling.LANCZOS), (x, y))
        top += heights[i] + _GAP
    return figure


def verdict_text(score: float, threshold: float | None) -> str:
    """Puts an image score in words; a defect is likely where the score is above the threshold.

    Args:
        score: image score, finite.
        threshold: above 0, or `None` where the category is not calibrated.

    Raises:
        ValueError: if `threshold` is neither `None` nor a finite number above 0, or `score` is not finite.
    """
    if not math.isfinite(score):
        raise ValueError(f"`score` must be finite, but {score} was given.")
    if threshold is None:
        return f"Score {score:.3f} (not calibrated: no threshold yet)"
    _check_positive(threshold, "threshold")
    ratio = score / threshold
    # With one decimal, both sides of the threshold would read "1.0 × the threshold".
    times = f"{ratio:.2f}" if 0.95 <= ratio < 1.05 else f"{ratio:.1f}"
    return f"{'Defect likely' if score > threshold else 'Looks normal'}: {times} × the threshold"


def _check_positive(value: float, argument: str) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"`{argument}` must be a finite number above 0, but {value} was given.")


def _check_same_size(pixels: np.ndarray, values: np.ndarray, argument: str) -> None:
    if pixels.shape[:2] != values.shape:
        raise ValueError(
            f"`{argument}` must have the picture's size, height × width {pixels.shape[0]} × {pixels.shape[1]}, but "
            f"{values.shape[0]} × {values.shape[1]} was given."
        )


def _pixels(image: Image.Image | np.ndarray) -> np.ndarray:
    """Copies an image to writable RGB, HWC uint8."""
    if isinstance(image, Image.Image):
        return np.array(image.convert("RGB"))
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError("`image` must be a PIL picture or a uint8 array [H, W, 3].")
    return image.copy()


def _scaled(anomaly_map: np.ndarray, threshold: float | None, maximum: float | None) -> np.ndarray:
    """Finds the positions on the color scale, [H, W] in [0, 1]."""
    values = np.asarray(anomaly_map, dtype=np.float64)
    if values.ndim != 2 or not np.isfinite(values).all():
        raise ValueError(f"`anomaly_map` must be a finite array [H, W], but one of shape {values.shape} was given.")
    if threshold is not None:
        _check_positive(threshold, "threshold")
        return np.clip(values / (2 * threshold), 0, 1)
    if maximum is None:
        raise ValueError("`maximum` is required where `threshold` is None: the value to draw in the hottest color.")
    _check_positive(maximum, "maximum")
    return np.clip(values / maximum, 0, 1)


def _colors(position: np.ndarray) -> np.ndarray:
    """Maps [H, W] in [0, 1] to colors [H, W, 3] in [0, 255]."""
    stops = np.linspace(0, 1, len(_ANCHORS))
    return np.stack([np.interp(position, stops, channel) for channel in _ANCHORS.T], axis=-1)


def _dilated(mask: np.ndarray, radius: int) -> np.ndarray:
    """Dilates a mask by a square of side 2 radius + 1."""
    for axis in (0, 1):
        padded = np.pad(mask, [(radius, radius) if a == axis else (0, 0) for a in (0, 1)])
        windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * radius + 1, axis=axis)
        mask = windows.any(axis=-1)
    return mask


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    lines = []
    # Pillow's own font has no multiplication sign, which `verdict_text` writes.
    for paragraph in text.replace("×", "x").split("\n"):
        lines.append("")
        for word in paragraph.split():
            longer = f"{lines[-1]} {word}".strip()
            if lines[-1] and font.getlength(longer) > width:
                lines.append(word)
            else:
                lines[-1] = longer
    return lines
