"""The real component classes at a tiny configuration, with seeded random weights, for 64 px pictures."""

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from anomalysd_pipeline.models.extractor import PrototypeExtractor
from anomalysd_pipeline.models.perceptual import PerceptualDistance

RESOLUTION = 64


def tiny_tokenizer() -> CLIPTokenizer:
    letters = "abcdefghijklmnopqrstuvwxyz.,-"
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77)


def tiny_text_encoder() -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=37,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=58,
        eos_token_id=59,
        pad_token_id=59,
    )
    return CLIPTextModel(config).eval()


def tiny_unet(in_channels: int = 9) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=RESOLUTION // 4,
        in_channels=in_channels,
        out_channels=4,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
    ).eval()


def tiny_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=RESOLUTION,
        scaling_factor=0.5,
    ).eval()


def tiny_taesd() -> AutoencoderTiny:
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        latent_channels=4,
    ).eval()


def ddim() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def tiny_perceptual() -> PerceptualDistance:
    """Positive biases keep some channel alive at every position: a direction of length zero is decided by rounding."""
    perceptual = PerceptualDistance(channels=(8, 8, 8, 8, 8))
    for conv in perceptual.convs:
        torch.nn.init.constant_(conv.bias, 0.3)
    return perceptual


def tiny_components(seed: int = 0) -> dict:
    """All components of `AnomalySDPipeline`, but for the bank."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return {
            "vae": tiny_vae(),
            "text_encoder": tiny_text_encoder(),
            "tokenizer": tiny_tokenizer(),
            "unet": tiny_unet(),
            "scheduler": ddim(),
            "extractor": PrototypeExtractor("resnet10t", (1, 2), normalize="layer"),
            "perceptual": tiny_perceptual(),
        }
