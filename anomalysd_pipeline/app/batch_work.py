"""The results of one batch, collected while it is inspected."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace

from PIL import Image

from ..app import views
from .desk import Desk, Visit
from .downloads import BatchRow, batch_csv, batch_zip

HEATMAP = 640
"""Longest side in pixels of a heatmap on the page."""


class BatchWork:
    """Inspects a batch, and holds what the page and the files tell of it.

    Attributes:
        values: a dict of each picture, for programs, in the order of the files.
        rows: a `BatchRow` of each, for the files, in the same order.
        share: share of the pictures that is done, in [0, 1].
    """

    def __init__(self, desk: Desk, visit: Visit, part):
        self.desk, self.visit, self.part = desk, visit, part
        self.values: list[dict] = []
        self.rows: list[BatchRow] = []
        self.share = 0.0
        self._shown: list[tuple[float, list, tuple[str, str] | None]] = []
        self._began = time.monotonic()
        self._total = 0

    def run(self, files, preset):
        """Inspects one picture after another, to the last or until canceled; yields the number done and the total."""
        from .uploads import expand
        from .work import batch

        visit = self.visit
        given = self.desk.uploads_of(visit.visitor, files, "files")
        uploads = expand([path for path, _ in given], self.desk.limits)
        with visit.session.in_use():
            self._folder, self._kept = self.desk.new_folder(visit), visit.session.new_folder()
            for item in batch(visit.session, self.desk.turns, self.part, uploads, preset):
                self._add(item)
                self.share, self._total = item.number / item.total, item.total
                yield item.number, item.total

    @property
    def table(self) -> list[list]:
        """The rows under the headings of the page, the most suspicious first, and last what could not be read."""
        return [row for _, row, _ in self._ordered()]

    @property
    def heatmaps(self) -> list[tuple[str, str]]:
        """Path and caption of each heatmap, in the order of the table."""
        return [heat for _, _, heat in self._ordered() if heat is not None]

    def seconds_left(self, done: int, total: int) -> float:
        """Estimates the time left from the time so far."""
        return (time.monotonic() - self._began) / done * (total - done)

    def _ordered(self) -> list[tuple]:
        return sorted(self._shown, key=lambda shown: -shown[0])

    def _add(self, item) -> None:
        if item.inspected is None:
            self._shown.append((-1.0, [item.file, "Could not be read", None, None, None, item.error], None))
            self.values.append({"file": item.file, "error": item.error})
            self.rows.append(BatchRow(item.file, error=item.error))
            return
        result, values = item.inspected.result, item.inspected.values()
        ratio = values["times_threshold"]
        words = {True: "Defect likely", False: "Looks normal", None: "No verdict"}[result.is_defective]
        figures = [
            None if v is None else round(v, n) for v, n in ((ratio, 2), (result.score, 4), (result.threshold, 4))
        ]
        self.values.append({**values, "error": None})
        heat = result.overlay()
        shown = self._folder / f"{item.number:03d}.webp"
        views.shrunk(heat, HEATMAP).save(shown, quality=80, method=2)
        self._shown.append((result.score, [item.file, words, *figures, ""], (str(shown), f"{item.file}: {words}")))
        self.visit.session.require_room(heat.width * heat.height)  # about the largest size of the files
        row = BatchRow(
            item.file, result.score, result.threshold, result.seconds, self._kept / f"{item.number:03d}.png"
        )
        heat.save(row.heatmap, compress_level=3)
        if result.predicted is not None:
            row = replace(row, mask=self._kept / f"{item.number:03d}_mask.png")
            Image.fromarray(result.predicted).save(row.mask)
        self.rows.append(row)

    def summary(self) -> str:
        """Counts the verdicts, in one line."""
        verdicts = [row[1] for row in self.table]
        counts = {word: verdicts.count(word) for word in dict.fromkeys(verdicts)}
        done = f"{len(verdicts)} done" if self.share == 1 else f"Canceled: {len(verdicts)} of {self._total} done"
        told = ", ".join(f"{count} × {word.lower()}" for word, count in counts.items())
        return f"{done} as “{self.part}”: {told}" if told else "Canceled."

    def files(self) -> list[str]:
        """Writes the table and the zip; returns their paths."""
        table = self._folder / "results.csv"
        table.write_bytes(batch_csv(self.rows))
        archive = batch_zip(self.rows, self._folder / "results.zip", self.values)
        shutil.rmtree(self._kept, ignore_errors=True)
        return [str(table), str(archive)]
