"""From pictures to score maps: the stages that inspection and calibration share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..data.tensors import resize
from ..models.bank import PrototypeBank
from .inpainting import decode, draw_noise, encode, repaint, start_schedule
from .masks import multi_scale_masks, prototype_mask
from .prompts import average_embedding
from .scoring import fuse, harmonic_mean, scale_map, smooth, smoothing_sigma
from .settings import InspectionSettings
from .workload import Workload, in_batches

if TYPE_CHECKING:
    from ..pipeline import AnomalySDPipeline
from ..common.devices import autocast

UNNAMED_CATEGORY = "part"
"""Name used in the generic prompts where no category is given."""

AT_ONCE = 4
"""Pictures whose features and latents are computed together: fixed, so that no batch size can change their
rounding."""


@dataclass(frozen=True)
class Findings:
    """What pictures are scored by, at the pipeline's resolution R.

    Attributes:
        multi_scale: S_ms, Eq. (19), float32 `[N, R, R]`.
        guided: S_pg, Eq. (20), float32 `[N, R, R]`; None without normal pictures.
        deviations: see `PrototypeBank.deviations`, float32 `[N, R, R]`; None where they are not asked for.
        repainted: what is shown to people, `[N, 3, R, R]` in [-1, 1].
        prototype_masks: bool `[N, 1, R, R]`; None without normal pictures.
    """

    multi_scale: Tensor
    guided: Tensor | None
    deviations: Tensor | None
    repainted: Tensor
    prototype_masks: Tensor | None

    def maps(self, prototype_weight: float, feature_weight: float) -> Tensor:
        """The smoothed score maps, Eq. (21), float32 `[N, R, R]`."""
        fused = fuse(self.multi_scale, self.guided, self.deviations, prototype_weight, feature_weight)
        return smooth(fused, smoothing_sigma(fused.shape[-1]))


def examine(
    pipe: AnomalySDPipeline,
    pictures: Tensor,
    category: str | None,
    settings: InspectionSettings,
    bank: PrototypeBank | None,
    batch_size: int | None = None,
    generator=None,
    callback: Callable | None = None,
    weigh_repainting: bool = True,
) -> Findings:
    """The stages between pictures and what they are scored by, for inspection and calibration alike.

    Args:
        pictures: `[N, 3, R, R]` in [-1, 1], R the pipeline's resolution.
        bank: holds `category`, or None for zero-shot.
        weigh_repainting: whether what the repainting does to deviations counts, in parts that the model was fine-tuned
            to; see `repaired`.
        Others: see `__call__`.
    """
    pipe.use_adaptation_of(category)
    facts = pipe.config.categories.get(category, {})
    device, side = pipe._execution_device, pipe.config.resolution
    pictures = pictures.to(device)

    # 1. The averaged prompt embedding
    design = facts.get("prompt_design", "hierarchical")
    prompts = pipe.prompt_book.prompts(category or UNNAMED_CATEGORY, design)
    text = (pipe.tokenizer, pipe.text_encoder)
    prompt_embeds = average_embedding(prompts, *text)  # [1, L, d]
    negative_embeds = average_embedding([""], *text) if settings.guidance_scale > 1 else None  # [1, L, d]

    # 2. How far each position is from the normal pictures, and the mask that follows from it
    distances, prototype_masks = None, None
    if bank is not None:
        psi = torch.cat([pipe.extractor(part) for part in pictures.split(AT_ONCE)])  # [N, C, h, w]
        distances = bank.to(device).distances(category, psi)  # [N, h, w]
        prototype_masks = prototype_mask(distances, (side, side))  # [N, 1, R, R]

    # 3. All passes: every picture with every mask
    passes = multi_scale_masks(side, side, settings.mask_scales, settings.mask_grouping)
    work = Workload(len(pictures), passes, prototype_masks)

    # 4. What is computed once per picture: latents and noise; and features, in the loop: too large to keep for all
    latents = torch.cat([encode(pipe.vae, part) for part in pictures.split(AT_ONCE)])  # [N, 4, h, w]
    noise = draw_noise(latents.shape, generator, device, pipe.unet.dtype)  # [N, 4, h, w]
    references: dict[int, list[Tensor]] = {}

    # 5. Repaint, measure and add up, in batches
    totals = torch.zeros(len(pictures), len(passes) + 1, side, side, device=device)  # [N, K + 1, R, R]
    # Shown to people: the coarse scales leave no seams, and the prototype mask knows where to look.
    shown = torch.zeros_like(pictures)  # [N, 3, R, R]
    # Each of the scales covers every pixel once.
    average = torch.zeros_like(pictures)  # [N, 3, R, R]
    shown_scale = len(passes) // 2
    steps = len(start_schedule(pipe.scheduler, settings.num_inference_steps, settings.noise_strength, device))
    done = 0
    with pipe.progress_bar(total=len(work) * steps) as progress:

        def run(jobs: range) -> None:
            nonlocal done
            indices, masks, rows = work.select(jobs, device)  # [B], [B, 1, R, R], [B]

            def on_step(step: int, timestep: Tensor, current: Tensor) -> Tensor:
                progress.update(len(jobs))
                if callback is not None:
                    changed = callback(pipe, done + step, int(timestep), {"latents": current})
                    current = (changed or {}).get("latents", current)
                return current

            with autocast(device, pipe.mixed_precision):
                repainted = repaint(
                    pipe.unet,
                    pipe.vae,
                    pipe.scheduler,
                    pictures[indices],
                    latents[indices],
                    masks,
                    noise[indices],
                    prompt_embeds.expand(len(jobs), -1, -1),
                    None if negative_embeds is None else negative_embeds.expand(len(jobs), -1, -1),
                    noise_strength=settings.noise_strength,
                    num_inference_steps=settings.num_inference_steps,
                    guidance_scale=settings.guidance_scale,
                    on_step=on_step,
                )  # [B, 3, R, R]
                features = pipe.perceptual.features(repainted)
            done += steps
            for finished in [picture for picture in references if picture < indices.min()]:
                del references[finished]
            differences = torch.empty(len(jobs), side, side, device=device)  # [B, R, R]
            for picture in indices.unique().tolist():
                if picture not in references:
                    with autocast(device, pipe.mixed_precision):
                        references[picture] = pipe.perceptual.features(pictures[picture, None])
                own = indices == picture
                differences[own] = pipe.perceptual.distance_map(
                    references[picture], [level[own] for level in features], (side, side)
                )
            # Sums change last: what failed for lack of memory is run again.
            for index, picture in enumerate(indices.tolist()):
                mask, result, row = masks[index], repainted[index], int(rows[index])
                totals[picture, row] += scale_map(mask[None], differences[index, None])  # Eqs. (18), (20)
                if row < len(passes):
                    average[picture] += mask * result / len(passes)
                if row in (shown_scale, len(passes)):
                    shown[picture] = torch.where(mask > 0.5, result, shown[picture])

        in_batches(run, len(work), batch_size or (16 if device.type == "cuda" else 4))

    # 6. Fuse the scales, and compare with the normal pictures what was there before and after
    multi_scale = harmonic_mean(totals[:, :-1].transpose(0, 1))  # [N, R, R], Eq. (19)
    guided = None if prototype_masks is None else totals[:, -1]
    far = None
    if bank is not None and settings.feature_weight > 0:
        far = []
        # Elsewhere the model does not know the part; see docs/features.md.
        known = weigh_repainting and facts.get("adapted")
        for rows in torch.arange(len(pictures)).split(AT_ONCE):
            after = _repainted_features(pipe, pictures[rows], latents[rows], average[rows]) if known else None
            far.append(bank.deviations(category, psi[rows], after))  # [n, h, w]
        far = resize(torch.cat(far), (side, side))
    return Findings(multi_scale, guided, far, shown, prototype_masks)


def _repainted_features(
    pipe: AnomalySDPipeline, pictures: Tensor, latents: Tensor, repainted: Tensor
) -> tuple[Tensor, Tensor]:
    """psi of repainted pictures, and of these with what the autoencoder loses of the originals put back, both
    [n, C, h, w]."""
    with autocast(pictures.device, pipe.mixed_precision):
        lost = pictures - decode(pipe.vae, latents)  # [n, 3, R, R]
    return pipe.extractor(repainted), pipe.extractor((repainted + lost).clamp(-1, 1))
