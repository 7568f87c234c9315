"""Synthetic textures: materials that fill the picture.

Every family is a pair of functions. The first draws the style of a product, plain numbers; the second a picture of it.
"""

from __future__ import annotations

import numpy as np

from .canvas import (
    Light,
    box,
    color,
    cover,
    disc,
    dome,
    fractal,
    frame,
    over,
    paint,
    shade,
    smooth_noise,
    step,
    worley,
)

PI = float(np.pi)


def _cells(u: np.ndarray, pitch: float) -> tuple[np.ndarray, np.ndarray]:
    """Splits a coordinate into the index of its cell and the position in it, in [-0.5, 0.5]."""
    t = u * np.float32(1 / pitch)
    index = np.floor(t)
    return index, t - index - np.float32(0.5)


def _tints(rng: np.random.Generator, rows: np.ndarray, columns: np.ndarray, amount: float) -> np.ndarray:
    """Draws a random brightness factor for each cell of a grid."""
    table = (1 + amount * rng.standard_normal((64, 64))).astype(np.float32)
    return table[rows.astype(np.int32) & 63, columns.astype(np.int32) & 63]


def _turned(rng: np.random.Generator, size: int, style: dict, wander: float = 0.03):
    """Draws the coordinates of a sheet put under the camera by hand: any shift, nearly the same angle."""
    return frame(size, rng.uniform(-1, 1, 2), style["angle"] + rng.normal(0, wander), 1 + rng.normal(0, 0.015))


def weave_style(rng: np.random.Generator) -> dict:
    hue, saturation, value = rng.random(), rng.uniform(0.0, 0.6), rng.uniform(0.35, 0.85)
    return {
        "angle": rng.choice([0.0, PI / 4, rng.uniform(-0.3, 0.3)]),
        "pitch": rng.uniform(0.07, 0.2),
        "ratio": rng.uniform(0.75, 1.3),
        "warp": color(hue, saturation, value),
        "weft": color(hue + rng.normal(0, 0.08), saturation * rng.uniform(0.4, 1.2), value * rng.uniform(0.7, 1.15)),
        "float": int(rng.integers(1, 3)),
        "rise": rng.uniform(0.25, 0.5),
        "fibre": rng.uniform(0.03, 0.09),
    }


def weave(rng: np.random.Generator, style: dict, size: int, light: Light):
    u, v = _turned(rng, size, style)
    u = u + smooth_noise(rng, size, 6) * np.float32(0.01)
    v = v + smooth_noise(rng, size, 6) * np.float32(0.01)
    pitch = style["pitch"]
    column, a = _cells(u, pitch)
    row, b = _cells(v, pitch * style["ratio"])
    turn = PI / style["float"]
    lift = np.float32(0.22 * pitch)
    warp = pitch * style["rise"] * np.sqrt(np.maximum(1 - (a * 2.1) ** 2, 0)) + lift * np.cos(
        (row + b + column) * turn
    )
    weft = pitch * style["rise"] * np.sqrt(np.maximum(1 - (b * 2.1) ** 2, 0)) - lift * np.cos(
        (column + a + row) * turn
    )
    on_top = step(-0.02 * pitch, 0.02 * pitch, warp - weft)
    fibre = np.float32(style["fibre"])
    lengthwise = 1 + fibre * smooth_noise(rng, size, 128, 24) + _tints(rng, column, row * 0, 0.03) - 1
    crosswise = 1 + fibre * smooth_noise(rng, size, 24, 128) + _tints(rng, row, column * 0, 0.03) - 1
    base = over(style["weft"] * crosswise[..., None], style["warp"] * lengthwise[..., None], on_top)
    height = np.maximum(warp, weft)
    depth = step(-0.1 * pitch, 0.45 * pitch, height)
    return shade(base * (0.45 + 0.55 * depth)[..., None], height * np.float32(0.8), light, 0.08, 8), None


def wood_style(rng: np.random.Generator) -> dict:
    hue, value = rng.uniform(0.04, 0.11), rng.uniform(0.4, 0.85)
    return {
        "angle": rng.choice([0.0, PI / 2]),
        "light_wood": color(hue, rng.uniform(0.25, 0.6), value),
        "dark_wood": color(hue - 0.015, rng.uniform(0.4, 0.75), value * rng.uniform(0.55, 0.8)),
        "rings": rng.uniform(2.5, 7),
        "wave": rng.uniform(0.1, 0.4),
        "pores": rng.uniform(0.03, 0.12),
        "sharp": rng.uniform(0.6, 2.0),
    }


def wood(rng: np.random.Generator, style: dict, size: int, light: Light):
    u, v = _turned(rng, size, style)
    long = style["angle"] == 0
    bend = fractal(rng, size, 2 if long else 5, 3, 0.45, rows=5 if long else 2)
    ring = (v + np.float32(style["wave"] * 0.5) * bend) * np.float32(style["rings"])
    saw = ring - np.floor(ring)
    band = step(0, 0.75, saw) * step(1, 0.85, saw)
    band = band ** np.float32(style["sharp"])
    grain = smooth_noise(rng, size, *((10, 128) if long else (128, 10)))
    fine = smooth_noise(rng, size, *((24, 256) if long else (256, 24)))
    pores = np.maximum(fine - np.float32(0.9), 0) * np.float32(style["pores"] * 2)
    base = over(paint(size, style["light_wood"]), style["dark_wood"], np.clip(band + 0.12 * grain, 0, 1))
    base = base * (1 + 0.03 * grain - pores)[..., None]
    return shade(base, grain * np.float32(0.0012), light, 0.05, 10), None


def brushed_metal_style(rng: np.random.Generator) -> dict:
    return {
        "angle": rng.choice([0.0, PI / 2]),
        "base": color(rng.choice([0.6, 0.1, 0.08]), rng.uniform(0.0, 0.25), rng.uniform(0.4, 0.8)),
        "streak": rng.uniform(0.03, 0.09),
        "length": rng.uniform(3, 14),
        "sheen": rng.uniform(0.05, 0.25),
    }


def brushed_metal(rng: np.random.Generator, style: dict, size: int, light: Light):
    u, v = _turned(rng, size, style, 0.01)
    fine, coarse = (style["length"], 220), (style["length"] * 0.5, 90)
    if style["angle"] != 0:
        fine, coarse = fine[::-1], coarse[::-1]
    streaks = 0.7 * smooth_noise(rng, size, *fine) + 0.5 * smooth_noise(rng, size, *coarse)
    glow = np.cos((frame(size, angle=style["angle"])[0] * 1.6 + rng.normal(0, 0.25)).astype(np.float32))
    base = paint(size, style["base"]) * (1 + np.float32(style["streak"]) * streaks)[..., None]
    return base + (glow * np.float32(style["sheen"]) * (0.8 + 0.1 * streaks))[..., None], None


def tiles_style(rng: np.random.Generator) -> dict:
    value = rng.uniform(0.35, 0.9)
    return {
        "angle": rng.choice([0.0, PI / 4]),
        "pitch": rng.uniform(0.28, 0.7),
        "ratio": float(rng.choice([1.0, 1.0, 0.5])),
        "brick": bool(rng.random() < 0.4),
        "gap": rng.uniform(0.02, 0.05),
        "corner": rng.uniform(0.005, 0.04),
        "tile": color(rng.random(), rng.uniform(0.0, 0.5), value),
        "grout": color(rng.uniform(0.05, 0.15), rng.uniform(0, 0.2), rng.uniform(0.2, 0.9)),
        "vary": rng.uniform(0.01, 0.07),
        "marble": rng.uniform(0.0, 0.15),
        "gloss": rng.uniform(0.0, 0.3),
    }


def tiles(rng: np.random.Generator, style: dict, size: int, light: Light):
    u, v = _turned(rng, size, style, 0.015)
    pitch, tall = style["pitch"], style["pitch"] * style["ratio"]
    row, b = _cells(v, tall)
    column, a = _cells(u + (row % 2) * np.float32(0.5 * pitch * style["brick"]), pitch)
    sdf = box(a * pitch, b * tall, (pitch - style["gap"]) / 2, (tall - style["gap"]) / 2, style["corner"])
    marble = fractal(rng, size, 5, 5, 0.6)
    shades = _tints(rng, row, column, style["vary"]) + np.float32(style["marble"]) * marble
    grain = smooth_noise(rng, size, 128)
    alpha = cover(sdf, size)
    top = shade(style["tile"] * shades[..., None], dome(sdf, 0.035), light, style["gloss"], 20)
    grout = style["grout"] * (0.85 + 0.06 * grain)[..., None]
    return over(grout * (0.7 + 0.3 * step(0, 0.02, sdf))[..., None], top, alpha), None


def perforated_sheet_style(rng: np.random.Generator) -> dict:
    pitch = rng.uniform(0.16, 0.36)
    return {
        "angle": rng.choice([0.0, PI / 4]),
        "pitch": pitch,
        "hole": pitch * rng.uniform(0.22, 0.36),
        "staggered": bool(rng.random() < 0.6),
        "square": bool(rng.random() < 0.25),
        "sheet": color(rng.choice([0.6, 0.1, rng.random()]), rng.uniform(0, 0.25), rng.uniform(0.45, 0.85)),
        "behind": color(rng.random(), 0.2, rng.uniform(0.04, 0.2)),
        "gloss": rng.uniform(0.1, 0.4),
    }


def perforated_sheet(rng: np.random.Generator, style: dict, size: int, light: Light):
    u, v = _turned(rng, size, style, 0.02)
    pitch = style["pitch"]
    tall = pitch * (0.866 if style["staggered"] else 1.0)
    row, b = _cells(v, tall)
    _, a = _cells(u + (row % 2) * np.float32(0.5 * pitch * style["staggered"]), pitch)
    a, b = a * np.float32(pitch), b * np.float32(tall)
    hole = box(a, b, style["hole"] * 0.9, style["hole"] * 0.9, 0.02) if style["square"] else disc(a, b, style["hole"])
    streaks = smooth_noise(rng, size, 8, 160)
    sheet = shade(style["sheet"] * (1 + 0.03 * streaks)[..., None], dome(-hole, 0.03), light, style["gloss"], 16)
    lx, ly, _ = light.direction
    inner = disc(a + 0.35 * lx * style["hole"], b + 0.35 * ly * style["hole"], style["hole"])
    deep = style["behind"] * (1 + 2.0 * step(-0.03, 0.03, inner))[..., None]
    return over(deep, sheet, cover(-hole, size)), None


def leather_style(rng: np.random.Generator) -> dict:
    return {
        "angle": 0.0,
        "cells": int(rng.integers(14, 30)),
        "base": color(
            rng.choice([rng.uniform(0.02, 0.1), rng.random()]), rng.uniform(0.1, 0.7), rng.uniform(0.2, 0.7)
        ),
        "bump": rng.uniform(0.01, 0.022),
        "gloss": rng.uniform(0.1, 0.35),
    }


def leather(rng: np.random.Generator, style: dict, size: int, light: Light):
    near, far, value = worley(rng, size, style["cells"])
    seam = step(0.0, 0.3, far - near)
    height = seam * np.float32(style["bump"]) + fractal(rng, size, 40, 3, 0.6) * np.float32(style["bump"] * 0.25)
    patina = 0.03 * fractal(rng, size, 3, 3)
    base = style["base"] * (0.72 + 0.28 * seam + patina + 0.04 * (value - 0.5))[..., None]
    return shade(base, height, light, style["gloss"], 14), None


def carpet_style(rng: np.random.Generator) -> dict:
    value = rng.uniform(0.3, 0.75)
    hue = rng.random()
    return {
        "angle": 0.0,
        "base": color(hue, rng.uniform(0.0, 0.5), value),
        "fleck": color(hue + rng.normal(0, 0.2), rng.uniform(0.0, 0.6), value * rng.uniform(0.5, 1.4)),
        "share": rng.uniform(0.4, 1.5),
        "pile": int(rng.integers(50, 100)),
        "loop": rng.uniform(0.0, 0.012),
        "pitch": rng.uniform(0.05, 0.09),
    }


def carpet(rng: np.random.Generator, style: dict, size: int, light: Light):
    u, v = _turned(rng, size, style)
    pile = fractal(rng, size, style["pile"], 2, 0.8)
    flecks = step(style["share"] - 0.25, style["share"] + 0.25, smooth_noise(rng, size, style["pile"] * 0.9))
    _, a = _cells(u + pile * np.float32(0.006), style["pitch"])
    rib = np.cos(a * np.float32(2 * PI))
    base = over(paint(size, style["base"]), style["fleck"], flecks) * (0.85 + 0.14 * pile + 0.04 * rib)[..., None]
    return shade(base, pile * np.float32(0.006) + rib * np.float32(style["loop"]), light), None


def mesh_style(rng: np.random.Generator) -> dict:
    pitch = rng.uniform(0.16, 0.3)
    return {
        "angle": rng.choice([0.0, PI / 4]),
        "pitch": pitch,
        "wire": pitch * rng.uniform(0.14, 0.24),
        "metal": color(rng.choice([0.6, 0.1]), rng.uniform(0, 0.3), rng.uniform(0.45, 0.85)),
        "behind": color(
            rng.random(), rng.uniform(0, 0.3), rng.choice([rng.uniform(0.05, 0.2), rng.uniform(0.75, 0.95)])
        ),
        "gloss": rng.uniform(0.1, 0.4),
    }


def mesh(rng: np.random.Generator, style: dict, size: int, light: Light):
    u, v = _turned(rng, size, style, 0.02)
    pitch, wire = style["pitch"], style["wire"]
    column, a = _cells(u, pitch)
    row, b = _cells(v, pitch)
    a, b = a * np.float32(pitch), b * np.float32(pitch)
    lift = np.float32(wire * 0.5)
    upright = np.sqrt(np.maximum(wire**2 - a * a, 0)) + lift * np.cos((row + b / pitch + column) * PI)
    level = np.sqrt(np.maximum(wire**2 - b * b, 0)) - lift * np.cos((column + a / pitch + row) * PI)
    has_a, has_b = cover(np.abs(a) - wire, size), cover(np.abs(b) - wire, size)
    upright, level = np.where(has_a > 0, upright, -1), np.where(has_b > 0, level, -1)
    height = np.maximum(upright, level)
    grain = 1 + 0.04 * smooth_noise(rng, size, 64)
    wires = shade(
        style["metal"] * grain[..., None], np.maximum(height, -lift) * np.float32(0.8), light, style["gloss"], 12
    )
    ground = style["behind"] * (1 + 0.03 * fractal(rng, size, 8, 3))[..., None]
    lx, ly, _ = light.direction
    cast = np.minimum(np.abs(a + lx * wire), np.abs(b + ly * wire))
    ground = ground * (0.75 + 0.25 * step(wire * 0.7, wire * 1.6, cast))[..., None]
    return over(ground, wires, np.maximum(has_a, has_b)), None


TEXTURE_DRAWERS = {
    "weave": (weave_style, weave),
    "wood": (wood_style, wood),
    "brushed_metal": (brushed_metal_style, brushed_metal),
    "tiles": (tiles_style, tiles),
    "perforated_sheet": (perforated_sheet_style, perforated_sheet),
    "leather": (leather_style, leather),
    "carpet": (carpet_style, carpet),
    "mesh": (mesh_style, mesh),
}
