"""Stage 3: the feature extractor of the prototypes, or the perceptual network of the score, from nothing.

    accelerate launch -m scripts.train_features --network extractor --steps 2500
    accelerate launch -m scripts.train_features --network perceptual --steps 2500
    accelerate launch -m scripts.train_features --network perceptual --on_repainted --steps 1200

Writes `<work>/extractor` or `<work>/perceptual`. Both learn from episodes: a few normal pictures of one product, and
queries of the same product with and without a defect drawn onto them.

* extractor: the nearest-neighbor distance E of Eq. (14), query against the normal pictures, has to tell the defect's
  pixels from the normal ones of the same product, and the query from its original by the maximum of the map, as an
  inspection does. It must describe a surface to find its neighbor, and see a defect to miss it. Colors are among the
  features from the start, with a weight that is learned too, so that the network learns what colors do not tell.
* perceptual (needs `<work>/vae`): the distance map D of Eq. (17) between a query and its normal original, spoiled the
  way a repainted picture is (taken through the autoencoder with disturbed latents, softened, shifted by a pixel, other
  light), has to tell the defect's pixels from the spoiled ones. `--on_repainted` (needs stage 2) goes on from there
  with what the finished denoiser really makes of the query, in the masks of an inspection.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from scipy import ndimage
from transformers import CLIPTextModel, CLIPTokenizer

from anomalysd_pipeline.method.inpainting import encode, repaint
from anomalysd_pipeline.method.prompts import PromptBook, average_embedding
from anomalysd_pipeline.models.extractor import PrototypeExtractor
from anomalysd_pipeline.models.perceptual import PerceptualDistance
from anomalysd_pipeline.synthetic import apply_defect, draw_normal, draw_surface, sample_style
from scripts.loop import stage_arguments, train
from scripts.pictures import TRAINED
from scripts.recipe import CROP, make_scheduler, seeded
from scripts.train_denoiser import draw_mask

SUPPORT = 2
COLORS = 27  # channels of psi
# Strides 8 and 16. Learned features alone could not tell defects of irregular parts from their normal variation.
EXTRACTOR = {"model_name": "resnet10t", "out_indices": (2, 3), "normalize": "layer", "color_weight": 1.0}
CONTEXT_WEIGHT = 1.5  # added after training: it told more of the drawn gears from each other
SHARPNESS = 4.0
"""Of the soft maximum over a map of log E."""


def draw_episode(rng: np.random.Generator):
    """Normal pictures [SUPPORT, s, s, 3], an original and a query [s, s, 3] (uint8) and the query's defect mask [s,
    s] bool."""
    size = 2 * CROP
    if rng.random() < 0.5:
        family = TRAINED[int(rng.integers(len(TRAINED)))]
        style = sample_style(family, rng)
        pictures = [draw_normal(family, rng, size, style=style) for _ in range(SUPPORT + 1)]
        images, foregrounds = [p.image for p in pictures], [p.foreground for p in pictures]
        if rng.random() < 0.4:  # whole parts at half size, else crops at full size
            images = [i.reshape(CROP, 2, CROP, 2, 3).mean((1, 3)).round().astype(np.uint8) for i in images]
            foregrounds = [f[::2, ::2] for f in foregrounds]
        else:
            y, x = rng.integers(size - CROP + 1, size=2)
            images = [i[y : y + CROP, x : x + CROP] for i in images]
            foregrounds = [f[y : y + CROP, x : x + CROP] for f in foregrounds]
    else:
        surface = draw_surface(rng, size)
        images, foregrounds = [], []
        for _ in range(SUPPORT + 1):
            y, x = rng.integers(size - CROP + 1, size=2)
            gain, bias = rng.normal(1, 0.05), rng.normal(0, 4)
            image = (
                surface.image[y : y + CROP, x : x + CROP] * gain
                + bias
                + rng.normal(0, rng.uniform(0, 3), (CROP, CROP, 3))
            )
            images.append(image.clip(0, 255).round().astype(np.uint8))
            foregrounds.append(surface.foreground[y : y + CROP, x : x + CROP])
    original, foreground = images[-1], foregrounds[-1]
    query, mask = original, np.zeros((CROP, CROP), bool)
    if rng.random() < 0.75:
        if foreground.mean() < 0.05:
            foreground = np.ones_like(foreground)
        query, mask, _ = apply_defect(original, foreground, rng)
    return np.stack(images[:-1]), original, query, mask


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
        repainted = repaint(
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
        return repainted, masks


class Scored(torch.nn.Module):
    """A network with the numbers that turn its distances into logits, and the weight of the colors beside it.

    The numbers enter times 20: they have far to go, and Adam moves every weight by about the learning rate.
    """

    def __init__(self, network):
        super().__init__()
        self.network = network
        self.scale = torch.nn.Parameter(torch.tensor(0.0))
        self.offset = torch.nn.Parameter(torch.tensor(0.0))
        self.color = torch.nn.Parameter(torch.tensor(0.0))

    def features(self, images):
        """psi with the colors at their learned weight."""
        psi = self.network(images)
        return torch.cat([psi[:, :-COLORS], (20 * self.color).exp() * psi[:, -COLORS:]], dim=1)

    def logits(self, distances):
        return (20 * self.scale).exp() * (torch.log(distances + 1e-4) - 20 * self.offset)


def extractor_distances(features, support, queries):
    """E [n, q, h, w] of queries [n, q, 3, s, s] against their own support [n, k, 3, s, s]."""
    count, shots, asked = *support.shape[:2], queries.shape[1]
    psi = features(torch.cat([support.flatten(0, 1), queries.flatten(0, 1)])).float()  # [n * (k + q), c, h, w]
    height, width = psi.shape[-2:]
    bank, query = (
        part.unflatten(0, (count, -1)).permute(0, 1, 3, 4, 2).flatten(1, 3)  # [n, pictures * h * w, c]
        for part in psi.split([count * shots, count * asked])
    )
    with torch.autocast(psi.device.type, enabled=False):  # differences of nearly equal numbers
        squares = query.square().sum(-1, keepdim=True) + bank.square().sum(-1)[:, None]
        squares = squares - 2 * query @ bank.transpose(1, 2)
    return squares.amin(-1).clamp(min=0).view(count, asked, height, width)


def contrast_loss(model: Scored, query: torch.Tensor, original: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """What an inspection asks of E: pixels of a defect above the normal ones of the same product, and the highest of a
    defective picture above the highest of its normal original.

    Args:
        query, original: E, [n, h, w].
        target: the query's defect, [n, h, w] in {0, 1}.
    """
    query, original = torch.log(query + 1e-4), torch.log(original + 1e-4)
    # Each product has a level of its own, which calibration finds; only what rises above it counts.
    level = ((query * (1 - target)).sum((1, 2)) + original.sum((1, 2))) / (
        (1 - target).sum((1, 2)) + original[0].numel()
    )
    values = torch.cat([query, original], 1) - level[:, None, None]
    logits = (20 * model.scale).exp() * (values - 20 * model.offset)
    pixels = balanced_loss(logits, torch.cat([target, torch.zeros_like(target)], 1))
    highest = [torch.logsumexp(SHARPNESS * v.flatten(1), dim=1) / SHARPNESS for v in (query, original)]
    defective = target.flatten(1).amax(1)
    pictures = F.softplus(SHARPNESS * (highest[1] - highest[0])) * defective
    return pixels + pictures.sum() / defective.sum().clamp(min=1)


def balanced_loss(logits, target, counted=None):
    """Binary cross-entropy, defect and normal pixels weighing alike within the batch; `counted` [n, h, w] in {0, 1}
    picks the pixels that count."""
    counted = torch.ones_like(target) if counted is None else counted
    positive = ((target * counted).sum() / counted.sum().clamp(min=1)).clamp(0.005, 0.5)
    weight = counted * (target * (0.5 / positive) + (1 - target) * (0.5 / (1 - positive)))
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (loss * weight).sum() / counted.sum().clamp(min=1)


def within_products(query: torch.Tensor, original: torch.Tensor, target: torch.Tensor) -> list[tuple[float, float]]:
    """For each defective query: how surely E ranks a pixel of the defect above a normal one of the same product, and
    whether (1, 0, or 0.5 for a tie) its maximum exceeds the original's."""
    from sklearn.metrics import roc_auc_score

    results = []
    for asked, normal, truth in zip(query, original, target, strict=True):
        if truth.any():
            labels = torch.cat([truth.flatten(), torch.zeros(normal.numel())])
            pixel = roc_auc_score(labels, torch.cat([asked.flatten(), normal.flatten()]))
            results.append((pixel, (torch.sign(asked.max() - normal.max()).item() + 1) / 2))
    return results


def main() -> None:
    parser = stage_arguments(__doc__, steps=2500, batch_size=6, learning_rate=1e-3)
    parser.add_argument("--network", choices=("extractor", "perceptual"), required=True)
    parser.add_argument("--on_repainted", action="store_true", help="train on what the finished denoiser repaints")
    parser.add_argument("--start_from", type=Path, help="folder of a pipeline whose extractor is trained further")
    arguments = parser.parse_args()
    vae = None
    if arguments.network == "perceptual" and not arguments.on_repainted:
        vae = AutoencoderKL.from_pretrained(arguments.work / "vae").eval().requires_grad_(False)
    if arguments.network == "extractor":
        network = seeded(lambda: PrototypeExtractor(**EXTRACTOR), arguments.seed)
        if arguments.start_from:
            earlier = PrototypeExtractor.from_pretrained(arguments.start_from / "extractor").float()
            network.load_state_dict(earlier.state_dict())
    elif arguments.on_repainted:
        network = PerceptualDistance.from_pretrained(arguments.work / "perceptual")
    else:
        network = seeded(PerceptualDistance, arguments.seed)
    repainter = Repainter(arguments.work) if arguments.on_repainted else None
    model = Scored(network.requires_grad_(True))
    model.train()

    def extractor_maps(model, episodes):
        """E of the queries and of their originals, and the target, each [n, h, w]."""
        device = next(model.parameters()).device
        support, originals, queries, masks = zip(*episodes, strict=True)
        support = to_batch(support).to(device)
        pairs = torch.stack([to_batch(queries), to_batch(originals)], dim=1).to(device)
        distances = extractor_distances(model.features, support, pairs)
        target = torch.from_numpy(np.stack(masks)).float()[:, None].to(device)
        # A position of psi counts as defective where a quarter of it is.
        target = (F.adaptive_avg_pool2d(target, distances.shape[-2:])[:, 0] > 0.25).float()
        return distances[:, 0], distances[:, 1], target

    def distances_and_target(network, episodes, rng):
        """Distances, the target and the pixels that count, each [n, h, w]."""
        device = next(network.parameters()).device
        _, originals, queries, masks = zip(*episodes, strict=True)
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
        if arguments.network == "perceptual":
            with torch.no_grad():  # the layer weights w of Eq. (16) enter squared: they stay non-negative
                for name, parameter in model.network.named_parameters():
                    if name.startswith("lin"):
                        parameter.clamp_(min=0)
        episodes = [draw_episode(rng) for _ in range(arguments.batch_size)]
        if arguments.network == "extractor":
            query, original, target = extractor_maps(model, episodes)
            return contrast_loss(model, query.float(), original.float(), target), {
                "color": (20 * model.color).exp().item()
            }
        distances, target, counted = distances_and_target(model.network, episodes, rng)
        return balanced_loss(model.logits(distances.float()), target, counted), {}

    def evaluate(model):
        from sklearn.metrics import roc_auc_score

        scores, targets, image_scores, image_targets, areas = [], [], [], [], []
        for index in range(8):
            rng = np.random.default_rng([99, index])
            episodes = [draw_episode(rng) for _ in range(8)]
            if arguments.network == "extractor":
                query, original, target = (tensor.float().cpu() for tensor in extractor_maps(model, episodes))
                areas += within_products(query, original, target)
                continue
            distances, target, counted = distances_and_target(model.network, episodes, rng)
            distances, target, counted = distances.float().cpu() * counted.cpu(), target.cpu() > 0.5, counted.cpu() > 0
            scores.append(distances[counted])
            targets.append(target[counted])
            image_scores.append(distances.flatten(1).amax(1))
            image_targets.append((target & counted).flatten(1).any(1))
        if areas:
            pixel, image = np.mean(areas, axis=0)
            return {"pixel_auroc": float(pixel), "image_auroc": float(image)}
        return {
            "pixel_auroc": float(roc_auc_score(torch.cat(targets), torch.cat(scores))),
            "image_auroc": float(roc_auc_score(torch.cat(image_targets), torch.cat(image_scores))),
        }

    stage = f"{arguments.network}-repainted-training" if arguments.on_repainted else f"{arguments.network}-training"
    model = train(stage, model, loss_of, evaluate, arguments)
    if arguments.network == "extractor":
        color = round((20 * model.color).exp().item(), 4)
        model.network.register_to_config(color_weight=color, context_weight=CONTEXT_WEIGHT)
    model.network.to(torch.float32).save_pretrained(arguments.work / arguments.network)


if __name__ == "__main__":
    main()
