"""The tab Teach: teaches a part live from a few pictures, and takes what was learned out and in."""

from __future__ import annotations

import gradio as gr

from ..app import views
from .desk import Desk, sentences
from .fields import Faults
from .hub_box import hub_box
from .inspect_tab import InspectTab, cleared
from .part_download import renewed
from .style import TO_LESSON_JS
from .teach_api import add_api, choices, lesson_of, loaded, offered, summed_up, taught_in_steps
from .thumbnails import pictures_of, under

HELP = (
    "Give 1 to 8 pictures of **good** parts, taken like those you will inspect. Four are enough for a threshold you "
    "can rely on; more variety among them means fewer false alarms. Where only a region of the picture matters, "
    "draw it in Inspect afterwards."
)
COARSE_HELP = "The part in one line each, such as: A perfect hex nut."
FINE_HELP = "How a good one looks, one line each, such as: A hex nut with sharp edges and a clean thread."
DEPTH_HELP = "For gray of 16 bits alone: cameras use 10, 12 or 14 of them, and few files tell."
RATE_HELP = "Good parts that may be called defective. Fewer of them, and fainter defects are missed."
LENGTH_HELP = (
    "Quick is enough for a verdict: with this model the score rests on the prototypes above all. Fine-tuning brings "
    "the repainted pictures closer to the part, changes the score little, and lets you publish the adaptation."
)
KEEP = (
    "What you teach is yours alone. It is gone ten minutes after you close or reload this page, or after an hour "
    "without use: download the part to keep it. The file holds your good pictures too. It can be loaded here, and "
    "`anomalysd detect --adaptation` and `load_adaptation` take it."
)
LOSS_HEIGHT = 200  # pixels, also without a curve, so that nothing below moves when the first loss arrives
USUAL = 4  # pictures that the times are told for while none are given


def build(desk: Desk, key_state: gr.State, inspecting: InspectTab, batch_part: gr.Dropdown, tabs: gr.Tabs) -> None:
    """Builds the contents of the tab, and the functions `teach` and `load_adaptation` for programs.

    Args:
        desk: gives sessions and turns.
        key_state: state that holds the key of the page's session.
        inspecting: the tab Inspect, where a new part is chosen and the old result is cleared.
        batch_part: list of parts in the tab Batch; a new part is chosen there.
        tabs: switched to Inspect on request.
    """
    from .lessons import RATES

    parts, faults = [inspecting.part, batch_part], Faults()
    first = desk.models.names[0]
    taught = gr.State("")
    with gr.Row():
        with gr.Column(scale=5, min_width=300):
            gr.Markdown(HELP, elem_classes="help")
            name = gr.Textbox(label="Name of the part", placeholder="hex nut", max_lines=1, elem_id="teach-name")
            faults.beside("name", name)
            pictures = gr.File(
                label="Pictures of good parts (1 to 8)",
                file_count="multiple",
                file_types=["image"],
                height=170,
                elem_id="teach-pictures",
            )
            under(desk, pictures, "pictures", pictures_of)
            faults.beside("pictures", pictures)
            with gr.Accordion("Describe it (optional)", open=False, elem_id="teach-more"):
                coarse = gr.Textbox(
                    "", label="In short", info=COARSE_HELP, lines=2, max_lines=4, elem_id="teach-coarse"
                )
                faults.beside("coarse", coarse)
                fine = gr.Textbox("", label="In detail", info=FINE_HELP, lines=3, max_lines=6, elem_id="teach-fine")
                faults.beside("fine", fine)
                depth = gr.Dropdown(
                    [("What the pictures tell", 0), *((f"{bits} bits", bits) for bits in range(8, 17))],
                    value=0,
                    label="Bits of 16-bit gray",
                    info=DEPTH_HELP,
                    elem_id="teach-depth",
                )
                faults.beside("bit_depth", depth)
            rate = gr.Radio(
                list(RATES.items()), value=0.05, label="False alarms", info=RATE_HELP, elem_id="teach-rate"
            )
            length = gr.Radio(
                offered(desk, first, USUAL),
                value="quick",
                label="How long to teach",
                info=LENGTH_HELP if desk.models.is_embedded else None,
                elem_id="teach-length",
            )
            with gr.Row():
                run = gr.Button("Teach this part", variant="primary", elem_id="teach-run")
                cancel = gr.Button("Cancel", interactive=False, elem_id="teach-cancel")
        with gr.Column(scale=5, min_width=320):
            result = gr.HTML(views.waiting("What was taught will be said here."), elem_id="teach-result")
            progress = gr.HTML(views.progress(), elem_id="teach-progress")
            inspect = gr.Button("Inspect this part", variant="primary", interactive=False, elem_id="teach-inspect")
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
        download = inspecting.download.render()
        upload = gr.UploadButton(
            "Load a part", type="filepath", file_types=[".safetensors", ".zip"], elem_id="teach-upload"
        )
    faults.beside("adaptation", upload)

    @sentences
    def give_lesson(key, name, pictures, coarse, fine, length, rate, depth, request: gr.Request):
        from .lessons import Canceled

        visit = desk.visit(key, request)
        ready = desk.models.facts(visit.base).state == "ready"
        yield {
            key_state: visit.key,
            result: views.waiting("Teaching …"),
            progress: views.progress(None, "Reading the pictures" if ready else "Loading the model"),
            **dict.fromkeys(losses.values()),
            validation: views.validation(),
            **faults.none(),
            **busy(True),
        }
        drawn, plotted, state = None, {}, None
        try:
            lesson = lesson_of(desk, visit, name, pictures, coarse, fine, length, rate, depth)
            for state in taught_in_steps(desk, visit, lesson):
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
            yield {result: views.verdict("Not taught.", None), progress: views.progress(), **busy(False)}
            yield faults.said(error)
            return
        message = summed_up(visit, lesson, state.facts)
        yield {
            result: views.verdict(f"“{lesson.name}” is ready to be inspected.", False, message),
            progress: views.progress(state),
            **arrived(visit, lesson.name),
            **busy(False),
        }

    def arrived(visit, part: str) -> dict:
        """Chooses a new part everywhere; a result of the part as it was before goes."""
        visit.session.shown = None
        chosen = {one: gr.Dropdown(choices=choices(visit), value=part) for one in parts}
        results = dict(zip(inspecting.results, cleared(f"“{part}” is chosen; give a picture of one."), strict=True))
        file = renewed(desk, visit, part)
        return {**chosen, **results, taught: part, inspect: gr.Button(interactive=True), download: file}

    def busy(on: bool) -> dict:
        return {run: gr.Button(interactive=not on), cancel: gr.Button(interactive=on)}

    inputs = [name, pictures, coarse, fine, length, rate, depth]
    news = [key_state, result, taught, inspect, download, *parts, *inspecting.results, *faults.outputs]
    run.click(None, None, None, js=TO_LESSON_JS)  # first: the next has to wait for the server
    run.click(
        give_lesson,
        [key_state, *inputs],
        [*news, progress, *losses.values(), validation, run, cancel],
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

    at_once = {"api_visibility": "private", "queue": False, "show_progress": "hidden"}
    cancel.click(stop, key_state, progress, **at_once)

    def go(part):
        return gr.Tabs(selected="inspect"), gr.Dropdown(value=part)

    inspect.click(go, taught, [tabs, inspecting.part], **at_once)

    def offer(key, pictures, request: gr.Request):
        """Tells the times for as many pictures as are given."""
        count = len(pictures) if isinstance(pictures, list) else 0
        base = key[0] if isinstance(key, tuple) else first
        return gr.Radio(choices=offered(desk, base, count or USUAL))

    for event in (pictures.change, tabs.select):
        event(offer, [key_state, pictures], length, preprocess=False, **at_once)

    @sentences
    def take_in(key, file, request: gr.Request):
        visit = desk.visit(key, request)
        try:
            names = loaded(desk, visit, file)
        except ValueError as error:
            return {key_state: visit.key, **faults.said(error)}
        listed = ", ".join(f"“{name}”" for name in names)
        said = views.verdict(f"Loaded {listed}.", False, "It is chosen in Inspect and Batch.")
        return {key_state: visit.key, result: said, **faults.none(), **arrived(visit, names[0])}

    upload.upload(
        take_in,
        [key_state, upload],
        news,
        api_visibility="private",
        preprocess=False,
        concurrency_limit=8,
        concurrency_id="teach",
    )
    hub_box(desk, key_state, result)
    add_api(desk, key_state, inputs)
