"""The tab Batch: inspects many pictures, or zips of them, into one table."""

from __future__ import annotations

import time

import gradio as gr

from ..app import views
from .desk import Desk, Visit, sentences
from .inspect_tab import ANY_PART, PRESETS

HEADERS = ["File", "Verdict", "× threshold", "Score", "Threshold", "Note"]
TYPES = ["str", "str", "number", "number", "number", "str"]
THUMBNAIL = 320
SHOW_SECONDS = 0.7


def build(desk: Desk, key: gr.State) -> gr.Dropdown:
    """Builds the contents of the tab and the function `batch` for programs; returns its list of parts."""
    limits = desk.limits
    with gr.Row():
        with gr.Column(scale=4, min_width=300):
            files = gr.File(
                label=f"Pictures, or zips of pictures (up to {limits.pictures})",
                file_count="multiple",
                file_types=["image", ".zip"],
                height=190,
                elem_id="batch-files",
            )
            part = gr.Dropdown(
                [ANY_PART],
                value=ANY_PART,
                label="Part",
                info="One that you have taught, for verdicts; otherwise there are scores and heatmaps alone.",
                allow_custom_value=True,
                elem_id="batch-part",
            )
            preset = gr.Radio(PRESETS, value="fast", label="Thoroughness", elem_id="batch-preset")
            run = gr.Button("Inspect all", variant="primary", elem_id="batch-run")
            progress = gr.HTML(views.bar(0.0, "Nothing is being inspected."), elem_id="batch-progress")
        with gr.Column(scale=6, min_width=320):
            gallery = gr.Gallery(
                label="Heatmaps",
                columns=4,
                height=360,
                object_fit="contain",
                interactive=False,
                elem_id="batch-gallery",
            )
            downloads = gr.File(
                label="To take home: table and heatmaps",
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
        label="Results; select a heading to sort",
        max_height=420,
        wrap=True,
        column_widths=["220px", "150px", "120px", "100px", "110px", "420px"],
        elem_id="batch-table",
    )

    @sentences
    def live(key, files, part, preset, request: gr.Request):
        visit = desk.visit(key, request)
        button, idle = gr.Button(interactive=False), gr.Button(interactive=True)
        yield visit.key, views.bar(0.0, "Reading the files"), [], [], None, button
        last = 0.0
        work = _Batch(desk, visit, part)
        try:
            for done, total in work.run(files, preset):
                if time.monotonic() - last < SHOW_SECONDS and done < total:
                    continue
                last = time.monotonic()
                words = f"{done} of {total} · {views.time_left(work.seconds_left(done, total))}"
                yield gr.skip(), views.bar(done / total, words), work.table, work.thumbnails, gr.skip(), gr.skip()
        except ValueError:
            yield gr.skip(), views.bar(0.0, "Not inspected."), gr.skip(), gr.skip(), gr.skip(), idle
            raise
        yield gr.skip(), views.bar(1.0, work.summary()), work.table, work.thumbnails, work.files(), idle

    run.click(
        live,
        [key, files, part, preset],
        [key, progress, table, gallery, downloads, run],
        api_visibility="private",
        preprocess=False,
        concurrency_limit=8,
        concurrency_id="batch",
        show_progress="hidden",
    )

    @sentences
    def batch(key, files, part, preset, request: gr.Request):
        """Inspects many pictures.

        Args:
            files: picture files, or zips of them.
            part: a part that this client has taught, "Any part", or any other name.
            preset: "fast" or "paper".

        Returns:
            `{"done", "total", "rows": [{"file", "verdict", "score", "threshold", ..., "error"}]}` as it grows, and at
            last the table as CSV and a zip of it and the heatmaps.
        """
        visit = desk.visit(key, request)
        work, last = _Batch(desk, visit, part), 0.0
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
    return part


class _Batch:
    """Collects the results of one batch while it is inspected.

    Attributes:
        table: rows under `HEADERS`.
        values: the same rows as dicts, for programs.
        thumbnails: path and caption of each heatmap.
        rows: `downloads.BatchRow` of each picture, for the files.
    """

    def __init__(self, desk: Desk, visit: Visit, part):
        self.desk, self.visit, self.part = desk, visit, part
        self.table: list[list] = []
        self.values: list[dict] = []
        self.thumbnails: list[tuple[str, str]] = []
        self.rows: list = []
        self.began = time.monotonic()

    def run(self, files, preset):
        """Inspects one picture after another; yields the number done and the total."""
        from .uploads import expand
        from .work import batch

        visit = self.visit
        given = self.desk.uploads_of(visit.visitor, files, "files")
        uploads = expand([path for path, _ in given], self.desk.limits)
        with visit.session.in_use():
            self.folder, self.kept = self.desk.new_folder(visit), visit.session.new_folder()
            for item in batch(visit.session, self.desk.turns, self.part, uploads, preset):
                self._add(item)
                yield item.number, item.total

    def seconds_left(self, done: int, total: int) -> float:
        """Estimates the time left from the time so far."""
        return (time.monotonic() - self.began) / done * (total - done)

    def _add(self, item) -> None:
        from .downloads import BatchRow

        if item.inspected is None:
            self.table.append([item.file, "Could not be read", None, None, None, item.error])
            self.values.append({"file": item.file, "error": item.error})
            self.rows.append(BatchRow(item.file, error=item.error))
            return
        result, values = item.inspected.result, item.inspected.values()
        ratio = values["times_threshold"]
        words = {True: "Defect likely", False: "Looks normal", None: "No verdict"}[result.is_defective]
        figures = [
            None if v is None else round(v, n) for v, n in ((ratio, 2), (result.score, 4), (result.threshold, 4))
        ]
        self.table.append([item.file, words, *figures, ""])
        self.values.append({**values, "error": None})
        heat = result.overlay()
        thumbnail = self.folder / f"{item.number:03d}.webp"
        views.shrunk(heat, THUMBNAIL).save(thumbnail, quality=80, method=2)
        self.thumbnails.append((str(thumbnail), f"{item.file}: {words}"))
        self.visit.session.require_room(heat.width * heat.height)  # about the largest size of the file
        path = self.kept / f"{item.number:03d}.png"
        heat.save(path, compress_level=3)
        self.rows.append(BatchRow(item.file, result.score, result.threshold, result.seconds, path))

    def summary(self) -> str:
        """Counts the verdicts, in one line."""
        verdicts = [row[1] for row in self.table]
        counts = {word: verdicts.count(word) for word in dict.fromkeys(verdicts)}
        return f"{len(verdicts)} done: " + ", ".join(f"{count} × {word.lower()}" for word, count in counts.items())

    def files(self) -> list[str]:
        """Writes the table and the zip; returns their paths."""
        import shutil

        from .downloads import batch_csv, batch_zip

        table = self.folder / "results.csv"
        table.write_bytes(batch_csv(self.rows))
        archive = batch_zip(self.rows, self.folder / "results.zip")
        shutil.rmtree(self.kept, ignore_errors=True)
        return [str(table), str(archive)]
