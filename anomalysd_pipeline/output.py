"""What an inspection returns."""

import base64
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers.utils import BaseOutput
from PIL import Image, ImageShow

from .common.drawing import marked, montage, verdict_text
from .common.files import disk_errors, written_into

MOST_SHOWN = 24
"""Pictures in a figure, and lines of a `repr`."""


@dataclass
class AnomalySDPipelineOutput(BaseOutput):
    """Result of `AnomalySDPipeline` for N pictures. Scores keep one absolute scale; nothing is normalized over a
    batch.

    Pictures of different sizes have maps of different sizes: the stacked arrays below are then lists of N arrays.
    `images` holds the inspected pictures; it is no part of the tuple that `return_dict=False` gives.

    Args:
        pred_scores (`np.ndarray` `[N]`, float32, >= 0):
            Image scores, the maximum of each smoothed score map at the model's resolution.
        pred_labels (`list[bool | None]`):
            True where the score exceeds the threshold; None where the category is not calibrated for these settings.
        anomaly_maps (`np.ndarray` `[N, H, W]`, float32, >= 0, or a tensor with `output_type="pt"`):
            Score of every pixel, S_map of Eq. (21) smoothed, at the input picture's own size.
        pred_masks (`np.ndarray` `[N, H, W]` bool or `None`):
            Pixels above the threshold in pictures that are defective; None without a threshold.
        inpainted (`list[PIL.Image.Image]`):
            The parts as the model thinks they should look, at the input picture's own size.
        prototype_masks (`np.ndarray` `[N, H, W]` bool or `None`):
            M^(p) of Eq. (15) at the input picture's own size; None for a category without normal pictures.
        thresholds (`list[float | None]`):
            The image threshold that applied to each picture.
    """

    pred_scores: np.ndarray
    pred_labels: list
    anomaly_maps: np.ndarray | list
    pred_masks: np.ndarray | list | None
    inpainted: list[Image.Image]
    prototype_masks: np.ndarray | list | None
    thresholds: list

    images = None  # without an annotation, so that it is no field

    def __repr__(self) -> str:
        count = len(self.thresholds)
        lines = [f"{type(self).__name__} of {count} pictures; see show(), save(folder), overlay(index)"]
        lines += [f"  {index}: {self._sentence(index)}" for index in range(min(count, MOST_SHOWN))]
        return "\n".join(lines + [f"  and {count - MOST_SHOWN} more"] * (count > MOST_SHOWN))

    def _repr_html_(self) -> str:
        file = io.BytesIO()
        self.figure().save(file, "PNG")
        return f'<img alt="{self}" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'

    def overlay(self, index: int = 0) -> Image.Image:
        """Lays the heatmap of a picture over it, and outlines the defect; RGB, at the picture's own size."""
        mask = None if self.pred_masks is None else _array(self.pred_masks[index])
        return marked(self.images[index], _array(self.anomaly_maps[index]), self.thresholds[index], mask)

    def figure(self) -> Image.Image:
        """Draws each picture beside the repainted one and the heatmap; at most the first `MOST_SHOWN`."""
        shown = range(min(len(self.thresholds), MOST_SHOWN))
        rows = [[self.images[index], self.inpainted[index], self.overlay(index)] for index in shown]
        labels = [self._sentence(index).replace(": ", "\n") for index in shown]
        return montage(rows, ["input", "repainted", "heatmap"], labels)

    def show(self) -> None:
        """Shows the figure, in a notebook below the cell, else in the system's own viewer.

        Raises:
            ValueError: if there is no viewer.
        """
        if not ImageShow.show(self.figure()):
            raise ValueError("No program here can show pictures; call `save` with a folder.")

    def save(self, folder: str | os.PathLike) -> None:
        """Writes `results.json` with anomalib's words, `montage.png`, and for each picture, by its number, a heatmap,
        a map (float32, .npy), the repainted picture and, with a threshold, a mask (255 where a defect is).

        Args:
            folder: made if missing; other files in it stay.

        Raises:
            ValueError: if it cannot be written; it is then as before.
        """
        folder, rows = Path(os.path.abspath(folder)), []
        with disk_errors("folder", folder), written_into(folder) as partial:
            for name in ("heatmaps", "maps", "inpainted", *(["masks"] if self.pred_masks is not None else [])):
                (partial / name).mkdir()
            for index, threshold in enumerate(self.thresholds):
                self.overlay(index).save(partial / "heatmaps" / f"{index}.png")
                self.inpainted[index].save(partial / "inpainted" / f"{index}.png")
                np.save(partial / "maps" / f"{index}.npy", _array(self.anomaly_maps[index]))
                if self.pred_masks is not None:
                    mask = np.uint8(255) * _array(self.pred_masks[index])
                    Image.fromarray(mask).save(partial / "masks" / f"{index}.png")
                rows.append(
                    {
                        "pred_score": float(self.pred_scores[index]),
                        "pred_label": self.pred_labels[index],
                        "threshold": threshold,
                        "pred_mask": None if self.pred_masks is None else f"masks/{index}.png",
                        "anomaly_map": f"maps/{index}.npy",
                        "heatmap": f"heatmaps/{index}.png",
                    }
                )
            self.figure().save(partial / "montage.png")
            (partial / "results.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")

    def _sentence(self, index: int) -> str:
        return verdict_text(float(self.pred_scores[index]), self.thresholds[index])


def _array(values: np.ndarray | torch.Tensor) -> np.ndarray:
    return values.cpu().numpy() if isinstance(values, torch.Tensor) else values
