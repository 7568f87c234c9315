"""What an inspection returns."""

from dataclasses import dataclass

import numpy as np
from diffusers.utils import BaseOutput
from PIL import Image


@dataclass
class AnomalySDPipelineOutput(BaseOutput):
    """Result of `AnomalySDPipeline` for N pictures. Scores keep one absolute scale; nothing is normalized over a
    batch.

    Pictures of different sizes have maps of different sizes: the stacked arrays below are then lists of N arrays.

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
