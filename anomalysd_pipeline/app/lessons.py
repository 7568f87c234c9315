"""Lessons: prototypes, threshold and, on request, a fine-tuning of one part, with progress."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

from PIL import Image

from .limits import Limits
from .model import Carried, Knowledge, own_pipeline
from .space import on_gpu
from .turns import Turns
from .uploads import clean_text

LENGTHS = {
    "quick": "Quick: prototypes and threshold, seconds",
    "standard": "Standard: fine-tune, about three minutes",
    "thorough": "Thorough: three times as long",
}
TIMES = {"standard": 1, "thorough": 3}
STEPS = {"steps": 200, "decoder_steps": 100}
"""Optimizer steps for a base whose config gives none."""

PICTURES = 8  # validation pictures during each stage
CALIBRATION = 0.2
"""Time for the threshold, as a share of the time for a fine-tuning of the length "standard"."""


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
    """

    name: str
    pictures: tuple[Image.Image, ...]
    prompts: dict[str, list[str]] | None = None
    length: str = "standard"
    steps: tuple[int, int] | None = None


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
    name: object, pictures: Sequence[Image.Image], coarse: object, fine: object, length: object, limits: Limits
) -> Lesson:
    """Makes a lesson of the values that a visitor has given.

    Args:
        name: name of the part.
        pictures: pictures of good parts, RGB, see `uploads.kept_size`.
        coarse, fine: prompts, one on a line.
        length: one of `LENGTHS`.
        limits: the app's bounds.

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
    levels = {"coarse": _lines(coarse, "coarse", limits), "fine": _lines(fine, "fine", limits)}
    if levels["fine"] and not levels["coarse"]:
        levels["coarse"] = [f"A perfect {readable_name(name)}."]
    return Lesson(name, tuple(pictures), levels if levels["coarse"] else None, length)


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


def _gpu_seconds_of_lesson(carried: Carried, lesson: Lesson, cancel, turns) -> float:
    if lesson.length == "quick":
        return 40
    settings = carried.pipe.adaptation_settings(**lesson_steps(carried.pipe, lesson))
    return 60 + settings.train_batch_size * (settings.steps * 0.05 + settings.decoder_steps * 0.1)


@on_gpu(_gpu_seconds_of_lesson)
def learn_on_gpu(
    carried: Carried, lesson: Lesson, cancel: threading.Event | None, turns: Turns | None
) -> Iterator[LessonState | Knowledge]:
    """Teaches a copy of the pipeline; yields its progress, then its knowledge for the caller to keep.

    Raises:
        Canceled: `cancel` was set.
        ValueError: the lesson cannot be taught.
    """
    left = threading.Event()  # set when nobody asks for the next state any more
    told: queue.Queue = queue.Queue()

    def ended() -> bool:
        return left.is_set() or (cancel is not None and cancel.is_set())

    def work() -> None:
        try:
            told.put(_Teaching(carried.pipe, lesson, told.put, ended, turns).run())
        # To be raised where it can be shown.
        except BaseException as error:
            told.put(error)

    thread = threading.Thread(target=work, name="teaching", daemon=True)
    thread.start()
    try:
        yield LessonState()
        while True:
            item = told.get()
            # States that later ones have overtaken need not be drawn; the facts come once, in the last state.
            while isinstance(item, LessonState) and not item.facts and not told.empty():
                item = told.get()
            if isinstance(item, BaseException):
                raise item
            yield item
            if isinstance(item, Knowledge):
                return
    finally:
        left.set()
        thread.join()


def lesson_steps(pipe, lesson: Lesson) -> dict[str, int]:
    """Counts the optimizer steps of a lesson, by the names of the adaptation's settings."""
    if lesson.steps is not None:
        return {"steps": lesson.steps[0], "decoder_steps": lesson.steps[1]}
    given = {**STEPS, **{k: v for k, v in pipe.config.adaptation.items() if k in STEPS and v is not None}}
    return {name: count * TIMES[lesson.length] for name, count in given.items()}


class _Teaching:
    """Does the work of one lesson, in a thread of its own."""

    def __init__(self, pipe, lesson: Lesson, tell: Callable, ended: Callable[[], bool], turns: Turns | None):
        self.pipe, self.lesson, self.tell, self.ended, self.turns = own_pipeline(pipe), lesson, tell, ended, turns
        self.state = LessonState()
        self.began = 0.0
        # Share of the whole before the threshold is set.
        times = TIMES.get(lesson.length, 0.02)
        self.before = times / (times + CALIBRATION)

    def run(self) -> Knowledge:
        with contextlib.nullcontext() if self.turns is None else self.turns.turn():
            self.began = time.monotonic()
            self.step("preparing", 0, 0, 0.01)
            if self.lesson.length == "quick":
                self.pipe.add_category(self.lesson.name, list(self.lesson.pictures), self.lesson.prompts)
            else:
                self.fine_tune()
            self.calibrate()
            record = self.pipe.config.categories[self.lesson.name]["calibration"]
            facts = {
                "pictures": self.pipe.config.categories[self.lesson.name]["shots"],  # without copies
                "length": self.lesson.length,
                "threshold": record["threshold"],
                "is_guess": not record["held_out"],
                "seconds": round(time.monotonic() - self.began, 1),
            }
            self.tell(replace(self.state, share=0.999, seconds_left=0.0, facts=facts))
            return Knowledge.of(self.pipe)

    def step(self, stage: str, step: int, steps: int, share: float, **changes) -> None:
        """Tells the progress, ends canceled work, and gives way to inspections that wait."""
        if self.ended():
            raise Canceled
        elapsed = time.monotonic() - self.began
        left = elapsed * (1 - share) / share if share > 0.03 else None
        self.state = replace(
            self.state, stage=stage, step=step, steps=steps, share=share, seconds_left=left, **changes
        )
        self.tell(self.state)
        if self.turns is not None:
            self.turns.give_way()
        if self.ended():
            raise Canceled

    def fine_tune(self) -> None:
        from ..adaptation.loop import fine_tune, in_memory_accelerator

        pipe, name, prompts = self.pipe, self.lesson.name, self._prompts()
        shots = {name: list(self.lesson.pictures)}
        settings = pipe.adaptation_settings(method="lora", **lesson_steps(pipe, self.lesson))
        pipe.check_adaptable(name, "lora", shots)
        losses: dict[str, list[float]] = {}

        def on_step(progress) -> None:
            losses.setdefault(progress.stage, []).append(progress.loss)
            copies = {stage: list(values) for stage, values in losses.items()}
            self.step(progress.stage, progress.step, progress.steps, self.before * progress.share, losses=copies)

        def validate(stage, step: int) -> None:
            total = settings.steps if stage.name == "denoiser" else settings.decoder_steps
            if step % max(1, total // PICTURES) and step != total:
                return
            with stage.evaluation(), accelerator.autocast():
                picture = self.validation(accelerator.unwrap_model(stage.module), stage)
            self.state = replace(self.state, picture=picture)
            self.tell(self.state)

        with in_memory_accelerator(pipe.device, settings) as accelerator:
            weights = fine_tune(pipe.base, shots, settings, accelerator, prompts, callback=on_step, validate=validate)
        pipe.learn(shots, weights, name, prompts, calibrate=False)

    def _prompts(self) -> dict | None:
        return None if self.lesson.prompts is None else {self.lesson.name: self.lesson.prompts}

    def validation(self, module, stage) -> Image.Image:
        """Draws a good part, and beside it the same with its middle repainted by the weights in training."""
        from ..adaptation.preview import validation_pictures

        self.pipe.use_adaptation(None)  # an inspection in between may have switched the shared decoder
        book = self.pipe.prompt_book
        book.add(self.lesson.name, self.lesson.prompts)
        texts = book.prompts(self.lesson.name)
        good, _, repainted = validation_pictures(
            self.pipe.base, stage, module, self.lesson.pictures[0], self.pipe.settings(start="image"), texts
        )
        side = self.pipe.config.resolution
        figure = Image.new("RGB", (2 * side + side // 16, side), "white")
        figure.paste(good, (0, 0))
        figure.paste(repainted, (side + side // 16, 0))
        return figure

    def calibrate(self) -> None:
        """Sets the threshold."""
        from ..method.calibration import COPIES

        pipe, name, pictures = self.pipe, self.lesson.name, list(self.lesson.pictures)
        shots = pipe.config.categories[name]["shots"]  # equal pictures are one
        pictures_to_score, rounds = shots if shots > 1 else COPIES, [0]

        @contextlib.contextmanager
        def counted(total: int):
            """Stands in for the progress bar, through which alone a calibration tells its progress."""
            done = [0]

            def update(count: int) -> None:
                done[0] += count
                share = (rounds[0] + done[0] / total) / pictures_to_score
                self.step("calibrating", round(100 * share), 100, self.before + (0.99 - self.before) * share)

            yield SimpleNamespace(update=update)
            rounds[0] += 1

        self.step("calibrating", 0, 100, self.before)
        pipe.progress_bar = counted
        try:
            pipe.calibrate(name, pictures)
        finally:
            del pipe.progress_bar
