"""Set the threshold of a part from its normal pictures alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
from scipy import optimize, special, stats

from ..data.inputs import Inputs, first_alike
from .scoring import NotFiniteError
from .settings import InspectionSettings

SCORE_VERSION = 4
"""2: the feature term is in other units; 3: pictures are repainted from exemplars only as far as they differ; 4: what
does not differ is the picture itself when both are compared."""

MANY_SCORES = 20
"""Number of scores from which on their own order tells the threshold."""

TYPICAL_SPREAD = 0.15
TYPICAL_WEIGHT = 8
"""Standard deviation that logarithms of normal scores typically have, and the number of scores it counts as."""

GROWTH = 0.2
"""Distances to the nearest of n times as many prototypes are n ** -0.2 of what they were."""

COPIES = 4
VARIATION = {"brightness": 0.03, "contrast": 0.03, "scale": 0.02, "degrees": 3.0}
"""Number and limits of the copies of a single picture: as photographs of one part under one lamp."""

COPIES_MARGIN = 2.5
"""Factor on the median score of copies, which do not show how good parts differ from each other: a guess."""


@dataclass(frozen=True)
class Calibration:
    """Holds a threshold and the scores it rests on.

    threshold: image and pixel scores above it are called defective.
    scores: the scores of normal pictures it was computed from, as expected against the whole bank.
    false_alarm_rate: the share of good parts that is expected above it.
    settings: the inspection settings it holds for.
    pictures: how many pictures these are.
    held_out: whether each was scored as if it were new; if not, the threshold is a guess from copies of one picture.
    digests, fingerprints: the picture of each score, see `Inputs`; earlier versions have no fingerprints.
    version: of the score.
    defective_scores, defective_digests: of the known defective pictures; empty without them.
    expected_false_alarms, expected_misses: with known defective pictures, the share of good parts that is expected
        above the threshold, and of defective parts below it; None without them, and where nothing is held out.
    classes: see `class_names`; those that were not the checkpoint's own.
    """

    threshold: float
    scores: list[float]
    false_alarm_rate: float
    settings: dict
    pictures: int
    held_out: bool
    digests: list[str] = field(default_factory=list)
    fingerprints: list[str] = field(default_factory=list)
    version: int = 1
    defective_scores: list[float] = field(default_factory=list)
    defective_digests: list[str] = field(default_factory=list)
    expected_false_alarms: float | None = None
    expected_misses: float | None = None
    classes: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict:
        """Gives JSON-serializable values, as stored in the pipeline's config; `classes` where there are any."""
        return {name: value for name, value in asdict(self).items() if name != "classes" or value}

    def doubts(self, category: str) -> list[str]:
        """Words what a person should know of the threshold, a warning each; empty where it is sound."""
        said = []
        if not self.held_out:
            said.append(
                f"The threshold of {category!r} is a guess, because one picture does not show how good parts differ; "
                "give `calibrate` one more picture of a good part, better four."
            )
        if (self.expected_misses or 0) > self.false_alarm_rate:
            said.append(
                f"The threshold of {category!r} cannot keep false alarms and misses to {self.false_alarm_rate:.1%}: "
                f"{self.expected_misses:.1%} of each are expected, because scores of known defective pictures lie "
                "close to those of normal ones; try another `preset`, or fine-tune with `adapt`."
            )
        return said


def differing_settings(
    record: Mapping, settings: InspectionSettings, classes: Mapping | None = None, usual: Mapping | None = None
) -> list[str]:
    """Names the settings in which a stored calibration differs from an inspection, so that its threshold does not
    apply; empty if it does.

    Args:
        record: see `Calibration.to_dict`.
        settings: of the inspection.
        classes: see `class_names`; None: they are not compared.
        usual: those of the checkpoint, which records have that name none.
    """
    # Earlier versions had no other.
    own = {"top_share": 0.0, "start": "image", "tile_size": 0, "tile_overlap": 0, **record["settings"]}
    own |= {**(usual or {}), **record.get("classes", {})}
    changed = [name for name, value in {**settings.to_dict(), **(classes or {})}.items() if own.get(name) != value]
    version = record.get("version", 1)
    if not changed and (settings.feature_weight > 0 and version < 2 or settings.start == "exemplar" and version < 4):
        return ["the version of the score"]
    return changed


def class_names(scheduler, vae) -> dict[str, str]:
    """Names the classes of "scheduler" and "vae", which users of diffusers replace; a compiled module is as before."""
    parts = {"scheduler": scheduler, "vae": vae}
    return {name: type(getattr(part, "_orig_mod", part)).__name__ for name, part in parts.items()}


def check_rate(false_alarm_rate: float) -> None:
    """Raises ValueError for a `false_alarm_rate` outside (0, 0.5), before minutes of work."""
    if not 0 < false_alarm_rate < 0.5:
        raise ValueError(f"`false_alarm_rate` must be above 0 and below 0.5, got {false_alarm_rate!r}.")


def prediction_threshold(scores: Sequence[float], false_alarm_rate: float) -> float:
    """Finds the value that a further normal score exceeds with probability `false_alarm_rate`.

    From `MANY_SCORES` on, where the rate allows, it is one of the scores: the ceil((1 - p)(n + 1))-th smallest, which
    a further one of the same distribution, whatever that is, exceeds with a probability of at most p (Vovk et al.
    2005, split conformal prediction). Of fewer, the bound of a normal distribution on the logarithm of the scores,
    which are positive and skewed: exp(m + t_{1-p, v} s sqrt(1 + 1/n)), with v = w + n - 1 and
    s^2 = (w s_0^2 + (n - 1) d^2) / v. The center m is the mean of the logarithms, and the spread d 1.4826 times the
    median distance from their median, because a picture that is unlike the few others says little about the next one.
    As few scores know little of their spread, it is joined by what is typical, s_0 = `TYPICAL_SPREAD`, as if by
    w = `TYPICAL_WEIGHT` further scores.

    Args:
        scores: n >= 1 positive scores of normal pictures.
        false_alarm_rate: p, in (0, 0.5).

    Raises:
        ValueError: for no score, scores that are not positive and finite, or a rate out of range.
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all() or (values <= 0).any():
        raise ValueError(f"`scores` must be 1 or more positive finite numbers, got {list(scores)}.")
    check_rate(false_alarm_rate)
    count = len(values)
    rank = math.ceil((1 - false_alarm_rate) * (count + 1))
    if count >= MANY_SCORES and rank <= count:
        return float(np.sort(values)[rank - 1])
    center, pooled, freedom = _log_distribution(values)
    margin = stats.t.ppf(1 - false_alarm_rate, freedom) * pooled * math.sqrt(1 + 1 / count)
    return math.exp(center + margin)


def _log_distribution(values: np.ndarray) -> tuple[float, float, int]:
    """Gives m, s and v of `prediction_threshold` for few scores."""
    logs, count = np.log(values), len(values)
    freedom = TYPICAL_WEIGHT + count - 1
    spread = stats.median_abs_deviation(logs, scale="normal")
    pooled = math.sqrt((TYPICAL_WEIGHT * TYPICAL_SPREAD**2 + (count - 1) * spread**2) / freedom)
    return logs.mean(), pooled, freedom


def expected_above(scores: Sequence[float], threshold: float) -> float:
    """Estimates the share of further scores above a threshold, by the distribution of `prediction_threshold` for few
    scores: that of defective pictures differs as little as that of normal ones."""
    return _share_above(*_log_distribution(np.asarray(scores, dtype=np.float64)), len(scores), math.log(threshold))


def threshold_between(normal: Sequence[float], defective: Sequence[float]) -> float:
    """Finds the threshold above which as large a share of normal scores is expected as of defective ones below it: the
    larger of the two shares is as small as it can be."""
    logs = np.log([*normal, *defective])
    good, bad = (_log_distribution(np.asarray(scores, dtype=np.float64)) for scores in (normal, defective))

    def excess(log: float) -> float:
        return _share_above(*good, len(normal), log) + _share_above(*bad, len(defective), log) - 1

    return math.exp(optimize.brentq(excess, logs.min() - 5, logs.max() + 5))


def _share_above(center: float, pooled: float, freedom: int, count: int, log: float) -> float:
    distance = (center - log) / (pooled * math.sqrt(1 + 1 / count))
    return float(special.stdtr(freedom, distance))  # the distribution function of t


def calibrate_threshold(
    score: Callable[[Inputs, int | None], float],
    pictures: Inputs,
    shots: Sequence[str],
    settings: InspectionSettings,
    false_alarm_rate: float,
    seed: int,
    before: Mapping | None = None,
    fingerprints: Sequence[str] = (),
    defective: Inputs | None = None,
    callback: Callable[[int, int], object] | None = None,
) -> Calibration:
    """Scores normal pictures as if they were new, and sets the threshold by that.

    A picture of the bank is scored against the prototypes of the others; what these would find closer if they were
    one more is taken off (`GROWTH`). Any other picture is scored as an inspection does. Copies of one picture count
    once, whether they come together or one after the other: as that of the bank if there is one among them.
    A single picture of the bank is compared with copies of itself, and the threshold is a guess.
    With known defective pictures the threshold is that of `threshold_between`; a guess is lowered to where they are
    expected to be found.

    Args:
        score: called as `score(picture, left_out)` with inputs of length 1 and the number of the bank's picture to
            leave out of the comparison, or None; returns the image score of an inspection.
        pictures: one normal picture or more.
        shots: digests of the pictures in the bank, in its order.
        settings: those that inspections will use.
        false_alarm_rate: see `prediction_threshold`.
        seed: of the copies.
        before: the record of an earlier calibration with the same bank, whose pictures count too if it holds for the
            same settings.
        fingerprints: of the pictures in the bank, see `Inputs.fingerprints`; none in earlier versions.
        defective: known defective pictures, or None; those of an earlier calibration count on.
        callback: called as `callback(done, total)` after every score; an exception that it raises ends the call.

    Raises:
        ValueError: see `prediction_threshold`; or a picture has no finite score, or is normal and defective.
    """
    check_rate(false_alarm_rate)
    scores: dict[str, float] = {}
    faults: dict[str, float] = {}
    marks = dict(zip(shots, fingerprints, strict=False))
    same = before is not None and not differing_settings(before, settings)
    if same:
        faults.update(zip(before.get("defective_digests", ()), before.get("defective_scores", ()), strict=True))
    if same and before["held_out"]:
        earlier = before.get("digests", ())
        scores.update(zip(earlier, before["scores"], strict=False))
        marks |= dict(zip(earlier, before.get("fingerprints", ()), strict=False))
    floor = float(np.finfo(np.float32).tiny)  # a map that is zero everywhere has no logarithm
    growth = ((len(shots) - 1) / len(shots)) ** GROWTH if shots and settings.feature_weight > 0 else 1.0
    digests = pictures.digests()
    given = dict(zip(digests, pictures.fingerprints(), strict=True))
    # Pictures of the bank first, so that they stand for their copies.
    marks = {digest: given[digest] for digest in shots if digest in given} | marks | given
    # Not copies of earlier pictures, nor one that nothing is left to compare with.
    groups = {
        head: group
        for head, group in _groups(marks, given).items()
        if not ((head in scores and head not in given) or (head in shots and len(shots) == 1))
    }
    total = len(groups) + len(defective or ()) + (0 if groups or scores else COPIES)
    count = itertools.count(1)

    def scored(picture: Inputs, left_out: int | None) -> float:
        value = score(picture, left_out)
        if callback is not None:
            callback(next(count), total)
        return value

    for head, group in groups.items():
        index = digests.index(head if head in given else group[0])
        try:
            if head in shots:
                scores[head] = max(growth * scored(pictures[index], shots.index(head)), floor)
            else:
                scores[head] = max(scored(pictures[index], None), floor)
        except NotFiniteError as error:
            raise NotFiniteError(f"Normal picture {index + 1} of {len(pictures)}", error.stage) from error
    for index, digest in enumerate([] if defective is None else defective.digests()):
        if digest in marks:
            raise ValueError(f"`defective_images` has a picture, number {index + 1}, that is a normal one too.")
        try:
            faults[digest] = max(scored(defective[index], None), floor)
        except NotFiniteError as error:
            raise NotFiniteError(f"Defective picture {index + 1} of {len(defective)}", error.stage) from error
    below = list(faults.values())
    facts = {"false_alarm_rate": false_alarm_rate, "settings": settings.to_dict(), "version": SCORE_VERSION}
    facts |= {"defective_scores": below, "defective_digests": list(faults)}

    def known(names: Iterable[str]) -> dict[str, list[str]]:
        return {"digests": list(names), "fingerprints": [marks.get(name, "") for name in names]}

    if scores:
        values = list(scores.values())
        threshold = prediction_threshold(values, false_alarm_rate)
        if below:
            threshold = threshold_between(values, below)
            facts["expected_false_alarms"] = expected_above(values, threshold)
            facts["expected_misses"] = 1 - expected_above(below, threshold)
        return Calibration(threshold, values, pictures=len(values), held_out=True, **known(scores), **facts)
    values = [max(scored(pictures[0].varied(seed + copy, **VARIATION), None), floor) for copy in range(COPIES)]
    threshold = COPIES_MARGIN * math.exp(float(np.median(np.log(values))))
    if below:
        # The lower bound of a further one: the upper bound of the inverse.
        threshold = min(threshold, 1 / prediction_threshold([1 / value for value in below], false_alarm_rate))
    return Calibration(threshold, values, pictures=1, held_out=False, **known(digests[:1]), **facts)


def _groups(marks: Mapping[str, str], given: Iterable[str]) -> dict[str, list[str]]:
    """Groups the digests `given` by the first of `marks` whose picture they are copies of."""
    named = {digest: mark for digest, mark in marks.items() if mark}
    names = list(named)
    heads = {digest: names[first] for digest, first in zip(names, first_alike(list(named.values())), strict=True)}
    groups: dict[str, list[str]] = {}
    for digest in given:
        groups.setdefault(heads[digest], []).append(digest)
    return groups
