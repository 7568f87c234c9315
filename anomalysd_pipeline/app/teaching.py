"""The work of a lesson: prototypes, threshold and, on request, a fine-tuning of one part, with progress."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace

from PIL import Image

from .lessons import Canceled, Lesson, LessonState
from .model import Carried, Knowledge, own_pipeline
from .pace import PREVIEWS, PROPORTIONS, Pace, Plan, pace_of
from .space import on_gpu
from .turns import Turns

TIMES = {"standard": 1, "thorough": 3}
STEPS = {"steps": 200, "decoder_steps": 100}
"""Optimizer steps for a base whose config gives none."""

HELD_OUT = 0.2
"""Share of a picture's score that is done before its passes: its own prototypes are left out of the bank."""

TRIAL_SECONDS = 60
"""Time after which a measurement is given up: a lesson on such a machine takes hours."""


def _gpu_seconds_of_lesson(carried: Carried, lesson: Lesson, cancel, turns, pace=None) -> float:
    if lesson.length == "quick":
        return 40
    settings = carried.pipe.adaptation_settings(**lesson_steps(carried.pipe, lesson))
    return 60 + settings.train_batch_size * (settings.steps * 0.05 + settings.decoder_steps * 0.1)


@on_gpu(_gpu_seconds_of_lesson)
def learn_on_gpu(
    carried: Carried, lesson: Lesson, cancel: threading.Event | None, turns: Turns | None, pace: Pace = PROPORTIONS
) -> Iterator[LessonState | Knowledge]:
    """Teaches a copy of the pipeline; yields its progress, then its knowledge for the caller to keep.

    Args:
        carried: the pipeline.
        lesson: the part and its pictures.
        cancel: ends the teaching at its next step.
        turns: turns of all visitors; None: there are no others.
        pace: of this machine, for the time left.

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
            told.put(Teaching(carried.pipe, lesson, told.put, ended, turns, pace).run())
        # To be raised where it can be shown.
        except BaseException as error:
            told.put(error)

    thread = threading.Thread(target=work, name="teaching", daemon=True)
    thread.start()
    try:
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


def plan(pipe, lesson: Lesson, pace: Pace) -> Plan:
    """Plans the course of a lesson."""
    from ..method.calibration import COPIES

    count = len(lesson.pictures)
    steps = {} if lesson.length == "quick" else lesson_steps(pipe, lesson)
    trained = (steps.get("steps", 0), steps.get("decoder_steps", 0))
    return Plan(pace.stages(count, count if count > 1 else COPIES, *trained), pace.measured)


class Teaching:
    """Does the work of one lesson; the arguments are those of `learn_on_gpu`, `tell` takes each state."""

    def __init__(
        self,
        pipe,
        lesson: Lesson,
        tell: Callable,
        ended: Callable[[], bool],
        turns: Turns | None,
        pace: Pace = PROPORTIONS,
    ):
        self.pipe, self.lesson, self.tell, self.ended, self.turns = own_pipeline(pipe), lesson, tell, ended, turns
        self.state = LessonState()
        self.began = 0.0
        self.plan = plan(pipe, lesson, pace)

    def run(self) -> Knowledge:
        if self.turns is not None and self.turns.taken:
            self.tell(self.state)
        with contextlib.nullcontext() if self.turns is None else self.turns.turn():
            self.began = time.monotonic()
            self.step("preparing")
            if self.lesson.length == "quick":
                self.pipe.add_category(self.lesson.name, list(self.lesson.pictures), self.lesson.prompts)
            else:
                self.fine_tune()
            self.calibrate()
            record = self.pipe.config.categories[self.lesson.name]["calibration"]
            facts = {
                "false_alarm_rate": record["false_alarm_rate"],
                "pictures": self.pipe.config.categories[self.lesson.name]["shots"],  # without copies
                "bit_depth": self.pipe.config.categories[self.lesson.name].get("bit_depth"),
                "length": self.lesson.length,
                "threshold": record["threshold"],
                "is_guess": not record["held_out"],
                "seconds": round(time.monotonic() - self.began, 1),
            }
            self.tell(replace(self.state, share=0.999, seconds_left=0.0, facts=facts))
            return Knowledge.of(self.pipe)

    def step(self, stage: str, step: int = 0, steps: int = 0, done: float = 0.0, **changes) -> None:
        """Tells the progress, ends canceled work, and gives way to inspections that wait.

        Args:
            stage, step, steps: as of `LessonState`.
            done: share of the stage that is done, in [0, 1].
        """
        if self.ended():
            raise Canceled
        share = self.plan.share(stage, done)
        left = self.plan.seconds_left(time.monotonic() - self.began)
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
            self.step(progress.stage, progress.step, progress.steps, progress.step / progress.steps, losses=copies)

        def validate(stage, step: int) -> None:
            total = settings.steps if stage.name == "denoiser" else settings.decoder_steps
            if step % max(1, total // PREVIEWS) and step != total:
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
                share = (rounds[0] + HELD_OUT + (1 - HELD_OUT) * done[0] / total) / pictures_to_score
                self.step("calibrating", round(100 * share), 100, share)

            yield SimpleNamespace(update=update)
            rounds[0] += 1

        self.step("calibrating", 0, 100)
        pipe.progress_bar = counted
        try:
            pipe.calibrate(name, pictures, self.lesson.false_alarm_rate)
        finally:
            del pipe.progress_bar


def measured_pace(pipe, turns: Turns) -> Pace | None:
    """Measures this machine by a lesson of two steps a stage, which gives way to visitors between them.

    Args:
        pipe: a pipeline on the base; it stays as it is.
        turns: turns of all visitors.

    Returns:
        The pace; None where even this takes more than `TRIAL_SECONDS`.
    """
    from ..synthetic import normal_images

    pictures = normal_images("hex_nut", 2, 0, pipe.config.resolution)
    lesson = Lesson("hex nut", tuple(pictures), None, "standard", steps=(2, 2))
    began, marks = time.monotonic(), []

    def tell(state: LessonState) -> None:
        marks.append((time.monotonic() - began, state.stage, state.step, state.picture))

    try:
        Teaching(pipe, lesson, tell, lambda: time.monotonic() - began > TRIAL_SECONDS, turns).run()
    except Canceled:
        return None
    return pace_of(marks, len(pictures))
