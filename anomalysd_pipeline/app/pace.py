"""How long lessons take on this machine: measured by a short one, and corrected while one goes on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

PREVIEWS = 8
"""Validation pictures during each stage."""

WEIGHT = 0.1
"""Share of a lesson after which what it took so far says as much of its pace as the measurement before it."""


@dataclass(frozen=True)
class Pace:
    """Holds the seconds that the pieces of a lesson take.

    Attributes:
        register: a picture's prototypes.
        score: a picture's score for the threshold.
        denoiser, decoder: an optimizer step.
        preview: a validation picture.
        measured: whether on this machine; otherwise only the proportions hold.
    """

    register: float = 0.2
    score: float = 1.0
    denoiser: float = 0.8
    decoder: float = 0.9
    preview: float = 0.3
    measured: bool = False

    def stages(self, registered: int, scored: int, denoiser: int = 0, decoder: int = 0) -> dict[str, float]:
        """Estimates the seconds of each stage, by the names of `LessonState.stage`, in their order.

        Args:
            registered: pictures whose prototypes are taken.
            scored: pictures that are scored for the threshold.
            denoiser, decoder: optimizer steps.
        """
        steps = {"denoiser": (denoiser, self.denoiser), "decoder": (decoder, self.decoder)}
        trained = {stage: n * each + min(n, PREVIEWS) * self.preview for stage, (n, each) in steps.items() if n}
        return {"preparing": registered * self.register, **trained, "calibrating": scored * self.score}


PROPORTIONS = Pace()
"""Of a machine that was not measured."""


@dataclass
class Plan:
    """Tells the share of a lesson that is done, and the time left.

    Attributes:
        stages: the seconds of each stage, see `Pace.stages`.
        measured: whether these are seconds of this machine.
    """

    stages: dict[str, float]
    measured: bool = False
    _share: float = field(default=0.0, init=False)

    def share(self, stage: str, done: float) -> float:
        """Returns the share of the whole, in [0, 1), that never falls.

        Args:
            stage: the present one.
            done: share of it that is done, in [0, 1].
        """
        before = 0.0
        for name, seconds in self.stages.items():
            if name == stage:
                before += done * seconds
                break
            before += seconds
        self._share = max(self._share, min(0.99, before / sum(self.stages.values())))
        return self._share

    def seconds_left(self, elapsed: float) -> float | None:
        """Estimates the seconds left; None where nothing is known yet.

        The estimate starts with the plan's and turns to the pace of the lesson itself.

        Args:
            elapsed: seconds since the lesson began.
        """
        total = sum(self.stages.values())
        if not self.measured:
            return None if self._share < 0.05 else elapsed * (1 - self._share) / self._share
        slowness = (elapsed + WEIGHT * total) / (self._share * total + WEIGHT * total)
        return (1 - self._share) * total * slowness


def pace_of(marks: Iterable[tuple[float, str, int, object]], pictures: int) -> Pace:
    """Computes the pace of a lesson from its course.

    Args:
        marks: the course in order: seconds, stage, step of the stage, and the validation picture that was the latest
            then.
        pictures: pictures of the lesson, two or more.
    """
    spent: dict[str, list[float]] = {"denoiser": [], "decoder": [], "preview": []}
    ends: dict[str, float] = {}
    last = None
    for mark in marks:
        seconds, stage, step, preview = mark
        if last is not None and stage == last[1] and stage in spent:
            kind = "preview" if preview is not last[3] else stage
            if kind == "preview" or step > last[2]:
                spent[kind].append(seconds - last[0])
        if stage == "calibrating" and "register" not in ends:
            ends["register"] = seconds - last[0]
            ends["start"] = seconds
        ends["end"], last = seconds, mark
    # The first step of a stage also prepares it, so the least is the closest to all that follow.
    least = {kind: min(times) for kind, times in spent.items() if times}
    score = (ends["end"] - ends["start"]) / pictures
    return Pace(register=ends["register"] / pictures, score=score, **least, measured=True)
