"""Repaint pictures in the latent space of a Stable Diffusion inpainting model.

The computation is that of diffusers' `StableDiffusionInpaintPipeline` for 9-channel UNets, with the VAE's posterior
mean as E(x), and cut into parts so that one picture's latent and noise serve all of its masks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .masks import latent_mask


def encode(vae, images: Tensor) -> Tensor:
    """Encodes pictures `[N, 3, H, W]` in [-1, 1] as E(x) `[N, 4, h, w]`, in the denoiser's scale.

    Takes AutoencoderKL and AutoencoderTiny.
    """
    encoded = vae.encode(images.to(vae.dtype))
    latents = encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latents
    return latents * vae.config.scaling_factor


def decode(vae, latents: Tensor) -> Tensor:
    """Decodes latents `[N, 4, h, w]` to float32 pictures `[N, 3, H, W]` in [-1, 1]."""
    return vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0].float().clamp(-1, 1)


def draw_noise(shape, generator, device, dtype) -> Tensor:
    """Draws a noise sample per picture, `[N, 4, h, w]`, shared by all its masks.

    Args:
        shape: `[N, 4, h, w]`.
        generator: one for all pictures, or a list of N; None: every picture gets the same numbers, on every device.

    Raises:
        ValueError: for a list of another length, or anything else than generators.
    """
    one = (1, *shape[1:])
    if generator is None:
        fixed = torch.Generator().manual_seed(0)
        return randn_tensor(one, generator=fixed, device=device, dtype=dtype).expand(shape)
    generators = generator if isinstance(generator, list) else [generator] * shape[0]
    if not all(isinstance(one, torch.Generator) for one in generators):
        raise ValueError(f"`generator` must be a `torch.Generator`, a list of these, or None, got {generator!r}.")
    if len(generators) != shape[0]:
        raise ValueError(f"`generator` must be one generator or a list of {shape[0]}, got {len(generators)}.")
    # One draw per picture: how many pictures a call holds does not change the first one's noise.
    return torch.cat([randn_tensor(one, generator=g, device=device, dtype=dtype) for g in generators])


def start_schedule(scheduler, num_inference_steps: int, noise_strength: float, device) -> Tensor:
    """Sets the scheduler to the last `noise_strength` of its steps and returns their timesteps `[T]`, T >= 1.

    The start is T~ = lambda T of the method, rounded as diffusers rounds it.

    Raises:
        ValueError: if no step is left.
    """
    scheduler.set_timesteps(num_inference_steps, device=device)
    begin = max(num_inference_steps - min(int(num_inference_steps * noise_strength), num_inference_steps), 0)
    timesteps = scheduler.timesteps[begin * scheduler.order :]
    if len(timesteps) == 0:
        raise ValueError(
            f"`num_inference_steps` ({num_inference_steps}) times `noise_strength` ({noise_strength}) leaves no step "
            "to run; raise either."
        )
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin * scheduler.order)
    return timesteps


def check_repainting(
    images: Tensor, masks: Tensor, factor: int, guidance_scale: float, negative_prompt_embeds: Tensor | None
) -> None:
    """Raises ValueError for pictures or masks of another shape than `repaint` takes; `factor` is the VAE's."""
    count = len(images)
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


def repaint(
    unet,
    vae,
    scheduler,
    images: Tensor,
    latents: Tensor,
    masks: Tensor,
    noise: Tensor,
    prompt_embeds: Tensor,
    negative_prompt_embeds: Tensor | None = None,
    *,
    noise_strength: float,
    num_inference_steps: int,
    guidance_scale: float = 1.0,
    starts: Tensor | None = None,
    on_step: Callable[[int, Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Repaints the masked part of each picture, Eq. (11) and the denoising after it; `decode` gives the picture.

    Args:
        images: `[N, 3, H, W]` in [-1, 1].
        latents: `[N, 4, h, w]`, `encode(vae, images)`.
        masks: `[N, 1, H, W]` in {0, 1}, 1 = repaint.
        noise: `[N, 4, h, w]`.
        prompt_embeds: `[N, L, d]`.
        negative_prompt_embeds: `[N, L, d]`, used where `guidance_scale` exceeds 1.
        starts: `[N, 4, h, w]`, latents of which the noise is added inside the masks; None: `latents`.
        on_step: called after each step with its index, timestep and latents; returns the latents to go on with.

    Returns:
        `[N, 4, h, w]`.
    """
    dtype = unet.dtype
    timesteps = start_schedule(scheduler, num_inference_steps, noise_strength, images.device)
    small_masks = latent_mask(masks.to(dtype), *latents.shape[-2:])  # [N, 1, h, w]
    masked_latents = encode(vae, images * (masks < 0.5)).to(dtype)  # [N, 4, h, w]
    if starts is not None:
        latents = torch.where(small_masks > 0.5, starts.to(latents.dtype), latents)
    if noise_strength >= 1.0:
        latents = noise.to(dtype) * scheduler.init_noise_sigma
    else:
        latents = scheduler.add_noise(latents.to(dtype), noise.to(dtype), timesteps[:1].repeat(len(images)))
    guided = guidance_scale > 1.0
    prompt_embeds = prompt_embeds.to(dtype)
    if guided:
        prompt_embeds = torch.cat([negative_prompt_embeds.to(dtype), prompt_embeds])
    extra = {}
    if "generator" in inspect.signature(scheduler.step).parameters:
        extra["generator"] = _generators(noise)
    for index, timestep in enumerate(timesteps):
        sample = torch.cat([latents] * 2) if guided else latents
        sample = scheduler.scale_model_input(sample, timestep)
        copies = 2 if guided else 1
        sample = torch.cat(
            [sample, small_masks.repeat(copies, 1, 1, 1), masked_latents.repeat(copies, 1, 1, 1)], dim=1
        )
        predicted = unet(sample, timestep, encoder_hidden_states=prompt_embeds, return_dict=False)[0]
        if guided:
            without, with_prompt = predicted.chunk(2)
            predicted = without + guidance_scale * (with_prompt - without)
        latents = scheduler.step(predicted, timestep, latents, **extra, return_dict=False)[0]
        if on_step is not None:
            latents = on_step(index, timestep, latents)
    return latents


def _generators(noise: Tensor) -> list[torch.Generator]:
    """Makes a source for each row of a batch of what a stochastic scheduler draws besides the noise `[N, 4, h, w]`.

    It follows from the row's noise: equal seeds give equal results, whatever else is in the batch.
    """
    bits = noise[:, 0, 0, 0].float().cpu().view(torch.int32).tolist()
    return [torch.Generator().manual_seed(own % 2**32) for own in bits]
