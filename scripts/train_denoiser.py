"""Stage 2: the text encoder and the denoiser together, from nothing, on the normal pictures of the pool.

    accelerate launch -m scripts.train_denoiser --steps 8000

Needs `<work>/vae`. Writes `<work>/tokenizer`, `<work>/text_encoder` and `<work>/unet`. The loss is the paper's Eq. (8)
but for one change: on a share of the pictures (`--defect_share`) a defect is drawn, and inside the mask the denoiser
has to answer with the noise that would lead back to the normal picture. At inference some of the original shows
through the noise; so small a model has to be taught not to keep a defect that it sees there.

Masks are the ones inference will ask for: cells of the multi-scale grid, alone and grouped, rectangles over the
foreground, and free shapes like prototype-guided masks. The last fifth of the steps sees whole pictures instead of
crops. `--start_from` goes on from the text encoder and the denoiser of an earlier checkpoint.

`--width`, `--prediction_type` and `--timesteps` are for comparing (docs/experiments.md): what they
ask for differs from the embedded checkpoint. The evaluation's figures in pictures can be compared between all of them.
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from anomalysd_pipeline.adaptation.losses import clean_latents
from anomalysd_pipeline.adaptation.samples import REPAIRED_FROM
from anomalysd_pipeline.method.inpainting import decode
from anomalysd_pipeline.method.masks import latent_mask, training_mask
from anomalysd_pipeline.method.prompts import PromptBook
from anomalysd_pipeline.synthetic import apply_defect
from scripts.loop import stage_arguments, train
from scripts.pictures import SURFACE, Pool
from scripts.recipe import CROP, RESOLUTION, make_scheduler, make_text_encoder, make_unet, seeded
from scripts.tokenizer import make_tokenizer

# Shares of the schedule. Inference starts at one of the first; the rest is trained less, for other strengths.
STARTS = (0.12, 0.35)
STARTS_SHARE = 0.6
VISITED = 0.5
VISITED_SHARE = 0.3
OUTSIDE_WEIGHT = 0.2
EVALUATED_AT = 0.25  # the embedded checkpoint's noise strength


class Denoiser(torch.nn.Module):
    """Text encoder and UNet as one module, so that one optimizer, one average and one checkpoint hold both."""

    def __init__(self, text_encoder, unet):
        super().__init__()
        self.text_encoder, self.unet = text_encoder, unet

    def forward(self, sample, timesteps, input_ids):
        return self.unet(sample, timesteps, self.text_encoder(input_ids)[0]).sample


def draw_mask(
    foreground: torch.Tensor, rng: np.random.Generator, generator: torch.Generator, grid_share: float = 0.45
) -> torch.Tensor:
    """One mask [1, s, s] in {0, 1}: grid cells (`grid_share`), of the rest foreground rectangles (64 %), free shapes
    (27 %) or everything (9 %)."""
    side = foreground.shape[-1]
    kind = rng.random()
    if kind < grid_share:
        cell = RESOLUTION // int(rng.choice([2, 4, 8], p=[0.2, 0.35, 0.45]))
        y, x = rng.integers(0, 2 * cell, size=2)
        rows, columns = (np.arange(side) + y) // cell, (np.arange(side) + x) // cell
        if rng.random() < 0.75:  # grouped: every second cell in both directions shares the pass
            mask = (rows % 2 == 0)[:, None] & (columns % 2 == 0)[None]
        else:
            mask = (rows == rng.choice(rows))[:, None] & (columns == rng.choice(columns))[None]
        return torch.from_numpy(mask.astype(np.float32))[None]
    kind = (kind - grid_share) / (1 - grid_share)
    if kind < 0.64:
        return training_mask(foreground, generator)
    if kind < 0.91:
        coarse = torch.randn(1, 1, *rng.integers(3, 10, size=2).tolist(), generator=generator)
        smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic")[0]
        return (smooth > torch.quantile(smooth, float(rng.uniform(0.5, 0.9)))).float()
    return torch.ones(1, side, side)


def draw_timesteps(rng: np.random.Generator, count: int, length: int, evenly: bool = False) -> torch.Tensor:
    """int64 [count] below `length`: most from where inference starts, the others mostly from what it visits; or
    `evenly` from all."""
    kind = rng.random(count)
    if evenly:
        return torch.from_numpy((rng.random(count) * length).astype(np.int64))
    low = np.where(kind < STARTS_SHARE, STARTS[0], 0.0)
    high = np.where(kind < STARTS_SHARE, STARTS[1], np.where(kind < STARTS_SHARE + VISITED_SHARE, VISITED, 1.0))
    return torch.from_numpy(((low + rng.random(count) * (high - low)) * length).astype(np.int64))


def damage(image: torch.Tensor, foreground: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """A picture [3, s, s] in [-1, 1] with a defect drawn onto its foreground [1, s, s]."""
    pixels = ((image.permute(1, 2, 0).numpy() + 1) * 127.5).round().clip(0, 255).astype(np.uint8)
    where = foreground[0].numpy() > 0.5
    if where.mean() < 0.02:
        where = np.ones_like(where)
    damaged, _, _ = apply_defect(pixels, where, rng)
    return torch.from_numpy(damaged.astype(np.float32) / 127.5 - 1.0).permute(2, 0, 1)


def to_pictures(stored: np.ndarray) -> torch.Tensor:
    """uint8 [n, s, s, 3] as float32 [n, 3, s, s] in [-1, 1]."""
    return torch.from_numpy(stored).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def main() -> None:
    parser = stage_arguments(__doc__, steps=8000, batch_size=8, learning_rate=5e-4)
    parser.add_argument(
        "--whole_share", type=float, default=0.2, help="share of the steps, the last ones, on whole pictures"
    )
    parser.add_argument(
        "--defect_share", type=float, default=0.5, help="share of the pictures shown with a defect to repair"
    )
    parser.add_argument("--start_from", type=Path, help="folder of a pipeline whose weights are trained further")
    parser.add_argument("--width", type=float, default=1.0, help="factor on the channels of the UNet")
    parser.add_argument("--prediction_type", choices=("epsilon", "v_prediction", "sample"), default="epsilon")
    parser.add_argument("--timesteps", choices=("inference", "all"), default="inference", help="noise trained with")
    arguments = parser.parse_args()
    pool = Pool(arguments.work / "pool", arguments.pool, arguments.seed, RESOLUTION, arguments.pool_workers)
    held_back = Pool(arguments.work / "pool-eval", 250, 10_000 + arguments.seed, RESOLUTION, arguments.pool_workers)
    vae = AutoencoderKL.from_pretrained(arguments.work / "vae").eval().requires_grad_(False)
    channels = vae.config.latent_channels
    scheduler = make_scheduler(arguments.prediction_type)
    book = PromptBook.default()
    if arguments.start_from:
        tokenizer = CLIPTokenizer.from_pretrained(arguments.start_from / "tokenizer")
        text_encoder = CLIPTextModel.from_pretrained(arguments.start_from / "text_encoder").float()
        model = Denoiser(text_encoder, UNet2DConditionModel.from_pretrained(arguments.start_from / "unet").float())
    else:
        tokenizer = make_tokenizer()
        model = Denoiser(
            seeded(make_text_encoder, arguments.seed, tokenizer),
            seeded(make_unet, arguments.seed, arguments.width, channels),
        )
    tokenizer.save_pretrained(arguments.work / "tokenizer")
    model.to(memory_format=torch.channels_last)
    model.train()

    def prompt_for(family: str, rng: np.random.Generator) -> str:
        if rng.random() < 0.1:
            return ""
        if rng.random() < 0.2:  # parts nobody described get the generic prompts at inference
            family = str(rng.choice(["part", "surface", "metal plate", "cookie", "bottle", "board"]))
        prompts = book.prompts("textured surface" if family == SURFACE else family)
        return str(rng.choice(prompts))

    def noisy_batch(images, foregrounds, names, rng, timesteps=None, defect_share=arguments.defect_share):
        """The denoiser's arguments, its target, and masks and shown pictures as they are at full size."""
        device = next(model.parameters()).device
        vae.to(device)
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        masks = torch.stack([draw_mask(f[0] > 0.5, rng, generator) for f in foregrounds])
        if timesteps is None:
            evenly = arguments.timesteps == "all"
            timesteps = draw_timesteps(rng, len(images), scheduler.config.num_train_timesteps, evenly)
        repaired = (timesteps >= REPAIRED_FROM * scheduler.config.num_train_timesteps).numpy()
        repaired &= rng.random(len(images)) < defect_share
        shown = torch.stack(
            [damage(i, f, rng) if r else i for i, f, r in zip(images, foregrounds, repaired, strict=True)]
        )
        # Outside the mask a defect stays: it is among the surroundings that are given.
        wanted = torch.where(masks > 0.5, images, shown)
        with torch.no_grad():
            stacked = torch.cat([shown, wanted, shown * (masks < 0.5)]).to(device)
            latents = vae.encode(stacked).latent_dist.mean.float() * vae.config.scaling_factor
        seen, clean, masked = latents.chunk(3)
        timesteps = timesteps.to(device)
        noise = torch.randn(seen.shape, generator=generator).to(device)
        noisy = scheduler.add_noise(seen, noise, timesteps)
        # Eq. (7) solved for the noise between the wanted latents and what is given; epsilon itself without a defect.
        signal = scheduler.alphas_cumprod.to(device)[timesteps].view(-1, 1, 1, 1)
        target = (noisy - signal.sqrt() * clean) / (1 - signal).sqrt()
        if arguments.prediction_type == "v_prediction":
            target = scheduler.get_velocity(clean, target, timesteps)
        elif arguments.prediction_type == "sample":
            target = clean
        small = latent_mask(masks.to(device), *seen.shape[-2:])
        prompts = [prompt_for(name, rng) for name in names]
        ids = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(device)
        return (torch.cat([noisy, small, masked], dim=1), timesteps, ids), target, masks, shown

    def loss_of(denoiser, rng, step):
        whole = step >= arguments.steps * (1 - arguments.whole_share)
        count = max(1, arguments.batch_size // 2) if whole else arguments.batch_size
        pictures = pool.batch(rng, count, crop=None if whole else CROP, zoom_out=0.25)
        given, target, _, _ = noisy_batch(*pictures, rng)
        error = (denoiser(*given).float() - target).square()  # [n, 4, h, w]
        inside = within(error, given)
        # Outside the masks the answer is given with the question; the decoder looks there only across their borders.
        return inside + OUTSIDE_WEIGHT * error.mean(), {"inside": inside.item()}

    def within(error, given):
        """Mean of `[n, 4, h, w]` inside the masks."""
        small = given[0][:, channels : channels + 1]
        return (error * small).sum() / (channels * small.sum()).clamp(min=1)

    def evaluate(denoiser):
        """ "inside": the mean error of the answer. Of pictures repainted in one step from the strength of inference:
        "kept", PSNR inside the masks where they show normal parts, and "left", the share of a drawn defect's squared
        difference from the normal part that is still there."""
        inside, kept, shown_errors, left = [], [], [], []
        length = scheduler.config.num_train_timesteps
        for start in range(0, 32, 8):
            images = to_pictures(held_back.images[start : start + 8])
            foregrounds = torch.from_numpy(held_back.foregrounds[start : start + 8])[:, None].float()
            names = [str(name) for name in held_back.families[start : start + 8]]
            several = torch.linspace(50, 550, len(images)).long()
            given, target, _, _ = noisy_batch(images, foregrounds, names, np.random.default_rng([7, start]), several)
            inside.append(within((denoiser(*given) - target).square(), given))
            start_of_inference = torch.full((len(images),), int(EVALUATED_AT * length))
            for defects in (False, True):
                given, _, masks, shown = noisy_batch(
                    images, foregrounds, names, np.random.default_rng([8, start]), start_of_inference, float(defects)
                )
                latents = clean_latents(scheduler, given[0][:, :channels], denoiser(*given), given[1])
                error = (decode(vae, latents).cpu() - images).square() * masks
                if defects:
                    before = (shown - images).square() * masks
                    left.append((error * (before > 0)).sum())
                    shown_errors.append(before.sum())
                else:
                    kept.append(error.sum((1, 2, 3)) / (3 * masks.sum((1, 2, 3))))
        return {
            "inside": torch.stack(inside).mean().item(),
            "kept": 10 * torch.log10(4 / torch.cat(kept).mean()).item(),
            "left": (sum(left) / sum(shown_errors)).item(),
        }

    model = train("denoiser-training", model, loss_of, evaluate, arguments)
    model.text_encoder.to(torch.float32).save_pretrained(arguments.work / "text_encoder")
    model.unet.to(torch.float32).save_pretrained(arguments.work / "unet")


if __name__ == "__main__":
    main()
