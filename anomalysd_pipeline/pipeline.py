"""AnomalySDPipeline: find defects by repainting a part as a normal one and measuring the difference (arXiv
2408.01960)."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from torch import Tensor

from .adaptation.records import MOST_ROTATIONS, check_records
from .common.checks import require_kind, require_number, require_whole
from .common.threads import give_way
from .data.images import load_pictures
from .data.inputs import Inputs
from .data.region import inside, unpack_region
from .data.tensors import stack
from .data.tiles import TILES_AT_ONCE
from .method.calibration import class_names
from .method.comparison import Comparison, compare
from .method.exemplars import mix
from .method.findings import Finding, findings, joined
from .method.inpainting import check_repainting, decode, draw_noise, encode, repaint, start_schedule
from .method.masks import multi_scale_masks
from .method.passes import run_passes
from .method.prompts import PromptBook, average_embedding, check_category
from .method.scoring import ScoreMaps, check_finite, harmonic_mean
from .method.settings import PRESETS, InspectionSettings, check_overrides, checkpoint_settings
from .method.workload import Workload
from .mixins.adapting import AdaptingMixin
from .mixins.learning import LearningMixin
from .mixins.storing import StoringMixin
from .mixins.turns import computes
from .models.adapters import AdapterStore
from .models.bank import PrototypeBank
from .models.extractor import PrototypeExtractor
from .models.perceptual import PerceptualDistance
from .output import AnomalySDPipelineOutput

logger = logging.get_logger(__name__)

UNNAMED_CATEGORY = "part"
"""Name used in the generic prompts where no category is given."""

AT_ONCE = 4
"""Pictures whose latents are computed together: fixed, so that no batch size can change their rounding."""

MOST_PIXELS = 4096
"""Side of a picture at which Stable Diffusion can be asked to repaint."""

MOST_NAMED = 20
"""Parts in a `repr`."""


class AnomalySDPipeline(LearningMixin, AdaptingMixin, StoringMixin, DiffusionPipeline):
    """Few-shot, multi-class anomaly detection with a Stable Diffusion inpainting model.

    Its methods may be called from several threads, also of pipelines that share networks: one at a time computes, and
    the others wait, except while a callback runs.

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
        preset_overrides: what this checkpoint changes in a preset, such as `{"fast": {"num_inference_steps": 8}}`; and
            under "exemplar" what it changes where exemplars are the start, unless a call or the part says how much
            noise or how many steps.
        noise_strength, prototype_weight, feature_weight: this checkpoint's defaults of the settings of the same name;
            a `feature_weight` of 0 leaves it to the preset.
        rotations: this checkpoint's number of rotated copies of each normal picture in a bank.
        prompts: `PromptBook.to_dict()`; None: the book of `prompts.json`.
        categories: settings of each registered category: `shots`, `digests` (of its normal pictures, in the order of
            the bank), `fingerprints` (of the same), `rotations`, `noise_strength`, `bit_depth` (of its 16-bit gray),
            `adaptation`, `prompt_design`, `calibration`, `region` (see `set_region`), `tile_size`,
            `tile_overlap`.
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
        self._usual_classes = class_names(scheduler, vae)
        for module in (unet, vae, perceptual):
            if module is not None:
                # The order in which convolutions compute; otherwise they reorder their inputs on every call.
                module.to(memory_format=torch.channels_last)
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        require_whole("resolution", resolution, self.vae_scale_factor, MOST_PIXELS)
        if resolution % self.vae_scale_factor:
            raise ValueError(
                f"`resolution` must be a multiple of the VAE's factor {self.vae_scale_factor}, got {resolution}."
            )
        require_whole("rotations", rotations, 1, MOST_ROTATIONS)
        require_number("vae.config.scaling_factor", vae.config.scaling_factor, 0, 1e6, above=True)
        require_kind("default_preset", default_preset, str, "the name of a preset")
        for name, given in (("preset_overrides", preset_overrides), ("adaptation", adaptation)):
            require_kind(name, given or {}, Mapping, "a dictionary of settings")
        check_overrides(preset_overrides or {})
        book = PromptBook.default() if prompts is None else PromptBook.from_dict(prompts)
        categories, adaptations = check_records(
            {} if categories is None else categories, {} if adaptations is None else adaptations
        )
        self.register_to_config(
            resolution=resolution,
            default_preset=default_preset,
            preset_overrides=copy.deepcopy(dict(preset_overrides or {})),
            noise_strength=noise_strength,
            prototype_weight=prototype_weight,
            feature_weight=feature_weight,
            rotations=rotations,
            prompts=book.to_dict(),
            categories=categories,
            adaptation=copy.deepcopy(dict(adaptation or {})),
            adaptations=adaptations,
            requires_safety_checker=False,
        )
        for preset in PRESETS:
            self.settings(preset=preset)
        self.adaptation_settings()
        self.knowledge.check(unet, vae)

    def __repr__(self) -> str:
        own = self.config
        parts = [f"{name}={type(module).__name__}" for name, module in self.components.items() if module is not None]
        lines = [
            f"{type(self).__name__} at {own.resolution} px, preset {own.default_preset!r}, {self.unet.dtype} on "
            f"{self.device}",
            f"  {', '.join(parts)}",
        ]
        for category in self.categories[:MOST_NAMED]:
            record = own.categories[category]
            calibration = record.get("calibration")
            threshold = "no threshold" if calibration is None else f"threshold {calibration['threshold']:.4g}"
            adaptation = f", adaptation {record['adaptation']!r}" if record.get("adaptation") else ""
            lines.append(f"  part {category!r}: {record.get('shots')} pictures, {threshold}{adaptation}")
        if len(self.categories) > MOST_NAMED:
            lines.append(f"  and {len(self.categories) - MOST_NAMED} more parts")
        return "\n".join(lines)

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
        record = self.config.categories.get(category, {})
        of_category = {name: record.get(name) for name in ("noise_strength", "tile_size", "tile_overlap")}
        if given.get("tile_size") == 0:
            of_category["tile_overlap"] = None
        layers = [
            {"guidance_scale": 1.0},
            checkpoint_settings(self.config),
            self.config.preset_overrides.get(preset, {}),
            of_category,
            given,
        ]
        settings = InspectionSettings.resolve(preset, layers)
        if settings.start == "image":
            return settings
        if category in self.bank and self.bank.shots(category) is None:
            if given.get("start") is not None:
                raise ValueError(
                    f"`start` 'exemplar' needs the normal pictures of a part, and none are kept of {category!r}; "
                    "register it anew by `add_category`, or give 'image'."
                )
            return replace(settings, start="image")
        said = [
            layer.get(name) for layer in (of_category, given) for name in ("noise_strength", "num_inference_steps")
        ]
        if any(value is not None for value in said):
            return settings
        return settings.with_exemplars(self.config.preset_overrides)

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
        top_share: float | None = None,
        start: str | None = None,
        tile_size: int | None = None,
        tile_overlap: int | None = None,
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
                guidance_scale, top_share, start, tile_size, tile_overlap: see `InspectionSettings`; None: the
                category's, the checkpoint's or the preset's value.
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
            top_share=top_share,
            start=start,
            tile_size=tile_size,
            tile_overlap=tile_overlap,
        )
        self.check_inputs(category, batch_size, output_type, callback_on_step_end_tensor_inputs)

        # 2. Pictures to the sizes of the networks
        loaded = load_pictures(image, "image", self.config.categories.get(category, {}).get("bit_depth"))
        sizes = [(picture.height, picture.width) for picture in loaded]
        region = self._region(category)
        inputs = self._inputs(loaded, region, settings)

        noise = generator if isinstance(generator, list) else [generator] * len(sizes)

        # 3. to 9. From pictures, or tiles of them, to what was found, in their own sizes
        def examine(own: Inputs, own_sizes, noise) -> list[Finding]:
            maps = self._score_maps(own, category, settings, None, batch_size, noise, callback_on_step_end)
            return findings(maps, settings, own_sizes)

        try:
            if inputs.tiles is None:
                found = examine(inputs, sizes, generator)
            else:
                if len(noise) != len(sizes):
                    raise ValueError(f"`generator` must be one generator or a list of {len(sizes)}, got {len(noise)}.")
                found = []
                for tiles, size, own in zip(inputs.tiles, sizes, noise, strict=True):
                    each = [examine(part, part_sizes, own) for part, part_sizes in tiles.chunks(TILES_AT_ONCE)]
                    found.append(joined(sum(each, []), tiles.boxes, size, settings.tile_overlap))
        finally:
            self.maybe_free_model_hooks()
        threshold = self._threshold(category, settings)
        scores = torch.stack([one.score for one in found])  # [N]
        labels = [None if threshold is None else bool(score > threshold) for score in scores.tolist()]
        maps = [one.anomaly_map for one in found]  # [H, W] each
        if region is not None:
            maps = [m * inside(region, size).to(m.device) for m, size in zip(maps, sizes, strict=True)]
        # Nothing is marked in a picture that is normal as a whole, though single pixels may lie above the threshold
        masks = [(m > threshold) & label for m, label in zip(maps, labels, strict=True)] if threshold else []
        output = AnomalySDPipelineOutput(
            pred_scores=scores.cpu().numpy(),
            pred_labels=labels,
            anomaly_maps=stack(maps, output_type),
            pred_masks=None if threshold is None else stack(masks, output_type),
            inpainted=[one.inpainted for one in found],
            prototype_masks=None if found[0].proposed is None else stack([one.proposed for one in found], output_type),
            thresholds=[threshold] * len(labels),
        )
        output.images = loaded
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
    @computes
    def _score_maps(
        self,
        inputs: Inputs,
        category: str | None,
        settings: InspectionSettings,
        left_out: int | None = None,
        batch_size: int | None = None,
        generator=None,
        callback: Callable | None = None,
    ) -> ScoreMaps:
        """Runs stages 3 to 7 of an inspection; calibration runs them too, against a part of the bank.

        Args:
            inputs: of N pictures.
            left_out: number of the bank's picture with which they are not compared; None: with all.
            Others: see `__call__`.
        """
        device, side = self._execution_device, self.config.resolution
        record = self.config.categories.get(category, {})
        self.use_adaptation(record.get("adaptation"))
        scheduler = copy.deepcopy(self.scheduler)  # it counts its steps
        inputs = inputs.to(device)
        pictures = inputs.squares  # [N, 3, R, R], R the pipeline's resolution

        # 3. Averaged prompt embedding
        design = record.get("prompt_design", "hierarchical")
        prompts = self.prompt_book.prompts(category or UNNAMED_CATEGORY, design)
        text = (self.tokenizer, self.text_encoder)
        embeds = average_embedding(prompts, *text)  # [1, L, d]
        negative_embeds = average_embedding([""], *text) if settings.guidance_scale > 1 else None  # [1, L, d]

        # 4. Distances to the prototypes and the mask that follows, Eqs. (12) to (15)
        compared = Comparison()
        if category in self.bank:
            exemplars = settings.start == "exemplar"
            compared = compare(inputs, self.extractor, self.bank.to(device), category, side, exemplars, left_out)
        far, shares = compared.distances, compared.shares  # [N, R, R] each

        # 5. Multi-scale masks, latents and noise
        masks = multi_scale_masks(side, side, settings.mask_scales, settings.mask_grouping)
        guides = compared.prototype_masks if settings.prototype_weight > 0 else None  # [N, 1, R, R]
        work = Workload(len(pictures), masks, guides, inputs.regions)
        latents = torch.cat([encode(self.vae, part) for part in pictures.split(AT_ONCE)])  # [N, 4, h, w]
        noise = draw_noise(latents.shape, generator, device, self.unet.dtype)  # [N, 4, h, w]
        starts = None
        if shares is not None:
            mixed = mix(pictures, compared.exemplars, shares)
            starts = torch.cat([encode(self.vae, part) for part in mixed.split(AT_ONCE)])  # [N, 4, h, w]

        # 6. Repaint every picture with every mask, Eq. (11), and measure, Eqs. (16) to (18) and (20)
        def between_steps(function: Callable, *arguments):
            answer, used = give_way(function, *arguments)
            if used:
                self.use_adaptation(record.get("adaptation"))
            return answer

        def on_step(step: int, timestep: Tensor, current: Tensor) -> Tensor:
            changed = between_steps(callback, self, step, int(timestep), {"latents": current})
            return (changed or {}).get("latents", current)

        schedule = start_schedule(scheduler, settings.num_inference_steps, settings.noise_strength, device)
        with self.progress_bar(total=len(work) * len(schedule)) as progress:
            painted = run_passes(
                self.unet,
                self.vae,
                scheduler,
                self.perceptual,
                pictures,
                latents,
                noise,
                work,
                embeds,
                negative_embeds,
                settings,
                batch_size or (16 if device.type == "cuda" else 4),
                self.mixed_precision,
                starts,
                shares,
                update=functools.partial(between_steps, progress.update),
                on_step=None if callback is None else on_step,
            )

        # 7. Fuse: harmonic mean, prototype map, deviations; `ScoreMaps.fused` weighs and smooths, Eqs. (19) and (21)
        deviations, shown = None, painted.shown
        check_finite("repainting", painted.differences)
        if far is not None and settings.feature_weight > 0:
            deviations = self.bank.relative(category, far, self.extractor.parts)
        if inputs.regions is not None:
            shown = torch.where(inputs.regions, shown, pictures)
        return ScoreMaps(
            multi_scale=harmonic_mean(painted.differences[:, :-1].transpose(0, 1)),
            guided=None if guides is None else painted.differences[:, -1],
            deviations=deviations,
            repainted=shown,
            prototype_masks=compared.prototype_masks,
            exemplars=compared.exemplars,
            regions=inputs.regions,
        )

    def _inputs(self, pictures, region: Tensor | None = None, settings: InspectionSettings | None = None) -> Inputs:
        size_of = getattr(self.extractor, "picture_size", lambda height, width: None)
        tiles = () if settings is None else (settings.tile_size, settings.tile_overlap)
        return Inputs.of(pictures, self.config.resolution, size_of, region, *tiles)

    def _region(self, category: str | None) -> Tensor | None:
        packed = self.config.categories.get(category, {}).get("region")
        return None if packed is None else unpack_region(packed)

    @torch.no_grad()
    @computes
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
        check_repainting(images, masks, self.vae_scale_factor, guidance_scale, negative_prompt_embeds)
        self.use_adaptation(self._chosen_adaptation)
        try:
            count, device = len(images), self._execution_device
            images, masks = images.to(device), masks.to(device).expand(count, -1, -1, -1)
            latents = encode(self.vae, images)  # [N, 4, h, w]
            if noise is None:
                noise = draw_noise(latents.shape, generator, device, self.unet.dtype)
            if noise.shape[0] not in (1, count) or noise.shape[1:] != latents.shape[1:]:
                raise ValueError(f"`noise` must be {[count, *latents.shape[1:]]}, got {list(noise.shape)}.")
            texts = (prompt_embeds, negative_prompt_embeds)
            painted = repaint(
                self.unet,
                self.vae,
                copy.deepcopy(self.scheduler),
                images,
                latents,
                masks.to(images.dtype),
                noise.to(device).expand(count, -1, -1, -1),
                *(None if text is None else text.to(device).expand(count, -1, -1) for text in texts),
                noise_strength=noise_strength,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
            )
            return decode(self.vae, painted)
        finally:
            self.maybe_free_model_hooks()

    def to(self, *args, **kwargs) -> AnomalySDPipeline:
        """As of `DiffusionPipeline`, without its warning for each network in float16 on a CPU: ours comes once."""
        return super().to(*args, **{"silence_dtype_warnings": True, **kwargs})

    @computes
    def maybe_free_model_hooks(self) -> None:
        """As of `DiffusionPipeline`, between the computations of other threads."""
        super().maybe_free_model_hooks()


# Here `DiffusionPipeline.from_pretrained` looks for the class that a saved folder names.
diffusers.AnomalySDPipeline = AnomalySDPipeline
