"""Synthetic parts, second half: molded, baked, pressed and painted parts."""

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
    segment,
    shade,
    shadow,
    smooth_noise,
    step,
    wobble,
)
from .objects import (
    bottle_mouth,
    bottle_mouth_style,
    circuit_board,
    circuit_board_style,
    gear,
    gear_style,
    ground,
    hex_nut,
    hex_nut_style,
    lay,
    place,
    ring,
    ring_style,
    screw,
    screw_style,
    washer,
    washer_style,
)

PI = float(np.pi)


def capsule_style(rng: np.random.Generator) -> dict:
    hue = rng.random()
    return {
        "left": color(hue, rng.uniform(0.2, 0.9), rng.uniform(0.3, 0.9)),
        "right": color(hue + rng.uniform(0.1, 0.9), rng.choice([0.05, rng.uniform(0.2, 0.9)]), rng.uniform(0.4, 0.95)),
        "length": rng.uniform(0.5, 0.62),
        "radius": rng.uniform(0.19, 0.27),
        "joint": rng.uniform(-0.1, 0.1),
        "gloss": rng.uniform(0.3, 0.6),
        "print": rng.uniform(0.0, 0.6),
        "bars": rng.uniform(0.3, 1, 5) > 0.55,
    }


def capsule(rng: np.random.Generator, style: dict, size: int, light: Light):
    u, v, scale = lay(rng, size, turn=0.5)
    radius = style["radius"]
    cap = u < style["joint"]
    local = np.where(cap, np.float32(radius * 1.05), np.float32(radius))
    sdf = segment(u, v, (-style["length"], 0), (style["length"], 0)) - local
    base = over(paint(size, style["right"]), style["left"], cover(u - np.float32(style["joint"]), size, scale))
    for index, wide in enumerate(style["bars"]):
        glyph = box(u - np.float32(0.12 + 0.085 * index), v, 0.028 if wide else 0.012, 0.06, 0.008)
        base = over(base, color(0.6, 0.3, 0.2), cover(glyph, size, scale) * np.float32(style["print"]))
    rim = np.abs(u - np.float32(style["joint"]))
    base = base * (1 - 0.25 * step(0.02, 0.0, rim) + 0.015 * fractal(rng, size, 10, 3))[..., None]
    alpha = cover(sdf, size, scale)
    part = shade(base, dome(sdf, radius, 0.85), light, style["gloss"], 26)
    return place(ground(rng, style, size), part, alpha, light, style, radius * 0.6), alpha


def tablet_style(rng: np.random.Generator) -> dict:
    return {
        "base": color(
            rng.random(), rng.choice([rng.uniform(0, 0.12), rng.uniform(0.2, 0.7)]), rng.uniform(0.65, 0.95)
        ),
        "speck": color(rng.random(), rng.uniform(0.2, 0.8), rng.uniform(0.2, 0.7)),
        "specks": rng.choice([0.0, rng.uniform(0.3, 0.8)]),
        "half": (rng.uniform(0.5, 0.7), rng.uniform(0.34, 0.5)),
        "round": bool(rng.random() < 0.4),
        "score": bool(rng.random() < 0.6),
        "gloss": rng.uniform(0.05, 0.3),
        "turn": rng.choice([0.3, PI]),
    }


def tablet(rng: np.random.Generator, style: dict, size: int, light: Light):
    u, v, scale = lay(rng, size, turn=style["turn"])
    half_w, half_h = style["half"]
    sdf = disc(u, v, half_w * 0.9) if style["round"] else box(u, v, half_w, half_h, half_h * 0.98)
    height = dome(sdf, half_h * 0.7, 0.5)
    if style["score"]:
        height = height - 0.03 * step(0.035, 0.0, np.abs(u)) * step(-0.04, -0.08, sdf)
    spots = step(2.0, 2.5, smooth_noise(rng, size, 70)) * np.float32(style["specks"])
    base = over(paint(size, style["base"]), style["speck"], spots)
    base = base * (1 + 0.015 * fractal(rng, size, 60, 2))[..., None]
    alpha = cover(sdf, size, scale)
    part = shade(base, height, light, style["gloss"], 18)
    return place(ground(rng, style, size), part, alpha, light, style, 0.12), alpha


def biscuit_style(rng: np.random.Generator) -> dict:
    hue, value = rng.uniform(0.05, 0.11), rng.uniform(0.45, 0.85)
    return {
        "dough": color(hue, rng.uniform(0.35, 0.65), value),
        "baked": color(hue - 0.02, rng.uniform(0.5, 0.75), value * rng.uniform(0.5, 0.75)),
        "chip": color(rng.uniform(0.0, 0.08), rng.uniform(0.2, 0.6), rng.uniform(0.08, 0.25)),
        "radius": rng.uniform(0.52, 0.74),
        "irregular": rng.uniform(0.015, 0.045),
        "chips": int(rng.integers(6, 18)),
        "chip_size": rng.uniform(0.05, 0.1),
        "crumb": rng.uniform(0.006, 0.016),
        "ground": color(rng.random(), rng.uniform(0, 0.3), rng.uniform(0.08, 0.32)),
        "ground_grain": rng.uniform(0.08, 0.25),
        "ground_cells": rng.uniform(50, 128),
    }


def biscuit(rng: np.random.Generator, style: dict, size: int, light: Light):
    u, v, scale = lay(rng, size)
    theta = np.arctan2(v, u)
    radius = np.sqrt(u * u + v * v)
    outline = style["radius"] + wobble(rng, theta, 7, style["irregular"])
    rough = fractal(rng, size, 28, 3, 0.6)
    sdf = radius - outline + rough * np.float32(0.004)
    lumps = fractal(rng, size, 9, 4, 0.6)
    height = dome(sdf, 0.3, 0.35) + lumps * np.float32(style["crumb"]) + rough * np.float32(style["crumb"] * 0.35)
    toast = np.clip(step(-0.3, 0.0, sdf) * 0.6 + 0.16 * lumps, 0, 1)
    base = over(paint(size, style["dough"]), style["baked"], toast) * (1 + 0.05 * rough)[..., None]
    chips = np.full_like(u, 9.0)
    for _ in range(style["chips"] + int(rng.integers(-1, 2))):
        away, angle = style["radius"] * 0.85 * np.sqrt(rng.random()), rng.uniform(-PI, PI)
        a, b = u - np.float32(away * np.cos(angle)), v - np.float32(away * np.sin(angle))
        stretch, lean = rng.uniform(0.8, 1.5), rng.uniform(-0.5, 0.5)
        chip = np.sqrt((a + lean * b) ** 2 + (b * stretch) ** 2) - style["chip_size"] * rng.uniform(0.6, 1.2)
        chips = np.minimum(chips, chip)
    chips = chips + rough * np.float32(0.008)
    base = base * (0.8 + 0.2 * step(0.0, 0.04, chips))[..., None]
    base = over(base, style["chip"] * (1 + 0.15 * lumps)[..., None], cover(chips, size, scale))
    height = height + dome(chips, style["chip_size"] * 0.6, 0.6)
    alpha = cover(sdf, size, scale)
    part = shade(base, height, light, 0.06, 10)
    return place(ground(rng, style, size), part, alpha, light, style, 0.09), alpha


def hanging_plate_style(rng: np.random.Generator) -> dict:
    return {
        "paint": color(rng.random(), rng.uniform(0.0, 0.8), rng.uniform(0.2, 0.9)),
        "half": (rng.uniform(0.2, 0.34), rng.uniform(0.38, 0.52)),
        "corner": rng.choice([0.02, rng.uniform(0.05, 0.2)]),
        "hole": rng.uniform(0.04, 0.07),
        "tab": rng.uniform(0.0, 0.12),
        "extra": int(rng.integers(0, 3)),
        "orange_peel": rng.uniform(0.0001, 0.0007),
        "gloss": rng.uniform(0.1, 0.4),
        "wire": color(0.1, rng.uniform(0, 0.3), rng.uniform(0.15, 0.5)),
        "wire_radius": rng.uniform(0.014, 0.025),
        "ground": color(0.6, rng.uniform(0, 0.06), rng.uniform(0.45, 0.75)),
        "ground_grain": rng.choice([0.0, rng.uniform(0.005, 0.03)]),
    }


def hanging_plate(rng: np.random.Generator, style: dict, size: int, light: Light):
    half_w, half_h = style["half"]
    angle, scale = rng.normal(0, 0.22), rng.uniform(0.9, 1.1)
    pivot = np.array([rng.normal(0, 0.1), rng.uniform(-0.55, -0.4)])
    u, v = frame(size, pivot, angle, scale)
    yaw = np.float32(np.cos(rng.normal(0, 0.35)))
    u, v = u / yaw, v - np.float32(half_h - 0.11)
    sdf = box(u, v, half_w, half_h, min(style["corner"], half_w * 0.9))
    if style["tab"] > 0.04:
        sdf = np.minimum(sdf, disc(u, v + np.float32(half_h - 0.06), 0.06 + style["tab"]))
    hole = disc(u, v + np.float32(half_h - 0.11), style["hole"])
    solid = np.maximum(sdf, -hole)
    for index in range(style["extra"]):
        solid = np.maximum(solid, -disc(u, v - np.float32((index + 1) * half_h * 0.45 - 0.1), style["hole"] * 1.3))
    peel = fractal(rng, size, 70, 2, 0.6)
    base = style["paint"] * (1 + 0.01 * fractal(rng, size, 4, 3))[..., None]
    part = shade(base, dome(solid, 0.02) + peel * np.float32(style["orange_peel"]), light, style["gloss"], 16)
    part = part * np.float32(1 + rng.normal(0, 0.05))
    x, y = frame(size, pivot)
    wall = ground(rng, style, size) * (1 - 0.06 * y + 0.05 * x)[..., None]
    reach = rng.uniform(0.03, 0.07)
    bends = [
        (reach, style["hole"] * 0.3),
        (-0.02, -style["hole"] * 0.2),
        (rng.normal(0, 0.06), -0.25),
        (rng.normal(0, 0.15), -1.3),
    ]
    wires = [segment(x, y, one, two) for one, two in zip(bends[:-1], bends[1:], strict=True)]
    radius = style["wire_radius"]
    front = np.minimum(wires[0], wires[1]) - np.float32(radius)
    whole = np.minimum(front, wires[2] - np.float32(radius))
    wire = shade(paint(size, style["wire"]), dome(whole, radius), light, 0.4, 10)
    alpha = cover(solid, size, scale * float(yaw))
    scene = shadow(wall, np.maximum(alpha, cover(whole, size)), light, 0.2, style["shadow"] * 0.6)
    behind = cover(np.minimum(wires[1], wires[2]) - np.float32(radius), size)
    scene = over(scene, wire, behind)
    scene = over(scene, part, alpha)
    hook = cover(wires[1] - np.float32(radius), size)
    return over(scene, wire, hook), alpha * (1 - hook)


def button_style(rng: np.random.Generator) -> dict:
    return {
        "base": color(rng.random(), rng.uniform(0, 0.7), rng.uniform(0.15, 0.9)),
        "radius": rng.uniform(0.55, 0.75),
        "rim": rng.uniform(0.08, 0.16),
        "holes": int(rng.choice([2, 4])),
        "hole": rng.uniform(0.05, 0.09),
        "spread": rng.uniform(0.13, 0.2),
        "pearl": rng.uniform(0.0, 0.08),
        "gloss": rng.uniform(0.2, 0.5),
    }


def button(rng: np.random.Generator, style: dict, size: int, light: Light):
    u, v, scale = lay(rng, size)
    body = disc(u, v, style["radius"])
    spread = style["spread"]
    a = np.abs(u) - np.float32(spread)
    b = np.abs(v) - np.float32(spread) if style["holes"] == 4 else v
    hole = disc(a, b, style["hole"])
    sdf = np.maximum(body, -hole)
    dish = step(-style["rim"], -style["rim"] - 0.08, body)
    height = dome(body, style["rim"], 0.6) - dish * np.float32(0.05) + dome(-hole, 0.02)
    swirl = fractal(rng, size, 5, 3)
    base = style["base"] * (1 + np.float32(style["pearl"]) * swirl)[..., None]
    alpha = cover(sdf, size, scale)
    return place(
        ground(rng, style, size), shade(base, height, light, style["gloss"], 22), alpha, light, style, 0.06
    ), alpha


OBJECT_DRAWERS = {
    "bottle_mouth": (bottle_mouth_style, bottle_mouth),
    "hex_nut": (hex_nut_style, hex_nut),
    "washer": (washer_style, washer),
    "screw": (screw_style, screw),
    "gear": (gear_style, gear),
    "capsule": (capsule_style, capsule),
    "tablet": (tablet_style, tablet),
    "circuit_board": (circuit_board_style, circuit_board),
    "ring": (ring_style, ring),
    "button": (button_style, button),
    "biscuit": (biscuit_style, biscuit),
    "hanging_plate": (hanging_plate_style, hanging_plate),
}
