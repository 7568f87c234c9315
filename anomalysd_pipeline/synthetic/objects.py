"""Synthetic parts, first half: metal and machined parts, each lying once in the picture.

Every family is a pair of functions. The first draws the style of a product, plain numbers. The second draws a picture
of it, and returns the lit scene and the part's coverage in [0, 1].
"""

from __future__ import annotations

import numpy as np

from .canvas import Light, box, color, cover, disc, dome, fractal, frame, hexagon, over, paint, shade, shadow, step

PI = float(np.pi)


def ground_style(rng: np.random.Generator) -> dict:
    """Draws the style of the ground: a plain, grainy or brushed plate of any brightness."""
    value = rng.choice([rng.uniform(0.03, 0.13), rng.uniform(0.32, 0.7), rng.uniform(0.75, 0.95)])
    return {
        "ground": color(rng.random(), rng.uniform(0, 0.3), value),
        "ground_grain": rng.choice([0.0, rng.uniform(0.01, 0.05), rng.uniform(0.03, 0.1)]),
        "ground_cells": rng.uniform(20, 110),
        "ground_cloud": rng.uniform(0.0, 0.04),
        "shadow": rng.uniform(0.25, 0.6),
    }


def ground(rng: np.random.Generator, style: dict, size: int) -> np.ndarray:
    """Draws the plate under the part, unlit; [size, size, 3]."""
    mottle = np.float32(style["ground_cloud"]) * fractal(rng, size, 3, 3)
    if style["ground_grain"] > 0:
        mottle = mottle + np.float32(style["ground_grain"]) * fractal(rng, size, style["ground_cells"], 2, 0.6)
    return style["ground"] * (1 + mottle)[..., None]


def lay(rng: np.random.Generator, size: int, turn: float = PI, shift: float = 0.05, zoom: float = 0.03):
    """Draws the coordinates and the scale of a part laid by hand, turned by up to `turn`."""
    scale = float(1 + np.clip(rng.normal(0, zoom), -2 * zoom, 2 * zoom))
    u, v = frame(size, rng.uniform(-shift, shift, 2), rng.uniform(-turn, turn), scale)
    return u, v, scale


def metal(rng: np.random.Generator) -> np.ndarray:
    """Draws the color of steel, zinc, brass, copper or blackened steel."""
    kind = rng.integers(5)
    hue = (0.6, 0.6, 0.12, 0.05, 0.6)[kind] + rng.normal(0, 0.01)
    saturation = (0.05, 0.12, 0.45, 0.5, 0.08)[kind] * rng.uniform(0.6, 1.2)
    return color(hue, saturation, rng.uniform(0.18, 0.3) if kind == 4 else rng.uniform(0.5, 0.8))


def brushed(rng: np.random.Generator, u: np.ndarray, v: np.ndarray, amount: float) -> np.ndarray:
    """Draws turning marks: a random brightness factor that depends on the radius only."""
    table = (1 + amount * rng.standard_normal(256)).astype(np.float32)
    radius = np.sqrt(u * u + v * v) * np.float32(120)
    index = radius.astype(np.int32) & 255
    part = radius - np.floor(radius)
    return table[index] * (1 - part) + table[(index + 1) & 255] * part


def sweep(u: np.ndarray, v: np.ndarray, light: Light, amount: float) -> np.ndarray:
    """Draws the two bright fans that turned metal shows towards the light and away from it."""
    lx, ly, _ = light.direction
    along = (u * lx + v * ly) ** 2
    return 1 + np.float32(amount) * (2 * along / ((u * u + v * v) * np.float32(lx * lx + ly * ly) + 1e-4) - 1)


def place(
    below: np.ndarray, part: np.ndarray, alpha: np.ndarray, light: Light, style: dict, depth: float
) -> np.ndarray:
    """Lays the part over its ground, with its shadow."""
    return over(shadow(below, alpha, light, depth, style["shadow"]), part, alpha)


def washer_style(rng: np.random.Generator) -> dict:
    outer = rng.uniform(0.55, 0.8)
    return {
        "metal": metal(rng),
        "outer": outer,
        "inner": outer * rng.uniform(0.35, 0.65),
        "bevel": rng.uniform(0.02, 0.06),
        "brush": rng.uniform(0.02, 0.07),
        "sweep": rng.uniform(0.05, 0.3),
        "gloss": rng.uniform(0.2, 0.5),
        "groove": rng.choice([0.0, rng.uniform(0.3, 0.7)]),
    }


def washer(rng: np.random.Generator, style: dict, size: int, light: Light):
    u, v, scale = lay(rng, size)
    sdf = np.maximum(disc(u, v, style["outer"]), -disc(u, v, style["inner"]))
    height = dome(sdf, style["bevel"])
    if style["groove"] > 0:
        middle = style["inner"] + (style["outer"] - style["inner"]) * style["groove"]
        height = height - dome(np.abs(disc(u, v, middle)) - np.float32(0.02), 0.02)
    base = style["metal"] * (brushed(rng, u, v, style["brush"]) * sweep(u, v, light, style["sweep"]))[..., None]
    base = base * (1 + 0.02 * fractal(rng, size, 12, 3))[..., None]
    alpha = cover(sdf, size, scale)
    return place(
        ground(rng, style, size), shade(base, height, light, style["gloss"]), alpha, light, style, 0.08
    ), alpha


def ring_style(rng: np.random.Generator) -> dict:
    rubber = rng.random() < 0.6
    radius = rng.uniform(0.48, 0.7)
    return {
        "base": color(rng.random(), rng.uniform(0, 0.2), rng.uniform(0.06, 0.2)) if rubber else metal(rng),
        "radius": radius,
        "tube": radius * rng.uniform(0.12, 0.3),
        "gloss": rng.uniform(0.1, 0.3) if rubber else rng.uniform(0.3, 0.6),
        "ground": color(rng.random(), rng.uniform(0, 0.25), rng.uniform(0.5, 0.95)),
    }


def ring(rng: np.random.Generator, style: dict, size: int, light: Light):
    u, v, scale = lay(rng, size)
    bend = rng.uniform(0.97, 1.03)
    sdf = np.abs(disc(u * np.float32(bend), v / np.float32(bend), style["radius"])) - np.float32(style["tube"])
    base = style["base"] * (1 + 0.03 * fractal(rng, size, 24, 3))[..., None]
    alpha = cover(sdf, size, scale)
    part = shade(base, dome(sdf, style["tube"], 0.9), light, style["gloss"], 18)
    return place(ground(rng, style, size), part, alpha, light, style, style["tube"]), alpha


def hex_nut_style(rng: np.random.Generator) -> dict:
    radius = rng.uniform(0.5, 0.68)
    return {
        "metal": metal(rng),
        "radius": radius,
        "bore": radius * rng.uniform(0.45, 0.65),
        "corner": rng.uniform(0.02, 0.08),
        "chamfer": rng.uniform(0.04, 0.1),
        "threads": rng.uniform(2.5, 5),
        "brush": rng.uniform(0.02, 0.06),
        "sweep": rng.uniform(0.05, 0.25),
        "gloss": rng.uniform(0.2, 0.5),
    }


def hex_nut(rng: np.random.Generator, style: dict, size: int, light: Light):
    u, v, scale = lay(rng, size)
    outside = hexagon(u, v, style["radius"], style["corner"])
    hole = disc(u, v, style["bore"])
    rim = disc(u, v, style["radius"] * 1.02)
    height = dome(outside, 0.03) - np.maximum(rim, 0) * np.float32(0.7) + dome(-hole, style["chamfer"], 0.8)
    base = style["metal"] * (brushed(rng, u, v, style["brush"]) * sweep(u, v, light, style["sweep"]))[..., None]
    base = base * (1 + 0.02 * fractal(rng, size, 12, 3))[..., None]
    top = shade(base, height, light, style["gloss"])
    lx, ly, _ = light.direction
    depth = np.maximum(-hole, 0) / np.float32(style["bore"])
    thread = 0.3 + 0.25 * np.cos(depth * np.float32(2 * PI * style["threads"] * 2.5))
    facing = 0.6 - 0.5 * (u * lx + v * ly) / np.float32(style["bore"])
    wall = style["metal"] * (thread * np.clip(facing, 0.1, 1.2))[..., None]
    below = ground(rng, style, size)
    alpha = cover(outside, size, scale)
    clear = cover(disc(u, v, style["bore"] * 0.8), size, scale)
    scene = place(below, over(top, wall, cover(hole, size, scale)), alpha, light, style, 0.14)
    scene = over(scene, below * np.float32(0.75), clear)
    return scene, alpha * (1 - clear)


def gear_style(rng: np.random.Generator) -> dict:
    radius = rng.uniform(0.58, 0.75)
    return {
        "metal": metal(rng) if rng.random() < 0.7 else color(rng.random(), rng.uniform(0, 0.5), rng.uniform(0.4, 0.9)),
        "radius": radius,
        "teeth": int(rng.integers(10, 32)),
        "depth": radius * rng.uniform(0.1, 0.18),
        "bore": radius * rng.uniform(0.15, 0.3),
        "holes": int(rng.choice([0, 3, 4, 5, 6])),
        "web": rng.uniform(0.0, 0.03),
        "brush": rng.uniform(0.02, 0.05),
        "sweep": rng.uniform(0.05, 0.25),
        "gloss": rng.uniform(0.15, 0.45),
    }


def gear(rng: np.random.Generator, style: dict, size: int, light: Light):
    u, v, scale = lay(rng, size)
    theta = np.arctan2(v, u)
    wave = np.cos(theta * np.float32(style["teeth"])) * np.float32(1.8)
    tooth = np.float32(style["depth"] / 2) * np.clip(wave, -1, 1)
    radius = np.sqrt(u * u + v * v)
    outside = radius - np.float32(style["radius"]) - tooth
    sdf = np.maximum(outside, np.float32(style["bore"]) - radius)
    root = style["radius"] - style["depth"] * 1.4
    hub = style["bore"] * 1.7
    if style["holes"]:
        sector = np.float32(2 * PI / style["holes"])
        local = (theta / sector - np.round(theta / sector)) * sector
        at, hole = (root + hub) / 2, (root - hub) * 0.3
        sdf = np.maximum(sdf, -disc(radius * np.cos(local) - np.float32(at), radius * np.sin(local), hole))
    web = step(hub, hub + 0.03, radius) * step(root, root - 0.03, radius)
    height = dome(sdf, 0.025) - web * np.float32(style["web"])
    base = style["metal"] * (brushed(rng, u, v, style["brush"]) * sweep(u, v, light, style["sweep"]))[..., None]
    base = base * (1 + 0.02 * fractal(rng, size, 12, 3))[..., None]
    alpha = cover(sdf, size, scale)
    return place(ground(rng, style, size), shade(base, height, light, style["gloss"]), alpha, light, style, 0.1), alpha


def screw_style(rng: np.random.Generator) -> dict:
    shank = rng.uniform(0.08, 0.14)
    return {
        "metal": metal(rng),
        "shank": shank,
        "head": shank * rng.uniform(1.7, 2.4),
        "head_length": rng.uniform(0.1, 0.22),
        "countersunk": bool(rng.random() < 0.5),
        "length": rng.uniform(1.15, 1.6),
        "pitch": rng.uniform(0.05, 0.085),
        "thread": shank * rng.uniform(0.15, 0.28),
        "plain": rng.uniform(0.0, 0.35),
        "tip": rng.uniform(0.08, 0.3),
        "gloss": rng.uniform(0.3, 0.6),
    }


def screw(rng: np.random.Generator, style: dict, size: int, light: Light):
    u, v, scale = lay(rng, size)
    start = -style["length"] / 2
    at = u - np.float32(start)
    roll = rng.uniform(0, 2 * PI)
    head, neck = style["head_length"], style["head_length"] + style["plain"]
    turn = (at * np.float32(1 / style["pitch"]) + v * np.float32(0.35 / style["shank"])) * np.float32(2 * PI) + roll
    radius = style["shank"] + style["thread"] * np.cos(turn) * step(neck, neck + 0.04, at)
    radius = radius * step(style["length"] + 0.02, style["length"] - style["tip"], at) ** np.float32(0.7)
    if style["countersunk"]:
        cap = style["head"] + (style["shank"] - style["head"]) * np.clip(at / np.float32(head), 0, 1)
    else:
        cap = style["head"] * np.sqrt(np.clip(1 - (1 - np.clip(at / np.float32(head), 0, 1)) ** 3, 0, 1))
    radius = np.where(at < head, cap, radius)
    sdf = np.maximum(np.abs(v) - radius, np.maximum(-at, at - np.float32(style["length"])))
    height = np.sqrt(np.maximum(radius * radius - v * v, 0)) * np.float32(0.8)
    gleam = 1 + 0.25 * np.cos(v / np.maximum(radius, 0.01) * 5 + 0.6) + 0.03 * fractal(rng, size, 16, 3)
    alpha = cover(sdf * np.float32(0.8), size, scale)
    part = shade(style["metal"] * gleam[..., None], height, light, style["gloss"], 14)
    return place(ground(rng, style, size), part, alpha, light, style, 0.12), alpha


def bottle_mouth_style(rng: np.random.Generator) -> dict:
    outer = rng.uniform(0.68, 0.85)
    glass = color(rng.choice([0.08, 0.3, 0.55, rng.random()]), rng.uniform(0.2, 0.7), rng.uniform(0.25, 0.6))
    return {
        "glass": glass,
        "outer": outer,
        "wall": outer * rng.uniform(0.12, 0.24),
        "neck": outer * rng.uniform(0.45, 0.62),
        "inside": rng.uniform(0.03, 0.2),
        "gloss": rng.uniform(0.4, 0.8),
        "rings": rng.uniform(0.1, 0.3),
        "ground": color(
            rng.random(), rng.uniform(0, 0.1), rng.choice([rng.uniform(0.05, 0.2), rng.uniform(0.85, 0.97)])
        ),
        "ground_grain": 0.0,
    }


def bottle_mouth(rng: np.random.Generator, style: dict, size: int, light: Light):
    u, v, scale = lay(rng, size, shift=0.03)
    radius = np.sqrt(u * u + v * v)
    outer, wall, neck = style["outer"], style["wall"], style["neck"]
    body = radius - np.float32(outer)
    lip = np.abs(radius - np.float32(outer - wall * 0.5)) - np.float32(wall * 0.5)
    inner = np.abs(radius - np.float32(neck)) - np.float32(wall * 0.25)
    height = dome(lip, wall * 0.5, 0.9) + dome(inner, wall * 0.25, 0.7)
    depth = np.clip(radius / np.float32(outer - wall), 0, 1)
    waves = (
        np.cos(radius * np.float32(rng.uniform(0.99, 1.01) * 40))
        * np.float32(style["rings"])
        * step(neck, outer, radius)
    )
    bright = style["inside"] + (1 - style["inside"]) * step(neck * 0.6, outer - wall * 0.2, radius) + 0.25 * waves
    bright = bright * (0.75 + 0.25 * depth)
    lx, ly, _ = light.direction
    angle = (u * lx + v * ly) / (radius * np.float32(np.hypot(lx, ly)) + 1e-3)
    streak = step(0.75, 0.97, angle) + 0.5 * step(0.85, 0.98, -angle)
    base = style["glass"] * (bright * (1 + 0.015 * fractal(rng, size, 8, 3)))[..., None]
    part = shade(base, height, light, style["gloss"], 30)
    part = part + (streak * step(-0.01, -wall * 0.4, lip) * np.float32(0.35 * style["gloss"]))[..., None]
    alpha = cover(body, size, scale)
    return place(ground(rng, style, size), part, alpha, light, style, 0.05), alpha


def circuit_board_style(rng: np.random.Generator) -> dict:
    chips = [
        (rng.uniform(-0.45, 0.45), rng.uniform(-0.4, 0.4), rng.uniform(0.1, 0.2), rng.uniform(0.08, 0.18))
        for _ in range(rng.integers(2, 4))
    ]
    small = [
        (rng.uniform(-0.65, 0.65), rng.uniform(-0.5, 0.5), *rng.permutation([0.045, 0.025]), rng.integers(3))
        for _ in range(rng.integers(4, 8))
    ]
    points = rng.uniform(-1, 1, (int(rng.integers(8, 14)), 2)) * (0.7, 0.5)
    return {
        "board": color(rng.choice([0.38, 0.38, 0.6, 0.0]), rng.uniform(0.5, 0.8), rng.uniform(0.2, 0.45)),
        "width": rng.uniform(0.72, 0.84),
        "height": rng.uniform(0.52, 0.7),
        "copper": color(rng.choice([0.12, 0.38]), rng.uniform(0.3, 0.6), rng.uniform(0.4, 0.8)),
        "chips": chips,
        "small": small,
        "traces": points,
        "pitch": rng.uniform(0.035, 0.06),
    }


def _window(u, v, x: float, y: float, reach_u: float, reach_v: float) -> tuple[slice, slice]:
    """Finds the rows and columns within reach of a point, where small details are drawn."""
    near = (np.abs(u - np.float32(x)) < reach_u) & (np.abs(v - np.float32(y)) < reach_v)
    rows, columns = np.flatnonzero(near.any(1)), np.flatnonzero(near.any(0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def circuit_board(rng: np.random.Generator, style: dict, size: int, light: Light):
    u, v, scale = lay(rng, size, turn=0.06, shift=0.03, zoom=0.02)
    width, tall = style["width"], style["height"]
    sdf = box(u, v, width, tall, 0.04)
    au, av = np.abs(u) - np.float32(width - 0.09), np.abs(v) - np.float32(tall - 0.09)
    bore = disc(au, av, 0.04)
    tracks = np.full_like(u, 9.0)
    pads = np.full_like(u, 9.0)
    for (x0, y0), (x1, y1) in zip(style["traces"][:-1], style["traces"][1:], strict=True):
        for x, y, reach_u, reach_v in (
            ((x0 + x1) / 2, y0, abs(x1 - x0) / 2, 0.0),
            (x1, (y0 + y1) / 2, 0.0, abs(y1 - y0) / 2),
        ):
            part = _window(u, v, x, y, reach_u + 0.04, reach_v + 0.04)
            tracks[part] = np.minimum(
                tracks[part], box(u[part] - np.float32(x), v[part] - np.float32(y), reach_u, reach_v)
            )
        part = _window(u, v, x0, y0, 0.06, 0.06)
        pads[part] = np.minimum(pads[part], disc(u[part] - np.float32(x0), v[part] - np.float32(y0), 0.03))
    base = over(
        paint(size, style["board"]), style["copper"] * np.float32(0.8), cover(tracks - np.float32(0.011), size)
    )
    base = over(
        base, style["copper"] * np.float32(1.2), cover(np.abs(pads + np.float32(0.008)) - np.float32(0.009), size)
    )
    height = dome(sdf, 0.015)
    silver, pitch = np.array([0.75, 0.76, 0.78], np.float32), np.float32(style["pitch"])
    for x, y, half_w, half_h in style["chips"]:
        part = _window(u, v, x, y, half_w + 0.1, half_h + 0.1)
        a, b, patch = u[part] - np.float32(x), v[part] - np.float32(y), base[part]
        chip = box(a, b, half_w, half_h, 0.01)
        comb = np.abs(a / pitch - np.round(a / pitch)) * pitch
        pins = np.maximum(comb - np.float32(0.012), box(a, b, half_w - 0.02, half_h + 0.045))
        patch = over(patch, silver, cover(pins, size)) * (0.6 + 0.4 * step(0.0, 0.05, chip))[..., None]
        patch = over(patch, color(0.6, 0.1, 0.13), cover(chip, size))
        mark = disc(a + np.float32(half_w - 0.035), b + np.float32(half_h - 0.035), 0.014)
        base[part] = over(patch, np.float32(0.3), cover(mark, size))
        height[part] += dome(chip, 0.02)
    for x, y, half_w, half_h, kind in style["small"]:
        part = _window(u, v, x, y, half_w + 0.03, half_h + 0.03)
        a, b = u[part] - np.float32(x), v[part] - np.float32(y)
        body = box(a, b, half_w, half_h, 0.006)
        cap = np.maximum(body, np.float32(max(half_w, half_h) * 0.6) - np.abs(a if half_w > half_h else b))
        tone = (color(0.09, 0.45, 0.6), color(0.6, 0.1, 0.12), color(0.1, 0.15, 0.8))[int(kind)]
        base[part] = over(over(base[part], tone, cover(body, size)), silver, cover(cap, size))
        height[part] += dome(body, 0.015)
    alpha = cover(sdf, size, scale) * (1 - cover(bore, size, scale))
    part = shade(base * (1 + 0.02 * fractal(rng, size, 40, 3))[..., None], height, light, 0.15, 20)
    ring_pad = cover(bore - np.float32(0.02), size)
    part = over(part, style["copper"] * np.float32(1.1), ring_pad)
    return place(ground(rng, style, size), part, alpha, light, style, 0.05), alpha
