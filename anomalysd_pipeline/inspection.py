"""From normal pictures to a folder of results: what `anomalysd demo` and `anomalysd detect` share."""

from __future__ import annotations

import csv
import heapq
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .data import list_images
from .visualize import contour, montage, overlay, verdict_text

UNCALIBRATED_MAXIMUM = 1.0
"""The map value drawn in the hottest color where there is no threshold; fixed, so that such heatmaps compare."""
MONTAGE_ROWS = 24
RESULT_COLUMNS = ("file", "score", "threshold", "verdict", "seconds", "error")
_CELL = 176  # pixels, the side of a picture in the montage


@dataclass(frozen=True)
class Inspection:
    """What is known of one picture after its inspection.

    Attributes:
        image: the picture, RGB, W x H.
        inpainted: the part as the model thinks it should look.
        anomaly_map: float32 [H, W], 0 or more.
        score: the image score, 0 or more.
        threshold: of the category, above 0; None where it is not calibrated.
        is_defective: `score` above `threshold`; None where it is not calibrated.
        seconds: how long the inspection took.
    """

    image: Image.Image
    inpainted: Image.Image
    anomaly_map: np.ndarray
    score: float
    threshold: float | None
    is_defective: bool | None
    seconds: float

    @property
    def verdict(self) -> str:
        """One word for a table: "defective", "normal", or nothing where the category is not calibrated."""
        return {True: "defective", False: "normal", None: ""}[self.is_defective]

    @property
    def sentence(self) -> str:
        """The verdict for a person; see `visualize.verdict_text`."""
        return verdict_text(self.score, self.threshold)

    def overlay(self) -> Image.Image:
        """The heatmap over the picture, with the outline of what lies above the threshold."""
        if self.threshold is None:
            return overlay(self.image, self.anomaly_map, maximum=UNCALIBRATED_MAXIMUM)
        heat = overlay(self.image, self.anomaly_map, self.threshold)
        return contour(heat, self.anomaly_map > self.threshold)


def register(pipe, category: str, images: Sequence[Image.Image], seed: int = 0, **options) -> None:
    """Adds a category to a pipeline and calibrates it, both from the same normal pictures.

    Args:
        pipe: an `AnomalySDPipeline`.
        category: its name.
        images: normal pictures, RGB.
        seed: of the calibration's draws.
        options: those `inspect` will be called with, since a threshold holds for these settings alone.

    Raises:
        ValueError: as `AnomalySDPipeline.add_category` and `AnomalySDPipeline.calibrate`.
    """
    pipe.add_category(category, images)
    pipe.calibrate(category, images, seed=seed, **options)


def inspect(pipe, image: Image.Image, category: str, seed: int = 0, **options) -> Inspection:
    """Inspects one picture; the result depends on the picture, the seed and the options alone.

    Args:
        pipe: an `AnomalySDPipeline`.
        image: RGB.
        category: its name; one that was never registered is inspected without prototypes and threshold.
        seed: of the noise.
        options: of the pipeline's call, such as `preset`, `noise_strength` and `feature_weight`.

    Raises:
        ValueError: as `AnomalySDPipeline.__call__`.
    """
    start = time.perf_counter()
    out = pipe(image, category=category, generator=torch.Generator().manual_seed(seed), **options)
    return Inspection(
        image=image,
        inpainted=out.inpainted[0],
        anomaly_map=out.anomaly_maps[0],
        score=float(out.pred_scores[0]),
        threshold=out.thresholds[0],
        is_defective=out.pred_labels[0],
        seconds=time.perf_counter() - start,
    )


def gather(sources: Iterable[str | os.PathLike], skip: Path) -> tuple[dict[Path, str], dict[str, str]]:
    """Lists the pictures of folders and files, and names the outputs of each.

    Args:
        sources: folders, searched with their subfolders, and files.
        skip: a folder whose pictures are left out: where results go, which may lie in one of the folders.

    Returns:
        - picture to name: a relative path without suffix, "/" between its parts. It starts below its source, carries
          what else is needed to be unlike every other one (the suffix, then a number), and never leaves the folder it
          is put in.
        - source to the sentence that says why it has no pictures.
    """
    skip = skip.resolve()
    below: dict[Path, Path] = {}
    errors: dict[str, str] = {}
    for source in map(Path, sources):
        try:
            found = list_images(source)
        except ValueError as error:
            errors[str(source)] = str(error)
            continue
        for path in found:
            if skip not in path.resolve().parents:
                below.setdefault(path, path.relative_to(source) if path != source else Path(path.name))

    names: dict[Path, str] = {}
    taken: set[str] = set()
    for path, relative in below.items():
        plain = relative.with_suffix("").as_posix()
        candidates = [plain, relative.as_posix()]
        candidates += [f"{plain}_{number}" for number in range(2, len(below) + 2)]
        # Compared without case, because some file systems do not tell "A" from "a".
        name = next(candidate for candidate in candidates if candidate.casefold() not in taken)
        taken.add(name.casefold())
        names[path] = name
    return names, errors


def table_values(result: Inspection) -> dict[str, str]:
    """The columns that every table of results has: `score`, `threshold`, `verdict` and `seconds`."""
    return {
        "score": f"{result.score:.6g}",
        "threshold": "" if result.threshold is None else f"{result.threshold:.6g}",
        "verdict": result.verdict,
        "seconds": f"{result.seconds:.2f}",
    }


def caption(first: str, result: Inspection) -> str:
    """The text beside a row of a montage: a name, and the verdict broken where a line may end."""
    return f"{first}\n{result.sentence.replace(': ', chr(10))}"


def write_table(path: str | os.PathLike, rows: Sequence[Mapping[str, object]], columns: Sequence[str]) -> None:
    """Writes rows as CSV (UTF-8, comma, header), complete or not at all; a missing or None value is an empty cell.

    Raises:
        ValueError: a row has a key that is not one of `columns`.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(unfinished, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


class ResultFolder:
    """A folder with the results of many pictures: `results.csv`, `heatmaps/`, `maps/` and `montage.png`.

    Heatmaps and maps are written as they come; the table and the montage by `finish`, which may be called after a part
    of the pictures too. Memory does not grow with the number of pictures but for a line each.

    Args:
        folder: made if missing, with the first result.
        overwrite: whether the results of an earlier run may be replaced. Files of other names stay.
        maps: whether every anomaly map is saved as `maps/<name>.npy`, float32 [H, W].

    Raises:
        ValueError: `folder` holds a `results.csv` already and `overwrite` is False, or it is a file.
    """

    def __init__(self, folder: str | os.PathLike, overwrite: bool = False, maps: bool = False):
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"`--out` '{folder}' is a file; give a folder.")
        if (self.folder / "results.csv").exists() and not overwrite:
            raise ValueError(f"`--out` '{folder}' already holds results; give another folder, or add --overwrite.")
        self.rows: list[dict[str, str]] = []
        self.inspected = 0
        self._maps = maps
        self._shown: list[tuple[float, int, list[Image.Image], str]] = []

    def add(self, path: Path, name: str, result: Inspection) -> None:
        """Keeps the result of the picture at `path`; `name` is the one that `gather` gave it."""
        heat = result.overlay()
        heat.save(self._place("heatmaps", f"{name}.png"))
        if self._maps:
            np.save(self._place("maps", f"{name}.npy"), result.anomaly_map)
        self.rows.append({"file": str(path), **table_values(result)})
        self.inspected += 1
        small = [_thumbnail(picture) for picture in (result.image, result.inpainted, heat)]
        entry = (result.score, -self.inspected, small, caption(name, result))
        if len(self._shown) < MONTAGE_ROWS:
            heapq.heappush(self._shown, entry)
        else:
            heapq.heappushpop(self._shown, entry)

    def fail(self, path: str | os.PathLike, sentence: str) -> None:
        """Keeps the reason why a picture could not be inspected."""
        self.rows.append({"file": str(path), "error": sentence})

    def finish(self) -> None:
        """Writes the table, and the montage of the `MONTAGE_ROWS` highest scores, highest first."""
        write_table(self._place("results.csv"), self.rows, RESULT_COLUMNS)
        if self._shown:
            shown = sorted(self._shown, key=lambda entry: entry[:2], reverse=True)
            figure = montage(
                [entry[2] for entry in shown],
                ["input", "repainted", "heatmap"],
                [entry[3] for entry in shown],
                cell=_CELL,
            )
            figure.save(self._place("montage.png"))

    def _place(self, *parts: str) -> Path:
        path = self.folder.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def _thumbnail(image: Image.Image) -> Image.Image:
    """A copy that fits a montage's cell."""
    ratio = min(1.0, _CELL / max(image.size))
    return image.resize([max(1, round(length * ratio)) for length in image.size], Image.Resampling.LANCZOS)
