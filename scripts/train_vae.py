"""Stage 1: the autoencoder, from nothing, on crops of drawn normal parts.

    accelerate launch -m scripts.train_vae --steps 3000

Writes `<work>/vae`. The loss is L1 + MSE. There is no sampling: with 4 latent channels, channels that start out
noisier than their signal are given up by the decoder, and color is the first to go. An adversarial or perceptual term
would invent texture, and invented texture is what the score would then report.

After training the latents are whitened, exactly, by folding a 4 x 4 matrix into the two 1 x 1 convolutions around
them: every channel then has unit variance, so that a noise strength takes the same share of light, color and detail.

`--factor`, `--latent_channels` and `--latents` are for comparing (docs/experiments.md).
"""

import torch

from scripts.loop import stage_arguments, train
from scripts.pictures import Pool
from scripts.recipe import CROP, RESOLUTION, make_vae, seeded


def main() -> None:
    parser = stage_arguments(__doc__, steps=3000, batch_size=8, learning_rate=1e-3)
    parser.add_argument(
        "--factor", type=int, choices=(2, 4, 8), default=4, help="of the picture's side to the latents'"
    )
    parser.add_argument("--latent_channels", type=int, default=4)
    parser.add_argument(
        "--latents", choices=("whitened", "scaled"), default="whitened", help="scaled: one factor for all channels"
    )
    arguments = parser.parse_args()
    pool = Pool(arguments.work / "pool", arguments.pool, arguments.seed, RESOLUTION, arguments.pool_workers)
    held_back = Pool(arguments.work / "pool-eval", 250, 10_000 + arguments.seed, RESOLUTION, arguments.pool_workers)
    vae = seeded(make_vae, arguments.seed, arguments.factor, arguments.latent_channels)
    vae.train()

    def loss_of(model, rng, step):
        images, _, _ = pool.batch(rng, arguments.batch_size, crop=CROP, zoom_out=0.3)
        images = images.to(next(model.parameters()).device)
        latents = model.encode(images).latent_dist.mean
        restored = model.decode(latents).sample.float()
        difference = restored - images
        absolute = difference.abs().mean()
        # The penalty only fixes the latents' scale, which reconstruction leaves open.
        return absolute + difference.square().mean() + 1e-4 * latents.float().square().mean(), {"l1": absolute.item()}

    @torch.no_grad()
    def evaluate(model):
        images = torch.from_numpy(held_back.images[:32]).permute(0, 3, 1, 2).float() / 127.5 - 1.0
        images = images.to(next(model.parameters()).device)
        latents, errors = [], []
        for part in images.split(8):
            latent = model.encode(part).latent_dist.mean
            errors.append((model.decode(latent).sample.clamp(-1, 1) - part).square().mean((1, 2, 3)))
            latents.append(latent)
        psnr = 10 * torch.log10(4.0 / torch.cat(errors))
        return {
            "psnr": psnr.mean().item(),
            "psnr_worst": psnr.min().item(),
            "latent_std": torch.cat(latents).std().item(),
        }

    vae = train("vae-training", vae, loss_of, evaluate, arguments)
    before = evaluate(vae)["psnr"]
    latents = []
    with torch.no_grad():
        for part in torch.from_numpy(held_back.images).permute(0, 3, 1, 2).split(8):
            images = part.float().to(vae.device) / 127.5 - 1.0
            latents.append(vae.encode(images).latent_dist.mean.transpose(0, 1).flatten(1).cpu())
    latents = torch.cat(latents, dim=1)
    if arguments.latents == "whitened":
        whiten(vae, latents)
        vae.register_to_config(scaling_factor=1.0)
    else:  # as Stable Diffusion's own autoencoder is used
        vae.register_to_config(scaling_factor=1 / latents.std().item())
    print(f"psnr before scaling {before:.3f}, after {evaluate(vae)['psnr']:.3f}")
    vae.to(torch.float32).save_pretrained(arguments.work / "vae")


@torch.no_grad()
def whiten(vae, latents: torch.Tensor) -> None:
    """Gives the latents `[C, M]` zero mean and the identity as covariance; what the autoencoder restores stays the
    same."""
    mean = latents.double().mean(dim=1)
    variances, axes = torch.linalg.eigh(torch.cov(latents.double()))
    forward = torch.diag(variances.rsqrt()) @ axes.T
    backward = axes @ torch.diag(variances.sqrt())
    channels = len(mean)
    into, out = vae.quant_conv, vae.post_quant_conv
    weight, bias = into.weight[:channels, :, 0, 0].double().cpu(), into.bias[:channels].double().cpu()
    into.weight[:channels, :, 0, 0] = forward @ weight
    into.bias[:channels] = forward @ (bias - mean)
    # The posterior's spread was never trained: a sample is to be its mean.
    into.weight[channels:] = 0
    into.bias[channels:] = -30
    weight, bias = out.weight[:, :, 0, 0].double().cpu(), out.bias.double().cpu()
    out.weight[:, :, 0, 0] = weight @ backward
    out.bias[:] = bias + weight @ mean


if __name__ == "__main__":
    main()
