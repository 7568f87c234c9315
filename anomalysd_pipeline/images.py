"""Pictures between people and tensors: lists of anything in, maps and PIL images at their own size out."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .data import load_image


def load_pictures(images, name: str) -> list[Image.Image]:
    """A picture, or a list of pictures, of any kind that `load_image` takes.

    Args:
        images: one or several; an array or tensor with a leading batch dimension counts as several.
        name: the argument's name, for the error.

    Raises:
        ValueError: for none, or one that cannot be read.
    """
    if isinstance(images, (np.ndarray, Tensor)):
        images = [images] if images.ndim < 4 else list(images)
    elif not isinstance(images, (list, tuple)):
        images = [] if images is None else [images]
    if not images:
        raise ValueError(f"`{name}` must be a picture or a list with at least one.")
    return [load_image(image) for image in images]


def resize(maps: Tensor, size: tuple[int, int], mode: str = "bilinear") -> Tensor:
    """Maps `[N, h, w]` to `[N, H, W]`, `mode` "bilinear" or "nearest"."""
    corners = {"align_corners": False} if mode == "bilinear" else {}
    return torch.nn.functional.interpolate(maps[:, None], size=size, mode=mode, **corners)[:, 0]


def stack(maps: list[Tensor], output_type: str):
    """One array or tensor `[N, H, W]` where all maps have one size, else a list; `output_type` "np" or "pt"."""
    if output_type == "np":
        maps = [m.cpu().numpy() for m in maps]
    if len({tuple(m.shape) for m in maps}) > 1:
        return maps
    return np.stack(maps) if output_type == "np" else torch.stack(maps)


def to_pil(image: Tensor, size: tuple[int, int]) -> Image.Image:
    """`[3, h, w]` in [-1, 1] to an RGB image of `size` (H, W)."""
    array = ((image.permute(1, 2, 0).cpu().numpy() + 1) * 127.5).round().clip(0, 255).astype(np.uint8)
    return Image.fromarray(array).resize((size[1], size[0]), Image.Resampling.BICUBIC)
