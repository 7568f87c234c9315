"""Architecture of the embedded checkpoint: every size that the stages of its training have to agree on.

The widths are chosen for inference on two CPU cores: at 256 px one inspection is 13 decoded pictures, so the
autoencoder is narrow at full resolution and the denoiser carries the parameters.
"""

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

RESOLUTION = 256
CROP = 128  # most training happens on crops: the networks are convolutional, and a crop costs a quarter of a picture
TEXT_WIDTH = 64


def make_vae() -> AutoencoderKL:
    """A factor-4 autoencoder with 4 latent channels: a factor of 8 with so few weights blurs the very details that
    are inspected."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=RESOLUTION,
        mid_block_add_attention=False,
    )


def make_unet() -> UNet2DConditionModel:
    """9 input channels as in Stable Diffusion inpainting; attention only at stride 16 of the picture, where it is
    cheap."""
    return UNet2DConditionModel(
        sample_size=RESOLUTION // 4,
        in_channels=9,
        out_channels=4,
        block_out_channels=(48, 96, 160),
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def make_text_encoder(tokenizer) -> CLIPTextModel:
    """A two-layer CLIP text model for the tokenizer trained on our own prompts."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def make_scheduler() -> DDIMScheduler:
    """Stable Diffusion's own noise schedule, so that a noise strength means the same on both tiers."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def seeded(factory, seed: int, *args):
    """Build a module with reproducible initial weights without touching the caller's random state."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return factory(*args)


DEFAULTS = {
    "default_preset": "fast",
    "preset_overrides": {"fast": {"num_inference_steps": 8}, "paper": {"num_inference_steps": 50}},
    "noise_strength": 0.4,
    "prototype_weight": 0.1,
    "feature_weight": 0.0,
}
"""What the embedded checkpoint stores as its own defaults of an inspection."""
