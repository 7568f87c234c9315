"""Compute the losses of the fine-tuning: Eq. (8) for the denoiser and Eq. (9) for the decoder.

The loss on repainted pictures is this project's own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..method.inpainting import encode
from ..method.masks import latent_mask

LPIPS_WEIGHT = 0.1
"""Beta of Eq. (9)."""


def noisy_latents(
    vae,
    scheduler,
    images: Tensor,
    masks: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    shown: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Makes the denoiser's input and its target, Eqs. (7) and (8).

    With `shown` (not in the paper) the noise is added to the latents of another picture: the part with a defect. The
    target then leads from there to the normal part inside the mask: Eq. (7) solved for epsilon, with the latents z of
    `shown` whose masked part is that of `images`:

        epsilon + sqrt(alpha_t / (1 - alpha_t)) (E(shown) - z)

    The factor grows without bound towards t = 0, so `FewShotDataset` shows no defect there.

    Args:
        vae, scheduler: of the pipeline; no gradient reaches the VAE.
        images: x, `[N, 3, H, W]` in [-1, 1].
        masks: m, `[N, 1, H, W]` in {0, 1}, 1 = repaint.
        noise: epsilon, `[N, 4, h, w]`.
        timesteps: t, int64 `[N]`, 0 ... T - 1.
        shown: `[N, 3, H, W]` in [-1, 1]; None: `images`.

    Returns:
        - float32 `[N, 9, h, w]`: z_t, the mask on the latent grid and E((1 - m) x), in the order of Stable Diffusion's
          inpainting checkpoints.
        - float32 `[N, 4, h, w]`: the target: noise, velocity or clean latents, by the scheduler's `prediction_type`.

    Raises:
        ValueError: the scheduler has another `prediction_type`.
    """
    given = images if shown is None else shown
    with torch.no_grad():
        seen, masked = encode(vae, torch.cat([given, given * (masks < 0.5)])).float().chunk(2)
        # The surroundings of the mask stay as they are shown.
        latents = seen if shown is None else encode(vae, torch.where(masks > 0.5, images, shown)).float()
    noisy = scheduler.add_noise(seen, noise, timesteps)
    if shown is not None:
        signal = scheduler.alphas_cumprod.to(noisy.device)[timesteps].view(-1, 1, 1, 1)
        noise = (noisy - signal.sqrt() * latents) / (1 - signal).sqrt()
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


def clean_latents(scheduler, noisy: Tensor, predicted: Tensor, timesteps: Tensor) -> Tensor:
    """Solves Eq. (7) for z with the denoiser's answer: the result of a single denoising step.

    Args:
        noisy: z_t, `[N, 4, h, w]`.
        predicted: the denoiser's answer, by the scheduler's `prediction_type`.
        timesteps: t, int64 `[N]`.

    Returns:
        `[N, 4, h, w]`.
    """
    signal = scheduler.alphas_cumprod.to(noisy.device)[timesteps].view(-1, 1, 1, 1)
    prediction_type = scheduler.config.prediction_type
    if prediction_type == "epsilon":
        return (noisy - (1 - signal).sqrt() * predicted) / signal.sqrt()
    if prediction_type == "v_prediction":
        return signal.sqrt() * noisy - (1 - signal).sqrt() * predicted
    return predicted


def repainting_loss(perceptual, repainted: Tensor, images: Tensor, masks: Tensor) -> Tensor:
    """Computes Eq. (9) inside the masks, between normal pictures and their repainted versions; not in the paper.

    Its value is like an anomaly score, which should be low for normal pictures.

    Args:
        perceptual: `PerceptualDistance`.
        repainted, images: `[N, 3, H, W]` in [-1, 1].
        masks: m, `[N, 1, H, W]` in {0, 1}, each with at least one pixel.

    Returns:
        float32 `[]`: MSE + 0.1 D over the pixels inside, each picture with the same weight.
    """
    weights = masks / masks.mean(dim=(1, 2, 3), keepdim=True)  # [N, 1, H, W]
    features = perceptual.features(images), perceptual.features(repainted)
    distances = perceptual.distance_map(*features, tuple(images.shape[-2:]))[:, None]  # [N, 1, H, W]
    return (weights * ((repainted - images.float()).square() + LPIPS_WEIGHT * distances)).mean()


class Decoder(nn.Module):
    """Wraps the decoding half of a VAE as a module, whose calls several processes can synchronize."""

    def __init__(self, vae):
        super().__init__()
        self.decoder = vae.decoder
        self.post_quant_conv = getattr(vae, "post_quant_conv", None)
        self.scaling_factor = vae.config.scaling_factor

    def forward(self, latents: Tensor) -> Tensor:
        """Decodes latents `[N, 4, h, w]` in the denoiser's scale to pictures `[N, 3, H, W]`, about [-1, 1]."""
        latents = latents / self.scaling_factor
        return self.decoder(latents if self.post_quant_conv is None else self.post_quant_conv(latents))


def decoder_loss(decoder: nn.Module, perceptual, latents: Tensor, images: Tensor) -> Tensor:
    """Computes Eq. (9): MSE + 0.1 LPIPS between pictures and their reconstructions.

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
