"""The tab Inspect: one picture, its verdict and heatmap, and the files to take home."""

from __future__ import annotations

from dataclasses import dataclass

import gradio as gr

from ..app import figures, region_box, views
from .desk import Desk, Visit, sentences
from .fields import Faults, about
from .heat import HeatView, Shown
from .part_download import renewed
from .stored import NOTE, StoredExamples
from .style import OPACITY_JS, TO_VERDICT_JS

PRESETS = [("Fast", "fast"), ("As in the paper, slower", "paper")]
ANY_PART = "Any part"
EMPTY = "Give a picture, and the verdict will appear here."
CHANGED = "Press Inspect for the verdict."


@dataclass(frozen=True)
class InspectTab:
    """Names the components that other tabs change.

    Attributes:
        picture, part: the inputs.
        results: the outputs, in the order of `cleared`.
        download: button for the file of the part, not rendered yet.
    """

    picture: gr.Image
    part: gr.Dropdown
    results: list[gr.components.Component]
    download: gr.DownloadButton


def cleared(text: str = CHANGED) -> tuple:
    """Gives the values of the tab's results while there is none: nothing old stands beside anything new."""
    return (
        views.waiting(text),
        views.gauge(),
        views.no_heatmap(),
        gr.Button(interactive=False),
        gr.Slider(interactive=False),
        gr.Button(interactive=False),
        None,
        None,
        None,
    )


def build(desk: Desk, key: gr.State, stored: StoredExamples | None, tabs: gr.Tabs) -> InspectTab:
    """Builds the contents of the tab, and the functions `inspect` and `accept` for programs.

    Args:
        desk: gives sessions and turns.
        key: state that holds the key of the page's session.
        stored: the ready examples; None: there are none.
        tabs: switched to Teach on request.
    """
    faults = Faults()
    with gr.Row():
        with gr.Column(scale=4, min_width=300):
            picture = gr.Image(
                label="Picture",
                type="filepath",
                image_mode=None,
                sources=["upload", "clipboard", "webcam"],
                height=300,
                elem_id="inspect-picture",
            )
            faults.beside("picture", picture)
            part = gr.Dropdown(
                [ANY_PART],
                value=ANY_PART,
                label="Part",
                info="One that you have taught. Any other name works too: its words guide the repainting.",
                allow_custom_value=True,
                elem_id="inspect-part",
            )
            faults.beside("part", part)
            first = gr.Button("No part yet? Teach one first", size="sm", elem_id="inspect-teach")
            preset = gr.Radio(PRESETS, value="fast", label="Thoroughness", elem_id="inspect-preset")
            run = gr.Button("Inspect", variant="primary", elem_id="inspect-run")
            place = gr.Column()
            if stored is not None:
                examples = gr.Dataset(
                    label="Examples, with stored results",
                    components=[picture],
                    samples=[[str(example.path)] for example in stored.examples],
                    type="index",
                    elem_id="inspect-examples",
                )
        with gr.Column(scale=6, min_width=320):
            verdict = gr.HTML(views.waiting(EMPTY), elem_id="inspect-verdict")
            gauge = gr.HTML(views.gauge(), elem_id="inspect-gauge")
            heatmap = gr.HTML(views.no_heatmap(), elem_id="inspect-heatmap")
            threshold = gr.Slider(
                0,
                1,
                value=0.5,
                label="Threshold",
                info="Move it to see what would change; keep it for all pictures of this part.",
                interactive=False,
                elem_id="inspect-threshold",
            )
            with gr.Row():
                keep = gr.Button("Keep this threshold", size="sm", interactive=False, elem_id="inspect-keep")
                good = gr.Button("This one is good", size="sm", interactive=False, elem_id="inspect-good")
            opacity = gr.Slider(0, 100, value=60, step=1, label="Heatmap opacity (%)", elem_id="inspect-opacity")
    with gr.Row():
        with gr.Column(min_width=320):
            compare = gr.ImageSlider(
                label="Before and after repainting",
                interactive=False,
                height=538,
                max_height=518,
                elem_id="inspect-compare",
            )
        with gr.Column(min_width=320):
            masks = gr.Gallery(
                label="Masks",
                columns=3,
                height=250,
                object_fit="contain",
                elem_id="inspect-masks",
                interactive=False,
            )
            downloads = gr.File(
                label="To take home: map and report",
                file_count="multiple",
                interactive=False,
                height=272,
                elem_id="inspect-downloads",
            )
    download = gr.DownloadButton("Download this part", interactive=False, elem_id="teach-download", render=False)
    inputs = [key, part, picture, preset]
    results = [verdict, gauge, heatmap, good, threshold, keep, compare, masks, downloads]
    with place:
        region_box.build(desk, key, part, results, download, faults, cleared)

    def everything(visit: Visit, found, inputs: tuple, note: str) -> dict:
        """Fills all results in, and remembers what can be drawn again for another threshold."""
        result = found.result
        folder = desk.new_folder(visit)
        view = HeatView(result.image, result.anomaly_map, found.region)
        shown = Shown(inputs, found.part, view, result.score, result.threshold)
        visit.session.shown = shown
        has = result.threshold is not None
        predicted = result.predicted if has else None
        values = (
            views.verdict(found.sentence, result.is_defective, note or found.remedy),
            views.gauge(result.score, result.threshold),
            view.html(result.threshold, _maximum(result.threshold), bool(result.is_defective)),
            gr.Button(interactive=has),
            gr.Slider(interactive=True, **shown.reach()) if has else gr.Slider(interactive=False),
            gr.Button(interactive=False),
            figures.compared(result, folder),
            figures.masks(result.image, found.settings["mask_scales"], found.proposed, predicted, folder),
            _files(desk, visit, found),
        )
        return {key: visit.key, **faults.none(), **dict(zip(results, values, strict=True))}

    def answered(key_value, part, picture, preset, request, before=None) -> dict:
        """Inspects, after `before` has changed what was learned of the part; says what is wrong beside its field."""
        visit = desk.visit(key_value, request)
        try:
            note = before(visit, part, picture) if before else ""
            found = _inspect(desk, visit, part, picture, preset)
        except ValueError as error:
            return {key: visit.key, **faults.said(error)}
        file = {download: renewed(desk, visit, found.part)} if before else {}
        return {**everything(visit, found, _inputs(picture, part, preset), note), **file}

    @sentences
    def show(key, part, picture, preset, request: gr.Request):
        return answered(key, part, picture, preset, request)

    @sentences
    def learn(key, part, picture, preset, request: gr.Request):
        def accepted(visit: Visit, part, picture) -> str:
            record = _accept(desk, visit, part, picture)
            count = record["pictures"]
            return f"The threshold is now {record['threshold']:.3f}, from {count} picture{'s' if count > 1 else ''}."

        return answered(key, part, picture, preset, request, accepted)

    @sentences
    def hold(key, part, picture, preset, value, request: gr.Request):
        def kept(visit: Visit, part, picture) -> str:
            from .work import keep_threshold

            keep_threshold(visit.session, part, value)
            return f"You have set the threshold of this part to {value:.3f}."

        return answered(key, part, picture, preset, request, kept)

    run.click(None, None, None, js=TO_VERDICT_JS)  # first: the next has to wait for the server
    shared = {"api_visibility": "private", "preprocess": False, "concurrency_limit": 24, "concurrency_id": "inspect"}
    runs = [
        button.click(function, given, [key, *results, download, *faults.outputs], show_progress_on=[verdict], **shared)
        for button, function, given in ((run, show, inputs), (good, learn, inputs), (keep, hold, [*inputs, threshold]))
    ]
    first.click(lambda: gr.Tabs(selected="teach"), None, tabs, api_visibility="private", queue=False)

    def clear(key, picture, part, preset):
        """Clears the results of other inputs than those that are chosen now."""
        session = desk.present(key)
        if session is not None and session.shown is not None:
            if session.shown.inputs == _inputs(picture, part, preset):
                return dict.fromkeys(results, gr.skip())
            session.shown = None
        return dict(zip(results, cleared(CHANGED if picture else EMPTY), strict=True))

    def try_out(key, value):
        """Draws the result again as if the threshold were another."""
        session = desk.present(key)
        shown = None if session is None else session.shown
        if shown is None or shown.threshold is None or not isinstance(value, int | float) or not value > 0:
            return (gr.skip(),) * 4
        told = views.verdict_at(shown.score, value, f"Tried by hand; the part's own is {shown.threshold:.3f}.")
        outlined = shown.score > value
        button = gr.Button(interactive=shown.part is not None)
        return told, views.gauge(shown.score, value), shown.view.html(value, outlined=outlined), button

    at_once = {"api_visibility": "private", "preprocess": False, "queue": False, "show_progress": "hidden"}
    for chosen in (picture, part, preset):
        # What is still being inspected belongs to the old inputs.
        chosen.change(clear, [key, picture, part, preset], results, cancels=runs, **at_once)
    threshold.input(try_out, [key, threshold], [verdict, gauge, heatmap, keep], trigger_mode="always_last", **at_once)
    opacity.input(None, opacity, None, js=OPACITY_JS)

    if stored is not None:

        def example(key_value, part, preset, number, request: gr.Request):
            number = number if isinstance(number, int) and 0 <= number < len(stored.examples) else 0
            drawn, chosen, path = stored.drawn(number), stored.examples[number], stored.path(number)
            visit = desk.visit(key_value, request)
            inputs = _inputs({"path": path}, part, preset)
            visit.session.shown = shown = Shown(inputs, None, drawn.view, chosen.score, chosen.threshold)
            values = (
                views.verdict(chosen.sentence, chosen.is_defective, f"{chosen.title}. {NOTE}"),
                drawn.gauge,
                drawn.view.html(chosen.threshold, outlined=chosen.is_defective),
                gr.Button(interactive=False),
                gr.Slider(interactive=True, **shown.reach()),
                gr.Button(interactive=False),
                drawn.compare,
                drawn.masks,
                None,
            )
            return {key: visit.key, picture: path, **dict(zip(results, values, strict=True))}

        examples.click(example, [key, part, preset, examples], [key, picture, *results], **at_once)
    _add_api(desk, key, picture, part, preset)
    return InspectTab(picture, part, results, download)


def _add_api(desk: Desk, key: gr.State, picture: gr.Image, part: gr.Dropdown, preset: gr.Radio) -> None:
    """Adds the functions `inspect` and `accept` for programs."""

    @sentences
    def inspect(key, picture, part, preset, request: gr.Request):
        """Inspects one picture.

        Args:
            picture: a picture file: BMP, GIF, JPEG, PNG, TIFF or WebP.
            part: a part that this client has taught, "Any part", or any other name.
            preset: "fast" or "paper".

        Returns:
            `{"verdict", "is_defective", "score", "threshold", "times_threshold", "seconds", "settings", ...}`; the
            threshold, its multiple and the verdict are null for a part without one. Then the files: map as 16-bit
            PNG and .npy, report as PNG and PDF.
        """
        visit = desk.visit(key, request)
        found = _inspect(desk, visit, part, picture, preset)
        return visit.key, found.values(), _files(desk, visit, found)

    @sentences
    def accept(key, picture, part, request: gr.Request):
        """Counts a picture as one of a good part: the threshold of a part that this client has taught follows.

        Args:
            picture: a picture file: BMP, GIF, JPEG, PNG, TIFF or WebP.
            part: a part that this client has taught.

        Returns:
            `{"threshold", "pictures", "is_guess"}`: the new threshold, and how many pictures it rests on.
        """
        from .work import threshold_facts

        visit = desk.visit(key, request)
        record = _accept(desk, visit, part, picture)
        return visit.key, threshold_facts(record)

    with gr.Column(visible=False):
        answer, files, call = gr.JSON(label="result"), gr.File(label="files", file_count="multiple"), gr.Button()
        threshold, confirm = gr.JSON(label="threshold"), gr.Button()
    confirm.click(
        accept,
        [key, picture, part],
        [key, threshold],
        api_name="accept",
        preprocess=False,
        concurrency_limit=24,
        concurrency_id="inspect",
    )
    call.click(
        inspect,
        [key, picture, part, preset],
        [key, answer, files],
        api_name="inspect",
        preprocess=False,
        concurrency_limit=24,
        concurrency_id="inspect",
    )


def _inspect(desk: Desk, visit: Visit, part, picture, preset):
    from .work import inspect_one

    name, read = _read(desk, visit, picture, part)
    return inspect_one(visit.session, desk.turns, part, read, name, preset)


def _accept(desk: Desk, visit: Visit, part, picture) -> dict:
    from .work import accept

    _, read = _read(desk, visit, picture, part)
    return accept(visit.session, desk.turns, part, read)


def _read(desk: Desk, visit: Visit, picture, part):
    """Returns the visitor's name for the picture, and the picture, read as those of the part."""
    from .uploads import read_picture
    from .work import known_depth

    path, name = desk.upload_of(visit.visitor, picture, "picture")
    depth = known_depth(visit.session, part)
    with about("picture"):
        return name, read_picture(path, name, desk.limits, depth)


def _maximum(threshold: float | None) -> float | None:
    from ..inspection.result import UNCALIBRATED_MAXIMUM

    return UNCALIBRATED_MAXIMUM if threshold is None else None


def _inputs(picture, part, preset) -> tuple:
    """Identifies what a result belongs to."""
    return picture.get("path") if isinstance(picture, dict) else None, part, preset


def _files(desk: Desk, visit: Visit, found) -> list[str]:
    from .downloads import ReportFacts, inspection_files

    facts = ReportFacts(found.part, found.file, desk.models.titles[visit.base], found.settings)
    return [str(path) for path in inspection_files(found.result, facts, desk.new_folder(visit))]
