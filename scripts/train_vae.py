"""Stage 1: the autoencoder, from nothing, on crops of drawn normal parts.

    accelerate launch -m scripts.train_vae --steps 3000

Writes `<work>/vae`. The loss is L1 + MSE and a KL term just large enough to keep the latents bounded. An adversarial
or perceptual term would invent texture, and invented texture is what the score would then report.
"""

import torch

from scripts.loop import stage_arguments, train
from scripts.pictures import Pool
from scripts.recipe import CROP, RESOLUTION, make_vae, seeded


def main() -> None:
    parser = stage_arguments(__doc__, steps=3000, batch_size=8, learning_rate=1e-3)
    arguments = parser.parse_args()
    pool = Pool(arguments.work / "pool", arguments.pool, arguments.seed, RESOLUTION, arguments.pool_workers)
    held_back = Pool(arguments.work / "pool-eval", 250, 10_000 + arguments.seed, RESOLUTION, arguments.pool_workers)
    vae = seeded(make_vae, arguments.seed)
    vae.train()

    def loss_of(model, rng, step):
        images, _, _ = pool.batch(rng, arguments.batch_size, crop=CROP, zoom_out=0.3)
        images = images.to(next(model.parameters()).device)
        posterior = model.encode(images).latent_dist
        restored = model.decode(posterior.sample()).sample.float()
        difference = restored - images
        reconstruction = difference.abs().mean() + difference.square().mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return reconstruction + 1e-4 * kl, {"reconstruction": reconstruction.item(), "kl": kl.item()}

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
    with torch.no_grad():
        spread = evaluate(vae)["latent_std"]
    vae.register_to_config(scaling_factor=1.0 / spread)
    vae.to(torch.float32).save_pretrained(arguments.work / "vae")


if __name__ == "__main__":
    main()
