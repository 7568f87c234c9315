"""Repaint pictures pass by pass, and add up the distances: Eqs. (11) and (16) to (20) of AnomalySD (arXiv
2408.01960)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.devices import autocast
from .exemplars import mix
from .inpainting import decode, repaint, start_schedule
from .masks import latent_mask
from .scoring import scale_map
from .settings import InspectionSettings
from .workload import Workload, in_batches


@dataclass(frozen=True)
class Repainting:
    """Holds the outcome of all passes of N pictures at K scales.

    Attributes:
        differences: float32 `[N, K + 1, R, R]`: S^(k) of Eq. (18) for each scale, then S_pg of Eq. (20); 0 where a
            picture has no prototype mask.
        shown: `[N, 3, R, R]` in [-1, 1], for people: a coarse scale, and over it the pass of the prototype mask, which
            knows where to look.
    """

    differences: Tensor
    shown: Tensor


def run_passes(
    unet,
    vae,
    scheduler,
    perceptual,
    pictures: Tensor,
    latents: Tensor,
    noise: Tensor,
    work: Workload,
    prompt_embeds: Tensor,
    negative_prompt_embeds: Tensor | None,
    settings: InspectionSettings,
    batch_size: int,
    mixed_precision: str = "no",
    starts: Tensor | None = None,
    shares: Tensor | None = None,
    update: Callable[[int], None] | None = None,
    on_step: Callable[[int, Tensor, Tensor], Tensor] | None = None,
) -> Repainting:
    """Repaints every picture with each of its masks, measures the distance, and adds up.

    Args:
        perceptual: `PerceptualDistance`.
        pictures: `[N, 3, R, R]` in [-1, 1].
        latents, noise: `[N, 4, h, w]`, shared by all masks of a picture.
        work: the passes.
        prompt_embeds, negative_prompt_embeds: `[1, L, d]`.
        settings: where they join passes, the latents that the passes of a scale repaint become one picture.
        batch_size: passes at once; halved when memory runs out. It does not change the result.
        mixed_precision: "no", "bf16" or "fp16", see `autocast`.
        starts: `[N, 4, h, w]`, latents of the pictures' exemplars, from which masks are repainted; None: `latents`.
        shares: `[N, R, R]` in [0, 1], how much of the pictures is replaced; None: all. The rest is not what decoding
            makes of it, but the picture itself, in what is compared and in what is shown.
        update: called after each step with the number of passes that moved on by a step; negative when a batch that
            ran out of memory starts again.
        on_step: called as `on_step(step, timestep, latents)` after each denoising step; returns the latents to go on
            with. `step` counts over all batches; a batch that starts again counts its steps again.
    """
    device, side, scales = pictures.device, pictures.shape[-1], work.scales
    differences = torch.zeros(len(pictures), scales + 1, side, side, device=device)  # [N, K + 1, R, R]
    shown = torch.zeros_like(pictures)  # [N, 3, R, R]
    joined: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # of a picture and a row: latents and mask
    references: dict[int, list[Tensor]] = {}  # made when they are needed: too large to keep for all pictures
    steps = len(start_schedule(scheduler, settings.num_inference_steps, settings.noise_strength, device))
    finished = 0  # steps of finished batches
    pending = 0  # what was reported of the batch that runs

    def run(jobs: range) -> None:
        nonlocal finished, pending
        if update is not None and pending:
            update(-pending)
        pending = 0
        indices, masks, rows = work.select(jobs, device)  # [B], [B, 1, R, R], [B]

        def after_step(step: int, timestep: Tensor, current: Tensor) -> Tensor:
            nonlocal pending
            pending += len(jobs)
            if update is not None:
                update(len(jobs))
            return current if on_step is None else on_step(finished + step, timestep, current)

        with autocast(device, mixed_precision):
            painted = repaint(
                unet,
                vae,
                scheduler,
                pictures[indices],
                latents[indices],
                masks,
                noise[indices],
                prompt_embeds.expand(len(jobs), -1, -1),
                None if negative_prompt_embeds is None else negative_prompt_embeds.expand(len(jobs), -1, -1),
                noise_strength=settings.noise_strength,
                num_inference_steps=settings.num_inference_steps,
                guidance_scale=settings.guidance_scale,
                starts=None if starts is None else starts[indices],
                on_step=after_step,
            )  # [B, 4, h, w]
        # Sums change last: a batch that ran out of memory is run again.
        if settings.mask_grouping == "joined":
            small = latent_mask(masks, *latents.shape[-2:]) > 0.5  # [B, 1, h, w]
            for index, place in enumerate(zip(indices.tolist(), rows.tolist(), strict=True)):
                before, covered = joined.get(place, (latents[place[0]], torch.zeros_like(masks[0])))
                joined[place] = (
                    torch.where(small[index], painted[index].to(before.dtype), before),
                    covered + masks[index],
                )
        else:
            compare(painted, masks, indices, rows)
        finished += steps
        pending = 0

    def compare(painted: Tensor, masks: Tensor, indices: Tensor, rows: Tensor) -> None:
        with autocast(device, mixed_precision):
            repainted = decode(vae, painted)  # [B, 3, R, R]
            if shares is not None:
                # What is half replaced fades sooner, so that no ghost of a defect comes back.
                repainted = mix(pictures[indices], repainted, 1 - (1 - shares[indices]).square())
            features = perceptual.features(repainted)
        for gone in [picture for picture in references if picture < indices.min()]:
            del references[gone]
        distances = torch.empty(len(painted), side, side, device=device)  # [B, R, R]
        for picture in indices.unique().tolist():
            if picture not in references:
                with autocast(device, mixed_precision):
                    references[picture] = perceptual.features(pictures[picture, None])
            own = indices == picture
            distances[own] = perceptual.distance_map(
                references[picture], [level[own] for level in features], (side, side)
            )  # Eqs. (16), (17)
        for index, (picture, row) in enumerate(zip(indices.tolist(), rows.tolist(), strict=True)):
            mask = masks[index]
            differences[picture, row] += scale_map(mask[None], distances[index, None])  # Eqs. (18), (20)
            if row in (scales // 2, scales):
                shown[picture] = torch.where(mask > 0.5, repainted[index], shown[picture])

    batch_size = in_batches(run, len(work), batch_size)
    places = sorted(joined)

    def compare_joined(chosen: range) -> None:
        own = [places[number] for number in chosen]
        painted, masks = (torch.stack(each) for each in zip(*(joined[place] for place in own), strict=True))
        compare(painted, masks, *torch.tensor(own, device=device).T)

    in_batches(compare_joined, len(places), batch_size)
    return Repainting(differences, shown)
