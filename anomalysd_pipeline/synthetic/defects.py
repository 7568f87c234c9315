"""Defects with exact masks, for any picture: `apply_defect`.

Every defect draws a changed picture. The visibly changed pixels are its mask; all others get their old values back.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from .canvas import color, fractal, frame, over, segment, smooth_noise, step, wobble

AREA = (0.002, 0.12)
VISIBLE = 7.0
ATTEMPTS = 12


def _spot(foreground: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draws a random foreground pixel, as coordinates (x, y) in [-1, 1]."""
    places = np.flatnonzero(foreground)
    row, column = divmod(int(places[rng.integers(len(places))]), foreground.shape[1])
    return (np.array([column, row]) + 0.5) * 2 / foreground.shape[0] - 1


def _blob(size: int, rng: np.random.Generator, center, radius: float, irregular: float = 0.25, edge: float = 0.02):
    """Draws the coverage of an irregular rounded spot with an edge of softness `edge`."""
    u, v = frame(size, center, rng.uniform(0, 2 * np.pi))
    v = v * np.float32(rng.uniform(1.0, 1.6))
    outline = radius * (1 + wobble(rng, np.arctan2(v, u), 7, irregular))
    distance = np.sqrt(u * u + v * v) - outline
    return step(max(edge, 2.5 / size), 0.0, distance + edge / 2), distance


def _contrast(picture: np.ndarray, where: np.ndarray, amount: float, rng: np.random.Generator) -> float:
    """Chooses +amount or -amount, by the direction in which the picture can still change visibly."""
    level = float((picture.mean(2) * where).sum() / (where.sum() + 1e-3))
    return amount if level < 70 or (level < 170 and rng.random() < 0.5) else -amount


def _path(rng: np.random.Generator, start, length: float, steps: int, bend: float) -> list[np.ndarray]:
    """Draws a wandering line of `steps` straight pieces around `start`."""
    angle = rng.uniform(0, 2 * np.pi)
    points = [np.asarray(start) - 0.5 * length * np.array([np.cos(angle), np.sin(angle)])]
    for _ in range(steps):
        angle += rng.normal(0, bend)
        points.append(points[-1] + length / steps * np.array([np.cos(angle), np.sin(angle)]))
    return points


def _stroke(size: int, points: list, width: float) -> np.ndarray:
    """Draws the coverage of a line that is thickest in its middle."""
    u, v = frame(size)
    alpha = np.zeros((size, size), np.float32)
    pieces = len(points) - 1
    for index in range(pieces):
        taper = 0.35 + 0.65 * np.sin(np.pi * (index + 0.7) / (pieces + 0.4))
        half = max(width * taper, 1.2 / size)
        distance = segment(u, v, points[index], points[index + 1])
        alpha = np.maximum(alpha, np.clip((half - distance) * np.float32(size / 2.5) + np.float32(0.5), 0, 1))
    return alpha


# The effects share one signature. They take the picture (float32 [S, S, 3] in 0-255), the foreground, the random
# generator and the force (1, and more after every attempt that was too faint). They return the changed picture, and
# the region in which it may change.


def _scratch(picture, foreground, rng, force):
    size = len(picture)
    points = _path(
        rng, _spot(foreground, rng), rng.uniform(0.3, 0.9), int(rng.integers(2, 6)), rng.choice([0.05, 0.25])
    )
    width = rng.uniform(0.007, 0.02) * min(force, 1.6)
    alpha = _stroke(size, points, width) * (0.75 + 0.25 * np.clip(smooth_noise(rng, size, 30), -1, 1))
    change = _contrast(picture, alpha, rng.uniform(45, 90) * force, rng)
    burr = _stroke(size, [p + np.array([2.2 * width, 1.6 * width]) for p in points], width * 0.7) * (1 - alpha)
    return picture + (alpha * change - burr * change * 0.35)[..., None], foreground


def _dent(picture, foreground, rng, force):
    size = len(picture)
    center, radius = _spot(foreground, rng), rng.uniform(0.08, 0.26)
    u, v = frame(size, center, rng.uniform(0, np.pi))
    v = v * np.float32(rng.uniform(1.0, 1.5))
    distance = np.sqrt(u * u + v * v) / np.float32(radius)
    bowl = np.maximum(1 - distance * distance, 0)
    angle = rng.uniform(0, 2 * np.pi)
    slope = (u * np.float32(np.cos(angle)) + v * np.float32(np.sin(angle))) / np.float32(radius) * bowl * 2.6
    rim = np.exp(-((distance - 0.95) ** 2) * 40) * np.float32(0.25)
    gain = (slope + rim * np.sign(slope)) * np.float32(min(0.45 * force, 0.8))
    pull = (bowl * bowl * np.float32(0.12 * size * radius * 0.5)).astype(np.float32)
    moved = _sample(picture, pull * u / np.float32(radius) * -1, pull * v / np.float32(radius) * -1)
    return moved * (1 + gain)[..., None] + gain[..., None] * 22 * np.float32(force), foreground


def _stain(picture, foreground, rng, force):
    size = len(picture)
    alpha, distance = _blob(size, rng, _spot(foreground, rng), rng.uniform(0.07, 0.32), 0.2, rng.choice([0.02, 0.06]))
    rim = np.exp(-((distance + 0.012) ** 2) * 5000) * np.float32(0.25)
    cloud = 1 + 0.18 * fractal(rng, size, 12, 3)
    strength = np.clip(alpha * cloud * np.float32(min(0.5 * force, 0.9)) + rim * alpha, 0, 0.95)
    if _contrast(picture, alpha, 1, rng) > 0:
        tone = color(rng.random(), rng.uniform(0.1, 0.6), rng.uniform(0.65, 0.95)) * 255
    else:
        tone = color(rng.choice([0.07, 0.09, rng.random()]), rng.uniform(0.3, 0.8), rng.uniform(0.08, 0.35)) * 255
    grain = picture - picture.mean((0, 1))
    return over(picture, tone + 0.35 * grain, strength), foreground


def _crack(picture, foreground, rng, force):
    size = len(picture)
    points = _path(rng, _spot(foreground, rng), rng.uniform(0.35, 0.9), int(rng.integers(6, 10)), 0.55)
    width = rng.uniform(0.009, 0.022) * min(force, 1.8)
    alpha = _stroke(size, points, width)
    for _ in range(int(rng.integers(0, 3))):
        branch = _path(rng, points[int(rng.integers(1, len(points) - 1))], rng.uniform(0.15, 0.35), 3, 0.5)
        shift = points[int(rng.integers(1, len(points) - 1))] - branch[0]
        alpha = np.maximum(alpha, _stroke(size, [p + shift for p in branch], width * 0.6))
    dark = float((picture.mean(2) * alpha).sum()) > 60 * float(alpha.sum())
    tone = np.float32(picture.min((0, 1)) * 0.5 + 8) if dark else np.float32(150 + 30 * force)
    lit = _stroke(size, [p + 1.8 * width for p in points], width * 0.5) * (1 - alpha)
    return over(picture, tone, alpha * np.float32(0.88)) + (lit * np.float32(30 * force))[..., None], foreground


def _missing_piece(picture, foreground, rng, force):
    size = len(picture)
    free = ~foreground
    if free.mean() > 0.08:
        edge = foreground & ~ndimage.binary_erosion(foreground, iterations=max(2, size // 42))
        alpha, distance = _blob(size, rng, _spot(edge, rng), rng.uniform(0.1, 0.28), 0.3)
        weight = free.astype(np.float32)
        sigma = size / 24
        spread = ndimage.gaussian_filter(weight, sigma, truncate=2.5)[..., None] + 1e-4
        behind = np.stack(
            [ndimage.gaussian_filter(picture[..., c] * weight, sigma, truncate=2.5) for c in range(3)], 2
        )
        behind = (behind + 1e-4 * picture[free].mean(0)) / spread
        grain = _grain(picture, rng, free)
        hollow = behind + grain - 12 * force * step(0.07, 0.0, -distance)[..., None]
    else:
        alpha, distance = _blob(size, rng, _spot(foreground, rng), rng.uniform(0.07, 0.26), 0.3)
        level = picture.mean((0, 1))
        deep = level * (0.3 if level.mean() > 60 else 2.2) + (0 if level.mean() > 60 else 50)
        bottom = 1 + 0.25 * fractal(rng, size, 24, 3)[..., None]
        angle = rng.uniform(0, 2 * np.pi)
        x, y = frame(size)
        side = np.sign(np.cos(angle) * x + np.sin(angle) * y)
        wall = smooth_noise(rng, size, 12) * 6 + 25 * step(0.05, 0.0, -distance) * side
        hollow = deep * bottom + wall[..., None] + _grain(picture, rng, foreground)
    return over(picture, hollow, alpha * foreground), foreground


def _pasted_patch(picture, foreground, rng, force):
    size = len(picture)
    center = _spot(foreground, rng)
    u, v = frame(size, center, rng.uniform(0, np.pi))
    half_w, half_h = rng.uniform(0.08, 0.3), rng.uniform(0.06, 0.2)
    sdf = np.maximum(np.abs(u) - np.float32(half_w), np.abs(v) - np.float32(half_h))
    alpha = np.clip(0.5 - sdf * np.float32(size / 2.6), 0, 1)
    source = _spot(foreground, rng)
    move = np.round((source - center) * size / 2).astype(int)
    turned = np.rot90(picture, int(rng.integers(1, 4)) if rng.random() < 0.7 else 0)
    piece = np.roll(turned, (-move[1], -move[0]), (0, 1))
    piece = piece * np.float32(1 + rng.normal(0, 0.08 * force)) + np.float32(rng.choice([-1, 1]) * 14 * force)
    return over(picture, piece, alpha), foreground


def _blur(picture, foreground, rng, force):
    size = len(picture)
    gray = picture.mean(2)
    detail = ndimage.gaussian_filter(np.abs(gray - ndimage.gaussian_filter(gray, size / 60)), size / 25) * foreground
    busiest = detail >= np.quantile(detail[foreground], 0.5)
    alpha, _ = _blob(size, rng, _spot(busiest & foreground, rng), rng.uniform(0.14, 0.34), 0.2, 0.04)
    sigma = size / 256 * rng.uniform(4, 7) * force
    sigmas = ((sigma, sigma), (sigma * 2, 0.5), (0.5, sigma * 2))[int(rng.choice([0, 0, 1, 2])) if force == 1 else 0]
    soft = np.stack([ndimage.gaussian_filter(picture[..., c], sigmas, truncate=2.5) for c in range(3)], 2)
    haze = _contrast(picture, alpha, 12 * (force - 1), rng)
    return over(picture, soft + np.float32(haze), alpha), foreground


def _contamination(picture, foreground, rng, force):
    size = len(picture)
    center = _spot(foreground, rng)
    alpha = np.zeros((size, size), np.float32)
    if rng.random() < 0.4:
        hair = _path(rng, center, rng.uniform(0.4, 0.8), 9, 0.45)
        alpha = _stroke(size, hair, rng.uniform(0.012, 0.022) * min(force, 1.5))
    else:
        for _ in range(int(rng.integers(1, 7))):
            piece, _ = _blob(size, rng, center + rng.normal(0, 0.1, 2), rng.uniform(0.03, 0.12), 0.4)
            alpha = np.maximum(alpha, piece)
    value = rng.uniform(0.75, 1.0) if _contrast(picture, alpha, 1, rng) > 0 else rng.uniform(0.05, 0.25)
    tone = color(rng.random(), rng.uniform(0.0, 0.9), value) * 255
    relief = 1 + 0.2 * smooth_noise(rng, size, 40)
    return over(picture, tone * relief[..., None] + _grain(picture, rng, foreground), alpha), foreground


def _bent(picture, foreground, rng, force):
    size = len(picture)
    gray = picture.mean(2)
    detail = ndimage.gaussian_filter(np.abs(gray - ndimage.gaussian_filter(gray, size / 40)), size / 25) * foreground
    busiest = foreground & (detail >= np.quantile(detail[foreground], 0.6))
    center, radius = _spot(busiest, rng), rng.uniform(0.18, 0.36)
    x, y = frame(size, center)
    fall = np.maximum(1 - (x * x + y * y) / np.float32(radius**2), 0) ** 2
    angle = rng.uniform(0, 2 * np.pi)
    reach = fall * np.float32(radius * size * 0.17 * min(force, 1.8))
    twist = np.float32(rng.normal(0, 0.5)) * fall * np.float32(size / 2)
    dx, dy = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    moved = _sample(picture, reach * dx - twist * y, reach * dy + twist * x)
    slope = (dx * x + dy * y) / np.float32(radius) * fall * np.float32(1.2 * (force - 1))
    return moved * (1 + slope)[..., None], ndimage.binary_dilation(foreground, iterations=max(2, size // 20))


def _rust(picture, foreground, rng, force):
    size = len(picture)
    alpha, _ = _blob(size, rng, _spot(foreground, rng), rng.uniform(0.1, 0.3), 0.3, 0.06)
    patches = step(-0.6, 0.4, fractal(rng, size, 14, 4, 0.65) + (alpha - 0.5) * 1.6) * alpha
    bright = picture.mean(2, keepdims=True)
    tone = color(rng.uniform(0.03, 0.08), rng.uniform(0.6, 0.9), rng.uniform(0.35, 0.6)) * 255
    mottle = 1 + 0.28 * fractal(rng, size, 40, 3, 0.7)[..., None]
    strength = np.clip(patches * np.float32(min(0.75 * force, 1.0)), 0, 1)
    return over(picture, tone * mottle + 0.12 * (bright - 128), strength), foreground


def _grain(picture: np.ndarray, rng: np.random.Generator, where: np.ndarray) -> np.ndarray:
    """Draws noise as strong as the picture's own, so that new material does not look painted on."""
    rough = np.abs(np.diff(picture.mean(2), axis=1))[where[:, 1:]]
    level = min(float(np.median(rough)) if rough.size else 2.0, 12.0) * 1.3
    return rng.standard_normal(picture.shape, dtype=np.float32) * np.float32(level)


def _sample(picture: np.ndarray, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """Displaces the picture by a field in pixels (bilinear)."""
    size = len(picture)
    index = np.arange(size, dtype=np.float32)
    x = np.clip(index[None, :] + dx, 0, size - 1.001)
    y = np.clip(index[:, None] + dy, 0, size - 1.001)
    column, row = x.astype(np.int32), y.astype(np.int32)
    a, b = (x - column)[..., None], (y - row)[..., None]
    top = picture[row, column] * (1 - a) + picture[row, column + 1] * a
    bottom = picture[row + 1, column] * (1 - a) + picture[row + 1, column + 1] * a
    return top * (1 - b) + bottom * b


_EFFECTS = {
    "scratch": _scratch,
    "dent": _dent,
    "stain": _stain,
    "crack": _crack,
    "missing_piece": _missing_piece,
    "pasted_patch": _pasted_patch,
    "blur": _blur,
    "contamination": _contamination,
    "bent": _bent,
    "rust": _rust,
}
DEFECTS: tuple[str, ...] = tuple(_EFFECTS)


def apply_defect(
    image: np.ndarray, foreground: np.ndarray, rng: np.random.Generator, defect: str | None = None
) -> tuple[np.ndarray, np.ndarray, str]:
    """Puts one defect on the foreground of a picture.

    Args:
        image: uint8 [S, S, 3], square.
        foreground: bool [S, S], True on the part; at least one pixel.
        rng: the only source of chance.
        defect: one of `DEFECTS`; None draws one.

    Returns:
        The changed picture (uint8 [S, S, 3]), the mask of the visible change (bool [S, S], between 0.2 % and 12 % of
        the picture wherever the foreground leaves room for it) and the defect's name. Outside the mask the picture is
        bit-equal to `image`; inside, nearly all pixels differ.

    Raises:
        ValueError: the defect is unknown, the picture of a wrong shape or type, or the foreground empty.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[0] != image.shape[1] or image.shape[2] != 3:
        raise ValueError(
            f"`image` is {image.dtype} of shape {image.shape}; it must be a square uint8 RGB array [S, S, 3]."
        )
    if foreground.shape != image.shape[:2] or foreground.dtype != bool or not foreground.any():
        raise ValueError(
            f"`foreground` is {foreground.dtype} of shape {foreground.shape} with {int(foreground.sum())} set pixels; "
            f"it must be a bool array of shape {image.shape[:2]} with at least one pixel set."
        )
    if defect is not None and defect not in _EFFECTS:
        raise ValueError(f"`defect` is {defect!r}; it must be one of {', '.join(DEFECTS)}.")
    defect = defect or DEFECTS[int(rng.integers(len(DEFECTS)))]
    picture = image.astype(np.float32)
    best = None
    for attempt in range(ATTEMPTS):
        changed, region = _EFFECTS[defect](picture, foreground, rng, 1.0 + 0.25 * attempt)
        changed = np.clip(changed + 0.5, 0, 255).astype(np.uint8)
        mask, contrast = _visible(image, changed, region)
        area = mask.mean()
        miss = max(AREA[0] - area, area - AREA[1], 0) / AREA[0] + max(15 - contrast, 0) / 15
        if best is None or miss < best[0]:
            best = (miss, changed, mask)
        if miss == 0:
            break
    _, changed, mask = best
    if not mask.any():
        return apply_defect(image, foreground, rng, "contamination")[:2] + (defect,)
    return np.where(mask[..., None], changed, image), mask, defect


def _visible(before: np.ndarray, after: np.ndarray, region: np.ndarray) -> tuple[np.ndarray, float]:
    """Masks the visible change in `region` without stray pixels; also returns its mean in gray levels."""
    difference = np.abs(before.astype(np.int16) - after).max(2).astype(np.float32)
    mask = (ndimage.uniform_filter(difference, 3) > VISIBLE) & (difference > 0) & region
    if before.shape[0] >= 128:
        mask = ndimage.binary_opening(mask) if mask.mean() > 0.01 else mask
    mask |= ndimage.binary_closing(mask) & region
    return mask, float(difference[mask].mean()) if mask.any() else 0.0
