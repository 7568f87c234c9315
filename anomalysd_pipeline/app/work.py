"""Work of the tabs with the model, without their components: inspect, inspect a batch, teach."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image

from .lessons import Canceled, Lesson, LessonState
from .model import Carried, Knowledge, own_pipeline
from .pace import PROPORTIONS, Pace
from .sessions import Part, Session
from .space import is_zero_gpu, on_gpu
from .teaching import learn_on_gpu
from .turns import Turns
from .uploads import Upload, clean_text, kept_size

if TYPE_CHECKING:
    import numpy as np

    from ..inspection.result import Inspection

PRESETS = ("fast", "paper")
ANY_PART = "Any part"
"""The page's name for no part in particular."""


@dataclass(frozen=True)
class Inspected:
    """Holds the inspection of a picture and the words for it.

    Attributes:
        part: name of the part as which it was inspected.
        file: the visitor's name for the picture.
        result: the inspection.
        proposed: bool [H, W], the region that the prototypes proposed to repaint; None for a part without them.
        settings: settings of the inspection.
        remedy: advice where there is no verdict, or no reliable one, or "".
        region: the part's region of interest, see `data.region`; None: the whole picture counts.
    """

    part: str
    file: str
    result: Inspection
    proposed: np.ndarray | None
    settings: dict
    remedy: str = ""
    region: str | None = None

    @property
    def sentence(self) -> str:
        """Puts the verdict in words."""
        from .report import verdict_words

        return verdict_words(self.result.score, self.result.threshold)

    def values(self) -> dict:
        """Returns the result for programs, JSON-serializable."""
        result = self.result
        ratio = None if result.threshold is None else result.score / result.threshold
        return {
            "file": self.file,
            "part": self.part,
            "verdict": self.sentence,
            "is_defective": result.is_defective,
            "score": result.score,
            "threshold": result.threshold,
            "times_threshold": ratio,
            "seconds": round(result.seconds, 3),
            "settings": self.settings,
        }


@dataclass(frozen=True)
class BatchItem:
    """Describes the `number`-th of `total` pictures of a batch: `inspected`, or refused with an `error`."""

    number: int
    total: int
    file: str
    inspected: Inspected | None = None
    error: str | None = None


def check_preset(preset: object) -> str:
    """Returns a preset, or raises ValueError unless it is one of `PRESETS`."""
    if preset not in PRESETS:
        raise ValueError(f"`preset` must be 'fast' or 'paper', got {str(preset)[:40]!r}.")
    return preset


def check_part(part: object, session: Session) -> str | None:
    """Cleans the name of a part for the pipeline; None for `ANY_PART` or no name.

    Raises:
        ValueError: it cannot be the name of a part.
    """
    from ..method.prompts import check_category

    part = clean_text(part, "part", session.limits.name_length)
    if part in ("", ANY_PART):
        return None
    try:
        return check_category(part)
    except ValueError as error:
        raise ValueError(str(error).replace("`category`", "`part`")) from error


def threshold_facts(record: Mapping) -> dict[str, object]:
    """Gives what programs are told of a part's new threshold, from the record of its calibration."""
    return {**{name: record[name] for name in ("threshold", "pictures")}, "is_guess": not record["held_out"]}


def known_depth(session: Session, part: object) -> int | None:
    """Returns the bits in use in the 16-bit gray of a part that was taught; None where it is not known.

    Raises:
        ValueError: as `check_part`.
    """
    return session.pipe.config.categories.get(check_part(part, session), {}).get("bit_depth")


def inspect_one(
    session: Session, turns: Turns, part: str | None, picture: Image.Image, file: str = "picture", preset: str = "fast"
) -> Inspected:
    """Inspects one picture when it is this visitor's turn.

    Args:
        session: the visitor's, with the pipeline.
        turns: turns of all visitors.
        part: a taught part; the words of any other name guide the repainting; None: neither.
        picture: RGB.
        file: the visitor's name for it.
        preset: one of `PRESETS`.

    Raises:
        ValueError: for a bad name or preset, or a session that has ended.
    """
    check_preset(preset)
    part = check_part(part, session)
    with session.in_use(), own_turn(session):
        pipe = session.pipe  # may wait for the base; takes nobody's turn meanwhile
        # A lent GPU serves one call alone, and computes in another process.
        compute = inspect_on_gpu if is_zero_gpu() else functools.partial(turns.compute, inspect_on_gpu)
        result, proposed = compute(Carried(pipe), picture, part, preset)
        settings = pipe.settings(preset=preset, category=part).to_dict()
        settings = {"preset": preset, **settings}
        record = pipe.config.categories.get(part)
    remedy = _remedy(part, record) if result.threshold is None else _doubt(record)
    return Inspected(part or ANY_PART, file, result, proposed, settings, remedy, (record or {}).get("region"))


def _remedy(part: str | None, record: dict | None) -> str:
    if record is None:
        return (
            "Teach it from 1 to 8 pictures of good ones in the tab Teach. Until then judge by the heatmap, where "
            "details of good parts may light up too."
        )
    return (
        "The threshold of this part holds for the thoroughness it was taught with; inspect with Fast, or judge by the "
        "heatmap."
    )


def _doubt(record: dict) -> str:
    if record["calibration"]["held_out"]:
        return ""
    return (
        "The threshold of this part is a guess, from one picture. Inspect good ones, and press “This one is good” for "
        "each: the threshold follows."
    )


def accept(session: Session, turns: Turns, part: str | None, picture: Image.Image) -> dict:
    """Counts a picture as one of a good part, so that the threshold of a part that was taught follows.

    Args:
        session: the visitor's, with the pipeline that learns.
        turns: turns of all visitors.
        part: a part that this session knows.
        picture: RGB.

    Returns:
        The part's calibration record.

    Raises:
        ValueError: for a part that was not taught, while a part is being taught, or a session that has ended.
    """
    part = check_part(part, session)
    with session.in_use(), own_turn(session), only_lesson(session, threading.Event()):
        pipe = session.pipe
        if part not in pipe.categories:
            raise ValueError(f"`part` must be one that you have taught, got {part or ANY_PART!r}; teach it first.")
        picture = kept_size(picture, pipe.config.resolution)
        compute = accept_on_gpu if is_zero_gpu() else functools.partial(turns.compute, accept_on_gpu)
        knowledge = compute(Carried(pipe), part, picture)
        with session.lock:
            knowledge.give(pipe)
        return pipe.config.categories[part]["calibration"]


def keep_threshold(session: Session, part: str | None, threshold: object) -> None:
    """Sets the threshold of a part that was taught to one that its visitor has chosen, for the same settings.

    The next picture that is accepted sets it anew.

    Args:
        session: the visitor's, with the pipeline that learns.
        part: a part that this session knows.
        threshold: above 0.

    Raises:
        ValueError: for a part without a threshold, a threshold that is no number above 0, a session that has ended,
            or while a part is being taught.
    """
    part = check_part(part, session)
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 < threshold < math.inf:
        raise ValueError(f"`threshold` must be a number above 0, got {str(threshold)[:40]!r}.")
    with session.in_use(), only_lesson(session, threading.Event()), session.lock:
        knowledge = session.pipe.knowledge
        calibration = knowledge.record(part).get("calibration")
        if calibration is None:
            raise ValueError(f"`part` must be one that you have taught, got {part or ANY_PART!r}; teach it first.")
        knowledge.store(part, calibration={**calibration, "threshold": float(threshold)})
        session.pipe.knowledge = knowledge


@on_gpu(lambda carried, part, picture: _gpu_seconds_of_inspection(carried, picture, part, None))
def accept_on_gpu(carried: Carried, part: str, picture: Image.Image) -> Knowledge:
    """Calibrates a copy of the pipeline with one more picture; returns its knowledge for the caller to keep."""
    pipe = own_pipeline(carried.pipe)
    record = pipe.config.categories[part]["calibration"]
    pipe.calibrate(part, [picture], record["false_alarm_rate"])
    return Knowledge.of(pipe)


def _gpu_seconds_of_inspection(carried: Carried, picture, part, preset) -> float:
    settings = carried.pipe.settings(preset=preset, category=part)
    passes = sum(k * k if settings.mask_grouping == "none" else min(k, 2) ** 2 for k in settings.mask_scales) + 1
    return 10 + passes * settings.num_inference_steps * settings.noise_strength * 0.02


@on_gpu(_gpu_seconds_of_inspection)
def inspect_on_gpu(
    carried: Carried, picture: Image.Image, part: str | None, preset: str
) -> tuple[Inspection, np.ndarray | None]:
    """The inspection itself."""
    from ..inspection.result import inspect

    (found,) = inspect(carried.pipe, [picture], part, preset=preset)
    return found, found.region


def batch(
    session: Session, turns: Turns, part: str | None, uploads: Sequence[Upload], preset: str = "fast"
) -> Iterator[BatchItem]:
    """Inspects pictures one after another, each in a turn of its own, until `cancel_batch` is called.

    A picture that cannot be read becomes an item with a sentence.

    Raises:
        ValueError: for a bad name or preset, or a session that has ended.
    """
    check_preset(preset)
    depth = known_depth(session, part)
    cancel = threading.Event()
    with _guard:
        _batches[session] = cancel
    with session.in_use():
        for number, upload in enumerate(uploads, 1):
            if cancel.is_set():
                return
            place = (number, len(uploads), upload.shown_name)
            if upload.error is not None:
                yield BatchItem(*place, error=upload.error)
                continue
            try:
                picture = upload.load(depth)
            except ValueError as error:
                yield BatchItem(*place, error=str(error))
                continue
            yield BatchItem(*place, inspected=inspect_one(session, turns, part, picture, upload.shown_name, preset))


def teach(
    session: Session, turns: Turns, lesson: Lesson, cancel: threading.Event, pace: Pace = PROPORTIONS
) -> Iterator[LessonState]:
    """Teaches a part (prototypes, threshold and, by the length, a fine-tuning); yields its progress.

    The last state has the stage "done". Until then the session is as it was, and it stays so after a cancellation, an
    error, or when nobody asks for the next state any more.

    Args:
        session: the visitor's, with the pipeline that learns.
        turns: turns of all visitors; the teaching gives way between its steps.
        lesson: the part and its pictures.
        cancel: ends the teaching at its next step, from any thread.
        pace: of this machine, for the time left.

    Raises:
        Canceled: as asked.
        ValueError: for a lesson that cannot be taught, or while another one is under way in this session.
    """
    with session.in_use(), only_lesson(session, cancel):
        session.require_part(lesson.name)
        pipe = session.pipe
        knowledge = last = None
        # Neither can go to the other process of a lent GPU; there nobody waits, and closing the generator cancels.
        shared = (None, None) if is_zero_gpu() else (cancel, turns)
        states = learn_on_gpu(Carried(pipe), lesson, *shared, pace)
        with contextlib.closing(states):
            for state in states:
                if cancel.is_set() or session.dropped:
                    raise Canceled
                if isinstance(state, Knowledge):
                    knowledge = state
                else:
                    yield (last := state)
        with _turn(turns), session.lock:
            if cancel.is_set():
                raise Canceled
            session.require_part(lesson.name)
            knowledge.give(pipe)
            session.parts[lesson.name] = Part(
                lesson.name, list(lesson.pictures), lesson.prompts, lesson.length != "quick", last.facts
            )
        yield dataclasses.replace(last, stage="done", share=1.0, seconds_left=0.0)


def cancel_batch(session: Session) -> bool:
    """Asks the session's latest batch to end after its present picture; returns False where there was none."""
    return _cancel(_batches, session)


def cancel_lesson(session: Session) -> bool:
    """Asks the session's teaching to end; returns False where there is none."""
    return _cancel(_lessons, session)


def _cancel(running: Mapping[Session, threading.Event], session: Session) -> bool:
    with _guard:
        cancel = running.get(session)
    if cancel is None:
        return False
    cancel.set()
    return True


_guard = threading.Lock()
_lessons: weakref.WeakKeyDictionary[Session, threading.Event] = weakref.WeakKeyDictionary()
_batches: weakref.WeakKeyDictionary[Session, threading.Event] = weakref.WeakKeyDictionary()
_waiting: weakref.WeakKeyDictionary[Session, threading.Lock] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def only_lesson(session: Session, cancel: threading.Event):
    with _guard:
        if session in _lessons:
            raise ValueError("A part is being taught in this session already; wait for it, or cancel it.")
        _lessons[session] = cancel
    try:
        yield
    finally:
        with _guard:
            del _lessons[session]


@contextlib.contextmanager
def own_turn(session: Session):
    """Lets only one call of a session wait for the model at a time, so that other visitors come between."""
    with _guard:
        lock = _waiting.setdefault(session, threading.Lock())
    with lock:
        yield


def _turn(turns: Turns):
    return contextlib.nullcontext() if is_zero_gpu() else turns.turn()
