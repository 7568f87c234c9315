"""Conversions between PIL images and tensors: resizing, augmentation, stacking."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def to_tensor(image: Image.Image, size: int | tuple[int, int]) -> torch.Tensor:
    """Converts an RGB image to float32 `[3, H, W]` in [-1, 1].

    Args:
        image: in mode RGB; resized with Lanczos, which antialiases, without keeping the aspect ratio.
        size: a square's side or `(H, W)`, in pixels.

    Raises:
        ValueError: `image` is not in mode RGB.
    """
    if image.mode != "RGB":
        raise ValueError(f"`image` has mode {image.mode}; pass it through `load_image`, which gives RGB.")
    height, width = (size, size) if isinstance(size, int) else size
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    pixels = np.asarray(image, dtype=np.float32) / 127.5 - 1
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def augment(
    image: torch.Tensor,
    generator: torch.Generator,
    brightness: float = 0.1,
    contrast: float = 0.1,
    scale: float = 0.1,
    degrees: float = 15.0,
    mask: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Varies contrast, brightness, scale and rotation of a normal picture, as the paper does with shots.

    Args:
        image: float `[3, H, W]` in [-1, 1].
        generator: source of the four draws, each uniform between minus and plus its limit.
        brightness: limit of the shift, as a share of the full range from black to white.
        contrast: limit of the relative change of each pixel's difference to the picture's mean.
        scale: limit of the relative change in size, below 1.
        degrees: limit of the rotation about the center; the picture is reflected beyond its edges.
        mask: bool `[H, W]`, scaled and turned along with the picture (nearest neighbor), or None.

    Returns:
        float `[3, H, W]` in [-1, 1]; with `mask`, a pair of picture and mask, bool `[H, W]`.

    Raises:
        ValueError: `image` has another shape, or `scale` is not in [0, 1).
    """
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"`image` has shape {list(image.shape)}; give one picture as [3, H, W] in [-1, 1].")
    if not 0 <= scale < 1:
        raise ValueError(f"`scale` is {scale}; give a value in [0, 1).")
    draws = torch.rand(4, generator=generator, device=generator.device).mul(2).sub(1).tolist()
    shift, gain, zoom = 2 * brightness * draws[0], 1 + contrast * draws[1], 1 + scale * draws[2]
    angle = torch.deg2rad(torch.tensor(degrees * draws[3]))
    cos, sin = angle.cos().item() / zoom, angle.sin().item() / zoom
    height, width = image.shape[-2:]
    # Grid coordinates run from -1 to 1 along both axes, so a rotation of pixels carries the aspect ratio.
    affine = torch.tensor([[[cos, -sin * height / width, 0.0], [sin * width / height, cos, 0.0]]]).to(image)
    grid = torch.nn.functional.affine_grid(affine, [1, 3, height, width], align_corners=False)
    turned = torch.nn.functional.grid_sample(image[None], grid, padding_mode="reflection", align_corners=False)[0]
    mean = turned.mean()
    varied = ((turned - mean) * gain + mean + shift).clamp(-1, 1)
    if mask is None:
        return varied
    options = {"mode": "nearest", "padding_mode": "reflection", "align_corners": False}
    return varied, torch.nn.functional.grid_sample(mask[None, None].to(image), grid, **options)[0, 0] > 0.5


def rotate(images: Tensor, degrees: float) -> Tensor:
    """Rotates pictures `[N, C, H, W]`: exactly by multiples of 90 degrees, else bilinearly, mirrored beyond."""
    if degrees % 90 == 0:
        return torch.rot90(images, int(degrees // 90), dims=(2, 3))
    return resample_rotated(images, degrees)


def resample_rotated(images: Tensor, degrees: float) -> Tensor:
    """Rotates pictures `[N, C, H, W]` about their center in the frame that they have, bilinearly, mirrored beyond."""
    height, width = images.shape[-2:]
    angle = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    cos, sin = angle.cos().item(), angle.sin().item()
    theta = images.new_tensor([[cos, -sin * height / width, 0], [sin * width / height, cos, 0]])
    grid = torch.nn.functional.affine_grid(theta.expand(len(images), -1, -1), list(images.shape), align_corners=False)
    return torch.nn.functional.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def fit(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes a picture `[3, h, w]` in [-1, 1] to `[3, H, W]`, antialiased; unchanged if it has that size."""
    if picture.shape[1:] == size:
        return picture
    return torch.nn.functional.interpolate(picture[None], size=size, mode="bilinear", antialias=True)[0].clamp(-1, 1)


def resize(maps: Tensor, size: tuple[int, int], mode: str = "bilinear") -> Tensor:
    """Resizes maps `[N, h, w]` to `[N, H, W]`; `mode` is "bilinear" or "nearest"."""
    corners = {"align_corners": False} if mode == "bilinear" else {}
    return torch.nn.functional.interpolate(maps[:, None], size=size, mode=mode, **corners)[:, 0]


def stack(maps: list[Tensor], output_type: str):
    """Stacks maps of equal size to an array ("np") or tensor ("pt") `[N, H, W]`, else returns a list."""
    if output_type == "np":
        maps = [m.cpu().numpy() for m in maps]
    if len({tuple(m.shape) for m in maps}) > 1:
        return maps
    return np.stack(maps) if output_type == "np" else torch.stack(maps)


def to_pil(image: Tensor, size: tuple[int, int]) -> Image.Image:
    """Converts `[3, h, w]` in [-1, 1] to an RGB image of `size` (H, W)."""
    array = ((image.permute(1, 2, 0).cpu().numpy() + 1) * 127.5).round().clip(0, 255).astype(np.uint8)
    return Image.fromarray(array).resize((size[1], size[0]), Image.Resampling.BICUBIC)
