"""Learn a part and inspect pictures of it, as `anomalysd demo`, `anomalysd detect` and the app do."""

from __future__ import annotations

import csv
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..adaptation.folder import write_part
from ..common.console import base_errors
from ..common.devices import choose_device
from ..common.drawing import UNCALIBRATED_MAXIMUM as UNCALIBRATED_MAXIMUM
from ..common.drawing import marked, verdict_text
from ..common.files import write_whole
from ..knowledge import PackedPart


@dataclass(frozen=True)
class Inspection:
    """Holds the result of an inspected picture.

    Attributes:
        image: the picture, RGB, W x H.
        inpainted: the part as the model thinks it should look.
        anomaly_map: float32 [H, W], 0 or more.
        score: the image score, 0 or more.
        threshold: of the category, above 0; None where it is not calibrated.
        is_defective: `score` above `threshold`; None where it is not calibrated.
        seconds: time that the inspection took, of several together each one's share.
        region: bool [H, W], the region that the prototypes proposed; None where there are none.
    """

    image: Image.Image
    inpainted: Image.Image
    anomaly_map: np.ndarray
    score: float
    threshold: float | None
    is_defective: bool | None
    seconds: float
    region: np.ndarray | None = None

    @property
    def verdict(self) -> str:
        """Gives a word for a table: "defective", "normal", or nothing where the category is not calibrated."""
        return _verdict(self.score, self.threshold)

    @property
    def sentence(self) -> str:
        """Words the verdict for a person; see `drawing.verdict_text`."""
        return verdict_text(self.score, self.threshold)

    @property
    def predicted(self) -> np.ndarray | None:
        """Marks the defect: bool [H, W], what lies above the threshold; nothing in a picture that is normal as a
        whole, where single pixels may lie above it. None where the category is not calibrated."""
        return None if self.threshold is None else (self.anomaly_map > self.threshold) & self.is_defective

    def overlay(self) -> Image.Image:
        """Lays the heatmap over the picture, and outlines the defect."""
        return marked(self.image, self.anomaly_map, self.threshold, self.predicted)


def register(
    pipe,
    category: str,
    images: Sequence[Image.Image],
    seed: int = 0,
    false_alarm_rate: float = 0.05,
    defective: Sequence[Image.Image] = (),
    region=None,
    callback: Callable[[int, int], object] | None = None,
    **options,
) -> None:
    """Adds a category to a pipeline and calibrates it, both from the same normal pictures.

    Args:
        pipe: an `AnomalySDPipeline`.
        category: its name.
        images: normal pictures, RGB.
        seed: of the calibration's draws.
        false_alarm_rate, defective, callback: see `AnomalySDPipeline.calibrate`, which takes nearly all of the time.
        region: see `AnomalySDPipeline.set_region`.
        options: those `inspect` will be called with, since a threshold holds for these settings alone.

    Raises:
        ValueError: as `AnomalySDPipeline.add_category` and `AnomalySDPipeline.calibrate`.
    """
    tiles = {name: options[name] for name in ("tile_size", "tile_overlap") if name in options}
    pipe.add_category(category, images, region=region, **tiles)
    pipe.calibrate(category, images, false_alarm_rate, seed, list(defective) or None, callback, **options)


def inspect(
    pipe,
    images: Sequence[Image.Image],
    category: str | None,
    seed: int = 0,
    threshold: float | None = None,
    **options,
) -> list[Inspection]:
    """Inspects pictures together; each result depends on its picture, the seed and the options alone.

    Args:
        pipe: an `AnomalySDPipeline`.
        images: RGB, one or more.
        category: its name; one that was never registered is inspected without prototypes and threshold.
        seed: of the noise, the same for every picture.
        threshold: to use in place of the category's own; None: the category's own.
        options: of the pipeline's call, such as `preset`, `noise_strength` and `feature_weight`.

    Raises:
        ValueError: as `AnomalySDPipeline.__call__`.
    """
    start = time.perf_counter()
    noise = [torch.Generator().manual_seed(seed) for _ in images]
    out = pipe(list(images), category=category, generator=noise, **options)
    seconds = (time.perf_counter() - start) / len(images)
    scores = [float(score) for score in out.pred_scores]
    thresholds = out.thresholds if threshold is None else [threshold] * len(scores)
    return [
        Inspection(
            image=image,
            inpainted=out.inpainted[index],
            anomaly_map=out.anomaly_maps[index],
            score=scores[index],
            threshold=thresholds[index],
            is_defective=out.pred_labels[index] if threshold is None else scores[index] > threshold,
            seconds=seconds,
            region=None if out.prototype_masks is None else out.prototype_masks[index],
        )
        for index, image in enumerate(images)
    ]


def save_part(pipe, category: str, path: Path) -> None:
    """Writes what `register` has learned, for other processes, later runs and the app; see `write_part`.

    Raises:
        OSError: the file cannot be written.
    """
    write_part(pipe.knowledge.pack_adaptation(category), pipe.base, path)


def load_part(pipe, category: str, path: Path) -> None:
    """Registers a category as `save_part` found it; the pipeline's own prompts for it are kept, as by `register`.

    Raises:
        ValueError: the file is missing or damaged.
    """
    try:
        stored = pipe.read_adaptation(path)
        part = PackedPart(stored.categories[category], stored.banks[category])
    except (LookupError, ValueError) as error:
        said = str(error).replace("`pretrained_adaptation_name_or_path` ", "")
        raise ValueError(
            f"'{path}', written by an earlier run, cannot be read ({said}); delete it, and the part is learned anew."
        ) from error
    known = pipe.knowledge
    known.unpack(category, part)
    pipe.knowledge = known


def load_pipeline(base: str | None, device: str | torch.device, mixed_precision: str = "no", **overrides):
    """Loads a pipeline on a device, without a progress bar of its own: a bar over all pictures says more.

    Args:
        base: Hub id or folder; None: the embedded checkpoint.
        device: "auto" takes a CUDA GPU if there is one.
        mixed_precision: see `AnomalySDPipeline.mixed_precision`; "auto": "bf16" where the processor computes in it.
        overrides: of the checkpoint's config, such as `resolution`; None where it is the checkpoint's.

    Raises:
        ValueError: there is no such device here, or the base cannot be loaded.
    """
    from .. import AnomalySDPipeline
    from ..common.devices import resolve_precision

    device = choose_device(device)
    given = {name: value for name, value in overrides.items() if value is not None}
    with base_errors(base):
        pipe = AnomalySDPipeline.from_pretrained(base, **given).to(device)
    pipe.set_progress_bar_config(disable=True)
    pipe.mixed_precision = resolve_precision(mixed_precision, device)
    return pipe


def table_values(score: float, threshold: float | None, seconds: float) -> dict[str, str]:
    """Words the columns that every table of results has: `score`, `threshold`, `verdict` and `seconds`."""
    return {
        "score": f"{score:.6g}",
        "threshold": "" if threshold is None else f"{threshold:.6g}",
        "verdict": _verdict(score, threshold),
        "seconds": f"{seconds:.2f}",
    }


def _verdict(score: float, threshold: float | None) -> str:
    if threshold is None:
        return ""
    return "defective" if score > threshold else "normal"


def caption(first: str, score: float, threshold: float | None) -> str:
    """Words the text beside a row of a montage: a name, and the verdict broken where a line may end."""
    return f"{first}\n{verdict_text(score, threshold).replace(': ', chr(10))}"


def write_table(path: str | os.PathLike, rows: Iterable[Mapping[str, object]], columns: Sequence[str]) -> None:
    """Writes rows as CSV (UTF-8, comma, header), complete or not at all; a missing or None value is an empty cell. A
    file name that is no text keeps its bytes.

    Raises:
        ValueError: a row has a key that is not one of `columns`.
    """

    def save(unfinished: Path) -> None:
        with open(unfinished, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)

    write_whole(Path(path), save)
