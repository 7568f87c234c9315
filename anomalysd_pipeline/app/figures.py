"""Pictures beside a result: the masks, and the picture against its repainted self."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from . import views

_TEAL = (45, 212, 191)


def compared(result, folder: Path) -> tuple[str, str]:
    """Writes the picture and its repainted self into a folder; returns both paths."""
    pair = []
    for name, image in (("picture", result.image), ("repainted", result.inpainted)):
        path = folder / f"{name}.webp"
        views.shrunk(image).save(path, quality=90, method=2)
        pair.append(str(path))
    return tuple(pair)


def masks(image: Image.Image, scales, proposed: np.ndarray | None, predicted: np.ndarray | None, folder: Path):
    """Draws the cells, and the proposed and the predicted region, as light on the darkened picture.

    Args:
        image: RGB, W x H.
        scales: the multi-scale masks; none: no cells are drawn.
        proposed, predicted: bool [H, W], or None where there is none to be told of.
        folder: where the pictures are written.

    Returns:
        Path and caption of each.
    """
    drawn = {"Multi-scale cells": grid(image, scales)} if scales else {}
    for title, region in (("By the prototypes", proposed), ("Above the threshold", predicted)):
        if region is not None:
            drawn[title if region.any() else f"{title}: nothing"] = lit(image, region)
    shown = []
    for number, (title, picture) in enumerate(drawn.items()):
        path = folder / f"mask_{number}.webp"
        picture.save(path, quality=88, method=2)
        shown.append((str(path), title))
    return shown


def grid(image: Image.Image, scales) -> Image.Image:
    """Draws the borders of the multi-scale masks on a picture, thinner for finer ones."""
    small = views.shrunk(image)
    draw = ImageDraw.Draw(small)
    width, height = small.size
    for scale in sorted(scales, reverse=True):
        line = max(1, round(max(small.size) / 100 / scale**0.5))
        for number in range(1, scale):
            x, y = number * width / scale, number * height / scale
            draw.line([(x, 0), (x, height)], fill=_TEAL, width=line)
            draw.line([(0, y), (width, y)], fill=_TEAL, width=line)
    return small


def lit(image: Image.Image, region: np.ndarray) -> Image.Image:
    """Darkens a picture outside of a region; without a region it stays as it is.

    Args:
        image: RGB, W x H.
        region: bool [H, W].

    Returns:
        An RGB picture, as large as `views.shrunk` makes it.
    """
    small = views.shrunk(image)
    if not region.any():
        return small
    mask = Image.fromarray(region).convert("L").resize(small.size)
    return Image.composite(small, small.point(lambda value: value // 3), mask)
