"""Surfaces: pictures of no particular part, for breadth in training.

A random pattern in random colors fills the picture, or covers a random body on another pattern.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from .canvas import (
    box,
    color,
    cover,
    disc,
    dome,
    fractal,
    frame,
    hexagon,
    over,
    segment,
    shade,
    shadow,
    smooth_noise,
    step,
    wobble,
    worley,
)

PI = float(np.pi)


def _clouds(rng, size):
    columns, octaves = rng.choice([3, 6, 12, 40]), int(rng.integers(1, 6))
    return fractal(rng, size, columns, octaves, rng.uniform(0.4, 0.8)) * np.float32(0.25)


def _brushed(rng, size):
    fine, coarse = rng.uniform(60, 240), rng.uniform(2, 16)
    pair = (fine, coarse) if rng.random() < 0.5 else (coarse, fine)
    return smooth_noise(rng, size, *pair) * np.float32(0.25)


def _leaves(rng, size):
    """Draws dead leaves: overlapping shapes whose sizes follow a power law."""
    wide = 2 * size
    image = Image.new("F", (wide, wide), float(rng.uniform(-0.5, 0.5)))
    pen = ImageDraw.Draw(image)
    smallest, round_shapes = rng.uniform(0.02, 0.06), rng.random() < 0.5
    count = int(rng.integers(60, 220))
    radii = np.minimum(smallest * (1 - rng.random(count)) ** -0.6, 0.6) * wide / 2
    centers = rng.uniform(0, wide, (count, 2))
    levels, angles = rng.uniform(-0.6, 0.6, count), rng.uniform(0, 2 * PI, count)
    for (x, y), radius, level, angle in zip(centers, radii, levels, angles, strict=True):
        if round_shapes:
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=float(level))
        else:
            turns = angle + np.linspace(0, 2 * PI, 5)[:4]
            pen.polygon([(x + radius * np.cos(t), y + radius * np.sin(t)) for t in turns], fill=float(level))
    return np.asarray(image.reduce(2), dtype=np.float32)


def _stripes(rng, size):
    u, _ = frame(size, rng.uniform(-1, 1, 2), rng.uniform(0, PI))
    if rng.random() < 0.4:
        u = u + fractal(rng, size, 3, 2) * np.float32(rng.uniform(0.02, 0.2))
    wave = np.sin(u * np.float32(rng.uniform(8, 70)))
    return np.clip(wave * np.float32(rng.choice([0.5, 3.0])), -0.5, 0.5)


def _cellular(rng, size):
    near, far, value = worley(rng, size, int(rng.integers(5, 26)))
    kind = rng.integers(3)
    if kind == 0:
        return near - np.float32(0.5)
    if kind == 1:
        return step(0.02, rng.uniform(0.1, 0.4), far - near) - np.float32(0.5)
    return (value - np.float32(0.5)) * step(0.0, 0.12, far - near)


def _woven(rng, size):
    u, v = frame(size, rng.uniform(-1, 1, 2), rng.uniform(0, PI))
    a, b = u * np.float32(rng.uniform(10, 50)), v * np.float32(rng.uniform(10, 50))
    if rng.random() < 0.5:
        return np.maximum(np.sin(a) * np.cos(b * 0.5), np.cos(b) * np.sin(a * 0.5)) - np.float32(0.3)
    return np.sin(a + np.sin(b) * np.float32(rng.uniform(0, 1.5))) * np.sin(b) * np.float32(0.5)


def _speckle(rng, size):
    level = rng.uniform(0.6, 2.0)
    spots = step(level, level + 0.35, smooth_noise(rng, size, rng.uniform(15, 120)))
    if rng.random() < 0.5:
        spots = spots - step(level, level + 0.35, smooth_noise(rng, size, rng.uniform(15, 120)))
    return spots * np.float32(0.8) - np.float32(0.2)


def _gradient(rng, size):
    x, y = frame(size, rng.uniform(-0.7, 0.7, 2), rng.uniform(0, 2 * PI))
    return x * np.float32(0.4) if rng.random() < 0.5 else np.sqrt(x * x + y * y) * np.float32(0.6) - np.float32(0.5)


def _shapes(rng, size):
    """Draws a regular grid of a random shape, straight or staggered."""
    u, v = frame(size, rng.uniform(-1, 1, 2), rng.choice([0.0, rng.uniform(0, PI)]))
    pitch, ratio = rng.uniform(0.14, 0.6), rng.choice([1.0, rng.uniform(0.5, 1.5)])
    row = np.floor(v * np.float32(1 / (pitch * ratio)))
    a = u * np.float32(1 / pitch) + row * np.float32(rng.choice([0.0, 0.5, rng.random()]))
    a = (a - np.floor(a) - np.float32(0.5)) * np.float32(pitch)
    b = v - (row + np.float32(0.5)) * np.float32(pitch * ratio)
    sdf = _outline(rng, a, b, pitch * min(ratio, 1) * rng.uniform(0.2, 0.45))
    if rng.random() < 0.3:
        sdf = np.abs(sdf) - np.float32(pitch * 0.05)
    return step(0.012, -0.012, sdf) - np.float32(0.5)


def _outline(rng, u, v, radius):
    """Draws the signed distance of a random regular shape of about the given radius."""
    kind = rng.integers(5)
    if kind == 0:
        return disc(u, v, radius)
    if kind == 1:
        return box(u, v, radius, radius * rng.uniform(0.4, 1.0), radius * rng.uniform(0, 0.3))
    if kind == 2:
        return hexagon(u, v, radius * 0.9)
    if kind == 3:
        arm = radius * rng.uniform(0.2, 0.4)
        return np.minimum(box(u, v, radius, arm), box(u, v, arm, radius))
    return np.abs(disc(u, v, radius * 0.75)) - np.float32(radius * 0.22)


_PATTERNS = (_clouds, _brushed, _leaves, _stripes, _cellular, _woven, _speckle, _gradient, _shapes)


def _pattern(rng, size):
    """Draws a pattern, or two laid over each other; about [-0.5, 0.5]."""
    field = _PATTERNS[rng.integers(len(_PATTERNS))](rng, size)
    if rng.random() < 0.45:
        field = field + np.float32(rng.uniform(0.15, 0.5)) * _PATTERNS[rng.integers(len(_PATTERNS))](rng, size)
    return field


def _palette(rng: np.random.Generator) -> np.ndarray:
    """Draws 256 colors in a smooth run through two to four random ones; float32 [256, 3]."""
    count = int(rng.integers(2, 5))
    hue, spread = rng.random(), rng.choice([0.03, 0.15, 0.5])
    vivid, middle, contrast = rng.choice([0.15, 0.4, 0.9]), rng.uniform(0.15, 0.85), rng.choice([0.08, 0.2, 0.45])
    stops = [
        color(
            hue + rng.normal(0, spread),
            rng.uniform(0, vivid),
            np.clip(middle + rng.uniform(-1, 1) * contrast, 0.03, 0.97),
        )
        for _ in range(count)
    ]
    at = np.linspace(0, count - 1, 256)
    return np.stack([np.interp(at, np.arange(count), [s[c] for s in stops]) for c in range(3)], 1).astype(np.float32)


def _material(rng, size, light):
    """Draws a lit patterned surface [size, size, 3]."""
    field = _pattern(rng, size)
    base = _palette(rng)[np.clip((field + np.float32(0.5)) * 255, 0, 255).astype(np.uint8)]
    if rng.random() < 0.4:
        base = (
            base * (1 + np.float32(rng.uniform(0.01, 0.06)) * smooth_noise(rng, size, rng.uniform(60, 160)))[..., None]
        )
    if rng.random() < 0.5:
        return base
    return shade(base, field * np.float32(rng.uniform(-0.04, 0.06)), light, rng.uniform(0, 0.3), rng.uniform(8, 30))


def _body(rng, size):
    """Draws the signed distance of a random body: a blob, polygon, regular shape, or bar with a head."""
    u, v = frame(size, rng.uniform(-0.15, 0.15, 2), rng.uniform(0, 2 * PI))
    radius = rng.uniform(0.35, 0.75)
    kind = rng.integers(4)
    if kind == 0:
        return np.sqrt(u * u + v * v) - np.float32(radius) * (
            1 + wobble(rng, np.arctan2(v, u), 6, rng.uniform(0.02, 0.2))
        )
    if kind == 1:
        sides = [
            u * np.float32(np.cos(turn)) + v * np.float32(np.sin(turn))
            for turn in rng.uniform(0, 2 * PI, int(rng.integers(3, 9)))
        ]
        return np.max(sides, 0) - np.float32(radius * 0.8) + np.maximum(disc(u, v, radius), 0)
    if kind == 2:
        return _outline(rng, u, v, radius)
    bar = segment(u, v, (-radius, 0), (radius, 0)) - np.float32(radius * rng.uniform(0.12, 0.5))
    return np.minimum(
        bar, _outline(rng, u - np.float32(radius * rng.uniform(-1, 1)), v, radius * rng.uniform(0.3, 0.6))
    )


def _features(rng, size, part, height, sdf):
    """Adds dots, chips, lines, ridges and holes to a body; returns the picture, height and outline."""
    for _ in range(int(rng.integers(0, 4))):
        kind = rng.integers(5)
        if kind < 2:
            count = int(rng.integers(1, 12))
            spots = np.full((size, size), 9, np.float32)
            spot_radius = rng.uniform(0.02, 0.09)
            for _ in range(count):
                spots = np.minimum(spots, disc(*frame(size, rng.uniform(-0.6, 0.6, 2)), spot_radius))
            if kind == 0:
                part = over(part, color(rng.random(), rng.uniform(0, 0.8), rng.random()), cover(spots, size))
                height = height + dome(spots, spot_radius, rng.uniform(-0.5, 0.6))
            else:
                sdf = np.maximum(sdf, -spots)
        else:
            u, v = frame(size, rng.uniform(-0.4, 0.4, 2), rng.uniform(0, PI))
            if kind == 2:
                line = np.abs(v) - np.float32(rng.uniform(0.01, 0.05))
            elif kind == 3:
                line = np.abs(disc(u, v, rng.uniform(0.1, 0.5))) - np.float32(rng.uniform(0.01, 0.05))
            else:
                line = _outline(rng, u, v, rng.uniform(0.08, 0.3))
            if rng.random() < 0.5:
                part = over(part, color(rng.random(), rng.uniform(0, 0.8), rng.random()), cover(line, size))
            height = height + dome(line, 0.03, rng.uniform(-0.8, 0.8))
    return part, height, sdf


def surface(rng: np.random.Generator, size: int, light) -> tuple[np.ndarray, np.ndarray | None]:
    """Draws a random lit scene and its body's coverage (None: a texture without a body)."""
    if rng.random() < 0.4:
        return _material(rng, size, light), None
    if rng.random() < 0.5:
        plain = color(rng.random(), rng.uniform(0, 0.4), rng.uniform(0.04, 0.97))
        below = (
            plain * (1 + np.float32(rng.uniform(0, 0.05)) * fractal(rng, size, rng.choice([3, 30, 100]), 2))[..., None]
        )
    else:
        below = _material(rng, size, light)
    sdf = _body(rng, size)
    if rng.random() < 0.4:
        base = _material(rng, size, light)
    else:
        plain = color(rng.random(), rng.uniform(0, 0.8), rng.uniform(0.08, 0.92))
        base = (
            plain
            * (1 + np.float32(rng.uniform(0.005, 0.05)) * fractal(rng, size, rng.choice([5, 20, 80]), 3))[..., None]
        )
    edge = rng.choice([0.02, 0.06, 0.2, 0.5])
    base, relief, sdf = _features(rng, size, base, np.zeros((size, size), np.float32), sdf)
    part = shade(base, dome(sdf, edge, rng.uniform(0.3, 1.0)) + relief, light, rng.uniform(0, 0.5), rng.uniform(8, 40))
    alpha = cover(sdf, size)
    return over(shadow(below, alpha, light, rng.uniform(0.02, 0.15), rng.uniform(0.0, 0.6)), part, alpha), alpha
