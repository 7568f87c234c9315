"""Drawing primitives shared by all synthetic pictures.

Coordinates run over [-1, 1] in x (right) and y (down). Fields are float32 [size, size], colors float32 [size, size, 3]
in [0, 1]. Shapes are signed distance functions (negative inside), so that edges are anti-aliased without drawing at a
higher resolution.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageFilter


@dataclass(frozen=True)
class Light:
    """Describes the light and the camera of one picture.

    Attributes:
        direction: float32 [3], unit vector towards the light; z points to the viewer.
        strength: factor of the brightness, about 1.
        ambient: share of light without a direction, in [0, 1].
        tint: float32 [3], white balance as factors of red, green and blue.
        slope: float32 [2], brightness gradient over the picture in x and y.
        vignette: darkening of the corners.
        noise: standard deviation of the sensor noise in gray levels of 0 to 255.
        soft: radius of the lens blur in 256ths of the picture's width.
    """

    direction: np.ndarray
    strength: float
    ambient: float
    tint: np.ndarray
    slope: np.ndarray
    vignette: float
    noise: float
    soft: float


@lru_cache(maxsize=8)
def grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Makes two read-only fields of the pixel centers' x and y, each [size, size] in [-1, 1]."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) * np.float32(2.0 / size) - 1
    x, y = np.meshgrid(axis, axis)
    x.flags.writeable = y.flags.writeable = False
    return x, y


def frame(size: int, shift=(0.0, 0.0), angle: float = 0.0, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Makes the part's own coordinates of every pixel, for a part moved, turned (radians) and scaled."""
    x, y = grid(size)
    cos, sin = np.float32(np.cos(angle) / scale), np.float32(np.sin(angle) / scale)
    x, y = x - np.float32(shift[0]), y - np.float32(shift[1])
    return cos * x + sin * y, cos * y - sin * x


def resize(field: np.ndarray, size: int, how=Image.Resampling.BICUBIC) -> np.ndarray:
    """Resamples a float32 field [h, w] to [size, size]."""
    return np.asarray(Image.fromarray(field).resize((size, size), how))


def smooth_noise(rng: np.random.Generator, size: int, columns: float, rows: float | None = None) -> np.ndarray:
    """Draws smooth Gaussian noise of about unit variance from `columns` x `rows` independent values."""
    columns = max(2, round(columns))
    rows = columns if rows is None else max(2, round(rows))
    return resize(rng.standard_normal((rows, columns), dtype=np.float32), size)


def fractal(rng: np.random.Generator, size: int, columns: float, octaves: int = 4, gain: float = 0.5, rows=None):
    """Draws fractal noise of about unit variance.

    It sums octaves of `smooth_noise`, each twice as fine and `gain` times as strong as the one before.
    """
    rows = columns if rows is None else rows
    total = smooth_noise(rng, size, columns, rows)
    weight = 1.0
    for octave in range(1, octaves):
        weight *= gain
        total = total + np.float32(weight) * smooth_noise(rng, size, columns * 2**octave, rows * 2**octave)
    return total * np.float32(np.sqrt((1 - gain**2) / (1 - gain ** (2 * octaves))))


def worley(rng: np.random.Generator, size: int, cells: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws cellular noise of cells x cells jittered points.

    Returns:
        Distances to the nearest and to the second nearest point in cell widths, and a random value in [0, 1] for each
        cell, all [size, size].
    """
    half = max(size // 2, 32)
    points = rng.random((2, cells + 2, cells + 2), dtype=np.float32) * np.float32(0.8) + np.float32(0.1)
    values = rng.random((cells + 2, cells + 2), dtype=np.float32)
    axis = (np.arange(half, dtype=np.float32) + 0.5) * np.float32(cells / half)
    index = axis.astype(int)
    inside = axis - index
    first = second = np.full((half, half), 9, np.float32)
    value = np.zeros((half, half), np.float32)
    for row in (0, 1, 2):
        for column in (0, 1, 2):
            cell = np.ix_(index + row, index + column)
            dx = points[0][cell] + (column - 1) - inside[None, :]
            dy = points[1][cell] + (row - 1) - inside[:, None]
            distance = dx * dx + dy * dy
            nearer = distance < first
            second = np.where(nearer, first, np.minimum(second, distance))
            first = np.where(nearer, distance, first)
            value = np.where(nearer, values[cell], value)
    bilinear = Image.Resampling.BILINEAR
    return (
        resize(np.sqrt(first), size, bilinear),
        resize(np.sqrt(second), size, bilinear),
        resize(value, size, Image.Resampling.NEAREST),
    )


def step(low: float, high: float, field: np.ndarray) -> np.ndarray:
    """Steps smoothly from 0 at `low` to 1 at `high`; `low` may be the larger."""
    t = np.clip((field - np.float32(low)) * np.float32(1 / (high - low)), 0, 1)
    return t * t * (3 - 2 * t)


def cover(sdf: np.ndarray, size: int, scale: float = 1.0) -> np.ndarray:
    """Turns a signed distance in part coordinates, scaled by `scale`, into smooth coverage in [0, 1]."""
    return np.clip(np.float32(0.5) - sdf * np.float32(scale * size / 2.6), 0, 1)


def dome(sdf: np.ndarray, width: float, rise: float = 1.0) -> np.ndarray:
    """Rounds an edge: height of a quarter circle of radius `width` inwards, flat after it."""
    t = np.clip(1 + sdf * np.float32(1 / width), 0, 1)
    return np.sqrt(np.maximum(1 - t * t, 0)) * np.float32(width * rise)


def disc(u, v, radius: float) -> np.ndarray:
    """Measures the signed distance to a disc around the origin."""
    return np.sqrt(u * u + v * v) - np.float32(radius)


def box(u, v, half_width: float, half_height: float, corner: float = 0.0) -> np.ndarray:
    """Measures the signed distance to a rectangle around the origin with rounded corners."""
    a = np.abs(u) - np.float32(half_width - corner)
    b = np.abs(v) - np.float32(half_height - corner)
    outside = np.sqrt(np.maximum(a, 0) ** 2 + np.maximum(b, 0) ** 2)
    return outside + np.minimum(np.maximum(a, b), 0) - np.float32(corner)


def hexagon(u, v, radius: float, corner: float = 0.0) -> np.ndarray:
    """Measures the signed distance, exact inside, to a hexagon of an inner radius with rounded corners."""
    a, b = np.abs(u), np.abs(v)
    edge = np.maximum(a * np.float32(0.8660254) + b * np.float32(0.5), b)
    return np.maximum(edge - np.float32(radius), np.sqrt(a * a + b * b) - np.float32(radius * (1.1547 - corner)))


def segment(u, v, start, end) -> np.ndarray:
    """Measures the distance to the straight line between two points."""
    du, dv = end[0] - start[0], end[1] - start[1]
    a, b = u - np.float32(start[0]), v - np.float32(start[1])
    t = np.clip((a * np.float32(du) + b * np.float32(dv)) * np.float32(1 / max(du * du + dv * dv, 1e-9)), 0, 1)
    return np.sqrt((a - t * np.float32(du)) ** 2 + (b - t * np.float32(dv)) ** 2)


def wobble(rng: np.random.Generator, theta: np.ndarray, terms: int, amount: float) -> np.ndarray:
    """Draws a smooth periodic function of the angle, about `amount` strong: an irregular outline."""
    weights = rng.normal(0, amount, terms) / np.arange(1, terms + 1)
    phases = rng.uniform(0, 2 * np.pi, terms)
    turns = np.linspace(-np.pi, np.pi, 721)
    table = sum(w * np.cos((k + 2) * turns + p) for k, (w, p) in enumerate(zip(weights, phases, strict=True)))
    index = ((theta + np.float32(np.pi)) * np.float32(720 / (2 * np.pi))).astype(np.int32)
    return table.astype(np.float32)[index]


def color(hue: float, saturation: float, value: float) -> np.ndarray:
    """Converts a hue (0-1, wraps), saturation and value to RGB float32 [3]."""
    return np.asarray(
        colorsys.hsv_to_rgb(hue % 1.0, min(max(saturation, 0), 1), min(max(value, 0), 1)), dtype=np.float32
    )


def paint(size: int, base: np.ndarray) -> np.ndarray:
    """Fills a picture with a color."""
    return np.broadcast_to(base.astype(np.float32), (size, size, 3)).copy()


def over(under: np.ndarray, top: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Lays `top`, a picture or a color, over `under` with the coverage `alpha`."""
    return under + alpha[..., None] * (top - under)


def shade(base: np.ndarray, height: np.ndarray, light: Light, gloss: float = 0.0, power: float = 24.0) -> np.ndarray:
    """Lights a colored relief: Lambert shading, under which level ground keeps its color, and a highlight.

    Args:
        base: color of the relief.
        height: its height in units of the coordinates.
        light: the light.
        gloss: strength of the highlight.
        power: narrowness of the highlight.
    """
    scale = np.float32(height.shape[0] / 4)
    slope_x, slope_y = np.zeros_like(height), np.zeros_like(height)
    slope_x[:, 1:-1] = (height[:, 2:] - height[:, :-2]) * scale
    slope_y[1:-1] = (height[2:] - height[:-2]) * scale
    length = 1 / np.sqrt(1 + slope_x * slope_x + slope_y * slope_y)
    lx, ly, lz = light.direction
    facing = np.maximum((lz - slope_x * lx - slope_y * ly) * length, 0)
    result = base * (light.ambient + (1 - light.ambient) / lz * facing)[..., None]
    if gloss > 0:
        half = light.direction + np.array([0, 0, 1], np.float32)
        hx, hy, hz = half / np.sqrt((half * half).sum())
        mirror = np.maximum((hz - slope_x * hx - slope_y * hy) * length, 0)
        result += (np.float32(gloss) * (mirror ** np.float32(power) - np.float32(0.6 * hz**power)))[..., None]
    return result


def shadow(ground: np.ndarray, alpha: np.ndarray, light: Light, depth: float, strength: float = 0.5) -> np.ndarray:
    """Darkens the ground by the soft shadow of a body of coverage `alpha`, `depth` coordinate units high."""
    size = alpha.shape[0]
    small = Image.fromarray((alpha * 255).astype(np.uint8)).resize((64, 64), Image.Resampling.BOX)
    lx, ly, lz = light.direction
    move = (float(lx / lz) * depth * 32, float(ly / lz) * depth * 32)
    small = small.transform(
        (64, 64), Image.Transform.AFFINE, (1, 0, move[0], 0, 1, move[1]), Image.Resampling.BILINEAR
    ).filter(ImageFilter.GaussianBlur(0.8 + 16 * depth))
    dark = np.asarray(small.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32)
    return ground * (1 - dark * np.float32(strength / 255))[..., None]


def finish(picture: np.ndarray, light: Light, rng: np.random.Generator) -> np.ndarray:
    """Photographs a lit scene: falloff, white balance, lens blur, sensor noise; uint8 [size, size, 3]."""
    size = picture.shape[0]
    x, y = grid(size)
    sx, sy = light.slope
    falloff = (1 + sx * x + sy * y - light.vignette * (x * x + y * y)) * np.float32(light.strength * 255)
    picture = picture * falloff[..., None] * light.tint
    blurred = Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))
    if light.soft > 0:
        blurred = blurred.filter(ImageFilter.GaussianBlur(light.soft * size / 256))
    photo = np.asarray(blurred, dtype=np.float32)
    noise = rng.standard_normal((size, size, 3), dtype=np.float32)
    photo = photo + noise * np.float32(light.noise) + np.float32(0.5)
    return np.clip(photo, 0, 255).astype(np.uint8)


def sample_setup(rng: np.random.Generator) -> dict:
    """Draws the camera and the lamps of a product's inspection station."""
    return {
        "light_angle": rng.uniform(0, 2 * np.pi),
        "light_tilt": rng.uniform(0.5, 0.95),
        "light_ambient": rng.uniform(0.3, 0.55),
        "warmth": rng.normal(0, 0.025),
        "slope": rng.uniform(0.0, 0.12),
        "vignette": rng.uniform(0.0, 0.07),
        "noise": rng.uniform(1.2, 3.5),
        "soft": rng.uniform(0.3, 0.7),
    }


def sample_light(rng: np.random.Generator, setup: dict) -> Light:
    """Draws a picture's light: the station's, a little changed in direction, strength and white balance."""
    angle = setup["light_angle"] + rng.normal(0, 0.2)
    tilt = float(np.clip(setup["light_tilt"] + rng.normal(0, 0.05), 0.35, 1.1))
    direction = np.array([np.cos(angle) * np.sin(tilt), np.sin(angle) * np.sin(tilt), np.cos(tilt)], np.float32)
    warmth = setup["warmth"] + rng.normal(0, 0.008)
    tint = np.array([1 + warmth, 1 + rng.normal(0, 0.004), 1 - warmth], np.float32)
    slope = setup["slope"] * np.array([np.cos(angle), np.sin(angle)]) + rng.normal(0, 0.012, 2)
    return Light(
        direction=direction,
        strength=float(1 + rng.normal(0, 0.03)),
        ambient=setup["light_ambient"],
        tint=tint,
        slope=slope.astype(np.float32),
        vignette=setup["vignette"],
        noise=setup["noise"],
        soft=setup["soft"],
    )
