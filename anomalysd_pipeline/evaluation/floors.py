"""Provide two floors without trained features, for detectors to beat."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..data.tensors import resize, to_pil, to_tensor
from ..method.prompts import readable_name
from ..method.scoring import image_score, smooth, smoothing_sigma
from ..models.bank import PrototypeBank
from ..models.collection import collect_prototypes
from .detector import Detector, Prediction, TensorDetector, require_normals

PROMPTS = ("", "A perfect {name}.")
"""The prompts of plain inpainting: none, or the category's name filled in."""


def nearest_distances(bank: Tensor, features: Tensor) -> Tensor:
    """Computes the Euclidean distance of each position to the nearest vector of a bank.

    Args:
        bank: `[M, C]`.
        features: `[N, C, h, w]`.

    Returns:
        float32 `[N, h, w]`.
    """
    holder = PrototypeBank(max_size=len(bank)).to(bank.device)
    holder.add("normal", bank)
    return holder.distances("normal", features).sqrt()


class ColorPatchFloor(TensorDetector):
    """Measures the distance to the nearest 3 x 3 color patch of the normal pictures, without a network.

    A picture is scaled to a square and averaged over a grid of cells. A cell has 27 values: the colors in [-1, 1] of
    the 3 x 3 cells around it, mid-gray outside the picture. The map is the Euclidean distance to the nearest cell of
    the normal pictures and their rotated copies, scaled up bilinearly and smoothed as ours; the score is its maximum.

    Args:
        resolution: side of the square in pixels, a multiple of `grid`.
        grid: cells per side.
        rotations: copies of each normal picture, evenly spaced over the full turn.
        device: where it is computed.

    Raises:
        ValueError: if `resolution` is no multiple of `grid`, or any of the three is less than 1.
    """

    name = "color_patches"
    one_model_per_category = False

    def __init__(self, resolution: int = 256, grid: int = 32, rotations: int = 4, device: str | torch.device = "cpu"):
        super().__init__()
        if min(resolution, grid, rotations) < 1 or resolution % grid:
            raise ValueError(
                "`resolution` must be a multiple of `grid` and they and `rotations` at least 1, got "
                f"{resolution}, {grid} and {rotations}."
            )
        self.resolution, self.grid, self.rotations, self.device = resolution, grid, rotations, torch.device(device)

    def describe(self) -> dict:
        return {
            "detector": self.name,
            "features": f"colors of 3x3 cells of a {self.grid}x{self.grid} grid, no network",
            "resolution": self.resolution,
            "rotations": self.rotations,
            "distance": "Euclidean to the nearest, whole bank",
            "smoothing_sigma": smoothing_sigma(self.resolution),
            "score": "maximum of the map",
        }

    def patches(self, images: Tensor) -> Tensor:
        """Takes the colors around each cell: `[N, 3, H, W]` in [-1, 1] to `[N, 27, grid, grid]`."""
        cells = F.adaptive_avg_pool2d(images, self.grid)  # [N, 3, g, g]
        around = F.unfold(cells, kernel_size=3, padding=1)  # [N, 27, g g]
        return around.view(len(images), -1, self.grid, self.grid)

    @torch.no_grad()
    def fit(self, category: str, normals: Sequence[Image.Image], seed: int) -> None:
        require_normals(self.name, normals)
        images = torch.stack([to_tensor(image, self.resolution) for image in normals]).to(self.device)
        self.remember(category, {"bank": collect_prototypes(self.patches, images, self.rotations)[0]})

    @torch.no_grad()
    def predict(self, category: str, image: Image.Image) -> Prediction:
        bank = self.recall(category)["bank"].to(self.device)
        distances = nearest_distances(bank, self.patches(to_tensor(image, self.resolution)[None].to(self.device)))
        maps = smooth(resize(distances, (self.resolution,) * 2), smoothing_sigma(self.resolution))  # [1, R, R]
        return Prediction(image_score(maps).item(), maps[0].cpu().numpy())


class PlainInpaintingFloor(Detector):
    """Repaints the whole picture at once by diffusers' inpainting with the same Stable Diffusion model.

    The map is the mean over the channels of the absolute difference of colors in [0, 1], smoothed as ours; the score
    is its maximum. It learns nothing from normal pictures and uses no adaptation.

    Args:
        pipe: an `AnomalySDPipeline`, for its base components, or a checkpoint for its `from_pretrained`; None: the
            embedded checkpoint.
        prompt: one of `PROMPTS`: none, or with the category's name at `{name}`.
        noise_strength, num_inference_steps: lambda (diffusers' `strength`) and the schedule's length; None: the
            pipeline's.
        device: of a pipeline that is loaded here; a given `AnomalySDPipeline` stays where it is.
        seed: of the noise, the same for every picture.

    Raises:
        ValueError: for another prompt.
    """

    name = "plain_inpainting"
    zero_shot = True
    one_model_per_category = False

    def __init__(
        self,
        pipe=None,
        prompt: str = PROMPTS[1],
        noise_strength: float | None = None,
        num_inference_steps: int | None = None,
        device: str | torch.device = "cpu",
        seed: int = 0,
    ):
        from diffusers import StableDiffusionInpaintPipeline

        if prompt not in PROMPTS:
            raise ValueError(f"`prompt` must be one of {', '.join(map(repr, PROMPTS))}, got {prompt!r}.")
        if pipe is None or isinstance(pipe, (str, os.PathLike)):
            from ..pipeline import AnomalySDPipeline

            pipe = AnomalySDPipeline.from_pretrained(pipe).to(device)
        given = {"noise_strength": noise_strength, "num_inference_steps": num_inference_steps}
        settings = pipe.settings(**given, start="image")
        self.pipe, self.prompt, self.seed = pipe, prompt, seed
        self.noise_strength, self.num_inference_steps = settings.noise_strength, settings.num_inference_steps
        self.inpaint = StableDiffusionInpaintPipeline(
            **{name: getattr(pipe, name) for name in ("vae", "text_encoder", "tokenizer", "unet")},
            # A scheduler counts its steps, so two pipelines cannot share it.
            scheduler=type(pipe.scheduler).from_config(pipe.scheduler.config),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        self.inpaint.set_progress_bar_config(disable=True)

    def describe(self) -> dict:
        return {
            "detector": self.name,
            "features": "none: absolute color difference to the repainted picture",
            "model": self.pipe.base.name,
            "resolution": self.pipe.config.resolution,
            "mask": "the whole picture",
            "prompt": self.prompt,
            "noise_strength": self.noise_strength,
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": 1.0,
            "noise_seed": self.seed,
            "smoothing_sigma": smoothing_sigma(self.pipe.config.resolution),
            "score": "maximum of the map",
        }

    def fit(self, category: str, normals: Sequence[Image.Image], seed: int) -> None:
        """Learns nothing."""

    @torch.no_grad()
    def predict(self, category: str, image: Image.Image) -> Prediction:
        side = self.pipe.config.resolution
        picture = to_tensor(image, side)[None]  # [1, 3, R, R]
        self.pipe.use_adaptation(None)
        repainted = self.inpaint(
            prompt=self.prompt.replace("{name}", readable_name(category)),
            image=(picture + 1) / 2,
            mask_image=torch.ones(1, 1, side, side),
            strength=self.noise_strength,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=1.0,
            height=side,
            width=side,
            generator=torch.Generator().manual_seed(self.seed),
            output_type="pt",
        ).images.float()  # [1, 3, R, R] in [0, 1]
        difference = (repainted - (picture.to(repainted.device) + 1) / 2).abs().mean(dim=1)  # [1, R, R]
        maps = smooth(difference, smoothing_sigma(side))
        shown = to_pil(repainted[0] * 2 - 1, (image.height, image.width))
        return Prediction(image_score(maps).item(), maps[0].cpu().numpy(), inpainted=shown)
