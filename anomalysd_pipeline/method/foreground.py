"""Find the part in a picture, by its distance in color from what lies at the border."""

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

# The rules by which an object is believed; see `foreground_mask`.
MIN_AREA, MAX_AREA = 0.03, 0.9
MIN_CONTRAST = 0.08
MIN_NOISE_RATIO = 3.0
MIN_SEPARATION = 0.65
MIN_EDGE = 0.4
MAX_BORDER_CONTACT = 0.7
MAX_PARTS = 6
MIN_KEPT = 0.8
MIN_SOLIDITY = 0.4


def foreground_mask(image: Tensor) -> Tensor:
    """Finds the object m_f on its background, for `training_mask`.

    The background is modeled from a frame along the borders, as a color that changes linearly over the picture, fitted
    with outliers left out. Pixels are split by Otsu's threshold on their color distance to it; small components are
    dropped and holes filled. The result is believed only if all of this holds, each by the constant of its name:

    - it covers 3% to 90% of the picture (`MIN_AREA`, `MAX_AREA`);
    - its mean color distance exceeds the background's by 0.08 of the full range (`MIN_CONTRAST`) and by 3 standard
      deviations of the background (`MIN_NOISE_RATIO`);
    - the split explains 65% of the variance of the distance (`MIN_SEPARATION`);
    - at its outline the distance changes by 0.4 of that difference within 1/32 of the picture's side (`MIN_EDGE`): a
      vignette or a soft stain has no outline;
    - along the borders it takes at most 0.7 of the share it takes in the whole picture (`MAX_BORDER_CONTACT`): a
      texture looks the same at the border as inside;
    - the components kept are at most 6 (`MAX_PARTS`), hold 80% of the pixels above the threshold (`MIN_KEPT`) and are
      not mostly filled holes (`MIN_SOLIDITY`): an object is compact, a texture's bright spots are many and scattered.

    Args:
        image: float `[3, H, W]` in [-1, 1], each side at least 8 pixels.

    Returns:
        bool `[H, W]`, True on the object; all True for textures and where no plausible object stands out.

    Raises:
        ValueError: `image` has another shape.
    """
    if image.ndim != 3 or image.shape[0] != 3 or min(image.shape[1:]) < 8:
        raise ValueError(f"`image` has shape {list(image.shape)}; give one picture as [3, H, W], 8 x 8 or larger.")
    distance, border = _background_distance(image.detach().float().cpu().numpy())
    everything = torch.ones(image.shape[1:], dtype=torch.bool, device=image.device)
    if distance.max() < MIN_CONTRAST:  # one flat color has no two classes to split
        return everything
    raw = distance > _otsu_threshold(distance)
    mask = _main_components(raw)
    return torch.from_numpy(mask).to(image.device) if _is_plausible(mask, raw, distance, border) else everything


def _background_distance(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Measures the color distance to the background, `[H, W]` in [0, 1], and returns the border it was fitted on."""
    height, width = image.shape[1:]
    # A little smoothing: sensor noise and JPEG blocks are no objects.
    smooth = ndimage.gaussian_filter(image, (0, max(height, width) / 200, max(height, width) / 200))
    edge = max(2, min(height, width) // 32)
    border = np.ones((height, width), dtype=bool)
    border[edge:-edge, edge:-edge] = False
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    basis = np.stack([np.ones_like(x), y, x], axis=-1)  # [H, W, 3]
    colors = smooth.transpose(1, 2, 0).astype(np.float64)  # [H, W, 3]
    points, samples = basis[border], colors[border]
    # The start must already hold where an object reaches the border, so a median; least squares then refines it.
    residual = np.linalg.norm(samples - np.median(samples, axis=0), axis=1)
    for _ in range(3):
        inliers = residual <= max(2.5 * np.median(residual), 0.02)
        plane = np.linalg.lstsq(points[inliers], samples[inliers], rcond=None)[0]
        residual = np.linalg.norm(samples - points @ plane, axis=1)
    return np.linalg.norm(colors - basis @ plane, axis=-1) / np.sqrt(12), border


def _otsu_threshold(values: np.ndarray) -> float:
    """Finds the upper edge of the lower class in the split with the greatest variance between classes."""
    counts, edges = np.histogram(values, bins=256)
    centers = (edges[1:] + edges[:-1]) / 2
    below = np.cumsum(counts)[:-1]
    above = values.size - below
    sums = np.cumsum(counts * centers)
    mean_below, mean_above = sums[:-1] / below, (sums[-1] - sums[:-1]) / above
    return float(edges[1 + np.argmax(below * above * (mean_above - mean_below) ** 2)])


def _main_components(raw: np.ndarray) -> np.ndarray:
    """Finds components of at least a tenth of the largest one's area, holes filled."""
    labels, count = ndimage.label(raw)
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    areas[0] = 0
    return ndimage.binary_fill_holes((areas >= max(1, 0.1 * areas.max()))[labels])


def _is_plausible(mask: np.ndarray, raw: np.ndarray, distance: np.ndarray, border: np.ndarray) -> bool:
    area = mask.mean()
    if not MIN_AREA <= area <= MAX_AREA:
        return False
    background, kept = distance[~mask], raw & mask
    contrast = distance[kept].mean() - background.mean()
    between = raw.mean() * (1 - raw.mean()) * (distance[raw].mean() - distance[~raw].mean()) ** 2
    window = max(3, min(mask.shape) // 32)
    step = ndimage.maximum_filter(distance, window) - ndimage.minimum_filter(distance, window)
    outline = mask & ~ndimage.binary_erosion(mask, border_value=1)
    return bool(
        contrast >= MIN_CONTRAST
        and contrast >= MIN_NOISE_RATIO * background.std()
        and between >= MIN_SEPARATION * distance.var()
        and np.median(step[outline]) >= MIN_EDGE * contrast
        and mask[border].mean() <= MAX_BORDER_CONTACT * area
        and ndimage.label(mask)[1] <= MAX_PARTS
        and kept.sum() >= MIN_KEPT * raw.sum()
        and kept.sum() >= MIN_SOLIDITY * mask.sum()
    )
