"""Train anomalib's DRAEM with our seeding and loop, without its trainer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.metadata import version

import torch
from PIL import Image
from torch import nn
from tqdm import trange

from ..data.tensors import to_tensor
from .backbones import import_anomalib, seeded
from .detector import Prediction, TensorDetector, require_normals


class DRAEM(TensorDetector):
    """Learns to repair and to locate painted defects: DRAEM (Zavrtanik et al. 2021).

    It is a full-shot method, trained from nothing for each category.

    Args:
        steps: training steps; the paper trains 700 epochs of the whole training set. The learning rate falls tenfold
            after 4/7 and after 6/7 of them, as in the paper.
        batch_size: pictures per step, drawn with replacement; the paper's.
        textures: folder of pictures to cut defects from, the Describable Textures Dataset in the paper; None: Perlin
            noise.
        resolution: side in pixels, a multiple of 32.
        mixed_precision: "bf16" for the networks, with the loss in float32, or "no".
        device: where it computes.
        progress: whether to show training's progress.

    Raises:
        ValueError: for an option out of its range or a missing package.
    """

    name = "draem"

    def __init__(
        self,
        steps: int = 1000,
        batch_size: int = 8,
        textures: str | os.PathLike | None = None,
        resolution: int = 256,
        mixed_precision: str = "no",
        device: str | torch.device = "cpu",
        progress: bool = False,
    ):
        super().__init__()
        if mixed_precision not in ("no", "bf16"):
            raise ValueError(f"`mixed_precision` must be 'no' or 'bf16', got {mixed_precision!r}.")
        if steps < 1 or batch_size < 1 or resolution < 32 or resolution % 32:
            raise ValueError(
                "`steps` and `batch_size` must be at least 1 and `resolution` a multiple of 32, got "
                f"{steps}, {batch_size} and {resolution}."
            )
        if textures is not None and not os.path.isdir(textures):
            raise ValueError(f"`textures` must be an existing folder of pictures, got '{textures}'.")
        self._model = import_anomalib("models.image.draem.torch_model").DraemModel
        self._loss = import_anomalib("models.image.draem.loss").DraemLoss
        self._augmenter = import_anomalib("data.utils.generators.perlin").PerlinAnomalyGenerator
        self.steps, self.batch_size, self.textures = steps, batch_size, textures
        self.resolution, self.device, self.progress = resolution, torch.device(device), progress
        self.mixed_precision = mixed_precision
        self._loaded: tuple[dict, nn.Module] | None = None

    def describe(self) -> dict:
        return {
            "detector": self.name,
            "implementation": f"anomalib {version('anomalib')}",
            "weights": "trained from nothing on each category's normal pictures",
            "steps": self.steps,
            "batch_size": self.batch_size,
            "defect_textures": "Perlin noise" if self.textures is None else os.path.basename(self.textures),
            "resolution": self.resolution,
            "mixed_precision": self.mixed_precision,
            "score": "maximum of the map, which is the probability of a defect",
        }

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.mixed_precision == "bf16")

    def fit(self, category: str, normals: Sequence[Image.Image], seed: int) -> None:
        require_normals(self.name, normals)
        pictures = torch.stack([to_tensor(image, self.resolution) for image in normals]).add(1).div(2)  # [K, 3, R, R]
        with seeded(seed, self.device), torch.enable_grad():
            model = self._model().train().to(self.device)
            augmenter, criterion = self._augmenter(self.textures, blend_factor=(0.1, 1.0)), self._loss()
            fused = self.device.type in ("cpu", "cuda")  # several times faster on a processor
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=fused)
            milestones = [round(self.steps * share) for share in (4 / 7, 6 / 7)]
            schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)
            for _ in trange(self.steps, desc=f"draem, {category}", disable=not self.progress):
                batch = pictures[torch.randint(len(pictures), (self.batch_size,))]
                painted, masks = augmenter(batch)
                with self._autocast():
                    repaired, predicted = model(painted.to(self.device))
                loss = criterion(batch.to(self.device), repaired.float(), masks.to(self.device), predicted.float())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        self.remember(category, {name: tensor.cpu() for name, tensor in model.state_dict().items()})

    @torch.no_grad()
    def predict(self, category: str, image: Image.Image) -> Prediction:
        learned = self.recall(category)
        # Loaded once for all pictures of a category, because the weights are large.
        if self._loaded is None or self._loaded[0] is not learned:
            with seeded(0, self.device):
                model = self._model()
            model.load_state_dict(learned)
            self._loaded = (learned, model.eval().to(self.device))
        with self._autocast():
            found = self._loaded[1](to_tensor(image, self.resolution)[None].add(1).div(2).to(self.device))
        return Prediction(found.pred_score.item(), found.anomaly_map[0].float().cpu().numpy())
