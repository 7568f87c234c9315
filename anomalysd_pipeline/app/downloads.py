"""Files that visitors take home (maps, reports, tables, parts) or bring back (parts)."""

from __future__ import annotations

import csv
import io
import json
import os
import tempfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, PngImagePlugin

from .report import ReportFacts, gauge, report, report_pdf, report_png, verdict_words
from .sessions import Part, Session
from .uploads import safe_name, visible_name
from .zips import Budget, entry_fault, is_incidental, is_zip, open_zip, read_entry

if TYPE_CHECKING:
    from ..inspection.result import Inspection

__all__ = [
    "BATCH_COLUMNS",
    "BatchRow",
    "ReportFacts",
    "batch_csv",
    "batch_zip",
    "gauge",
    "inspection_files",
    "load_part_file",
    "map_npy",
    "map_png16",
    "part_file",
    "report",
    "report_pdf",
    "report_png",
    "verdict_words",
]

BATCH_COLUMNS = ("file", "score", "threshold", "verdict", "seconds", "error")
_FACTS_BYTES = 1_000_000
_MOST_STEPS, _MOST_SCALES, _FINEST_SCALE = 200, 8, 16
"""Bounds on the settings of a brought adaptation's thresholds; an inspection beyond them would take hours."""


@dataclass(frozen=True)
class BatchRow:
    """Describes one picture of a batch, inspected or refused.

    Attributes:
        file: the visitor's name for it.
        score, threshold, seconds: None where it was refused; `threshold` also where the part has none.
        heatmap: a picture, or the path of one; None where it was refused.
        error: a sentence where it was refused.
        mask: path of a picture that is white where the part is called defective; None without a verdict.
    """

    file: str
    score: float | None = None
    threshold: float | None = None
    seconds: float | None = None
    heatmap: Image.Image | str | os.PathLike | None = None
    error: str | None = None
    mask: str | os.PathLike | None = None

    def values(self) -> dict[str, str]:
        """Returns the texts of the table's row by `BATCH_COLUMNS`, "" where there is nothing.

        `verdict` is "defective", "normal" or "".
        """
        from ..inspection.result import table_values

        values = {**dict.fromkeys(BATCH_COLUMNS, ""), "file": self.file, "error": self.error or ""}
        if self.score is not None:
            values |= table_values(self.score, self.threshold, self.seconds or 0.0)
        return values


def map_png16(anomaly_map: np.ndarray, scale: float | None = None) -> bytes:
    """Encodes a map as a PNG of 16-bit gray: value = gray × scale / 65535.

    Its text chunk "Description" holds this formula, and "Scale" the number.

    Args:
        anomaly_map: float [H, W], finite, 0 or more.
        scale: above 0, the value of white; higher values are cut. None: the map's maximum.
    """
    values = np.asarray(anomaly_map, dtype=np.float64)
    # A map of zeros has no scale of its own, and any will do.
    scale = float(values.max()) or 1.0 if scale is None else float(scale)
    gray = np.rint(np.clip(values / scale, 0, 1) * 65535).astype(np.uint16)
    text = PngImagePlugin.PngInfo()
    text.add_text("Description", f"AnomalySD anomaly map: value = gray * {scale!r} / 65535")
    text.add_text("Scale", repr(scale))
    data = io.BytesIO()
    Image.fromarray(gray).save(data, "PNG", pnginfo=text)
    return data.getvalue()


def map_npy(anomaly_map: np.ndarray) -> bytes:
    """Encodes a map as the bytes of a `.npy` file, float32 [H, W]."""
    data = io.BytesIO()
    np.save(data, np.asarray(anomaly_map, dtype=np.float32), allow_pickle=False)
    return data.getvalue()


def inspection_files(result: Inspection, facts: ReportFacts, folder: str | os.PathLike) -> list[Path]:
    """Writes the files of one inspection that a visitor takes home, named after the picture.

    They are `..._map.png`, `..._map.npy`, `..._report.png` and `..._report.pdf`.

    Returns:
        The four paths, in this order.
    """
    page = report(result, facts)
    contents = {
        "map.png": map_png16(result.anomaly_map),
        "map.npy": map_npy(result.anomaly_map),
        "report.png": report_png(page),
        "report.pdf": report_pdf(page),
    }
    stem = safe_name(Path(facts.file).stem, "picture")
    paths = [Path(folder, f"{stem}_{name}") for name in contents]
    for path, content in zip(paths, contents.values(), strict=True):
        path.write_bytes(content)
    return paths


def batch_csv(rows: Iterable[BatchRow]) -> bytes:
    """Writes the table of a batch as CSV: UTF-8 with the mark that spreadsheets need, no formulas."""
    text = io.StringIO()
    writer = csv.DictWriter(text, BATCH_COLUMNS)
    writer.writeheader()
    writer.writerows({name: _uncomputed(value) for name, value in row.values().items()} for row in rows)
    return text.getvalue().encode("utf-8-sig", "replace")


def batch_zip(
    rows: Sequence[BatchRow], path: str | os.PathLike, values: Sequence[Mapping[str, object]] | None = None
) -> Path:
    """Writes a zip of a batch's table, heatmaps and masks.

    They are `results.csv`, `results.json`, `heatmaps/001_name.png` and `masks/001_name.png`, numbered like the rows.

    Args:
        rows: of the batch.
        path: of the zip.
        values: what the JSON tells of each row, beside the names of its pictures; None: the values of the table.

    Returns:
        The path.
    """
    path, told = Path(path), []
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("results.csv", batch_csv(rows))
        for number, row in enumerate(rows, 1):
            facts = dict(row.values() if values is None else values[number - 1])
            name = f"{number:03d}_{safe_name(Path(row.file).stem, 'picture')}.png"
            for kind, picture in (("heatmap", row.heatmap), ("mask", row.mask)):
                facts[kind] = None if picture is None else f"{kind}s/{name}"
                if isinstance(picture, Image.Image):
                    data = io.BytesIO()
                    picture.save(data, "PNG")
                    archive.writestr(facts[kind], data.getvalue())
                elif picture is not None:
                    archive.write(picture, facts[kind])
            told.append(facts)
        text = json.dumps({"pictures": told}, indent=2, ensure_ascii=False).encode("utf-8", "replace")
        archive.writestr("results.json", text)
    return path


def part_file(pipe, part: str, path: str | os.PathLike) -> Path:
    """Writes all that was learned of a part, fine-tuned or not, see `AnomalySDPipeline.save_adaptation`.

    Call it within a turn: another session's inspection would change the weights that it reads.

    Args:
        pipe: the pipeline that learned it.
        part: its name, or that of its adaptation.
        path: of the file, which ends in ".safetensors".

    Returns:
        The path.

    Raises:
        ValueError: there is none of that name.
    """
    adaptation = pipe.config.categories.get(part, {}).get("adaptation") or part
    pipe.save_adaptation(path, adaptation)
    return Path(path)


def load_part_file(
    session: Session, path: str | os.PathLike, shown_name: str | None = None, overwrite: bool = False
) -> list[str]:
    """Takes what was learned of parts from a file into a session, completely or not at all.

    The file is one of `part_file`, or a zip of a folder of `AnomalySDPipeline.save_adaptation`. The session's pipeline
    and its `parts` change. Call it within a turn, as `part_file`.

    Args:
        session: whose `lock` is held meanwhile.
        path: of the file on the server; no error says so.
        shown_name: the visitor's name for it; None: the file's own name.
        overwrite: whether parts of the same names may be replaced.

    Returns:
        Names of its parts.

    Raises:
        ValueError: it is no such file, holds other files, is too large, fits another base, or brings more parts than
            there is room for.
    """
    name = visible_name(Path(path).name if shown_name is None else shown_name)
    limits = session.limits
    if not os.path.isfile(path):
        raise ValueError(f"'{name}' is not there anymore; upload it again.")
    if os.path.getsize(path) > limits.upload_bytes:
        raise ValueError(f"'{name}' is larger than {limits.upload_bytes / 1e6:.3g} MB; it cannot be taken in here.")
    contents = _adaptation_files(path, name, limits) if is_zip(path, name) else None
    pipe = session.pipe
    with session.in_use(), session.lock, tempfile.TemporaryDirectory(dir=session.folder) as folder:
        source = path
        if contents is not None:
            session.require_room(sum(map(len, contents.values())))
            source = folder
            for file, content in contents.items():
                Path(folder, file).write_bytes(content)
        try:
            stored = pipe.read_adaptation(source)
            _check_bounds(stored, session, name)
            brought = pipe.load_adaptation(source, overwrite=overwrite)
        except ValueError as error:
            # The path is a place of the server, and the argument one of the Python function.
            argument = f"`pretrained_adaptation_name_or_path` '{source}'"
            message = str(error).replace(argument, f"'{name}'").replace(str(source), name)
            message = message.replace("as `save_adaptation` writes it", "as it was downloaded here")
            raise ValueError(message.replace("`pretrained_adaptation_name_or_path`", f"'{name}'")) from error
        prompts = pipe.prompt_book.to_dict()["categories"]
        for part in brought:
            facts = {"shots": pipe.config.categories[part]["shots"], "file": name}
            session.parts[part] = Part(part, prompts=prompts[part], taught=bool(stored.state), facts=facts)
    return brought


def _adaptation_files(path: str | os.PathLike, name: str, limits) -> dict[str, bytes]:
    """Reads the two files of an adaptation by their names; both may lie in one folder of the zip."""
    from ..adaptation.folder import FACTS, WEIGHTS

    largest = {FACTS: min(_FACTS_BYTES, limits.adaptation_bytes), WEIGHTS: limits.adaptation_bytes}
    sentence = f"'{name}' takes more than {limits.adaptation_bytes / 1e6:.3g} MB unpacked; it cannot be taken in here."
    budget = Budget(limits.adaptation_bytes, sentence)
    contents: dict[str, bytes] = {}
    folders = set()
    with open_zip(path, name, limits.zip_entries) as archive:
        for info in archive.infolist():
            folder, _, file = info.filename.rpartition("/")
            if is_incidental(info) or file == "README.md":
                continue
            entry = f"{name}: {visible_name(info.orig_filename)}"
            if fault := entry_fault(info, largest.get(file, limits.adaptation_bytes)):
                raise ValueError(f"'{entry}' {fault}.")
            folders.add(folder)
            if file not in largest or file in contents or len(folders) > 1 or "/" in folder:
                raise ValueError(f"'{entry}' is not part of an adaptation; give the file as it was downloaded here.")
            contents[file] = read_entry(archive, info, entry, largest[file], budget.spend)
    if contents.keys() != largest.keys():
        raise ValueError(f"'{name}' must hold {FACTS} and {WEIGHTS}; give the file as it was downloaded here.")
    return contents


def _check_bounds(stored, session: Session, name: str) -> None:
    """Refuses an adaptation that fits the base but exceeds the bounds of a session."""
    limits = session.limits
    total = len(session.parts.keys() | stored.categories.keys())
    if total > limits.parts:
        raise ValueError(
            f"'{name}' brings {len(stored.categories)} parts, which would make {total}, and a session has room for "
            f"{limits.parts}; reload the page to start anew."
        )
    for category, record in stored.categories.items():
        prompts = stored.prompts[category]
        counts = [1 if isinstance(texts, str) else len(texts) for texts in prompts.values()]
        if max(counts) > limits.prompts or len(category) > limits.name_length:
            raise ValueError(
                f"'{name}' has a part with more than {limits.prompts} prompts of a kind, or with a name of more than "
                f"{limits.name_length} characters; it cannot be taken in here."
            )
        settings = (record["calibration"] or {}).get("settings")
        if settings and (
            settings["num_inference_steps"] > _MOST_STEPS
            or len(settings["mask_scales"]) > _MOST_SCALES
            or max(settings["mask_scales"]) > _FINEST_SCALE
        ):
            raise ValueError(
                f"'{name}' was calibrated at settings that take too long here; calibrate it with one of the presets."
            )


def _uncomputed(text: str) -> str:
    """Quotes a cell that a spreadsheet would take for a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
