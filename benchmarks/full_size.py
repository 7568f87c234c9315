"""Cost of Stable Diffusion 1.5 at its real size, with random weights: nothing is downloaded.

    python benchmarks/full_size.py                          # on a GPU: all of it
    python benchmarks/full_size.py --device cpu --calls 4   # measures a few calls of the UNet and extrapolates
    python benchmarks/full_size.py --embedded --threads 1   # the embedded checkpoint beside it, in its own size

Random weights are as fast as trained ones. In one process, each on the same pictures: a plain loop of diffusers'
inpainting pipeline over the masks of the paper, then the presets `paper` and `fast`. Prints seconds a picture, the
ratio to the loop, calls of the UNet, the share of the time that their arithmetic alone would take at the speed of a
large matrix product, peak memory so far, and the largest difference of the maps to those of the loop. Where the device
computes in bfloat16, presets of networks in float32 are measured in mixed precision too. With one thread on a CPU,
seconds are those of the processor, which other programs do not lengthen.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionInpaintPipeline, UNet2DConditionModel
from diffusers.utils.torch_utils import randn_tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from anomalysd_pipeline import EMBEDDED, AnomalySDPipeline
from anomalysd_pipeline.common.devices import choose_device, resolve_precision
from anomalysd_pipeline.data.tensors import to_tensor
from anomalysd_pipeline.method.masks import multi_scale_masks
from anomalysd_pipeline.method.prompts import average_embedding
from anomalysd_pipeline.method.scoring import ScoreMaps, harmonic_mean, scale_map
from anomalysd_pipeline.models.bank import PrototypeBank
from anomalysd_pipeline.models.extractor import PrototypeExtractor
from anomalysd_pipeline.models.perceptual import PerceptualDistance
from anomalysd_pipeline.synthetic import normal_images

PART = "hex_nut"
_FEW = 8
FULL = {
    "resolution": 512,
    "unet": {"sample_size": 64, "in_channels": 9, "cross_attention_dim": 768},
    "vae": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 512},
    "text": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "extractor": "tf_efficientnet_b6",
    "perceptual": (64, 192, 384, 256, 256),
}
TINY = {
    "resolution": 64,
    "unet": {
        "sample_size": 8,
        "in_channels": 9,
        "cross_attention_dim": 16,
        "block_out_channels": (8, 8, 8, 8),
        "layers_per_block": 1,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    },
    "vae": {"block_out_channels": (4, 4, 4, 4), "norm_num_groups": 2, "sample_size": 64},
    "text": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    "extractor": "resnet10t",
    "perceptual": (4, 4, 4, 4, 4),
}


def build(size: dict, device: torch.device, dtype: torch.dtype) -> AnomalySDPipeline:
    """Builds the networks of Stable Diffusion 1.5 inpainting, EfficientNet-B6 and AlexNet with random weights."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with device:
            unet = UNet2DConditionModel(**size["unet"])
            vae = AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, **size["vae"]
            )
            text_encoder = CLIPTextModel(CLIPTextConfig(vocab_size=49408, **size["text"]))
        extractor = PrototypeExtractor(size["extractor"]).to(device)
        perceptual = PerceptualDistance(size["perceptual"]).to(device)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.no_grad():  # diffusers samples E(x); with a spread of e^-15 its sample is the mean, as ours
        vae.quant_conv.weight[4:] = 0
        vae.quant_conv.bias[4:] = -30
    pipe = AnomalySDPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=CLIPTokenizer.from_pretrained(EMBEDDED, subfolder="tokenizer"),
        unet=unet.eval(),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        extractor=extractor,
        perceptual=perceptual,
        bank=PrototypeBank(max_unturned=10_000).to(device),
        resolution=size["resolution"],
        rotations=1,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def clock() -> float:
    """Seconds; with one thread on a CPU those of the processor, which other programs do not lengthen."""
    alone = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    return time.process_time() if alone else time.perf_counter()


class Meter:
    """Counts calls of the UNet, a picture and mask each, and clocks networks where asked.

    Attributes:
        calls: of the UNet.
        seconds: network to seconds.
    """

    def __init__(self, pipe: AnomalySDPipeline, clocked: bool):
        self.device, self.clocked = pipe.device, clocked
        self.calls, self.seconds, self._began = 0, {}, {}
        for name in ("unet", "text_encoder", "extractor"):
            network = getattr(pipe, name)
            network.register_forward_pre_hook(lambda _, inputs, name=name: self._begin(name, inputs))
            network.register_forward_hook(lambda *_, name=name: self._end(name))

    def reset(self) -> None:
        self.calls, self.seconds = 0, {"unet": 0.0, "text_encoder": 0.0, "extractor": 0.0}
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return clock()

    def memory(self) -> float:
        """Peak in GiB: of the GPU since `reset`, else of the process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    def _begin(self, name: str, inputs) -> None:
        if name == "unet":
            self.calls += len(inputs[0])
        if self.clocked:
            self._began[name] = self.now()

    def _end(self, name: str) -> None:
        if self.clocked:
            self.seconds[name] += self.now() - self._began[name]


@torch.no_grad()
def plain_loop(pipe: AnomalySDPipeline, loop, picture, mask, steps: int, scales: tuple[int, ...], generator):
    """Repaints a picture with a call of diffusers' pipeline for each mask, and gives the map `[R, R]` of the paper."""
    settings, side = pipe.settings(preset="paper"), pipe.config.resolution
    embeds = average_embedding(
        pipe.prompt_book.prompts(PART, "hierarchical"), pipe.tokenizer, pipe.text_encoder
    )  # [1, L, d]
    image = to_tensor(picture, side)[None].to(pipe.device)  # [1, 3, R, R]
    reference = pipe.perceptual.features(image)
    state = generator.get_state()

    def difference(own: torch.Tensor) -> torch.Tensor:
        generator.set_state(state)
        repainted = loop(
            image=(image + 1) / 2,
            mask_image=own,
            prompt_embeds=embeds,
            strength=settings.noise_strength,
            num_inference_steps=steps,
            guidance_scale=1.0,
            height=side,
            width=side,
            generator=generator,
            output_type="pt",
        ).images  # [1, 3, R, R]
        far = pipe.perceptual.distance_map(reference, pipe.perceptual.features(repainted * 2 - 1), (side, side))
        return scale_map(own, far)

    scales = multi_scale_masks(side, side, scales, "none")
    maps = [sum(difference(own[None].to(pipe.device)) for own in scale.masks) for scale in scales]
    guided = difference(mask[None, None].to(pipe.device, torch.float32))[None]
    found = ScoreMaps(harmonic_mean(torch.stack(maps))[None], guided, None, image, None)
    return found.fused(settings.prototype_weight, 0.0)[0].cpu()


@dataclass
class Row:
    """Holds what was measured of a way to inspect: `seconds` and `calls` a picture, maps `[N, R, R]`."""

    name: str
    seconds: float
    calls: int
    memory: float
    maps: torch.Tensor


def measure(pipe, pictures, calls: int | None, batch_size: int | None) -> list[Row]:
    """Measures the loop and both presets on pictures of a registered part.

    Args:
        calls: of the UNet that are run for each, at least 2; all else is extrapolated, but for what takes at most
            `_FEW` calls: that is run whole, the median of three times. None: all are run.
    """
    parts = {k: getattr(pipe, k) for k in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
    loop = StableDiffusionInpaintPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    loop.set_progress_bar_config(disable=True)
    meter = Meter(pipe, clocked=calls is not None)
    side, factor, dtype = pipe.config.resolution, pipe.vae_scale_factor, pipe.unet.dtype
    shape = (1, pipe.unet.config.out_channels, side // factor, side // factor)

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(0) for _ in pictures]

    def ours(preset: str, few: dict, precision: str = "no") -> torch.Tensor:
        pipe.mixed_precision = precision
        drawn = generators()
        for generator in drawn:  # diffusers draws for its sample of E(x) first
            randn_tensor(shape, generator=generator, device=pipe.device, dtype=dtype)
        given = {"category": PART, "preset": preset, "generator": drawn, "batch_size": batch_size, "output_type": "pt"}
        nonlocal masks
        out = pipe(pictures, **given, **few)
        masks = out.prototype_masks  # the loop is given the same
        return out.anomaly_maps.cpu()

    def theirs(few: dict) -> torch.Tensor:
        settings = pipe.settings(preset="paper", **few)
        each = zip(pictures, masks, generators(), strict=True)
        arguments = (settings.num_inference_steps, settings.mask_scales)
        return torch.stack([plain_loop(pipe, loop, *one[:2], *arguments, one[2]) for one in each])

    # A pass with one mask of the whole picture, and one with the mask of the prototypes.
    strength = pipe.settings(preset="paper").noise_strength
    few = {"mask_scales": (1,), "num_inference_steps": -int(-max(1, (calls or 2) // 2) // strength)}
    if meter.device.type == "cuda":  # the first call chooses kernels and takes memory
        ours("paper", few)
        ours("fast", few)
    rows, masks = [], None
    ways = {"paper": ("paper", lambda given: ours("paper", given)), "plain diffusers loop": ("paper", theirs)}
    ways["fast"] = "fast", lambda given: ours("fast", given)
    mixed = resolve_precision("auto", meter.device) if dtype == torch.float32 else "no"
    if mixed != "no":
        for preset in ("paper", "fast"):
            ways[f"{preset}, {mixed}"] = preset, lambda given, preset=preset: ours(preset, given, mixed)
    for name, (preset, run) in ways.items():
        whole = pipe.settings(preset=preset, category=PART)
        own = {} if calls is None or masks is not None and calls_of(whole, masks) <= _FEW else few
        took = []
        for _ in range(3 if calls is not None and not own else 1):
            meter.reset()
            began = meter.now()
            maps = run(own)
            took.append(meter.now() - began)
        seconds, found = statistics.median(took), meter.calls
        if own:
            seconds, found = extrapolated(seconds, meter, pipe.settings(preset=preset, **few), whole, masks)
        rows.append(Row(name, seconds / len(pictures), round(found / len(pictures)), meter.memory(), maps))
    rows[:2] = rows[1::-1]
    return rows


def passes_of(settings, masks: torch.Tensor) -> int:
    """Counts the passes of pictures with the masks of their prototypes, bool `[N, R, R]`."""
    scales = multi_scale_masks(64, 64, settings.mask_scales, settings.mask_grouping)
    guided = int(masks.any(dim=(1, 2)).sum()) if settings.prototype_weight > 0 else 0
    return sum(len(scale.masks) for scale in scales) * len(masks) + guided


def calls_of(settings, masks: torch.Tensor) -> int:
    """Counts the calls of the UNet, as of `passes_of`."""
    return passes_of(settings, masks) * int(settings.num_inference_steps * settings.noise_strength)


def extrapolated(seconds: float, meter: Meter, few, whole, masks: torch.Tensor) -> tuple[float, int]:
    """Extends what few passes and steps took to all: the UNet by calls, the rest by passes, and prompts and features,
    which a picture needs once, not at all."""
    once = meter.seconds["text_encoder"] + meter.seconds["extractor"]
    rest = (seconds - meter.seconds["unet"] - once) / passes_of(few, masks)
    calls = calls_of(whole, masks)
    return once + rest * passes_of(whole, masks) + meter.seconds["unet"] / meter.calls * calls, calls


def arithmetic(config: Mapping) -> float:
    """Counts the floating-point operations of a call of the UNet."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
        side = config["sample_size"]
        sample, text = torch.zeros(1, 9, side, side), torch.zeros(1, 77, config["cross_attention_dim"])
        with FlopCounterMode(display=False) as counter:
            unet(sample, torch.zeros(1), encoder_hidden_states=text)
    return counter.get_total_flops()


def speed(device: torch.device, dtype: torch.dtype, side: int) -> float:
    """Measures floating-point operations a second of a matrix product, the best of five."""
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        began = clock()
        (left @ right).sum().item()
        best = min(best, clock() - began)
    return 2 * side**3 / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--calls", type=int, help="UNet calls to measure for each, at least 2 (default: all)")
    parser.add_argument("--pictures", type=int, default=1)
    parser.add_argument("--batch-size", type=int, help="passes at once (default: 16 on a GPU, 4 on a CPU)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--embedded", action="store_true", help="the embedded checkpoint, in float32")
    parser.add_argument("--tiny", action="store_true", help="small networks, to try the program itself")
    arguments = parser.parse_args()
    if arguments.calls is not None and arguments.calls < 2:
        parser.error("`--calls` must be at least 2, one for each of two masks.")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device, dtype, size = choose_device(arguments.device), getattr(torch, arguments.dtype), FULL
    if arguments.tiny:
        size = TINY
    cuda = device.type == "cuda"
    print(torch.cuda.get_device_name(device) if cuda else f"CPU, {torch.get_num_threads()} threads", end="; ")
    began = time.perf_counter()
    if arguments.embedded:
        dtype, pipe = torch.float32, AnomalySDPipeline.from_pretrained().to(device)
        pipe.set_progress_bar_config(disable=True)
    else:
        pipe = build(size, device, dtype)
    side, weights = pipe.config.resolution, "trained" if arguments.embedded else "random"
    operations = arithmetic(pipe.unet.config)
    limit = speed(device, dtype, 256 if arguments.tiny else 8192 if cuda else 2048)
    millions = sum(weight.numel() for weight in pipe.unet.parameters()) / 1e6
    print(f"torch {torch.__version__}, {weights} weights in {str(dtype).removeprefix('torch.')}, {side} px")
    print(f"UNet of {millions:.1f} M weights, {operations / 1e12:.3g} TFLOP a call; ", end="")
    print(f"a matrix product runs at {limit / 1e12:.3g} TFLOP/s")
    normal, *pictures = normal_images(PART, 1 + arguments.pictures, seed=0, size=side)
    pipe.add_category(PART, [normal])
    print(f"built, and 1 normal picture registered: {time.perf_counter() - began:.0f} s", flush=True)
    rows = measure(pipe, pictures, arguments.calls, arguments.batch_size)
    heads = ("", "s a picture", "ratio", "UNet calls", "share of limit", "peak GiB", "difference of maps")
    print("".join(f"{head:>{max(22 if not head else 0, len(head) + 3)}}" for head in heads))
    for row in rows:
        share = row.calls * operations / limit / row.seconds
        far = (row.maps - rows[0].maps).abs().max().item()
        cells = (f"{row.seconds:.4g}", f"{rows[0].seconds / row.seconds:.2f}", row.calls, f"{share:.0%}")
        cells += (f"{row.memory:.2f}", f"{far:.2g} of {rows[0].maps.max().item():.2g}")
        print(f"{row.name:>22}" + "".join(f"{c:>{len(h) + 3}}" for c, h in zip(cells, heads[1:], strict=True)))
    if arguments.calls is not None:
        print(
            f"Extrapolated: {2 * max(1, arguments.calls // 2)} calls of the UNet in 2 passes a picture were measured; "
            f"seconds and calls are those of all, maps those of what ran. What takes at most {_FEW} calls ran whole."
        )


if __name__ == "__main__":
    main()
