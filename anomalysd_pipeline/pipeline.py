"""AnomalySDPipeline: find defects by repainting a part as a normal one and measuring the difference (arXiv
2408.01960)."""

from __future__ import annotations

import contextlib
import copy
import functools
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from torch import Tensor

from . import EMBEDDED
from .adaptation.base import Base
from .adaptation.folder import (
    StoredAdaptation,
    adaptation_base_of,
    is_adaptation_folder,
    read_adaptation,
    write_adaptation,
    write_part,
)
from .adaptation.records import MOST_ROTATIONS, check_records
from .adaptation.registry import check_shots, default_name
from .adaptation.settings import AdaptationSettings
from .common.checks import require_kind, require_number, require_whole
from .common.console import renaming
from .common.files import disk_errors, recover, write_whole, written_into
from .common.threads import alone, give_way, takes_turns
from .data.depth import KEY
from .data.images import load_pictures
from .data.inputs import Inputs
from .data.region import inside, pack_region, unpack_region
from .data.tensors import stack
from .knowledge import Knowledge
from .method.calibration import Calibration, calibrate_threshold, check_rate, class_names, differing_settings
from .method.comparison import Comparison, compare
from .method.exemplars import mix, unexplained
from .method.findings import Finding, findings, joined
from .method.inpainting import check_repainting, decode, draw_noise, encode, repaint, start_schedule
from .method.masks import multi_scale_masks
from .method.passes import run_passes
from .method.prompts import PromptBook, average_embedding, check_category
from .method.scoring import ScoreMaps, check_finite, harmonic_mean, image_score
from .method.settings import PRESETS, InspectionSettings, check_overrides, checkpoint_settings
from .method.workload import Workload
from .models.adapters import AdapterStore, merge_lora, switch_adapter, take_out_adapters
from .models.bank import PrototypeBank
from .models.collection import fill_bank
from .models.extractor import PrototypeExtractor, make_extractor, wants_extractor
from .models.missing import made_networks
from .models.perceptual import PerceptualDistance
from .output import AnomalySDPipelineOutput

if TYPE_CHECKING:
    from .adaptation.loop import AdaptationProgress, AdaptedWeights

logger = logging.get_logger(__name__)

UNNAMED_CATEGORY = "part"
"""Name used in the generic prompts where no category is given."""

AT_ONCE = 4
"""Pictures whose latents are computed together: fixed, so that no batch size can change their rounding."""

TILES_AT_ONCE = 16
"""Tiles of a picture whose maps are in memory together."""

MOST_PIXELS = 4096
"""Side of a picture at which Stable Diffusion can be asked to repaint."""

MOST_NAMED = 20
"""Parts in a `repr`."""

_computes = takes_turns(lambda pipe: pipe.components.values())  # which other pipelines may hold too
_learns = takes_turns(lambda pipe: [pipe])  # inspections go on meanwhile


class AnomalySDPipeline(DiffusionPipeline):
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

    _chosen_adaptation: str | None = None
    _warned_of_half = False

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
    @_computes
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
        compared, resized, shares = Comparison(), None, None
        if category in self.bank:
            exemplars = settings.start == "exemplar"
            compared = compare(inputs, self.extractor, self.bank.to(device), category, side, exemplars, left_out)
            resized = compared.resized(side, inputs.regions)  # [N, R, R]
        if compared.exemplars is not None:
            usual = self.bank.usual_distance(category, self.extractor.parts)
            shares = unexplained(resized, usual)  # [N, R, R]

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
                update=functools.partial(between_steps, progress.update),
                on_step=None if callback is None else on_step,
            )

        # 7. Fuse: harmonic mean, prototype map, deviations; `ScoreMaps.fused` weighs and smooths, Eqs. (19) and (21)
        deviations, shown = None, painted.shown
        check_finite("repainting", painted.differences)
        if resized is not None and settings.feature_weight > 0:
            deviations = self.bank.relative(category, resized, self.extractor.parts)
        if shares is not None:
            shown = mix(pictures, shown, shares)
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
    @_computes
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

    # Learning without a gradient step

    @property
    def categories(self) -> list[str]:
        """Names of the registered categories, alphabetically."""
        return sorted(self.config.categories)

    @property
    def prompt_book(self) -> PromptBook:
        """A copy of the prompts in use; `add_category` changes them."""
        return PromptBook.from_dict(self.config.prompts)

    @property
    def knowledge(self) -> Knowledge:
        """What was learned of the parts. Records and prompts are copies, to be changed and assigned; bank and adapters
        are the pipeline's own."""
        return Knowledge.of(self.config, self.bank, self.adapters)

    @knowledge.setter
    @_computes
    def knowledge(self, known: Knowledge) -> None:
        self.register_modules(bank=known.bank, adapters=known.adapters)
        self.register_to_config(**known.config())
        if self._chosen_adaptation not in known.adaptations:
            self._chosen_adaptation = None

    def _store_category(self, category: str, **facts) -> None:
        known = self.knowledge
        known.store(category, **facts)
        self.knowledge = known

    @torch.no_grad()
    @_learns
    @_computes
    def add_category(
        self,
        category: str,
        normal_images,
        prompts=None,
        noise_strength: float | None = None,
        rotations: int | None = None,
        bit_depth: int | None = None,
        region=None,
        tile_size: int | None = None,
        tile_overlap: int | None = None,
        callback: Callable[[int, int], object] | None = None,
    ) -> None:
        """Registers a part from its normal pictures, without a gradient step: prompts and the prototype bank of Eq.
        (13).

        A category of that name is replaced, and its calibration and adaptation forgotten. Of copies of one picture the
        first counts, see `Inputs.alike`. On an error nothing is changed.

        Args:
            category: name of the part; it fills the generic prompts where the part has none of its own.
            normal_images: 1 or more pictures of good parts, anything `load_image` takes.
            prompts: T_c as `PromptBook.add` takes it; None keeps the part's own or the generic set.
            noise_strength: lambda for this part; None: the checkpoint's.
            rotations: number of rotated copies of each picture in the bank, evenly spaced; None: the checkpoint's.
            bit_depth: bits in use in 16-bit gray of this part, from 8 to 16; None: what the files tell, else what
                their largest value looks like, see `images.common_depth`. Further pictures of the part are read so.
            region: the region of interest, see `set_region`; None keeps the part's own.
            tile_size, tile_overlap: cut these pictures into tiles, as inspections of the part then are; see
                `InspectionSettings`. None: pictures are looked at whole.
            callback: called as `callback(done, total)` after each copy of a picture; an exception that it raises
                cancels.

        Raises:
            ValueError: for a bad name, no or unreadable pictures, bad prompts, a strength outside (0, 1], a depth
                or a tile out of its range or a bad region.
        """
        check_category(category)
        packed = self.config.categories.get(category, {}).get("region")
        if region is not None:
            with renaming({"mask": "region"}):
                packed = pack_region(region)
        known = self.knowledge
        known.prompts.add(category, prompts)
        if noise_strength is not None:
            self.settings(noise_strength=noise_strength)
        tiling = self.settings(tile_size=tile_size or 0, tile_overlap=tile_overlap)
        loaded = load_pictures(normal_images, "normal_images", bit_depth)
        if bit_depth is None:  # pictures that were read before keep theirs
            bit_depth = max((picture.info[KEY] for picture in loaded if KEY in picture.info), default=None)
        counts = None if packed is None else unpack_region(packed)
        inputs = self._inputs(loaded, counts, tiling)
        device = self._execution_device
        rotations = self.config.rotations if rotations is None else rotations
        # Copies say nothing twice, and could not be left out of each other's comparison.
        kept = sorted(set(inputs.alike()))
        digests, marks = inputs.digests(), inputs.fingerprints()
        if inputs.tiles is None:
            shaped, regions, sources = [inputs.shaped[index] for index in kept], [counts] * len(kept), None
        else:
            tiles = [inputs.tiles[index].inputs for index in kept]
            shaped = [tile for own in tiles for tile in own.shaped]
            sources = [number for number, own in enumerate(tiles) for _ in own.shaped]
            regions = [] if counts is None else [one[0] for own in tiles for one in own.regions]
        shaped = [picture.to(device) for picture in shaped]
        regions = None if counts is None else regions
        if len(kept) < len(inputs):
            logger.warning(
                f"{len(inputs) - len(kept)} of the {len(inputs)} normal pictures of {category!r} are copies of "
                "others, and count once with these."
            )
        between = None if callback is None else functools.partial(give_way, callback)
        fill_bank(self.bank.to(device), category, self.extractor, shaped, rotations, regions, sources, between)
        known.store(
            category,
            shots=len(kept),
            digests=[digests[index] for index in kept],
            fingerprints=[marks[index] for index in kept],
            rotations=rotations,
            noise_strength=noise_strength,
            bit_depth=bit_depth,
            adaptation=None,
            prompt_design="hierarchical",
            calibration=None,
        )
        known.set_facts(category, region=packed, tile_size=tiling.tile_size, tile_overlap=tiling.tile_overlap)
        known.drop_unused_adaptations()
        self.knowledge = known

    @torch.no_grad()
    @_learns
    @_computes
    def set_region(self, category: str, mask) -> None:
        """Sets a part's region of interest: outside of it nothing counts, in learning and in inspection.

        Its prototypes are taken anew from the kept normal pictures, without cells that lie outside, and its threshold
        is forgotten: call `calibrate` next. Maps are 0 outside; score, verdict and mask are of what lies inside. What
        lies outside stays visible to the networks, as surroundings. Fine-tuning looks at whole pictures.

        Args:
            category: a part registered by `add_category`.
            mask: a picture that is bright inside and dark outside, or a bool array `[H, W]`, for pictures of the same
                view whatever their size; or a polygon, 3 or more points (x, y) as shares of width and height in
                [0, 1]. None: the whole picture.

        Raises:
            ValueError: for a part that is not registered or whose normal pictures are not kept, or a bad mask.
        """
        shots = self.bank.shots(category)
        if category not in self.config.categories or shots is None or self.settings(category=category).tile_size:
            raise ValueError(
                f"`category` must be a part whose normal pictures are kept, and whole, got {category!r}; register it "
                "by `add_category`, which takes a `region` too."
            )
        packed = None if mask is None else pack_region(mask)
        known, device = self.knowledge, self._execution_device
        pictures = [shots.copy(number).to(device) for number in range(len(shots.sizes))]  # not turned
        regions = None if packed is None else [unpack_region(packed)] * len(pictures)
        fill_bank(self.bank.to(device), category, self.extractor, pictures, int(shots.rotations), regions)
        known.store(category, calibration=None)
        known.set_facts(category, region=packed)
        self.knowledge = known

    @_learns
    @_computes
    def remove_category(self, category: str) -> None:
        """Forgets a registered part: its bank, settings and calibration.

        Raises:
            ValueError: if it is not registered.
        """
        known = self.knowledge
        known.remove(category)
        self.knowledge = known

    @torch.no_grad()
    @_learns
    def calibrate(
        self,
        category: str,
        normal_images,
        false_alarm_rate: float = 0.05,
        seed: int = 0,
        defective_images=None,
        callback: Callable[[int, int], object] | None = None,
        **settings,
    ) -> Calibration:
        """Sets a part's threshold from normal pictures, alone or with a few known defective ones; see
        `calibration.calibrate_threshold`.

        Called again with further pictures of good parts, the threshold follows; those of earlier calls with the same
        settings count on until the part is registered anew.

        Args:
            category: a part registered by `add_category`.
            normal_images: 1 or more pictures of good parts; those given to `add_category` will do, because each is
                compared with the others alone. From one of these alone the threshold is a guess.
            false_alarm_rate: share of good parts that may exceed the threshold.
            seed: of the noise, and of the copies where there is one picture.
            defective_images: pictures of defective parts, none of them normal; None: none are known. The threshold is
                then where as large a share of good parts is expected above it as of defective ones below it, with a
                warning where that is more than `false_alarm_rate`.
            callback: called as `callback(done, total)` after each picture; an exception that it raises cancels.
            **settings: the settings of `__call__` (`preset`, `noise_strength`, ...) at which the part will be
                inspected. The threshold applies to inspections with the same settings.

        Returns:
            The stored record: threshold, the scores it rests on, the settings.

        Raises:
            ValueError: for a part that is not registered, unreadable pictures or bad settings.
        """
        if category not in self.config.categories:
            raise ValueError(
                f"`category` must be registered by `add_category` before it is calibrated, got {category!r}."
            )
        chosen = self.settings(category=category, **settings)
        check_rate(false_alarm_rate)
        record = self.config.categories[category]
        if "digests" not in record:
            raise ValueError(
                f"`category` {category!r} was registered by an earlier version, which did not note its pictures; "
                "register it again by `add_category`."
            )
        region = self._region(category)
        loaded = load_pictures(normal_images, "normal_images", record.get("bit_depth"))
        inputs = self._inputs(loaded, region, chosen)
        defective = None
        if defective_images is not None:
            loaded = load_pictures(defective_images, "defective_images", record.get("bit_depth"))
            defective = self._inputs(loaded, region, chosen)

        def score(picture: Inputs, left_out: int | None) -> float:
            noise = torch.Generator().manual_seed(seed)
            parts = [picture] if picture.tiles is None else picture.tiles[0].inputs.chunks(TILES_AT_ONCE)
            scores = []
            for part in parts:
                found = self._score_maps(part, category, chosen, left_out, generator=noise)
                maps = found.fused(chosen.prototype_weight, chosen.feature_weight)
                scores += image_score(maps, chosen.top_share, found.regions).tolist()
            return max(scores)

        before = record["calibration"]
        if before is not None and self._differing(before, chosen):
            before = None
        try:
            calibration = calibrate_threshold(
                score,
                inputs,
                record["digests"],
                chosen,
                false_alarm_rate,
                seed,
                before,
                record.get("fingerprints", ()),
                defective,
                callback,
            )
        finally:
            self.maybe_free_model_hooks()
        for doubt in calibration.doubts(category):
            logger.warning(doubt)
        names = class_names(self.scheduler, self.vae).items()
        others = {part: name for part, name in names if name != self._usual_classes[part]}
        calibration = replace(calibration, classes=others)
        self._store_category(category, calibration=calibration.to_dict())
        return calibration

    # Fine-tuning

    @property
    def adaptations(self) -> list[str]:
        """Names of the adaptations kept beside the base, alphabetically."""
        return sorted(self.config.adaptations)

    def adaptation_settings(self, **given) -> AdaptationSettings:
        """The settings that `adapt` would use with these arguments: call, then checkpoint, then the paper's.

        Raises:
            TypeError: for a name that is no setting.
            ValueError: for a value out of its range.
        """
        return AdaptationSettings.resolve([self.config.adaptation, given])

    @_learns
    def adapt(
        self,
        normal_images: Mapping[str, object],
        steps: int | None = None,
        method: str | None = None,
        decoder_steps: int | None = None,
        name: str | None = None,
        prompts: Mapping[str, object] | None = None,
        calibrate: bool = True,
        false_alarm_rate: float = 0.05,
        callback: Callable[[AdaptationProgress], None] | None = None,
        **settings,
    ) -> AdaptedWeights:
        """Fine-tunes the denoiser and the decoder on a few normal pictures, then registers and calibrates the parts.

        All or nothing: until it has succeeded, and after an error or a cancellation, the pipeline is as it was.

        Args:
            normal_images: category to 1 or more pictures of good parts, anything `load_image` takes.
            steps, decoder_steps: optimizer steps of the denoiser and of the decoder; None: the checkpoint's own.
            method: "lora": the learned weights are kept beside the base, and inspections of these categories use them,
                so that many adaptations share one base. "full": the base itself is replaced in this pipeline.
            name: of the adaptation; None: the categories' names. One of that name is replaced, if no other categories
                rest on it.
            prompts: category to T_c, as `PromptBook.add` takes it; None keeps the part's own or the generic set.
            calibrate: whether thresholds are set from the same pictures.
            false_alarm_rate: see `calibrate`.
            callback: called with an `AdaptationProgress` after every step; an exception that it raises cancels.
            **settings: others of `AdaptationSettings`, such as `learning_rate`, `train_decoder`, `rank`, `seed`.

        Returns:
            The learned weights, with the loss of every step.

        Raises:
            ValueError: for bad names, pictures, prompts or settings.
        """
        from .adaptation.loop import fine_tune, in_memory_accelerator

        shots = check_shots(normal_images, prompts)
        chosen = self.adaptation_settings(steps=steps, method=method, decoder_steps=decoder_steps, **settings)
        self.check_adaptable(name or default_name(shots), chosen.method, shots)
        check_rate(false_alarm_rate)
        self._check_hooks("adapt")
        with in_memory_accelerator(self.device, chosen) as accelerator:
            weights = fine_tune(self.base, shots, chosen, accelerator, prompts=prompts, callback=callback)
        self.learn(shots, weights, name, prompts, calibrate, false_alarm_rate)
        return weights

    @_learns
    def learn(
        self,
        normal_images: Mapping[str, object],
        weights: AdaptedWeights,
        name: str | None = None,
        prompts: Mapping[str, object] | None = None,
        calibrate: bool = True,
        false_alarm_rate: float = 0.05,
    ) -> None:
        """Takes in the result of `fine_tune`, and registers and calibrates its categories; all or nothing.

        Arguments and errors are those of `adapt`.
        """
        shots = check_shots(normal_images, prompts)
        name = name or default_name(shots)
        full = weights.settings.method == "full"
        self.check_adaptable(name, weights.settings.method, shots)
        with self._undone_on_error():
            if full:
                self._replace_weights(weights)
            for category, images in shots.items():
                self.add_category(category, images, (prompts or {}).get(category))
                # Inspected with the prompts that it was trained with.
                design = weights.settings.prompt_design
                self._store_category(category, adaptation=None if full else name, prompt_design=design)
            if not full:
                # In half precision, as it will be saved: inspections now equal those after a reload.
                state = {
                    part: {key: value.half() for key, value in own.items()}
                    for part, own in (("denoiser", weights.denoiser), ("decoder", weights.decoder))
                    if own is not None
                }
                # After the categories: they drop the adaptation that this one replaces.
                with alone(self.components.values()):
                    known = self.knowledge
                    known.add_adaptation(name, {"settings": weights.settings.to_dict()}, state)
                    self.knowledge = known
            if calibrate:
                for category, images in shots.items():
                    self.calibrate(category, images, false_alarm_rate)

    def check_adaptable(self, name: str, method: str, categories: Collection[str] | None = None) -> None:
        """Checks what can be told to be wrong with an adaptation before it is trained.

        Args:
            name: of the adaptation.
            method: "lora" or "full".
            categories: those it is for.

        Raises:
            ValueError: for a bad name, one on which other categories rest, or a method that would change the base of
                other adaptations.
        """
        try:
            check_category(name)
        except ValueError as error:
            raise ValueError(str(error).replace("`category`", "`name`")) from error
        if method == "full":
            self._check_base("`method` 'full'")
        others = [c for c in self.knowledge.categories_of(name) if categories is not None and c not in categories]
        if others:
            raise ValueError(
                f"`name` {name!r} is that of an adaptation on which {', '.join(map(repr, others))} rest; give another "
                "name, or remove it with `remove_adaptation` first."
            )

    @_learns
    @_computes
    def remove_adaptation(self, name: str) -> None:
        """Forgets an adaptation and the categories that rest on it.

        Raises:
            ValueError: if there is none of that name.
        """
        self._check_adaptation(name)
        known = self.knowledge
        for category in known.categories_of(name):
            known.remove(category)
        known.drop_unused_adaptations()
        self.knowledge = known

    def set_adaptation(self, name: str | None) -> None:
        """Chooses the adaptation that direct calls of `inpaint` use; None, as at first: the base. An inspection
        switches by itself, to the adaptation of its category.

        Raises:
            ValueError: if there is none of that name.
        """
        if name is not None:
            self._check_adaptation(name)
        self._chosen_adaptation = name

    @_computes
    def use_adaptation(self, name: str | None) -> None:
        """Switches the denoiser and the decoder to an adaptation or to the base. Called before every run: another
        pipeline may share them and have switched them since."""
        if self.unet.dtype == torch.float16 and self._execution_device.type == "cpu" and not self._warned_of_half:
            self._warned_of_half = True
            logger.warning(
                "float16 is slow and inaccurate on a CPU; call `pipe.to(torch.float32)`, and for speed set "
                "`pipe.mixed_precision = 'bf16'` where the CPU computes in it, or move the pipeline to a GPU."
            )
        for module, part in ((self.unet, "denoiser"), (self.vae, "decoder")):
            switch_adapter(module, None if name is None else self.adapters.adapter(name, part), self)

    def use_adaptation_of(self, category: str | None) -> None:
        """Switches to the adaptation of a category; to the base for one that has none."""
        self.use_adaptation(self.config.categories.get(category, {}).get("adaptation"))

    @property
    def base(self) -> Base:
        """The networks that adaptations rest on, with a copy of the prompts."""
        names = ("unet", "vae", "scheduler", "tokenizer", "text_encoder", "extractor", "perceptual")
        return Base(
            **{name: getattr(self, name) for name in names},
            prompts=self.prompt_book,
            resolution=self.config.resolution,
            vae_scale_factor=self.vae_scale_factor,
            name_or_path=self.name_or_path,
        )

    def adaptation_base(self) -> dict:
        """A few weights of each network, by which an adaptation finds its base again."""
        return self.base.fingerprint()

    # Loading and saving

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path=None,
        *,
        timm_model: str | None = None,
        timm_checkpoint: str | None = None,
        alexnet_checkpoint: str | None = None,
        lpips_checkpoint: str | None = None,
        **kwargs,
    ):
        """Loads a saved pipeline, or any Stable Diffusion inpainting checkpoint, from the Hub or from disk; or an
        adaptation's folder, along with its base.

        A bare inpainting checkpoint lacks the networks that look for defects; they are made: an ImageNet model by timm
        for the prototypes, and AlexNet LPIPS for the distance.

        Args:
            pretrained_model_name_or_path: Hub id or folder; None: the embedded checkpoint (`EMBEDDED`).
            timm_model: the extractor, also in place of the checkpoint's own: a timm name such as
                "vit_small_patch14_dinov2.lvd142m". None: the checkpoint's own, or "tf_efficientnet_b6" where it has
                none.
            timm_checkpoint: its weights as a local file; None: timm downloads them, unless the checkpoint's own
                extractor is a `timm_model` already.
            alexnet_checkpoint, lpips_checkpoint: torchvision's AlexNet and LPIPS' layer weights as local files (None:
                torchvision downloads the first, the second lies in the `lpips` package).
            **kwargs: those of `DiffusionPipeline.from_pretrained`, such as `dtype`, `variant`, `cache_dir`,
                `local_files_only`, and components to use in place of the stored ones.

        Raises:
            ValueError: for a UNet without 9 input channels, a weights file that does not fit, or is neither here nor
                to be downloaded, or a `timm_model` other than that of the prototypes which the checkpoint holds.
        """
        if kwargs.get("torch_dtype") is None:
            # Said aloud, because transformers would otherwise keep a text encoder in the precision it is stored in.
            kwargs["dtype"] = kwargs.get("dtype") or torch.float32
        kwargs.setdefault("use_safetensors", True)  # no pickles, unless a caller insists
        path = pretrained_model_name_or_path or EMBEDDED
        if path == EMBEDDED and not os.path.isdir(path):
            raise ValueError(
                "`pretrained_model_name_or_path` must be a folder or a Hub id where a published pipeline.py stands "
                "for the package: the embedded checkpoint comes with the installed package anomalysd-pipeline."
            )
        recover(path)
        if is_adaptation_folder(path):
            base, resolution = adaptation_base_of(path)
            pipe = cls.from_pretrained(
                base,
                timm_model=timm_model,
                timm_checkpoint=timm_checkpoint,
                alexnet_checkpoint=alexnet_checkpoint,
                lpips_checkpoint=lpips_checkpoint,
                **{"resolution": resolution, **kwargs},
            )
            pipe.load_adaptation(path)
            return pipe
        folder = path if os.path.isdir(path) else cls.download(path, **kwargs)
        from .hub.components import class_of, own_components, readable

        with readable(path, folder):
            pipe = super().from_pretrained(path, **kwargs, **own_components(folder, kwargs))
            # Thresholds in the folder are of its own components, not of those a caller gives.
            given = {part: class_of(folder, part) for part in pipe._usual_classes if part in kwargs}
        pipe._usual_classes |= {part: name for part, name in given.items() if name}
        wanted = kwargs.get("extractor") is None and wants_extractor(
            pipe.extractor, pipe.bank.categories, timm_model, timm_checkpoint
        )
        made = made_networks(
            path,
            (lambda: make_extractor(timm_model, timm_checkpoint, pipe.config.resolution)) if wanted else None,
            None
            if pipe.perceptual is not None
            else lambda: PerceptualDistance.from_files(alexnet_checkpoint, lpips_checkpoint),
        )
        # Assignment would leave those unregistered that were registered as missing.
        made = {name: module.to(pipe.unet.dtype, memory_format=torch.channels_last) for name, module in made.items()}
        pipe.register_modules(**made)
        return pipe

    @_learns
    @_computes
    def load_lora_weights(self, pretrained_model_name_or_path_or_dict, lora_scale: float = 1.0, **kwargs) -> None:
        """Merges LoRA weights into denoiser and text encoder for good, such as an LCM-LoRA, which needs few steps.

        Thresholds are forgotten: call `calibrate` next. Networks that other pipelines share stay as they are there.

        Args:
            pretrained_model_name_or_path_or_dict: Hub id, folder, file or weights by name.
            lora_scale: factor of what the weights add.
            **kwargs: those of diffusers' `load_lora_weights`, such as `weight_name`.

        Raises:
            ValueError: if adaptations rest on the networks as they are, or these are no LoRA weights.
        """
        self._check_base("`load_lora_weights`")
        self._check_hooks("load_lora_weights")
        source = pretrained_model_name_or_path_or_dict
        self.register_modules(**merge_lora(self.unet, self.text_encoder, source, lora_scale, **kwargs))
        self._forget_thresholds()

    @_computes
    def save_pretrained(self, save_directory, *args, **kwargs) -> None:
        """As `DiffusionPipeline.save_pretrained`; adaptations, banks, prompts and thresholds included.

        By its `pipeline.py` diffusers loads the folder where this package is not installed.

        The files appear when all of them are on disk; other files of the folder stay.

        Raises:
            ValueError: if the folder cannot be written; it is then as before.
        """
        # Their weights are in the store, so the modules can be written as they were loaded.
        take_out_adapters(self.unet)
        take_out_adapters(self.vae)
        folder = Path(os.path.abspath(save_directory))
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", folder.name)
        if class_names(self.scheduler, self.vae) != self._usual_classes:  # which the folder will not tell any more
            known = self.knowledge
            known.note_classes(self._usual_classes)
            self.knowledge = known
        from .hub.bundle import bundle_source

        with disk_errors("save_directory", folder), written_into(folder) as partial:
            (partial / "pipeline.py").write_text(bundle_source(), encoding="utf-8", newline="\n")
            super().save_pretrained(partial, *args, **kwargs)

    def save_adaptation(self, save_directory, adaptation: str | None = None, exemplars: bool = True) -> None:
        """Writes what was learned of parts, without the base: LoRA weights, banks, prompts, thresholds and the
        normal pictures that were registered, a few MB.

        Args:
            save_directory: folder, made if missing and replaced as a whole if it holds an adaptation; or a file that
                ends in ".safetensors", as the app and `anomalysd detect` write it.
            adaptation: its name, or that of a part without a fine-tuning; None: the only one there is.
            exemplars: False leaves the normal pictures out. Whoever loads it then repaints from the image itself
                (`start`), and has to calibrate anew.

        Raises:
            ValueError: if there is none of that name, or several and none is named, or it cannot be written.
        """
        known = self.knowledge
        bare = [category for category in self.categories if known.record(category).get("adaptation") is None]
        names = self.adaptations or bare
        if adaptation is None:
            if len(names) != 1:
                raise ValueError(f"`adaptation` must name one of {', '.join(names) or 'none: call `adapt` first'}.")
            adaptation = names[0]
        if adaptation not in bare:
            self._check_adaptation(adaptation)
        stored, path = known.pack_adaptation(adaptation, exemplars), Path(save_directory)
        if path.suffix != ".safetensors":
            return write_adaptation(stored, self.base, path)
        with disk_errors("save_directory", path):
            write_whole(path, lambda unfinished: write_part(stored, self.base, unfinished))

    def read_adaptation(self, pretrained_adaptation_name_or_path, **hub) -> StoredAdaptation:
        """Reads an adaptation and checks that it fits, without taking it in; arguments and errors are those of
        `load_adaptation`."""
        return read_adaptation(pretrained_adaptation_name_or_path, self.base, self.settings, **hub)

    @_learns
    @_computes
    def load_adaptation(self, pretrained_adaptation_name_or_path, overwrite: bool = False, **hub) -> list[str]:
        """Takes in an adaptation that `save_adaptation` wrote, from a folder, a file or the Hub; all or nothing.

        Args:
            pretrained_adaptation_name_or_path: folder, also that of a fine-tuning which holds it, file or Hub id.
            overwrite: whether categories of the same names may be replaced.
            **hub: `revision`, `token`, `cache_dir`, `local_files_only`, as of `huggingface_hub.snapshot_download`.

        Returns:
            The categories it brought.

        Raises:
            ValueError: if it is missing, damaged or made for another base, or its categories are registered already,
                or others rest on an adaptation of its name.
        """
        found = self.read_adaptation(pretrained_adaptation_name_or_path, **hub)
        registered = [category for category in found.categories if category in self.config.categories]
        if registered and not overwrite:
            raise ValueError(
                f"`pretrained_adaptation_name_or_path` brings {', '.join(map(repr, registered))}, which this pipeline "
                "knows already; give `overwrite=True`, or remove them with `remove_category` first."
            )
        others = sorted(set(self.knowledge.categories_of(found.name)) - set(found.categories))
        if others and found.state:
            raise ValueError(
                f"`pretrained_adaptation_name_or_path` brings an adaptation {found.name!r}, and on one of that name "
                f"{', '.join(map(repr, others))} rest here; remove it with `remove_adaptation` first."
            )
        with self._undone_on_error():
            known = self.knowledge
            known.unpack_adaptation(found)
            self.knowledge = known
        return list(found.categories)

    def push_to_hub(self, repo_id: str, **kwargs) -> str:
        """Publishes the pipeline, or one of its adaptations, on the Hub, with a model card.

        Args:
            repo_id: "user/name"; made if it does not exist.
            **kwargs: those of `publishing.push_to_hub`: `adaptation` (a name; None: the whole pipeline), `private`,
                `create_pr`, `token`, `figures` (measured ones, for the card), `license`, `commit_message`, `revision`,
                `exemplars` (False leaves the registered normal pictures out).

        Returns:
            The address of the commit or of the pull request.

        Raises:
            ValueError: for a bad name, or if the Hub cannot be reached or refuses.
        """
        from .hub.publishing import push_to_hub

        return push_to_hub(self, repo_id, **kwargs)

    # Parts of the above

    def to(self, *args, **kwargs) -> AnomalySDPipeline:
        """As of `DiffusionPipeline`, without its warning for each network in float16 on a CPU: ours comes once."""
        return super().to(*args, **{"silence_dtype_warnings": True, **kwargs})

    @_computes
    def maybe_free_model_hooks(self) -> None:
        """As of `DiffusionPipeline`, between the computations of other threads."""
        super().maybe_free_model_hooks()

    def _threshold(self, category: str | None, settings: InspectionSettings) -> float | None:
        if category is not None and self.categories and category not in self.categories:
            logger.warning(
                f"`category` {category!r} is not registered, so there is no verdict and nothing to compare with; "
                f"registered are {', '.join(map(repr, self.categories))}."
            )
        record = self.config.categories.get(category, {}).get("calibration")
        if record is None:
            return None
        changed = self._differing(record, settings)
        if changed:
            logger.warning(
                f"{category!r} is calibrated for other settings ({', '.join(changed)} differ), so its threshold does "
                "not apply; call `calibrate` with these settings."
            )
            return None
        return record["threshold"]

    def _differing(self, record: Mapping, settings: InspectionSettings) -> list[str]:
        return differing_settings(record, settings, class_names(self.scheduler, self.vae), self._usual_classes)

    def _replace_weights(self, weights: AdaptedWeights) -> None:
        """Puts fully trained weights in new modules: the old ones may be another pipeline's too."""
        if weights.denoiser is not None:
            unet = copy.deepcopy(self.unet)
            take_out_adapters(unet)  # of adaptations that are gone, or of another pipeline
            unet.load_state_dict(weights.denoiser)
            self.register_modules(unet=unet)
        if weights.decoder is not None:
            vae = copy.deepcopy(self.vae)
            take_out_adapters(vae)
            vae.load_state_dict(weights.decoder, strict=False)
            self.register_modules(vae=vae)
        self._forget_thresholds()

    def _forget_thresholds(self) -> None:
        """Forgets the thresholds that were set with other weights."""
        known = self.knowledge
        for category in known.categories:
            known.store(category, calibration=None)
        self.knowledge = known

    @contextlib.contextmanager
    def _undone_on_error(self) -> Iterator[None]:
        """Lets a block change knowledge and weights; after an error all is as it was."""
        known, modules, chosen = self.knowledge, {"unet": self.unet, "vae": self.vae}, self._chosen_adaptation
        self.knowledge = known.copy()  # the originals can then simply be put back
        try:
            yield
        except BaseException:
            self.register_modules(**modules)
            self.knowledge = known
            self._chosen_adaptation = chosen
            raise

    def _check_base(self, cause: str) -> None:
        if self.adaptations:
            raise ValueError(
                f"{cause} would change the base that {', '.join(map(repr, self.adaptations))} rest on; remove them "
                "with `remove_adaptation`, or use a pipeline that is loaded anew."
            )

    def _check_hooks(self, method: str) -> None:
        if getattr(self, "_all_hooks", None):
            raise ValueError(
                f"`{method}` needs the pipeline on one device, but parts of it are offloaded; call "
                "`pipe.remove_all_hooks()` and `pipe.to(...)` first."
            )

    def _check_adaptation(self, name: str) -> None:
        if name not in self.config.adaptations:
            raise ValueError(f"`adaptation` must be one of {', '.join(self.adaptations) or 'none yet'}, got {name!r}.")


# Here `DiffusionPipeline.from_pretrained` looks for the class that a saved folder names.
diffusers.AnomalySDPipeline = AnomalySDPipeline
