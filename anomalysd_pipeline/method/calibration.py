"""The threshold of a part, from its normal pictures alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from scipy import stats

from ..data.tensors import augment, to_tensor
from ..models.collection import COMPARED_PICTURES, fill_bank
from .detection import examine
from .scoring import image_score
from .settings import InspectionSettings

if TYPE_CHECKING:
    from ..pipeline import AnomalySDPipeline


MIN_SCORES = 8
"""Augmented copies fill up a handful of pictures to this many scores: fewer say little about a spread."""

VARIATION = {"brightness": 0.03, "contrast": 0.03, "scale": 0.02, "degrees": 3.0}
"""How far the copies differ: as two photographs of one part under one lamp. More would lift the threshold too far."""

MANY_SCORES = 20
"""Scores from which on their own order tells the threshold."""

TYPICAL_SPREAD = 0.35
TYPICAL_WEIGHT = 8
"""By how much the logarithms of the scores of normal pictures typically differ (standard deviation), and as how many
scores this counts. So chosen that neither drawn parts nor metal plates, 4 pictures each, have more false alarms than
are asked for, and otherwise the fewest misses."""

SINGLE_PICTURE_MARGIN = 2.0
"""Factor on the threshold from one picture: its copies do not show how good parts differ from each other. On drawn
parts and metal plates, with the features of the embedded checkpoint, 55 % of the good ones were above the bound of the
copies, and 3 % above twice that."""


@dataclass(frozen=True)
class Calibration:
    """A threshold and what it rests on.

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
        """JSON-serializable, as stored in the pipeline's config."""
        return asdict(self)


def prediction_threshold(scores: Sequence[float], false_alarm_rate: float) -> float:
    """The value that one further normal score exceeds with probability `false_alarm_rate`.

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
    if not 0 < false_alarm_rate < 0.5:
        raise ValueError(f"`false_alarm_rate` must be above 0 and below 0.5, got {false_alarm_rate!r}.")
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
    pipe: AnomalySDPipeline,
    category: str,
    pictures: Sequence[Image.Image],
    settings: InspectionSettings,
    false_alarm_rate: float,
    seed: int,
) -> Calibration:
    """Scores normal pictures as if they were new and sets the threshold by that; the pipeline is left unchanged.

    With two pictures or more, each is scored against a bank of the others; only how unlike the others it may be as a
    whole is known from all. Up to `MIN_SCORES`, lightly augmented copies (light, contrast, a small turn and scale) are
    scored as well; a single picture has only those, against its own bank, and its threshold is raised by
    `SINGLE_PICTURE_MARGIN`.

    What the repainting does to distances (`repaired`) is left out: a model that was fine-tuned to these very pictures
    repaints them better than new ones, whose scores it raises. On metal plates good parts score less with it.

    Args:
        pipe: a pipeline in which `category` is registered.
        pictures: K >= 1 normal pictures.
        settings: those that inspections will use.
        false_alarm_rate: see `prediction_threshold`.
        seed: of the augmentation and of the noise; 0 gives the noise of an inspection without a generator.

    Raises:
        ValueError: see `prediction_threshold`.
    """
    prediction_threshold([1.0, 2.0], false_alarm_rate)  # a bad rate is refused before minutes of work
    side = pipe.config.resolution
    tensors = torch.stack([to_tensor(picture, side) for picture in pictures])  # [K, 3, R, R]
    copies = max(1, math.ceil(MIN_SCORES / len(tensors))) if len(tensors) < MIN_SCORES else 1
    held_out = len(tensors) > 1
    rotations = pipe.config.categories[category]["rotations"]
    generator = torch.Generator().manual_seed(seed)
    scores: list[float] = []
    for index, tensor in enumerate(tensors):
        bank = pipe.bank
        if held_out:
            others = torch.cat([tensors[:index], tensors[index + 1 :]]).to(pipe._execution_device)
            bank = pipe.bank.empty()
            fill_bank(bank, category, pipe.extractor, others, rotations, len(tensors) >= COMPARED_PICTURES)
            # A picture unlike the others is why all of them are allowed more, not one that three others would reject.
            if category in pipe.bank:
                bank.take_reach(category, pipe.bank)
        augmented = [augment(tensor, generator, **VARIATION) for _ in range(copies - 1)]
        batch = torch.stack(
            [tensor, *augmented] if held_out else [*augmented, augment(tensor, generator, **VARIATION)]
        )
        noise = [torch.Generator().manual_seed(seed) for _ in batch]
        found = examine(pipe, batch, category, settings, bank, generator=noise, weigh_repainting=False)
        scores += image_score(found.maps(settings.prototype_weight, settings.feature_weight)).tolist()
    pipe.maybe_free_model_hooks()
    floor = np.finfo(np.float32).tiny  # a map that is zero everywhere has no logarithm
    return Calibration(
        threshold=prediction_threshold([max(score, floor) for score in scores], false_alarm_rate)
        * (1.0 if held_out else SINGLE_PICTURE_MARGIN),
        scores=scores,
        false_alarm_rate=false_alarm_rate,
        settings=settings.to_dict(),
        pictures=len(tensors),
        held_out=held_out,
    )
