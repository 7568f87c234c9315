"""The two losses of the paper's fine-tuning: the denoiser's, Eq. (8), and the decoder's, Eq. (9)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .inpainting import encode
from .masks import latent_mask

LPIPS_WEIGHT = 0.1
"""Beta of Eq. (9)."""


def noisy_latents(
    vae, scheduler, images: Tensor, masks: Tensor, noise: Tensor, timesteps: Tensor
) -> tuple[Tensor, Tensor]:
    """The denoiser's input and what it shall answer, Eqs. (7) and (8).

    Args:
        vae, scheduler: of the pipeline; no gradient reaches the VAE.
        images: x, `[N, 3, H, W]` in [-1, 1].
        masks: m, `[N, 1, H, W]` in {0, 1}, 1 = repaint.
        noise: epsilon, `[N, 4, h, w]`.
        timesteps: t, int64 `[N]`, 0 ... T - 1.

    Returns:
        - float32 `[N, 9, h, w]`: z_t, the mask on the latent grid and E((1 - m) x), in the order of Stable Diffusion's
          inpainting checkpoints.
        - the target, float32 `[N, 4, h, w]`: noise, velocity or clean latents, by the scheduler's `prediction_type`.

    Raises:
        ValueError: for a scheduler with another `prediction_type`.
    """
    with torch.no_grad():
        latents, masked = encode(vae, torch.cat([images, images * (masks < 0.5)])).float().chunk(2)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    sample = torch.cat([noisy, latent_mask(masks, *latents.shape[-2:]), masked], dim=1)
    prediction_type = scheduler.config.prediction_type
    if prediction_type == "epsilon":
        return sample, noise
    if prediction_type == "v_prediction":
        return sample, scheduler.get_velocity(latents, noise, timesteps)
    if prediction_type == "sample":
        return sample, latents
    raise ValueError(
        f"`scheduler` must have the prediction_type 'epsilon', 'v_prediction' or 'sample' to be trained with, got "
        f"{prediction_type!r}."
    )


def denoiser_loss(unet: nn.Module, sample: Tensor, timesteps: Tensor, prompt_embeds: Tensor, target: Tensor) -> Tensor:
    """Eq. (8): the mean squared error of the denoiser's answer.

    Args:
        sample, target: see `noisy_latents`.
        prompt_embeds: `[N, L, d]`.

    Returns:
        float32 `[]`.
    """
    predicted = unet(sample, timesteps, encoder_hidden_states=prompt_embeds, return_dict=False)[0]
    return nn.functional.mse_loss(predicted.float(), target.float())


class Decoder(nn.Module):
    """The decoding half of a VAE as a module of its own, so that one call to it is what several processes
    synchronize."""

    def __init__(self, vae):
        super().__init__()
        self.decoder = vae.decoder
        self.post_quant_conv = getattr(vae, "post_quant_conv", None)
        self.scaling_factor = vae.config.scaling_factor

    def forward(self, latents: Tensor) -> Tensor:
        """Latents `[N, 4, h, w]` in the denoiser's scale to pictures `[N, 3, H, W]`, about [-1, 1]."""
        latents = latents / self.scaling_factor
        return self.decoder(latents if self.post_quant_conv is None else self.post_quant_conv(latents))


def decoder_loss(decoder: nn.Module, perceptual, latents: Tensor, images: Tensor) -> Tensor:
    """Eq. (9): MSE + 0.1 LPIPS between pictures and their reconstructions.

    Args:
        decoder: `Decoder`.
        perceptual: `PerceptualDistance`, Eq. (10).
        latents: E(x), `[N, 4, h, w]` in the denoiser's scale.
        images: x, `[N, 3, H, W]` in [-1, 1].

    Returns:
        float32 `[]`.
    """
    decoded = decoder(latents).float()
    return nn.functional.mse_loss(decoded, images.float()) + LPIPS_WEIGHT * perceptual(decoded, images).mean()
