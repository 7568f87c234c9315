"""Set the threshold of a part from its normal pictures alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from ..data.tensors import augment
from .settings import InspectionSettings

MIN_SCORES = 8
"""Number of scores up to which augmented copies are added: fewer say little about a spread."""

VARIATION = {"brightness": 0.03, "contrast": 0.03, "scale": 0.02, "degrees": 3.0}
"""Limits of the augmented copies: as two photographs of one part under one lamp."""

MANY_SCORES = 20
"""Number of scores from which on their own order tells the threshold."""

TYPICAL_SPREAD = 0.35
TYPICAL_WEIGHT = 8
"""Standard deviation that logarithms of normal scores typically have, and the number of scores it counts as."""

SINGLE_PICTURE_MARGIN = 2.0
"""Factor on the threshold from a single picture, whose copies do not show how good parts differ from each other."""


@dataclass(frozen=True)
class Calibration:
    """Holds a threshold and the scores it rests on.

    threshold: image and pixel scores above it are called defective.
    scores: the scores of normal pictures it was computed from.
    false_alarm_rate: the share of good parts that is expected above it.
    settings: the inspection settings it holds for.
    pictures: how many pictures were given.
    held_out: whether each was scored against a bank made without it (two pictures or more).
    """

    threshold: float
    scores: list[float]
    false_alarm_rate: float
    settings: dict
    pictures: int
    held_out: bool

    def to_dict(self) -> dict:
        """Gives JSON-serializable values, as stored in the pipeline's config."""
        return asdict(self)


def check_rate(false_alarm_rate: float) -> None:
    """Raises ValueError for a `false_alarm_rate` outside (0, 0.5), before minutes of work."""
    if not 0 < false_alarm_rate < 0.5:
        raise ValueError(f"`false_alarm_rate` must be above 0 and below 0.5, got {false_alarm_rate!r}.")


def prediction_threshold(scores: Sequence[float], false_alarm_rate: float) -> float:
    """Finds the value that a further normal score exceeds with probability `false_alarm_rate`.

    From `MANY_SCORES` on, where the rate allows, it is one of the scores: the ceil((1 - p)(n + 1))-th smallest, which
    a further one of the same distribution, whatever that is, exceeds with a probability of at most p (Vovk et al.
    2005, split conformal prediction). Of fewer, the bound of a normal distribution on the logarithm of the scores,
    which are positive and skewed: exp(c + t_{1-p, v} s sqrt(1 + 1/n)), with v = w + n - 1 and
    s^2 = (w s_0^2 + (n - 1) d^2) / v.
    The center c is the median and the spread d 1.4826 times the median distance from it, because a picture that is
    unlike the few others says little about the next one, which will be compared with it too. As few scores know
    little of their spread, it is joined by what is typical, s_0 = `TYPICAL_SPREAD`, as if by w = `TYPICAL_WEIGHT`
    further scores.

    Args:
        scores: n >= 2 positive scores of normal pictures.
        false_alarm_rate: p, in (0, 0.5).

    Raises:
        ValueError: for fewer than 2 scores, scores that are not positive and finite, or a rate out of range.
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or len(values) < 2 or not np.isfinite(values).all() or (values <= 0).any():
        raise ValueError(f"`scores` must be 2 or more positive finite numbers, got {list(scores)}.")
    check_rate(false_alarm_rate)
    count = len(values)
    rank = math.ceil((1 - false_alarm_rate) * (count + 1))
    if count >= MANY_SCORES and rank <= count:
        return float(np.sort(values)[rank - 1])
    logs = np.log(values)
    center = np.median(logs)
    spread = stats.median_abs_deviation(logs, scale="normal")
    freedom = TYPICAL_WEIGHT + count - 1
    pooled = math.sqrt((TYPICAL_WEIGHT * TYPICAL_SPREAD**2 + (count - 1) * spread**2) / freedom)
    margin = stats.t.ppf(1 - false_alarm_rate, freedom) * pooled * math.sqrt(1 + 1 / count)
    return math.exp(center + margin)


def calibrate_threshold(
    score: Callable[[Tensor, int | None], Sequence[float]],
    pictures: Tensor,
    settings: InspectionSettings,
    false_alarm_rate: float,
    seed: int,
) -> Calibration:
    """Scores normal pictures as if they were new, and sets the threshold by that.

    Of two pictures or more, each is scored as if only the others were known. Up to `MIN_SCORES`, lightly augmented
    copies (light, contrast, a small turn and scale) are scored as well. A single picture has only those, compared with
    itself, and its threshold is raised by `SINGLE_PICTURE_MARGIN`.

    Args:
        score: called as `score(batch, held_out)` with pictures `[n, 3, R, R]` in [-1, 1] and the index of the normal
            picture to leave out of the comparison, or None; returns n image scores, as an inspection gives them.
        pictures: K >= 1 normal pictures, `[K, 3, R, R]` in [-1, 1].
        settings: those that inspections will use.
        false_alarm_rate: see `prediction_threshold`.
        seed: of the augmentation.

    Raises:
        ValueError: see `prediction_threshold`.
    """
    check_rate(false_alarm_rate)
    copies = max(1, math.ceil(MIN_SCORES / len(pictures)))
    held_out = len(pictures) > 1
    generator = torch.Generator().manual_seed(seed)
    scores: list[float] = []
    for index, picture in enumerate(pictures):
        augmented = [augment(picture, generator, **VARIATION) for _ in range(copies - held_out)]
        batch = [picture, *augmented] if held_out else augmented
        scores += score(torch.stack(batch), index if held_out else None)
    floor = np.finfo(np.float32).tiny  # a map that is zero everywhere has no logarithm
    threshold = prediction_threshold([max(value, floor) for value in scores], false_alarm_rate)
    return Calibration(
        threshold=threshold * (1.0 if held_out else SINGLE_PICTURE_MARGIN),
        scores=scores,
        false_alarm_rate=false_alarm_rate,
        settings=settings.to_dict(),
        pictures=len(pictures),
        held_out=held_out,
    )
