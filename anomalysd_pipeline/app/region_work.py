"""Work of the box in which a visitor draws a part's region of interest, without its components."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from PIL import Image

from .model import Carried, Knowledge, own_pipeline
from .sessions import Session
from .space import is_zero_gpu, on_gpu
from .turns import Turns
from .work import check_part, only_lesson, own_turn

SMALLEST = 0.02
"""Least share of width and of height that a region must span."""


def polygon(corners: object) -> list[tuple[float, float]] | None:
    """Makes a polygon of the corners that a visitor has set; None for none: the whole picture.

    Args:
        corners: pairs (x, y), shares of width and height in [0, 1]; two are opposite corners of a rectangle.

    Raises:
        ValueError: they are no such list, a single corner, or span less than `SMALLEST`.
    """
    from ..data.region import MOST_POINTS

    if corners in (None, []):
        return None
    if not isinstance(corners, list) or not 2 <= len(corners) <= MOST_POINTS:
        raise ValueError("`region` must be a list of 2 or more corners (x, y), or empty for the whole picture.")
    for corner in corners:
        numbers = isinstance(corner, list) and len(corner) == 2 and all(type(v) in (int, float) for v in corner)
        if not numbers or not all(0 <= value <= 1 for value in corner):
            raise ValueError("`region` must have corners (x, y) that are shares of width and height, from 0 to 1.")
    if any(max(values) - min(values) < SMALLEST for values in zip(*corners, strict=True)):
        raise ValueError("`region` is too small to hold a part; set its corners farther apart.")
    if len(corners) == 2:
        (left, top), (right, bottom) = corners
        corners = [[left, top], [right, top], [right, bottom], [left, bottom]]
    return [tuple(corner) for corner in corners]


def good_pictures(session: Session, part: str) -> list[Image.Image]:
    """Returns the good pictures of a part, as they were uploaded or as its file holds them; none where not kept."""
    from ..data.tensors import to_pil

    held = session.parts.get(part)
    if held is not None and held.pictures:
        return list(held.pictures)
    shots = session.pipe.bank.shots(part)
    sizes = [] if shots is None else shots.sizes.tolist()
    return [to_pil(shots.copy(number), size) for number, size in enumerate(sizes)]


def set_region(session: Session, turns: Turns, part: str | None, corners: object) -> dict:
    """Sets a part's region of interest and, from its good pictures, its threshold anew; all or nothing.

    Args:
        session: the visitor's, with the pipeline that learns.
        turns: turns of all visitors; the work gives way between pictures.
        part: a part that this session knows.
        corners: see `polygon`.

    Returns:
        The part's calibration record.

    Raises:
        ValueError: for a part that was not taught or whose good pictures are not kept, bad corners, while a part is
            being taught, or a session that has ended.
    """
    region, part, cancel = polygon(corners), check_part(part, session), threading.Event()
    with session.in_use(), own_turn(session), only_lesson(session, cancel):
        pipe = session.pipe
        if part not in pipe.categories:
            raise ValueError("`part` must be one that you have taught; teach it first.")
        if pipe.bank.shots(part) is None or pipe.config.categories[part].get("tile_size"):
            raise ValueError("`part` must be one whose good pictures are kept, and whole; teach it here.")

        def step(*_) -> None:
            turns.give_way()
            if cancel.is_set() or session.dropped:
                raise ValueError("Canceled. The region is as it was.")

        given = Carried(pipe), part, region, good_pictures(session, part)
        if is_zero_gpu():
            knowledge = set_region_on_gpu(*given)
        else:
            with turns.turn():
                knowledge = set_region_on_gpu(*given, step)
        with session.lock:
            knowledge.give(pipe)
        return pipe.config.categories[part]["calibration"]


@on_gpu(lambda *_: 40)
def set_region_on_gpu(
    carried: Carried,
    part: str,
    region: list | None,
    pictures: Sequence[Image.Image],
    step: Callable[[int, int], object] | None = None,
) -> Knowledge:
    """Sets the region and the threshold of a copy of the pipeline; returns its knowledge for the caller to keep."""
    pipe = own_pipeline(carried.pipe)
    before = pipe.config.categories[part]["calibration"] or {}
    pipe.set_region(part, region)
    pipe.calibrate(part, list(pictures), before.get("false_alarm_rate", 0.05), callback=step)
    return Knowledge.of(pipe)
