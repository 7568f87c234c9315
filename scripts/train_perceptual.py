"""Stage 3: the perceptual network of the score, from nothing.

    accelerate launch -m scripts.train_perceptual --steps 2500
    accelerate launch -m scripts.train_perceptual --on_repainted --steps 1200

Writes `<work>/perceptual`; needs `<work>/vae`. It learns from pairs: a normal picture of a product, and the same with
or without a defect drawn onto it. The distance map D of Eq. (17) between the latter and its normal original, spoiled
the way a repainted picture is (taken through the autoencoder with disturbed latents, softened, shifted by a pixel,
other light), has to tell the defect's pixels from the spoiled ones. `--on_repainted` (needs stage 2) goes on from
there with what the finished denoiser really makes of the picture, in the masks of an inspection.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from scipy import ndimage
from transformers import CLIPTextModel, CLIPTokenizer

from anomalysd_pipeline.method.inpainting import decode, encode, repaint
from anomalysd_pipeline.method.prompts import PromptBook, average_embedding
from anomalysd_pipeline.models.perceptual import PerceptualDistance
from anomalysd_pipeline.synthetic import apply_defect, draw_normal, draw_surface, sample_style
from scripts.loop import stage_arguments, train
from scripts.pictures import TRAINED
from scripts.recipe import CROP, make_scheduler, seeded
from scripts.train_denoiser import draw_mask


def draw_pair(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An original and a query [s, s, 3] (uint8) and the query's defect mask [s, s] bool."""
    original, foreground = _draw_part(rng) if rng.random() < 0.5 else _draw_surface(rng)
    query, mask = original, np.zeros((CROP, CROP), bool)
    if rng.random() < 0.75:
        if foreground.mean() < 0.05:
            foreground = np.ones_like(foreground)
        query, mask, _ = apply_defect(original, foreground, rng)
    return original, query, mask


def _draw_part(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    size, family = 2 * CROP, TRAINED[int(rng.integers(len(TRAINED)))]
    part = draw_normal(family, rng, size, style=sample_style(family, rng))
    if rng.random() < 0.4:  # whole parts at half size, else crops at full size
        small = part.image.reshape(CROP, 2, CROP, 2, 3).mean((1, 3)).round().astype(np.uint8)
        return small, part.foreground[::2, ::2]
    return _crop(rng, part.image, part.foreground)


def _draw_surface(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    surface = draw_surface(rng, 2 * CROP)
    image, foreground = _crop(rng, surface.image, surface.foreground)
    gain, bias, noise = rng.normal(1, 0.05), rng.normal(0, 4), rng.normal(0, rng.uniform(0, 3), image.shape)
    return (image * gain + bias + noise).clip(0, 255).round().astype(np.uint8), foreground


def _crop(rng: np.random.Generator, image: np.ndarray, foreground: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    y, x = rng.integers(len(image) - CROP + 1, size=2)
    return image[y : y + CROP, x : x + CROP], foreground[y : y + CROP, x : x + CROP]


def to_batch(pictures) -> torch.Tensor:
    """uint8 [..., s, s, 3] to float32 [..., 3, s, s] in [-1, 1]."""
    return torch.from_numpy(np.stack(pictures).astype(np.float32) / 127.5 - 1.0).movedim(-1, -3).contiguous()


def spoil(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What repainting does to a normal picture: softer, moved by up to a pixel, a little lighter or darker, other
    noise."""
    result = image.astype(np.float32)
    if rng.random() < 0.8:
        result = ndimage.gaussian_filter(result, (*[rng.uniform(0.2, 1.4)] * 2, 0))
    if rng.random() < 0.6:
        field = [ndimage.zoom(rng.normal(0, 0.8, (5, 5)), CROP / 5, order=1) for _ in range(2)]
        grid = np.mgrid[:CROP, :CROP].astype(np.float32)
        where = [g + f for g, f in zip(grid, field, strict=True)]
        result = np.stack(
            [ndimage.map_coordinates(result[..., c], where, order=1, mode="nearest") for c in range(3)], -1
        )
    light = ndimage.zoom(rng.normal(0, rng.uniform(0, 6), (3, 3)), CROP / 3, order=1)
    result = result * rng.normal(1, 0.03) + light[..., None] + rng.normal(0, rng.uniform(0, 4), result.shape)
    return result.clip(0, 255).round().astype(np.uint8)


@torch.no_grad()
def repainted_like(vae, images: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Normal pictures [n, 3, s, s] as an imperfect denoiser would give them back: decoded from disturbed latents."""
    latents = vae.encode(images).latent_dist.mean
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    count, channels, height, width = latents.shape
    for cells in (4, 16, height):  # errors of a few pixels and errors of a whole region
        shape = (count, channels, min(cells, height), min(cells, width))
        error = torch.randn(shape, generator=generator) * torch.rand(count, 1, 1, 1, generator=generator) * 0.25
        latents = latents + F.interpolate(error, (height, width), mode="bilinear").to(latents)
    return vae.decode(latents).sample.clamp(-1, 1)


class Repainter:
    """What an inspection does to queries: one random pass of the multi-scale masks, repainted by the trained model."""

    def __init__(self, work: Path):
        self.vae = AutoencoderKL.from_pretrained(work / "vae").eval().requires_grad_(False)
        self.unet = UNet2DConditionModel.from_pretrained(work / "unet").eval().requires_grad_(False)
        text_encoder = CLIPTextModel.from_pretrained(work / "text_encoder").eval()
        tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
        self.prompt = average_embedding(PromptBook.default().prompts("part"), tokenizer, text_encoder)
        self.scheduler = make_scheduler()

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, rng: np.random.Generator):
        """Repainted pictures and the masks [n, 1, s, s] in which they were."""
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        everything = torch.ones(images.shape[-2:], dtype=torch.bool)
        masks = torch.stack([draw_mask(everything, rng, generator, grid_share=0.9) for _ in images]).to(images)
        latents = encode(self.vae, images)
        steps, strength = ((4, 0.25), (5, 0.2), (3, 0.34))[int(rng.integers(3))]
        painted = repaint(
            self.unet,
            self.vae,
            self.scheduler,
            images,
            latents,
            masks,
            torch.randn(latents.shape, generator=generator).to(latents),
            self.prompt.expand(len(images), -1, -1),
            noise_strength=strength,
            num_inference_steps=steps,
        )
        return decode(self.vae, painted), masks


class Scored(torch.nn.Module):
    """A network with the numbers that turn its distances into logits.

    The numbers enter times 20: they have far to go, and Adam moves every weight by about the learning rate.
    """

    def __init__(self, network):
        super().__init__()
        self.network = network
        self.scale = torch.nn.Parameter(torch.tensor(0.0))
        self.offset = torch.nn.Parameter(torch.tensor(0.0))

    def logits(self, distances):
        return (20 * self.scale).exp() * (torch.log(distances + 1e-4) - 20 * self.offset)


def balanced_loss(logits, target, counted=None):
    """Binary cross-entropy, defect and normal pixels weighing alike within the batch; `counted` [n, h, w] in {0, 1}
    picks the pixels that count."""
    counted = torch.ones_like(target) if counted is None else counted
    positive = ((target * counted).sum() / counted.sum().clamp(min=1)).clamp(0.005, 0.5)
    weight = counted * (target * (0.5 / positive) + (1 - target) * (0.5 / (1 - positive)))
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (loss * weight).sum() / counted.sum().clamp(min=1)


def main() -> None:
    parser = stage_arguments(__doc__, steps=2500, batch_size=6, learning_rate=1e-3)
    parser.add_argument("--on_repainted", action="store_true", help="train on what the finished denoiser repaints")
    arguments = parser.parse_args()
    if arguments.on_repainted:
        network, vae = PerceptualDistance.from_pretrained(arguments.work / "perceptual"), None
        repainter = Repainter(arguments.work)
    else:
        network, repainter = seeded(PerceptualDistance, arguments.seed), None
        vae = AutoencoderKL.from_pretrained(arguments.work / "vae").eval().requires_grad_(False)
    model = Scored(network.requires_grad_(True))
    model.train()

    def distances_and_target(network, pairs, rng):
        """Distances, the target and the pixels that count, each [n, h, w]."""
        device = next(network.parameters()).device
        originals, queries, masks = zip(*pairs, strict=True)
        target = torch.from_numpy(np.stack(masks)).float()[:, None].to(device)
        queries = to_batch(queries).to(device)
        side = CROP // 2
        counted = torch.ones_like(target)
        if repainter is not None:
            repainted, counted = repainter(queries, rng)
        else:
            repainted = to_batch([spoil(image, rng) for image in originals]).to(device)
            half = len(repainted) // 2
            repainted[half:] = repainted_like(vae, to_batch(originals).to(device)[half:], rng).to(repainted)
        distances = network.distance_map(network.features(queries), network.features(repainted), (side, side))
        return distances, F.adaptive_max_pool2d(target, side)[:, 0], F.avg_pool2d(counted, 2)[:, 0].floor()

    def loss_of(model, rng, step):
        with torch.no_grad():  # the layer weights w of Eq. (16) enter squared: they stay non-negative
            for name, parameter in model.network.named_parameters():
                if name.startswith("lin"):
                    parameter.clamp_(min=0)
        pairs = [draw_pair(rng) for _ in range(arguments.batch_size)]
        distances, target, counted = distances_and_target(model.network, pairs, rng)
        return balanced_loss(model.logits(distances.float()), target, counted), {}

    def evaluate(model):
        from sklearn.metrics import roc_auc_score

        scores, targets, image_scores, image_targets = [], [], [], []
        for index in range(8):
            rng = np.random.default_rng([99, index])
            pairs = [draw_pair(rng) for _ in range(8)]
            distances, target, counted = distances_and_target(model.network, pairs, rng)
            distances, target, counted = distances.float().cpu() * counted.cpu(), target.cpu() > 0.5, counted.cpu() > 0
            scores.append(distances[counted])
            targets.append(target[counted])
            image_scores.append(distances.flatten(1).amax(1))
            image_targets.append((target & counted).flatten(1).any(1))
        return {
            "pixel_auroc": float(roc_auc_score(torch.cat(targets), torch.cat(scores))),
            "image_auroc": float(roc_auc_score(torch.cat(image_targets), torch.cat(image_scores))),
        }

    stage = "perceptual-repainted-training" if arguments.on_repainted else "perceptual-training"
    model = train(stage, model, loss_of, evaluate, arguments)
    model.network.to(torch.float32).save_pretrained(arguments.work / "perceptual")


if __name__ == "__main__":
    main()
