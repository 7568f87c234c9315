"""A fixed transform with the interface of an autoencoder: the cosine transform of blocks, of which the first few
coefficients are kept. It costs nothing to train and next to nothing to compute; what a trained autoencoder is worth is
measured against it."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

FACTOR = 4
COLOR_AXES = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [1.0, -2.0, 1.0]])
"""Light, red against blue, green against both."""
CHROMA_PENALTY = 2
"""How many frequencies later a color's coefficient comes than that of light: most of what is seen is light."""


def cosines(side: int) -> Tensor:
    """The orthonormal cosine transform (DCT-II) of `side` values, [side, side], a frequency a row."""
    place = (torch.arange(side, dtype=torch.float64) + 0.5) * torch.pi / side
    rows = torch.cos(torch.arange(side, dtype=torch.float64)[:, None] * place) * (2 / side) ** 0.5
    rows[0] /= 2**0.5
    return rows.float()


class BlockTransform(torch.nn.Module):
    """Keeps `channels` coefficients of every 4 x 4 block: the means of light and colors first, then by frequency.

    Args:
        channels: how many coefficients of the 48 are kept; latents are `[N, channels, H / 4, W / 4]`.
        pictures: `[N, 3, H, W]` in [-1, 1], over which each latent channel gets zero mean and unit variance.
    """

    def __init__(self, channels: int, pictures: Tensor):
        super().__init__()
        self.config = SimpleNamespace(scaling_factor=1.0, latent_channels=channels)
        waves = cosines(FACTOR)
        order = sorted(
            (max(u, v) + CHROMA_PENALTY * (color > 0) * (u + v > 0), u + v, color, u, v)
            for color in range(3)
            for u in range(FACTOR)
            for v in range(FACTOR)
        )
        axes = F.normalize(COLOR_AXES, dim=1)
        kernels = [axes[color][:, None, None] * waves[u][:, None] * waves[v] for _, _, color, u, v in order[:channels]]
        self.register_buffer("kernels", torch.stack(kernels))  # [C, 3, 4, 4], orthonormal
        self.register_buffer("mean", torch.zeros(1, channels, 1, 1))
        self.register_buffer("deviation", torch.ones(1, channels, 1, 1))
        seen = torch.cat([self.latents(part) for part in pictures.split(8)])
        self.mean = seen.mean((0, 2, 3), keepdim=True)
        self.deviation = seen.std((0, 2, 3), keepdim=True)

    @property
    def dtype(self) -> torch.dtype:
        return self.kernels.dtype

    def latents(self, pictures: Tensor) -> Tensor:
        """`[N, 3, H, W]` to `[N, channels, H / 4, W / 4]`."""
        return (F.conv2d(pictures, self.kernels, stride=FACTOR) - self.mean) / self.deviation

    def encode(self, pictures: Tensor) -> SimpleNamespace:
        """As `AutoencoderKL.encode`: the answer's `latent_dist.mean`."""
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=self.latents(pictures)))

    def decode(self, latents: Tensor, return_dict: bool = True):
        """As `AutoencoderKL.decode`: the answer's `sample`, or a tuple of it."""
        pictures = F.conv_transpose2d(latents * self.deviation + self.mean, self.kernels, stride=FACTOR)
        return SimpleNamespace(sample=pictures) if return_dict else (pictures,)
