"""Show the progress of a fine-tuning: a normal picture whose middle is repainted."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import torch
from PIL import Image
from torch import nn

from ..data.tensors import to_pil, to_tensor
from ..method.inpainting import decode, draw_noise, encode, repaint
from ..method.prompts import average_embedding
from ..method.settings import InspectionSettings
from .base import Base
from .stages import Stage


def validation_pictures(
    base: Base,
    stage: Stage,
    module: nn.Module,
    image: Image.Image,
    settings: InspectionSettings,
    texts: list[str],
) -> list[Image.Image]:
    """Draws a normal picture as it is, with its middle masked, and repainted as in an inspection.

    Args:
        base: the networks that do not train.
        stage: the stage in training, within `Stage.evaluation`.
        module: its module, unwrapped: the denoiser, or the decoder of the autoencoder.
        image: RGB, any size.
        settings: settings of an inspection of the part.
        texts: prompts of the part.

    Returns:
        Three RGB pictures of `base.resolution` squared.
    """
    unet, vae = (module, base.vae) if stage.name == "denoiser" else (stage.unet, _with_decoder(base.vae, module))
    side = base.resolution
    x = to_tensor(image, side)[None].to(next(module.parameters()).device)  # [1, 3, R, R]
    mask = torch.zeros_like(x[:, :1])  # [1, 1, R, R]
    mask[..., side // 4 : side - side // 4, side // 4 : side - side // 4] = 1
    latents = encode(vae, x)  # [1, 4, h, w]
    painted = repaint(
        unet,
        vae,
        copy.deepcopy(base.scheduler),  # the one in training keeps its own steps
        x,
        latents,
        mask,
        draw_noise(latents.shape, None, x.device, latents.dtype),
        average_embedding(texts, base.tokenizer, base.text_encoder),
        noise_strength=settings.noise_strength,
        num_inference_steps=settings.num_inference_steps,
    )
    return [to_pil(picture[0], (side, side)) for picture in (x, x * (mask < 0.5), decode(vae, painted))]


def _with_decoder(vae, decoder: nn.Module) -> SimpleNamespace:
    """Puts the decoder in training into as much of an autoencoder as repainting needs."""
    scale = vae.config.scaling_factor  # the decoder in training divides by it
    return SimpleNamespace(
        config=vae.config, dtype=vae.dtype, encode=vae.encode, decode=lambda z, **_: (decoder(z * scale),)
    )
