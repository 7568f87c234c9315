"""What the repainting says of distances to the prototypes. Not in AnomalySD (arXiv 2408.01960), which compares the
repainted picture with the original by a perceptual network alone.

What a model repaints as a normal part would look is closer to the prototypes where it was defective, and as far from
them as before where normal parts vary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

REPAIRED_WEIGHT = 0.6
"""Of the share of a distance that the repainting takes away. Chosen on drawn parts and metal plates."""
REMAINING_WEIGHT, REMAINING_LIMIT = 0.7, 0.35
"""Of the distance of the repainted picture, and up to which it counts: beyond what normal parts differ by, it is the
repainting that is odd, and says nothing. Chosen on drawn parts and metal plates."""


def repaired_share(before: Tensor, after: Tensor) -> Tensor:
    """The share of the distance around each position that is gone: max(1 - a / b, 0), averages over a window.

    The window is 2 r + 1 positions wide, r = w / 10 rounded, at least 1: 7 of 32, as one position says too little.

    Args:
        before: [N, h, w], >= 0.
        after: [N, h, w], >= 0.

    Returns:
        [N, h, w] in [0, 1]; 0 where nothing was there before.
    """
    reach = max(1, round(before.shape[-1] / 10))
    before, after = (
        F.avg_pool2d(map_[:, None], 2 * reach + 1, stride=1, padding=reach)[:, 0] for map_ in (before, after)
    )
    return torch.where(before > 0, 1 - after / before, torch.zeros_like(before)).clamp(min=0)


def weigh(deviations: Tensor, original: Tensor, repainted: Tensor, restored: Tensor) -> Tensor:
    """What deviates counts more where the repainting repairs it, and less where as much remains on a normal part.

    max((1 + `REPAIRED_WEIGHT` q) D - `REMAINING_WEIGHT` min(R, `REMAINING_LIMIT`), 0), q see [`repaired_share`].

    Args:
        deviations: D, [N, h, w], >= 0, see `PrototypeBank.deviations`.
        original: relative distances of the picture, [N, h, w].
        repainted: R, those of the repainted picture, [N, h, w].
        restored: those of the repainted picture with what the autoencoder loses of the original put back, [N, h, w].

    Returns:
        [N, h, w], >= 0.
    """
    raised = deviations * (1 + REPAIRED_WEIGHT * repaired_share(original, restored))
    return (raised - REMAINING_WEIGHT * repainted.clamp(max=REMAINING_LIMIT)).clamp(min=0)
