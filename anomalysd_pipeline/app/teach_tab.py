"""The tab Teach: teaches a part live from a few pictures, and takes adaptations out and in."""

from __future__ import annotations

import threading
import time

import gradio as gr

from ..app import views
from .desk import Desk, Visit, sentences, shown
from .hub_box import hub_box
from .inspect_tab import ANY_PART

HELP = (
    "Give 1 to 8 pictures of **good** parts, taken like those you will inspect. Four are enough for a threshold you "
    "can rely on; more variety among them means fewer false alarms."
)
COARSE_HELP = "The part in one line each, such as: A perfect hex nut."
FINE_HELP = "How a good one looks, one line each, such as: A hex nut with sharp edges and a clean thread."
KEEP = (
    "What you teach is yours alone. It is gone ten minutes after you close or reload this page, or after an hour "
    "without use: download the adaptation to keep it."
)
SHOW_SECONDS = 0.4  # between two drawings of the progress
LOSS_HEIGHT = 200  # pixels, also without a curve, so that nothing below moves when the first loss arrives


def build(desk: Desk, key_state: gr.State, parts: list[gr.Dropdown]) -> None:
    """Builds the contents of the tab, and the functions `teach` and `load_adaptation` for programs.

    Args:
        desk: gives sessions and turns.
        key_state: state that holds the key of the page's session.
        parts: lists of parts on other tabs; a new part is added and chosen there.
    """
    from .lessons import LENGTHS

    with gr.Row():
        with gr.Column(scale=5, min_width=300):
            gr.Markdown(HELP, elem_classes="help")
            name = gr.Textbox(label="Name of the part", placeholder="hex nut", max_lines=1, elem_id="teach-name")
            pictures = gr.File(
                label="Pictures of good parts (1 to 8)",
                file_count="multiple",
                file_types=["image"],
                height=170,
                elem_id="teach-pictures",
            )
            with gr.Accordion("Describe it (optional)", open=False):
                coarse = gr.Textbox(
                    "", label="In short", info=COARSE_HELP, lines=2, max_lines=4, elem_id="teach-coarse"
                )
                fine = gr.Textbox("", label="In detail", info=FINE_HELP, lines=3, max_lines=6, elem_id="teach-fine")
            length = gr.Radio(
                [(words, name) for name, words in LENGTHS.items()],
                value="standard",
                label="How long to teach",
                elem_id="teach-length",
            )
            with gr.Row():
                run = gr.Button("Teach this part", variant="primary", elem_id="teach-run")
                cancel = gr.Button("Cancel", interactive=False, elem_id="teach-cancel")
        with gr.Column(scale=5, min_width=320):
            result = gr.HTML(views.waiting("What was taught will be said here."), elem_id="teach-result")
            progress = gr.HTML(views.progress(), elem_id="teach-progress")
            with gr.Row():
                losses = {
                    stage: gr.LinePlot(
                        x="step",
                        y="loss",
                        label=f"Loss of the {stage}",
                        height=LOSS_HEIGHT,
                        elem_classes="loss",
                        elem_id=f"teach-loss-{stage}",
                    )
                    for stage in ("denoiser", "decoder")
                }
            validation = gr.HTML(views.validation(), elem_id="teach-validation")
    gr.Markdown(KEEP, elem_classes="help")
    with gr.Row():
        download = gr.DownloadButton("Download the adaptation", interactive=False, elem_id="teach-download")
        upload = gr.UploadButton("Load an adaptation (zip)", file_types=[".zip"], elem_id="teach-upload")

    @sentences
    def live(key, name, pictures, coarse, fine, length, request: gr.Request):
        from .lessons import Canceled

        visit = desk.visit(key, request)
        lesson = _lesson(desk, visit, name, pictures, coarse, fine, length)
        said = views.waiting(f"Teaching “{lesson.name}” …")
        yield {
            key_state: visit.key,
            result: said,
            progress: views.progress(None, "Waiting for a turn"),
            **dict.fromkeys(losses.values()),
            validation: views.validation(),
            **busy(True),
        }
        last, drawn, plotted = 0.0, None, {}
        try:
            for state in _taught_in_steps(desk, visit, lesson):
                if time.monotonic() - last < SHOW_SECONDS and state.stage != "done":
                    continue
                last = time.monotonic()
                news = {progress: views.progress(state)}
                for stage, values in state.losses.items():
                    if len(values) != plotted.get(stage):
                        plotted[stage] = len(values)
                        news[losses[stage]] = views.loss_curve(values)
                if state.picture is not drawn:
                    drawn = state.picture
                    news[validation] = views.validation(drawn)
                yield news
        except Canceled:
            said = views.verdict("Canceled. Nothing was changed.", None)
            yield {result: said, progress: views.progress(None, "Canceled."), **busy(False)}
            return
        except ValueError as error:
            yield {result: views.verdict("Not taught.", None, str(error)), progress: views.progress(), **busy(False)}
            raise
        message, file = _left(desk, visit, lesson, state.facts)
        yield {
            result: views.verdict(f"“{lesson.name}” is ready to be inspected.", False, message),
            progress: views.progress(state),
            download: gr.DownloadButton(value=file, interactive=file is not None),
            **{part: gr.Dropdown(choices=choices(visit), value=lesson.name) for part in parts},
            **busy(False),
        }

    def busy(on: bool) -> dict:
        return {run: gr.Button(interactive=not on), cancel: gr.Button(interactive=on)}

    shown_outputs = [key_state, result, progress, *losses.values(), validation, run, cancel, download, *parts]
    run.click(
        live,
        [key_state, name, pictures, coarse, fine, length],
        shown_outputs,
        api_visibility="private",
        preprocess=False,
        concurrency_limit=8,
        concurrency_id="teach",
        show_progress="hidden",
    )

    def stop(key):
        from .work import cancel_lesson

        session = desk.present(key)
        if session is not None and cancel_lesson(session):
            return views.progress(None, "Canceling after this step …")
        return gr.skip()

    cancel.click(stop, key_state, progress, api_visibility="private", queue=False, show_progress="hidden")

    @sentences
    def take_in(key, file, request: gr.Request):
        visit = desk.visit(key, request)
        names = _loaded(desk, visit, file)
        listed = ", ".join(f"“{name}”" for name in names)
        said = views.verdict(f"Loaded {listed}.", False, "Select it in Inspect or Batch.")
        return visit.key, said, *[gr.Dropdown(choices=choices(visit), value=names[0]) for _ in parts]

    upload.upload(
        take_in,
        [key_state, upload],
        [key_state, result, *parts],
        api_visibility="private",
        preprocess=False,
        concurrency_limit=8,
        concurrency_id="teach",
    )
    hub_box(desk, key_state)
    _add_api(desk, key_state, [name, pictures, coarse, fine, length])


def choices(visit: Visit) -> list[str]:
    """Lists the parts that a visitor can choose."""
    return [ANY_PART, *sorted(visit.session.parts)]


def _lesson(desk: Desk, visit: Visit, name, pictures, coarse, fine, length):
    """Reads and checks the values that a visitor has given."""
    from .lessons import make_lesson
    from .uploads import kept_size, read_picture

    files = desk.uploads_of(visit.visitor, pictures, "pictures")
    most = desk.limits.part_pictures
    if len(files) > most:
        raise ValueError(f"`pictures` must be 1 to {most} pictures of good parts, but {len(files)} were given.")
    lesson = make_lesson(name, [], coarse, fine, length, desk.limits)
    visit.session.require_part(lesson.name)
    side = visit.session.pipe.config.resolution
    read = [kept_size(read_picture(path, name, desk.limits), side) for path, name in files]
    return make_lesson(name, read, coarse, fine, length, desk.limits)


def _taught_in_steps(desk: Desk, visit: Visit, lesson):
    from .work import teach

    return teach(visit.session, desk.turns, lesson, threading.Event())


def _left(desk: Desk, visit: Visit, lesson, facts: dict) -> tuple[str, str | None]:
    """Sums a lesson up in a message, and packs its adaptation, if there is one, into a file."""
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
    if lesson.length == "quick":
        return message + " There is no adaptation to download: nothing was fine-tuned.", None
    return message, _adaptation_file(desk, visit, lesson.name)


def _adaptation_file(desk: Desk, visit: Visit, part: str) -> str:
    from .downloads import adaptation_zip
    from .uploads import safe_name

    pipe = visit.session.pipe
    adaptation = pipe.config.categories[part]["adaptation"]
    path = desk.new_folder(visit) / f"{safe_name(part)}.zip"
    with desk.turns.turn():
        return str(adaptation_zip(pipe, adaptation, path))


def _loaded(desk: Desk, visit: Visit, file) -> list[str]:
    from .downloads import load_adaptation_zip

    path, name = desk.upload_of(visit.visitor, file, "adaptation")
    with visit.session.in_use():
        visit.session.pipe  # noqa: B018  # may wait for the base, which is nobody's turn
        with desk.turns.turn():
            return load_adaptation_zip(visit.session, path, name, overwrite=True)


def _add_api(desk: Desk, key_state: gr.State, inputs: list) -> None:
    """Adds the functions `teach` and `load_adaptation` for programs."""

    @sentences
    def teach(key, name, pictures, coarse, fine, length, request: gr.Request):
        """Teaches a part from pictures of good ones; it can then be inspected by the same client.

        Args:
            name: name of the part.
            pictures: 1 to 8 picture files of good parts.
            coarse: short descriptions, one on a line, or "".
            fine: descriptions of a good one's details, one on a line, or "".
            length: "quick", "standard" or "thorough".

        Returns:
            `{"stage", "step", "steps", "share", "seconds_left", "loss"}` while it learns; at last `{"stage": "done",
            "part", "parts", "threshold", ...}`, and the adaptation as a zip, or null for "quick".
        """
        from .lessons import Canceled

        visit = desk.visit(key, request)
        lesson = _lesson(desk, visit, name, pictures, coarse, fine, length)
        last = 0.0
        try:
            for state in _taught_in_steps(desk, visit, lesson):
                if time.monotonic() - last < SHOW_SECONDS:
                    continue
                last = time.monotonic()
                losses = state.losses.get(state.stage)
                told = {n: getattr(state, n) for n in ("stage", "step", "steps", "share", "seconds_left")}
                yield visit.key, {**told, "loss": losses[-1] if losses else None}, None
        except Canceled:
            raise shown(ValueError("The teaching was canceled; nothing was changed.")) from None
        _, adaptation = _left(desk, visit, lesson, state.facts)
        told = {"stage": "done", "share": 1.0, "part": lesson.name, "parts": sorted(visit.session.parts)}
        yield visit.key, {**told, **state.facts}, adaptation

    @sentences
    def load_adaptation(key, file, request: gr.Request):
        """Takes in an adaptation.

        Args:
            file: the zip that `teach` returned.

        Returns:
            `{"parts": [...]}`, the names of its parts.
        """
        visit = desk.visit(key, request)
        return visit.key, {"parts": _loaded(desk, visit, file)}

    with gr.Column(visible=False):
        answer, file = gr.JSON(label="result"), gr.File(label="adaptation")
        zipped = gr.File(label="adaptation", file_types=[".zip"])
        call, load = gr.Button(), gr.Button()
    shared = {"preprocess": False, "concurrency_limit": 8, "concurrency_id": "teach"}
    call.click(teach, [key_state, *inputs], [key_state, answer, file], api_name="teach", **shared)
    load.click(load_adaptation, [key_state, zipped], [key_state, answer], api_name="load_adaptation", **shared)
