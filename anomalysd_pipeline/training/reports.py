"""Write the curve of a fine-tuning's losses, and pictures of its progress."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from PIL import Image

from ..adaptation.loop import AdaptationProgress
from ..adaptation.preview import validation_pictures
from ..adaptation.settings import AdaptationSettings
from ..adaptation.stages import Stage
from ..common.drawing import montage
from ..common.files import disk_errors, read_rows, write_names, write_whole
from ..common.progress import Stages

LOSSES, FACTS, LOGS, VALIDATION = "losses.jsonl", "run.json", "logs", "validation"
_PROJECT = "anomalysd"
_CELL = 192


class LossCurve:
    """Writes a file with a line for every step: `stage`, `step`, `loss` and `lr`.

    Each step is in it once: a run that goes on from a checkpoint replaces the lines after it.

    Args:
        path: made if missing.
    """

    def __init__(self, path: Path):
        self._path, self._begun = path, set()

    def add(self, stage: str, step: int, loss: float, lr: float) -> None:
        """Writes a line, so that it is there if the next step does not come."""
        if stage not in self._begun:
            self._cut(stage, step)
            self._begun.add(stage)
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": stage, "step": step, "loss": loss, "lr": lr}) + "\n")

    def _cut(self, stage: str, step: int) -> None:
        if not self._path.exists():
            return
        rows = (row for _, row in read_rows(self._path, {"stage": str, "step": int}))
        text = "".join(json.dumps(row) + "\n" for row in rows if row["stage"] != stage or row["step"] < step)
        write_whole(self._path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))


class Reports:
    """Follows a fine-tuning: `step` and `validate` are called by `adaptation.loop.fine_tune`.

    Nothing is written before the first step is done.

    Args:
        accelerator: its trackers are started, see `Accelerator.init_trackers`.
        pipe: an `AnomalySDPipeline`.
        shots: category to its normal pictures, RGB.
        settings: of the fine-tuning.
        prompts: category to T_c where it is not the pipeline's own.
        output_dir: the run's folder.
        facts: JSON-serializable description of the run.
        validation_steps: steps between pictures; None: there are none.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        pipe,
        shots: Mapping[str, Sequence[Image.Image]],
        settings: AdaptationSettings,
        prompts: Mapping[str, object] | None,
        output_dir: Path,
        facts: Mapping,
        validation_steps: int | None,
    ):
        self.accelerator, self.pipe, self.shots, self.settings = accelerator, pipe, shots, settings
        self.output_dir, self.facts, self.validation_steps = output_dir, facts, validation_steps
        self._curve = LossCurve(output_dir / LOSSES)
        self._bar, self._begun, self._lr = Stages("learning", accelerator.is_main_process), False, {}
        self._book = pipe.prompt_book
        for category, given in (prompts or {}).items():
            self._book.add(category, given)

    def step(self, progress: AdaptationProgress) -> None:
        """Follows every step; on every process."""
        if not self._begun:
            self._begin()
        lr = self._learning_rate(progress)
        if self.accelerator.is_main_process:
            with self._disk_errors():
                self._curve.add(progress.stage, progress.step, progress.loss, lr)
            self._bar.step(progress.stage, progress.step, progress.steps, f"loss {progress.loss:.4f}")
        values = {f"{progress.stage}/loss": progress.loss, f"{progress.stage}/lr": lr}
        for tracker in self.accelerator.trackers:
            tracker.log(values, **self._place(tracker, progress.step))

    def validate(self, stage: Stage, step: int) -> None:
        """Writes a picture of what the weights in training do, if it is time; on every process, because a sharded
        model computes on all of them."""
        if self.validation_steps is None or step % self.validation_steps:
            return
        with stage.evaluation(), self.accelerator.autocast():
            module = self.accelerator.unwrap_model(stage.module)
            rows = [
                validation_pictures(
                    self.pipe.base,
                    stage,
                    module,
                    images[0],
                    self.pipe.settings(category=category, start="image"),
                    self._texts(category),
                )
                for category, images in self.shots.items()
            ]
        if not self.accelerator.is_main_process:
            return
        figure = montage(rows, ["normal part", "masked", "repainted"], list(self.shots), cell=_CELL)
        with self._disk_errors():
            folder = self.output_dir / VALIDATION
            folder.mkdir(exist_ok=True)
            figure.save(folder / f"{stage.name}-{step}.png")
        for tracker in self.accelerator.trackers:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            images = {f"{stage.name}/validation": np.asarray(figure)[None]}
            tracker.log_images(images, **self._place(tracker, step), **layout)

    def close(self) -> None:
        """Ends the progress bar and the trackers."""
        self._bar.close()
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def _begin(self) -> None:
        if self.accelerator.is_main_process:
            with self._disk_errors():
                self.output_dir.mkdir(parents=True, exist_ok=True)
                text = json.dumps(dict(self.facts), indent=2, ensure_ascii=False) + "\n"
                write_whole(self.output_dir / FACTS, lambda unfinished: write_names(unfinished, text))
        values = {**self.settings.to_dict(), "categories": list(self.shots)}
        # Trackers take numbers and texts.
        flat = {k: v if isinstance(v, (bool, int, float, str)) else json.dumps(v) for k, v in values.items()}
        self.accelerator.init_trackers(_PROJECT, config=flat)
        self._begun = True

    def _learning_rate(self, progress: AdaptationProgress) -> float:
        if progress.stage not in self._lr:
            rate = self.settings.learning_rate
            if progress.stage == "decoder":
                rate = self.settings.decoder_learning_rate or rate
            optimizer = torch.optim.SGD([torch.zeros(1)], lr=rate)
            schedule = get_scheduler(
                self.settings.lr_scheduler,
                optimizer,
                num_warmup_steps=self.settings.lr_warmup_steps,
                num_training_steps=progress.steps,
            )
            self._lr[progress.stage] = lambda step: rate * schedule.lr_lambdas[0](step - 1)
        return self._lr[progress.stage](progress.step)

    def _place(self, tracker, step: int) -> dict:
        # wandb wants steps that never go back, and each stage starts at 1.
        return {"step": step} if tracker.name == "tensorboard" else {}

    def _texts(self, category: str) -> list[str]:
        return self._book.prompts(category, self.settings.prompt_design)

    def _disk_errors(self):
        return disk_errors("output_dir", self.output_dir, "go on with `--resume_from_checkpoint latest`")
