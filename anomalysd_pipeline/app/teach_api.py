"""What the tab Teach does, for the page and as the functions `teach` and `load_adaptation` for programs."""

from __future__ import annotations

import threading
import time

import gradio as gr

from ..app import views
from .desk import Desk, Visit, sentences, shown
from .fields import about
from .inspect_tab import ANY_PART
from .part_download import written

SHOW_SECONDS = 0.4  # between two drawings of the progress


def choices(visit: Visit) -> list[str]:
    """Lists the parts that a visitor can choose."""
    return [ANY_PART, *sorted(visit.session.parts)]


def lesson_of(desk: Desk, visit: Visit, name, pictures, coarse, fine, length, rate, bit_depth):
    """Reads and checks the values that a visitor has given; all pictures are read at one depth."""
    from .lessons import check_depth, make_lesson
    from .uploads import common_depth, kept_size, read_picture

    files = desk.uploads_of(visit.visitor, pictures, "pictures")
    most = desk.limits.part_pictures
    if len(files) > most:
        raise ValueError(f"`pictures` must be 1 to {most} pictures of good parts, but {len(files)} were given.")
    texts = (coarse, fine, length, desk.limits, rate)
    lesson = make_lesson(name, [], *texts)
    visit.session.require_part(lesson.name)
    depth = check_depth(bit_depth) or common_depth([path for path, _ in files], desk.limits)
    side = visit.session.pipe.config.resolution
    with about("pictures"):
        read = [kept_size(read_picture(path, shown, desk.limits, depth), side) for path, shown in files]
    return make_lesson(name, read, *texts)


def taught_in_steps(desk: Desk, visit: Visit, lesson):
    """Teaches; yields the states that are worth to be shown: the first of each stage, and then one now and then."""
    from .work import teach

    last, stage = 0.0, None
    for state in teach(visit.session, desk.turns, lesson, threading.Event(), desk.pace(visit.base)):
        if state.stage == stage and time.monotonic() - last < SHOW_SECONDS:
            continue
        last, stage = time.monotonic(), state.stage
        yield state


def summed_up(visit: Visit, lesson, facts: dict) -> str:
    """Sums a lesson up in a message."""
    count, copies = facts["pictures"], len(lesson.pictures) - facts["pictures"]
    message = (
        f"Learned from {count} picture{'s' if count > 1 else ''} in {facts['seconds']:.0f} s; the threshold is "
        f"{facts['threshold']:.3f}."
    )
    if copies:
        said = "are copies of others" if copies > 1 else "is a copy of another"
        message += f" {copies} of those given {said}, and told nothing new."
    if facts["is_guess"]:
        message += " With a single picture the threshold is a guess; two or more make it a measurement."
    else:
        message += f" About {100 * facts['false_alarm_rate']:g} in 100 good parts are expected above it."
    if visit.session.pipe.config.categories[lesson.name].get("region"):
        message += " Its region of interest is the one that you have set before."
    return message + views.depth_note(facts["bit_depth"])


def loaded(desk: Desk, visit: Visit, file) -> list[str]:
    """Takes in a part from a file; returns the names that it brought."""
    from .downloads import load_part_file

    path, name = desk.upload_of(visit.visitor, file, "adaptation")
    with visit.session.in_use(), about("adaptation"):
        visit.session.pipe  # noqa: B018  # may wait for the base, which is nobody's turn
        with desk.turns.turn():
            return load_part_file(visit.session, path, name, overwrite=True)


def offered(desk: Desk, base: str, count: int) -> list[tuple[str, str]]:
    """Lists the lengths of lessons, with the time that each takes here once that is known.

    Args:
        desk: knows the pace of this machine.
        base: name of the base under the session.
        count: pictures of the part.
    """
    from .lessons import LENGTHS, Lesson
    from .teaching import plan

    pace, listed = desk.pace(base), []
    for name, words in LENGTHS.items():
        if pace.measured:
            lesson = Lesson("part", (None,) * count, None, name)
            words += f", {views.about(sum(plan(desk.models.base(base), lesson, pace).stages.values()))}"
        listed.append((words, name))
    return listed


def add_api(desk: Desk, key_state: gr.State, inputs: list) -> None:
    """Adds the functions `teach` and `load_adaptation` for programs."""

    @sentences
    def teach(key, name, pictures, coarse, fine, length, false_alarm_rate, bit_depth, request: gr.Request):
        """Teaches a part from pictures of good ones; it can then be inspected by the same client.

        Args:
            name: name of the part.
            pictures: 1 to 8 picture files of good parts.
            coarse: short descriptions, one on a line, or "".
            fine: descriptions of a good one's details, one on a line, or "".
            length: "quick", "standard" or "thorough".
            false_alarm_rate: share of good parts that may be called defective, above 0 and below 0.5.
            bit_depth: bits in use where pictures hold 16-bit gray, from 8 to 16; 0: what the pictures tell.

        Returns:
            `{"stage", "step", "steps", "share", "seconds_left", "loss"}` while it learns; at last `{"stage": "done",
            "part", "parts", "threshold", ...}`, and what was learned as a file.
        """
        from .lessons import Canceled

        visit = desk.visit(key, request)
        lesson = lesson_of(desk, visit, name, pictures, coarse, fine, length, false_alarm_rate, bit_depth)
        try:
            for state in taught_in_steps(desk, visit, lesson):
                losses = state.losses.get(state.stage)
                told = {n: getattr(state, n) for n in ("stage", "step", "steps", "share", "seconds_left")}
                yield visit.key, {**told, "loss": losses[-1] if losses else None}, None
        except Canceled:
            raise shown(ValueError("The teaching was canceled; nothing was changed.")) from None
        adaptation = written(desk, visit, lesson.name)
        told = {"stage": "done", "share": 1.0, "part": lesson.name, "parts": sorted(visit.session.parts)}
        yield visit.key, {**told, **state.facts}, adaptation

    @sentences
    def load_adaptation(key, file, request: gr.Request):
        """Takes in what was learned of a part.

        Args:
            file: the file that `teach` returned, `part.safetensors` of `anomalysd detect`, or a zipped adaptation.

        Returns:
            `{"parts": [...]}`, the names of its parts.
        """
        visit = desk.visit(key, request)
        return visit.key, {"parts": loaded(desk, visit, file)}

    with gr.Column(visible=False):
        answer, file = gr.JSON(label="result"), gr.File(label="adaptation")
        zipped = gr.File(label="adaptation", file_types=[".safetensors", ".zip"])
        call, load = gr.Button(), gr.Button()
    shared = {"preprocess": False, "concurrency_limit": 8, "concurrency_id": "teach"}
    call.click(teach, [key_state, *inputs], [key_state, answer, file], api_name="teach", **shared)
    load.click(load_adaptation, [key_state, zipped], [key_state, answer], api_name="load_adaptation", **shared)
