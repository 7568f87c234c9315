"""AnomalySDPipeline: find defects by repainting a part as a normal one and measuring the difference (arXiv
2408.01960)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import fields

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from torch import Tensor

from .adaptations import AdaptationMixin
from .categories import CategoryMixin
from .data.images import load_pictures
from .data.tensors import resize, stack, to_pil, to_tensor
from .loading import LoadingMixin
from .method.detection import examine
from .method.inpainting import draw_noise, encode, repaint
from .method.prompts import PromptBook, check_category
from .method.scoring import image_score
from .method.settings import PRESETS, InspectionSettings, checkpoint_settings
from .models.adapters import AdapterStore
from .models.bank import PrototypeBank
from .models.extractor import PrototypeExtractor
from .models.perceptual import PerceptualDistance
from .output import AnomalySDPipelineOutput

logger = logging.get_logger(__name__)


class AnomalySDPipeline(LoadingMixin, CategoryMixin, AdaptationMixin, DiffusionPipeline):
    """Few-shot, multi-class anomaly detection with a Stable Diffusion inpainting model.

    Args:
        vae: AutoencoderKL or AutoencoderTiny.
        text_encoder, tokenizer: the CLIP text model of the checkpoint.
        unet: UNet2DConditionModel with 9 input channels (noisy latents 4, mask 1, masked-image latents 4).
        scheduler: any diffusers scheduler with `add_noise`.
        extractor: `PrototypeExtractor`, the features of Eq. (12).
        perceptual: `PerceptualDistance`, the distance of Eqs. (16) and (17).
        bank: `PrototypeBank`, the normal features of every registered category, Eq. (13).
        adapters: `AdapterStore`, what adaptations have learned.
        resolution: side in pixels at which pictures are inspected.
        default_preset: "paper", "fast" or "sota", used where a call names none.
        preset_overrides: what this checkpoint changes in a preset, such as `{"fast": {"num_inference_steps": 8}}`.
        noise_strength, prototype_weight, feature_weight: this checkpoint's defaults of the settings of the same name;
            a `feature_weight` of 0 leaves it to the preset.
        rotations: this checkpoint's number of rotated copies of each normal picture in a bank.
        prompts: `PromptBook.to_dict()`; None: the book of `prompts.json`.
        categories: settings of each registered category: `shots`, `noise_strength`, `adaptation`,
            `prompt_design`, `adapted` (whether the weights that it is inspected with were fine-tuned to it),
            `calibration`.
        adaptation: this checkpoint's defaults of a fine-tuning, see `AdaptationSettings`.
        adaptations: settings with which each adaptation in `adapters` was made.
        safety_checker, feature_extractor, image_encoder, requires_safety_checker: accepted because Stable Diffusion
            repositories list them; never loaded or used.

    Raises:
        ValueError: if the UNet does not take 9 input channels.
    """

    model_cpu_offload_seq = "text_encoder->extractor->unet->vae->perceptual"
    _optional_components = [
        "safety_checker",
        "feature_extractor",
        "image_encoder",
        "extractor",
        "perceptual",
        "bank",
        "adapters",
    ]
    _exclude_from_cpu_offload = ["bank", "adapters"]
    _callback_tensor_inputs = ["latents"]

    mixed_precision: str = "no"
    """What repainting and the perceptual distance are computed in: "no" (the weights' own type), "bf16" or "fp16".
    With "bf16" a CPU that has such instructions is two to three times faster; scores change by about a hundredth."""

    def __init__(
        self,
        vae,
        text_encoder,
        tokenizer,
        unet,
        scheduler,
        extractor: PrototypeExtractor | None = None,
        perceptual: PerceptualDistance | None = None,
        bank: PrototypeBank | None = None,
        adapters: AdapterStore | None = None,
        resolution: int = 512,
        default_preset: str = "paper",
        preset_overrides: dict | None = None,
        noise_strength: float = 0.4,
        prototype_weight: float = 0.1,
        feature_weight: float = 0.0,
        rotations: int = 4,
        prompts: dict | None = None,
        categories: dict | None = None,
        adaptation: dict | None = None,
        adaptations: dict | None = None,
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker: bool = False,
    ):
        super().__init__()
        channels = unet.config.in_channels
        if channels != 9:
            raise ValueError(
                f"`unet` must be an inpainting UNet with 9 input channels, but it has {channels}; use an inpainting "
                "checkpoint such as 'stable-diffusion-v1-5/stable-diffusion-inpainting'."
            )
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            extractor=extractor,
            perceptual=perceptual,
            bank=PrototypeBank() if bank is None else bank,
            adapters=AdapterStore() if adapters is None else adapters,
            safety_checker=None,
            feature_extractor=None,
            image_encoder=None,
        )
        for module in (unet, vae, perceptual):
            if module is not None:
                # The order in which convolutions compute; otherwise they reorder their inputs on every call.
                module.to(memory_format=torch.channels_last)
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        if resolution % self.vae_scale_factor:
            raise ValueError(
                f"`resolution` must be a multiple of the VAE's factor {self.vae_scale_factor}, got {resolution}."
            )
        book = PromptBook.default() if prompts is None else PromptBook.from_dict(prompts)
        self.register_to_config(
            resolution=resolution,
            default_preset=default_preset,
            preset_overrides=copy.deepcopy(dict(preset_overrides or {})),
            noise_strength=noise_strength,
            prototype_weight=prototype_weight,
            feature_weight=feature_weight,
            rotations=rotations,
            prompts=book.to_dict(),
            categories=copy.deepcopy(dict(categories or {})),
            adaptation=copy.deepcopy(dict(adaptation or {})),
            adaptations=copy.deepcopy(dict(adaptations or {})),
            requires_safety_checker=False,
        )
        for preset in PRESETS:
            self.settings(preset=preset)
        self.adaptation_settings()

    # Settings

    def settings(self, preset: str | None = None, category: str | None = None, **given) -> InspectionSettings:
        """The settings that a call with these arguments would use: call, then category, then checkpoint, then preset.

        Raises:
            TypeError: for a name that is no setting.
            ValueError: for a value out of its range.
        """
        unknown = set(given) - {field.name for field in fields(InspectionSettings)}
        if unknown:
            raise TypeError(f"`{sorted(unknown)[0]}` is not a setting of an inspection.")
        preset = self.config.default_preset if preset is None else preset
        of_category = {"noise_strength": self.config.categories.get(category, {}).get("noise_strength")}
        layers = [
            {"guidance_scale": 1.0},
            checkpoint_settings(self.config),
            self.config.preset_overrides.get(preset, {}),
            of_category,
            given,
        ]
        return InspectionSettings.resolve(preset, layers)

    # Inspection

    @torch.no_grad()
    def __call__(
        self,
        image=None,
        category: str | None = None,
        preset: str | None = None,
        noise_strength: float | None = None,
        num_inference_steps: int | None = None,
        mask_scales: Sequence[int] | None = None,
        mask_grouping: str | None = None,
        prototype_weight: float | None = None,
        feature_weight: float | None = None,
        guidance_scale: float | None = None,
        batch_size: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "np",
        callback_on_step_end: Callable[[AnomalySDPipeline, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        return_dict: bool = True,
    ) -> AnomalySDPipelineOutput | tuple:
        """Inspects one picture or several of one category.

        Args:
            image: a picture or a list of them: path, PIL, numpy or tensor, see `load_image`; a tensor or array with a
                leading batch dimension counts as a list.
            category: name of the part. One that was never added is inspected zero-shot: its prompts or the generic
                ones, multi-scale masks only. None: an unnamed part.
            preset: "paper", "fast" or "sota"; None: the checkpoint's default.
            noise_strength, num_inference_steps, mask_scales, mask_grouping, prototype_weight, feature_weight,
                guidance_scale: see `InspectionSettings`; None: the category's, the checkpoint's or the preset's value.
            batch_size: passes (picture and mask) at once; halved by itself when memory runs out. It does not change
                the result. None: 16 on a GPU, 4 on a CPU.
            generator: source of the noise, one for all or one per picture. None: every picture gets the same noise, so
                that its score depends on nothing but the picture.
            output_type: "np", or "pt" for maps as tensors.
            callback_on_step_end: called as `callback(pipe, step, timestep, {"latents": ...})` after each denoising
                step, `step` counting over all passes; it may return changed latents, and an exception ends the call.
            return_dict: False returns the output's fields as a tuple.

        Returns:
            `AnomalySDPipelineOutput`.

        Raises:
            ValueError: for a picture that cannot be read or an argument out of its range.
        """
        # 1. Check inputs and settle what was left open
        settings = self.settings(
            preset=preset,
            category=category,
            noise_strength=noise_strength,
            num_inference_steps=num_inference_steps,
            mask_scales=mask_scales,
            mask_grouping=mask_grouping,
            prototype_weight=prototype_weight,
            feature_weight=feature_weight,
            guidance_scale=guidance_scale,
        )
        self.check_inputs(category, batch_size, output_type, callback_on_step_end_tensor_inputs)
        loaded = load_pictures(image, "image")
        sizes = [(picture.height, picture.width) for picture in loaded]
        pictures = torch.stack([to_tensor(picture, self.config.resolution) for picture in loaded])  # [N, 3, R, R]

        # 2. Score maps at the model's resolution
        bank = self.bank if category in self.bank else None
        try:
            found = examine(self, pictures, category, settings, bank, batch_size, generator, callback_on_step_end)
        finally:
            self.maybe_free_model_hooks()
        maps = found.maps(settings.prototype_weight, settings.feature_weight)  # [N, R, R]
        prototype_masks = found.prototype_masks

        # 3. Image scores before resizing, so that a score does not depend on the size of the file
        scores = image_score(maps)  # [N]

        # 4. Compare with the threshold, if the category has one for these settings
        threshold = self._threshold(category, settings)
        labels = [None if threshold is None else bool(score > threshold) for score in scores.tolist()]

        # 5. Everything back to the pictures' own sizes
        maps = [resize(m[None], size)[0] for m, size in zip(maps, sizes, strict=True)]  # [H, W] each
        if prototype_masks is not None:
            prototype_masks = [
                resize(m.float(), size, "nearest")[0] > 0.5 for m, size in zip(prototype_masks, sizes, strict=True)
            ]
        output = AnomalySDPipelineOutput(
            pred_scores=scores.cpu().numpy(),
            pred_labels=labels,
            anomaly_maps=stack(maps, output_type),
            pred_masks=None if threshold is None else stack([m > threshold for m in maps], output_type),
            inpainted=[to_pil(x, size) for x, size in zip(found.repainted, sizes, strict=True)],
            prototype_masks=None if prototype_masks is None else stack(prototype_masks, output_type),
            thresholds=[threshold] * len(labels),
        )
        return output if return_dict else output.to_tuple()

    def check_inputs(self, category, batch_size, output_type, callback_on_step_end_tensor_inputs) -> None:
        """Raises ValueError for the arguments of `__call__` that are no settings and no pictures."""
        if category is not None:
            check_category(category)
        if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
            raise ValueError(f"`batch_size` must be a whole number of at least 1, or None, got {batch_size!r}.")
        if output_type not in ("np", "pt"):
            raise ValueError(f"`output_type` must be 'np' or 'pt', got {output_type!r}.")
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` may hold {self._callback_tensor_inputs}, got {unknown}."
            )

    @torch.no_grad()
    def inpaint(
        self,
        images: Tensor,
        masks: Tensor,
        prompt_embeds: Tensor,
        noise_strength: float = 0.4,
        num_inference_steps: int = 50,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        guidance_scale: float = 1.0,
        negative_prompt_embeds: Tensor | None = None,
    ) -> Tensor:
        """Repaints the masked part of pictures; one batch, by the base or what `set_adaptation` has chosen.

        Equal to diffusers' own inpainting pipeline with the same weights, noise and strength, the VAE's posterior mean
        standing for E(x).

        Args:
            images: `[N, 3, H, W]` in [-1, 1], sides multiples of the VAE's factor.
            masks: `[N, 1, H, W]` or `[1, 1, H, W]` in {0, 1}, 1 = repaint.
            prompt_embeds: `[1 or N, L, d]`.
            noise_strength, num_inference_steps, guidance_scale: see `InspectionSettings`.
            noise: `[1 or N, 4, h, w]`, or None: drawn from `generator` (None: the same for every picture).
            negative_prompt_embeds: `[1 or N, L, d]`, needed where `guidance_scale` exceeds 1.

        Returns:
            float32 `[N, 3, H, W]` in [-1, 1].

        Raises:
            ValueError: for a shape or a value out of its range.
        """
        self.settings(
            noise_strength=noise_strength, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale
        )
        count, factor = len(images), self.vae_scale_factor
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % factor or images.shape[3] % factor:
            raise ValueError(
                f"`images` must be [N, 3, H, W] with sides that are multiples of {factor}, got {list(images.shape)}."
            )
        if masks.ndim != 4 or masks.shape[0] not in (1, count) or masks.shape[1:] != (1, *images.shape[2:]):
            raise ValueError(
                f"`masks` must be [{count}, 1, {images.shape[2]}, {images.shape[3]}], got {list(masks.shape)}."
            )
        if guidance_scale > 1 and negative_prompt_embeds is None:
            raise ValueError("`negative_prompt_embeds` is needed where `guidance_scale` exceeds 1.")
        self.use_adaptation(self._chosen_adaptation)
        device = self._execution_device
        images, masks = images.to(device), masks.to(device).expand(count, -1, -1, -1)
        latents = encode(self.vae, images)  # [N, 4, h, w]
        if noise is None:
            noise = draw_noise(latents.shape, generator, device, self.unet.dtype)
        if noise.shape[0] not in (1, count) or noise.shape[1:] != latents.shape[1:]:
            raise ValueError(f"`noise` must be {[count, *latents.shape[1:]]}, got {list(noise.shape)}.")
        embeds = [
            None if e is None else e.to(device).expand(count, -1, -1) for e in (prompt_embeds, negative_prompt_embeds)
        ]
        result = repaint(
            self.unet,
            self.vae,
            self.scheduler,
            images,
            latents,
            masks.to(images.dtype),
            noise.to(device).expand(count, -1, -1, -1),
            *embeds,
            noise_strength=noise_strength,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
        )
        self.maybe_free_model_hooks()
        return result

    # Parts of the above

    def _threshold(self, category: str | None, settings: InspectionSettings) -> float | None:
        record = self.config.categories.get(category, {}).get("calibration")
        if record is None:
            return None
        if record["settings"] != settings.to_dict():
            changed = [key for key, value in settings.to_dict().items() if record["settings"].get(key) != value]
            logger.warning(
                f"{category!r} is calibrated for other settings ({', '.join(changed)} differ), so its threshold does "
                "not apply; call `calibrate` with these settings."
            )
            return None
        return record["threshold"]
