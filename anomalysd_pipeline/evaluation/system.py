"""Wrap this package's pipeline as a detector under evaluation."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image

from ..adaptation.loop import AdaptationProgress
from ..knowledge import PackedPart
from .detector import Detector, Prediction, require_normals


class AnomalySDDetector(Detector):
    """Evaluates an `AnomalySDPipeline`, not adapted, adapted before, or adapted to each draw.

    Args:
        pipe: an `AnomalySDPipeline`. A category that is registered keeps its bank, threshold and adaptation, which
            must have been learned from as many pictures as the evaluation gives.
        options: settings of an inspection, see `AnomalySDPipeline.settings`; `preset` among them.
        prompt_design: "hierarchical", "simple" or "none".
        calibrate: whether to set a threshold from the normal pictures.
        false_alarm_rate: see `AnomalySDPipeline.calibrate`.
        adaptation: options of `AnomalySDPipeline.adapt`, to fine-tune to all categories of a draw together; None: no
            fine-tuning.
    """

    name = "anomalysd"
    zero_shot = True
    one_model_per_category = False
    shareable = True

    def __init__(
        self,
        pipe,
        options: Mapping | None = None,
        prompt_design: str = "hierarchical",
        calibrate: bool = True,
        false_alarm_rate: float = 0.05,
        adaptation: Mapping | None = None,
    ):
        self.pipe, self.options, self.prompt_design = pipe, dict(options or {}), prompt_design
        self.calibrate, self.false_alarm_rate, self.adaptation = calibrate, false_alarm_rate, adaptation
        self._own, self._weights = set(pipe.categories), _digest(pipe)
        self._seed = 0
        pipe.settings(**self.options)  # refuses a wrong option before hours of work

    def describe(self) -> dict:
        pipe = self.pipe
        facts = {
            "base": pipe.base.name,
            "weights": self._weights,
            "features": pipe.extractor.config.model_name,
            "model_resolution": pipe.config.resolution,
            "dtype": str(pipe.unet.dtype).removeprefix("torch."),
            "mixed_precision": pipe.mixed_precision,
            "prompt_design": self.prompt_design,
            "false_alarm_rate": self.false_alarm_rate if self.calibrate else None,
            **pipe.settings(**self.options).to_dict(),
        }
        if self.adaptation is not None:
            facts["adapted"] = pipe.adaptation_settings(**self.adaptation).to_dict()
        elif self._own:
            facts["learned before"] = sorted(self._own)
        return facts

    def begin(self, seed: int) -> None:
        """Starts a draw: `seed` draws the noise, as it drew the pictures."""
        self._seed = seed

    def check_shots(self, category: str, shots: int) -> None:
        """Checks that a category may be evaluated with a number of shots.

        Raises:
            ValueError: if it was learned before, from another number of pictures.
        """
        if category in self._own and self.adaptation is None:
            known = self.pipe.config.categories[category]["shots"]
            if known != shots:
                raise ValueError(
                    f"`--shots` is {shots}, but {category!r} was learned from {known} picture{'s' * (known != 1)} "
                    f"before; evaluate with --shots {known}, or with a model that has not learned it."
                )

    def fit(self, category: str, normals: Sequence[Image.Image], seed: int) -> None:
        self.check_shots(category, len(normals))
        if category in self._own:
            return
        if not normals:
            if category in self.pipe.categories:
                self.pipe.remove_category(category)
            self._set_prompt_design(category)
            return
        self.pipe.add_category(category, list(normals))
        self._set_prompt_design(category)
        if self.calibrate:
            self._calibrate(category, normals, seed)

    def adapt(
        self,
        normals: Mapping[str, Sequence[Image.Image]],
        seed: int,
        callback: Callable[..., None] = lambda stage, step, steps, note="": None,
    ) -> None:
        """Fine-tunes to all categories of a draw together and calibrates them, in place of `fit`; `callback` is called
        after each step of each stage, as `progress.Stages.step`."""
        require_normals(self.name, [image for images in normals.values() for image in images])
        self._forget_adaptations()
        shots = {category: list(images) for category, images in normals.items()}

        def trained(at: AdaptationProgress) -> None:
            callback(at.stage, at.step, at.steps, f"loss {at.loss:.4f}")

        self.pipe.adapt(shots, seed=seed, calibrate=False, callback=trained, **self.adaptation)
        if self.calibrate:
            for category, images in shots.items():
                self._calibrate(category, images, seed, functools.partial(callback, f"calibrating {category}"))

    def save_adaptation(self, folder: Path) -> None:
        """Writes the adaptation."""
        self.pipe.save_adaptation(folder)

    def load_adaptation(self, folder: Path) -> None:
        """Reads a folder that `save_adaptation` wrote, in place of `adapt`."""
        self._forget_adaptations()
        self.pipe.load_adaptation(folder, overwrite=True)

    def predict(self, category: str, image: Image.Image) -> Prediction:
        generator = torch.Generator().manual_seed(self._seed)
        out = self.pipe(image, category=category, generator=generator, **self.options)
        return Prediction(float(out.pred_scores[0]), out.anomaly_maps[0], out.thresholds[0], out.inpainted[0])

    def save(self, category: str, path: str | Path) -> None:
        self.pipe.knowledge.pack(category).save(Path(path))

    def load(self, category: str, path: str | Path) -> None:
        known = self.pipe.knowledge
        known.unpack(category, PackedPart.load(Path(path)))
        self.pipe.knowledge = known

    def _set_prompt_design(self, category: str) -> None:
        known = self.pipe.knowledge
        known.store(category, prompt_design=self.prompt_design)
        self.pipe.knowledge = known

    def _calibrate(self, category: str, normals: Sequence[Image.Image], seed: int, callback=None) -> None:
        self.pipe.calibrate(category, list(normals), self.false_alarm_rate, seed, callback=callback, **self.options)

    def _forget_adaptations(self) -> None:
        for name in self.pipe.adaptations:
            self.pipe.remove_adaptation(name)


def _digest(pipe) -> str:
    """Computes a short digest of all weights, adaptations included, and of the registered categories."""
    mark = hashlib.sha256(json.dumps([pipe.adaptation_base(), pipe.config.categories], sort_keys=True).encode())
    for name in pipe.adaptations:
        for part, weights in sorted(pipe.adapters.state(name).items()):
            for key, value in sorted(weights.items()):
                mark.update(f"{name} {part} {key} ".encode() + value.detach().float().cpu().numpy().tobytes())
    return mark.hexdigest()[:16]
