"""Ground-truth masks of any coding: where they lie, what they mark, and how they shrink."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from .depth import is_deep
from .images import SUFFIXES, open_image
from .listing import list_folder
from .pixels import flatten

MOST_CLASSES = 32
"""Most values of a mask that number kinds of defects; a mask with more has shades."""


def load_mask(
    path: str | os.PathLike | Sequence[Path], size: int | tuple[int, int] | None = None, indexed: bool = False
) -> np.ndarray:
    """Reads a ground-truth mask as bool `[H, W]`, True on the defect.

    Every value but the background marks a defect: 1, 2, 127 or 255, red or blue. Shades of a soft edge, which fill no
    2 x 2 pixels, are binarized at half of the highest value, and so are JPEG, WebP and masks of more than
    `MOST_CLASSES` values. Transparency counts as background, which is black or, in a palette without it, index 0.

    Args:
        path: a picture file, a folder of them or several files, which are united.
        size: a square's side, or `(H, W)`: see `shrink_mask`.
        indexed: whether all values are classes: defects are then all values but 0, or all palette indices but 0.

    Raises:
        ValueError: as `load_image`; a folder without pictures, or pictures of different sizes.
    """
    if isinstance(path, (str, os.PathLike)):
        parts = list_folder(path, "path") if os.path.isdir(path) else [path]
    else:
        parts = path
    masks = [_binarize(part, indexed) for part in parts]
    if len({mask.shape for mask in masks}) > 1:
        raise ValueError(f"`path` {quoted(path)} holds masks of different sizes; give them the size of the picture.")
    mask = np.logical_or.reduce(masks)
    return mask if size is None else shrink_mask(mask, size)


def shrink_mask(mask: np.ndarray, size: int | tuple[int, int]) -> np.ndarray:
    """Resizes a mask, bool `[H, W]`, to a square's side or `(H, W)`, with antialiasing and binarized at 0.5."""
    height, width = (size, size) if isinstance(size, int) else size
    soft = Image.fromarray(mask.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(soft) > 0.5


class Masks:
    """Finds the masks of pictures by their names; reads each folder once."""

    def __init__(self) -> None:
        self._files: dict[Path, dict[str, list[Path]]] = {}

    def find(self, folder: Path, stem: str) -> Path | tuple[Path, ...] | None:
        """Finds the masks in `folder` of the picture of that stem, see `datasets.read_mvtec`; None without any."""
        if folder not in self._files:
            self._files[folder] = by_stem = {}
            for path in sorted(folder.iterdir()) if folder.is_dir() else ():
                if path.suffix.lower() in SUFFIXES and path.is_file():
                    by_stem.setdefault(re.sub(r"_mask([-_]?\d+)?$", "_mask", path.stem), []).append(path)
        for name in (f"{stem}_mask", stem):
            found = self._files[folder].get(name, ())
            # Of one mask in several formats PNG is the one without loss.
            plain = {path.stem: path for path in sorted(found, key=lambda path: path.suffix.lower() == ".png")}
            if plain:
                return next(iter(plain.values())) if len(plain) == 1 else tuple(plain.values())
        united = folder / stem
        holds = united.is_dir() and any(path.suffix.lower() in SUFFIXES for path in united.iterdir())
        return united if holds else None


def _binarize(path: str | os.PathLike, indexed: bool) -> np.ndarray:
    name = f"`path` '{os.fspath(path)}'"
    image = open_image(path, name)
    if image.mode == "P" and indexed:
        return np.asarray(image) > 0
    if is_deep(image):
        values = np.asarray(image)
    else:
        # The highest channel: in a mean of channels a dark color would be lost.
        values = np.asarray(flatten(image, name, "black")).max(axis=2)
    if image.mode == "P" and values.all():
        values = np.asarray(image)
    if indexed:
        return values > 0
    marked = values > values.max() / 2
    levels = np.unique(values)
    if 2 < len(levels) <= MOST_CLASSES and Path(path).suffix.lower() in (".bmp", ".gif", ".png", ".tif", ".tiff"):
        corner = values[1:, 1:]
        filled = (corner == values[:-1, 1:]) & (corner == values[1:, :-1]) & (corner == values[:-1, :-1])
        marked |= np.isin(values, np.unique(corner[filled & (corner > 0)]))
    return marked


def quoted(path: str | os.PathLike | Sequence[Path]) -> str:
    """Names a file or several in a sentence."""
    paths = [path] if isinstance(path, (str, os.PathLike)) else path
    return " and ".join(f"'{os.fspath(part)}'" for part in paths)
