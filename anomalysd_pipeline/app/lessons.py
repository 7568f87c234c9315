"""Lessons: what a visitor wants to be taught, and how far it has come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import Image

from .limits import Limits
from .uploads import clean_text

LENGTHS = {
    "quick": "Quick: prototypes and threshold",
    "standard": "Standard: fine-tuned as well",
    "thorough": "Thorough: fine-tuned three times as long",
}
RATES = {"1 in 100": 0.01, "1 in 20": 0.05, "1 in 10": 0.1}
"""Shares of good parts that may be called defective, by their words."""


class Canceled(Exception):
    """Ends a teaching that its visitor has canceled."""


@dataclass(frozen=True)
class Lesson:
    """Describes a part to be taught.

    Attributes:
        name: name of the part.
        pictures: 1 or more of good parts, RGB, see `uploads.kept_size`.
        prompts: {"coarse": [...], "fine": [...]}, or None: the generic ones.
        length: one of `LENGTHS`.
        steps: optimizer steps of the denoiser and the decoder; None: by the length.
        false_alarm_rate: share of good parts that may exceed the threshold.
    """

    name: str
    pictures: tuple[Image.Image, ...]
    prompts: dict[str, list[str]] | None = None
    length: str = "quick"
    steps: tuple[int, int] | None = None
    false_alarm_rate: float = 0.05


@dataclass(frozen=True)
class LessonState:
    """Tells the progress of a teaching.

    Attributes:
        stage: "waiting", "preparing", "denoiser", "decoder", "calibrating" or "done".
        step, steps: steps done and in all of the stage, 0 where it has none.
        share: share of the whole that is done, in [0, 1].
        seconds_left: estimate for the whole; None where nothing is known yet.
        losses: stage to the loss of each step so far.
        picture: the latest validation picture, a good part beside itself with its middle repainted.
        facts: facts of the taught part, in the last state.
    """

    stage: str = "waiting"
    step: int = 0
    steps: int = 0
    share: float = 0.0
    seconds_left: float | None = None
    losses: dict[str, list[float]] = field(default_factory=dict)
    picture: Image.Image | None = None
    facts: dict = field(default_factory=dict)


def make_lesson(
    name: object,
    pictures: Sequence[Image.Image],
    coarse: object,
    fine: object,
    length: object,
    limits: Limits,
    false_alarm_rate: object = 0.05,
) -> Lesson:
    """Makes a lesson of the values that a visitor has given.

    Args:
        name: name of the part.
        pictures: pictures of good parts, RGB, see `uploads.kept_size`.
        coarse, fine: prompts, one on a line.
        length: one of `LENGTHS`.
        limits: the app's bounds.
        false_alarm_rate: share of good parts that may exceed the threshold, above 0 and below 0.5.

    Raises:
        ValueError: a value is of the wrong kind or out of bounds; the sentence names it.
    """
    from ..method.prompts import check_category, readable_name

    name = clean_text(name, "name", limits.name_length, required=True)
    try:
        check_category(name)
    except ValueError as error:
        raise ValueError(str(error).replace("`category`", "`name`")) from error
    if not isinstance(length, str) or length not in LENGTHS:
        raise ValueError(f"`length` must be one of {', '.join(map(repr, LENGTHS))}, got {str(length)[:40]!r}.")
    rate = false_alarm_rate
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < 0.5:
        raise ValueError(f"`false_alarm_rate` must be a number above 0 and below 0.5, got {str(rate)[:40]!r}.")
    levels = {"coarse": _lines(coarse, "coarse", limits), "fine": _lines(fine, "fine", limits)}
    if levels["fine"] and not levels["coarse"]:
        levels["coarse"] = [f"A perfect {readable_name(name)}."]
    return Lesson(name, tuple(pictures), levels if levels["coarse"] else None, length, None, rate)


def check_depth(bit_depth: object) -> int | None:
    """Returns the bits in use in 16-bit gray that a visitor has given; None for 0, which leaves it to the pictures.

    Raises:
        ValueError: for anything but 0 and a whole number from 8 to 16.
    """
    if type(bit_depth) is not int or bit_depth not in (0, *range(8, 17)):
        raise ValueError(
            f"`bit_depth` must be 0, for what the pictures tell, or from 8 to 16, got {str(bit_depth)[:40]!r}."
        )
    return bit_depth or None


def _lines(text: object, argument: str, limits: Limits) -> list[str]:
    if not isinstance(text, str | None):
        raise ValueError(f"`{argument}` must be a text with one description on each line.")
    longest = limits.prompts * (limits.prompt_length + 2)
    if len(text or "") > longest:
        raise ValueError(f"`{argument}` has {len(text)} characters; at most {longest} are taken.")
    lines = [clean_text(line, argument, limits.prompt_length) for line in (text or "").splitlines()]
    lines = [line for line in lines if line]
    if len(lines) > limits.prompts:
        raise ValueError(f"`{argument}` has {len(lines)} descriptions; give at most {limits.prompts}, one on a line.")
    return lines
