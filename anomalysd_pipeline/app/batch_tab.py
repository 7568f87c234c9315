"""The tab Batch: inspects many pictures, or zips of them, into one table, the most suspicious first."""

from __future__ import annotations

import time

import gradio as gr

from ..app import views
from .batch_work import BatchWork
from .desk import Desk, sentences
from .fields import Faults
from .inspect_tab import ANY_PART, PRESETS
from .style import TO_HEATMAPS_JS
from .thumbnails import pictures_in, under

HEADERS = ["File", "Verdict", "× threshold", "Score", "Threshold", "Note"]
TYPES = ["str", "str", "number", "number", "number", "str"]
SHOW_SECONDS = 0.7
IDLE = "Nothing is being inspected."


def build(desk: Desk, key: gr.State) -> gr.Dropdown:
    """Builds the contents of the tab and the function `batch` for programs; returns its list of parts."""
    limits, faults = desk.limits, Faults()
    with gr.Row():
        with gr.Column(scale=4, min_width=300):
            files = gr.File(
                label=f"Pictures, or zips of pictures (up to {limits.pictures})",
                file_count="multiple",
                file_types=["image", ".zip"],
                height=190,
                elem_id="batch-files",
            )
            under(desk, files, "files", pictures_in)
            faults.beside("files", files)
            part = gr.Dropdown(
                [ANY_PART],
                value=ANY_PART,
                label="Part",
                info="One that you have taught, for verdicts; otherwise there are scores and heatmaps alone.",
                allow_custom_value=True,
                elem_id="batch-part",
            )
            faults.beside("part", part)
            preset = gr.Radio(PRESETS, value="fast", label="Thoroughness", elem_id="batch-preset")
            with gr.Row():
                run = gr.Button("Inspect all", variant="primary", elem_id="batch-run")
                cancel = gr.Button("Cancel", interactive=False, elem_id="batch-cancel")
            progress = gr.HTML(views.bar(0.0, IDLE), elem_id="batch-progress")
        with gr.Column(scale=6, min_width=320):
            gallery = gr.Gallery(
                label="Heatmaps",
                columns=4,
                height=360,
                object_fit="contain",
                interactive=False,
                buttons=["download", "fullscreen"],
                elem_id="batch-gallery",
            )
            downloads = gr.File(
                label="To take home: table, and a zip of it with heatmaps and masks",
                file_count="multiple",
                interactive=False,
                height=140,
                elem_id="batch-downloads",
            )
    table = gr.Dataframe(
        headers=HEADERS,
        datatype=TYPES,
        value=[],
        type="array",
        interactive=False,
        label="Results, the most suspicious first; select a row to see its heatmap, a heading to sort",
        max_height=420,
        wrap=True,
        column_widths=["220px", "150px", "120px", "100px", "110px", "420px"],
        elem_id="batch-table",
    )
    busy, idle = gr.update(interactive=False), gr.update(interactive=True)

    @sentences
    def inspect_all(key_value, files, part, preset, request: gr.Request):
        visit = desk.visit(key_value, request)
        yield {
            key: visit.key,
            progress: views.bar(0.0, "Reading the files"),
            table: [],
            gallery: gr.Gallery(value=[], selected_index=None),
            downloads: None,
            run: busy,
            cancel: idle,
            **faults.none(),
        }
        last = 0.0
        work = BatchWork(desk, visit, part)
        try:
            for done, total in work.run(files, preset):
                if time.monotonic() - last < SHOW_SECONDS and done < total:
                    continue
                last = time.monotonic()
                words = f"{done} of {total} · {views.time_left(work.seconds_left(done, total))}"
                yield {progress: views.bar(done / total, words), table: work.table, gallery: work.heatmaps}
        except ValueError as error:
            yield {progress: views.bar(0.0, "Not inspected."), run: idle, cancel: busy}
            yield faults.said(error)
            return
        yield {
            progress: views.bar(work.share, work.summary()),
            table: work.table,
            gallery: work.heatmaps,
            downloads: work.files() if work.rows else None,
            run: idle,
            cancel: busy,
        }

    running = run.click(
        inspect_all,
        [key, files, part, preset],
        [key, progress, table, gallery, downloads, run, cancel, *faults.outputs],
        api_visibility="private",
        preprocess=False,
        concurrency_limit=8,
        concurrency_id="batch",
        show_progress="hidden",
    )
    at_once = {"api_visibility": "private", "queue": False, "show_progress": "hidden"}

    def stop_batch(key):
        from .work import cancel_batch

        session = desk.present(key)
        stopped = session is not None and cancel_batch(session)
        return views.bar(0.0, "Canceling after this picture …") if stopped else gr.skip()

    cancel.click(stop_batch, key, progress, **at_once)

    def clear_batch(key):
        """Clears the results of other files, or of another part."""
        stop_batch(key)
        return views.bar(0.0, IDLE), [], gr.Gallery(value=[], selected_index=None), None, idle, busy

    # Only what the visitor changes here: a part that was just taught ends no batch, whose part is said with its end.
    for changed in (files.change, part.input, preset.input):
        changed(clear_batch, key, [progress, table, gallery, downloads, run, cancel], cancels=[running], **at_once)

    def open_row(shown, event: gr.SelectData):
        """Opens the heatmap of a row, wherever sorting has put it."""
        captions = [item.get("caption") for item in shown or [] if isinstance(item, dict)]
        caption = ": ".join(map(str, (event.row_value or [])[:2]))
        return gr.Gallery(selected_index=captions.index(caption) if caption in captions else None)

    table.select(None, None, None, js=TO_HEATMAPS_JS)
    table.select(open_row, gallery, gallery, preprocess=False, **at_once)
    _add_api(desk, key, files, part, preset)
    return part


def _add_api(desk: Desk, key: gr.State, files: gr.File, part: gr.Dropdown, preset: gr.Radio) -> None:
    """Adds the function `batch` for programs."""

    @sentences
    def batch(key, files, part, preset, request: gr.Request):
        """Inspects many pictures.

        Args:
            files: picture files, or zips of them.
            part: a part that this client has taught, "Any part", or any other name.
            preset: "fast" or "paper".

        Returns:
            `{"done", "total", "rows": [{"file", "verdict", "score", "threshold", ..., "error"}]}` as it grows, and at
            last the table as CSV, and a zip of it (as CSV and JSON), the heatmaps and the masks.
        """
        visit = desk.visit(key, request)
        work, last = BatchWork(desk, visit, part), 0.0
        done = total = 0
        for done, total in work.run(files, preset):
            if time.monotonic() - last >= SHOW_SECONDS:
                last = time.monotonic()
                yield visit.key, {"done": done, "total": total, "rows": work.values}, None
        yield visit.key, {"done": done, "total": total, "rows": work.values}, work.files()

    with gr.Column(visible=False):
        answer, taken, call = gr.JSON(label="result"), gr.File(label="files", file_count="multiple"), gr.Button()
    call.click(
        batch,
        [key, files, part, preset],
        [key, answer, taken],
        api_name="batch",
        preprocess=False,
        concurrency_limit=8,
        concurrency_id="batch",
    )
