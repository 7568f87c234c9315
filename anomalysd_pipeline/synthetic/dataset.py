"""Pictures of synthetic parts, normal and defective: single ones, or a folder in MVTec-AD's layout."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from .canvas import finish, sample_light, sample_setup
from .defects import DEFECTS, apply_defect
from .objects import ground_style
from .organics import OBJECT_DRAWERS
from .surfaces import surface
from .textures import TEXTURE_DRAWERS

TEXTURES: tuple[str, ...] = tuple(TEXTURE_DRAWERS)
OBJECTS: tuple[str, ...] = tuple(OBJECT_DRAWERS)
FAMILIES: tuple[str, ...] = TEXTURES + OBJECTS
UNSEEN: tuple[str, ...] = ("perforated_sheet", "gear", "capsule")

_DRAWERS = {**TEXTURE_DRAWERS, **OBJECT_DRAWERS}
_STYLE, _NORMAL, _TEST_GOOD, _TEST_DEFECTIVE = range(4)
_SMALLEST = 16


@dataclass(frozen=True)
class Sample:
    """Holds a picture and its ground truth.

    Attributes:
        image: uint8 [S, S, 3], RGB.
        mask: bool [S, S], True on the defect; all False on a normal picture.
        foreground: bool [S, S], True on the part; all True for textures.
        family: one of `FAMILIES`, or "surface".
        defect: one of `DEFECTS`, or None on a normal picture.
    """

    image: np.ndarray
    mask: np.ndarray
    foreground: np.ndarray
    family: str
    defect: str | None


def sample_style(family: str, rng: np.random.Generator) -> dict:
    """Draws a product of a family: colors, proportions and counts, its ground and inspection station.

    Raises:
        ValueError: the family is unknown.
    """
    _check_family(family)
    style = {"family": family, **sample_setup(rng)}
    if family in OBJECT_DRAWERS:
        style |= ground_style(rng)
    return style | _DRAWERS[family][0](rng)


def draw_normal(family: str, rng: np.random.Generator, size: int = 256, style: dict | None = None) -> Sample:
    """Draws a normal picture of a family.

    Args:
        family: one of `FAMILIES`.
        rng: the only source of chance: equal states give bit-equal pictures.
        size: height and width in pixels, at least 16.
        style: a product from `sample_style`; None draws one first.

    Raises:
        ValueError: the family is unknown, the size too small, or the style that of another family.
    """
    _check_family(family)
    _check_size(size)
    if style is None:
        style = sample_style(family, rng)
    if style["family"] != family:
        raise ValueError(
            f"`style` belongs to the family {style['family']!r}; it must come from sample_style({family!r}, rng)."
        )
    light = sample_light(rng, style)
    scene, alpha = _DRAWERS[family][1](rng, style, size, light)
    return _photo(scene, alpha, light, rng, family)


def draw_surface(rng: np.random.Generator, size: int = 256) -> Sample:
    """Draws a normal picture of the family "surface": a random pattern, or a random body on a pattern.

    Raises:
        ValueError: the size is below 16.
    """
    _check_size(size)
    light = sample_light(rng, sample_setup(rng))
    scene, alpha = surface(rng, size, light)
    return _photo(scene, alpha, light, rng, "surface")


def draw_defective(
    family: str, rng: np.random.Generator, size: int = 256, defect: str | None = None, style: dict | None = None
) -> Sample:
    """Draws a picture with one defect on the part.

    The picture without its defect is `draw_normal(family, rng, size, style)` from the same state of `rng`; the two are
    bit-equal outside the mask.

    Args:
        family, rng, size, style: as for `draw_normal`.
        defect: one of `DEFECTS`; None draws one.

    Raises:
        ValueError: the family or defect is unknown, the size too small, or the style that of another family.
    """
    _check_defect(defect)
    normal = draw_normal(family, rng, size, style)
    image, mask, defect = apply_defect(normal.image, normal.foreground, rng, defect)
    return Sample(image, mask, normal.foreground, family, defect)


def normal_images(family: str, count: int, seed: int, size: int = 256) -> list[Image.Image]:
    """Draws `count` normal pictures (RGB) of a seed's product; a larger count only adds pictures.

    Raises:
        ValueError: the family is unknown, the count negative, or the size too small.
    """
    style = _product(family, seed)
    _check_count("count", count)
    return [
        Image.fromarray(draw_normal(family, _stream(family, seed, _NORMAL, index), size, style).image)
        for index in range(count)
    ]


def test_samples(family: str, good: int, defective: int, seed: int, size: int = 256) -> list[Sample]:
    """Draws test pictures of the product of `normal_images(family, ..., seed)`, good before defective.

    None of them is among the normal images. The defects take turns in the order of `DEFECTS`.

    Raises:
        ValueError: the family is unknown, a count negative, or the size too small.
    """
    style = _product(family, seed)
    _check_count("good", good)
    _check_count("defective", defective)
    normal = [draw_normal(family, _stream(family, seed, _TEST_GOOD, index), size, style) for index in range(good)]
    broken = [
        draw_defective(
            family, _stream(family, seed, _TEST_DEFECTIVE, index), size, DEFECTS[index % len(DEFECTS)], style
        )
        for index in range(defective)
    ]
    return normal + broken


test_samples.__test__ = False


def write_dataset(
    out: str | Path,
    families: Iterable[str] = FAMILIES,
    train: int = 4,
    good: int = 8,
    defective: int = 8,
    seed: int = 0,
    size: int = 256,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Writes synthetic families as PNG files in the layout of MVTec-AD.

    The folders are `<family>/train/good`, `<family>/test/good`, `<family>/test/<defect>` and, for masks of 0 and 255,
    `<family>/ground_truth/<defect>`; the files in each are numbered from 000.

    Args:
        out: folder of the data set.
        families: families to draw, from `FAMILIES`.
        train, good, defective: pictures of each family for training, and normal and defective ones for testing.
        seed: stands for the products.
        size: height and width in pixels, at least 16.
        progress: called with a family's name when its pictures are written.

    Raises:
        ValueError: a family is unknown, a count negative, the size too small, or `out` already has files under a
            family's name.
    """
    out, families = Path(out), list(families)
    for family in families:
        _check_family(family)
        folder = out / family
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"`out` already holds {folder}; give an empty folder or one without these families.")
    for name, count in (("train", train), ("good", good), ("defective", defective)):
        _check_count(name, count)
    _check_size(size)
    for family in families:
        for index, image in enumerate(normal_images(family, train, seed, size)):
            _write(image, out / family / "train" / "good", f"{index:03d}.png")
        written: dict[str, int] = {}
        for sample in test_samples(family, good, defective, seed, size):
            kind = sample.defect or "good"
            index = written.get(kind, 0)
            written[kind] = index + 1
            _write(Image.fromarray(sample.image), out / family / "test" / kind, f"{index:03d}.png")
            if sample.defect is not None:
                mask = Image.fromarray(sample.mask.astype(np.uint8) * 255)
                _write(mask, out / family / "ground_truth" / kind, f"{index:03d}_mask.png")
        if progress is not None:
            progress(family)


def _photo(scene, alpha, light, rng, family: str) -> Sample:
    size = len(scene)
    foreground = np.ones((size, size), bool) if alpha is None else alpha > 0.5
    return Sample(finish(scene, light, rng), np.zeros((size, size), bool), foreground, family, None)


def _write(image: Image.Image, folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    image.save(folder / name)


def _stream(family: str, seed: int, purpose: int, index: int = 0) -> np.random.Generator:
    """Makes the random generator of one picture, independent of the number of other pictures."""
    return np.random.default_rng([seed, zlib.crc32(family.encode()), purpose, index])


def _product(family: str, seed: int) -> dict:
    _check_family(family)
    return sample_style(family, _stream(family, seed, _STYLE))


def _check_family(family: str) -> None:
    if family not in _DRAWERS:
        raise ValueError(f"`family` is {family!r}; it must be one of {', '.join(FAMILIES)}.")


def _check_defect(defect: str | None) -> None:
    if defect is not None and defect not in DEFECTS:
        raise ValueError(f"`defect` is {defect!r}; it must be one of {', '.join(DEFECTS)}.")


def _check_size(size: int) -> None:
    if size < _SMALLEST:
        raise ValueError(f"`size` is {size}; it must be at least {_SMALLEST} pixels.")


def _check_count(name: str, count: int) -> None:
    if count < 0:
        raise ValueError(f"`{name}` is {count}; it must be 0 or more.")
