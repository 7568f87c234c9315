"""Pick a few vectors that stand for many."""

import torch
from torch import Tensor

_PROJECTED_DIM = 32


@torch.no_grad()
def greedy_coreset(features: Tensor, size: int, seed: int = 0) -> Tensor:
    """Picks a k-center coreset: starts anywhere, then takes again and again the vector farthest from those taken.

    Its largest gap is at most twice the smallest possible (Gonzalez 1985). Vectors of more than 32 channels are
    compared by a random projection to 32. Takes O(M * size) time and O(M) memory.

    Args:
        features: [M, C].
        size: Vectors to keep, >= 1.
        seed: Of the first vector and of the projection.

    Returns:
        int64 [K] of distinct indices, K = min(size, M), less where vectors are duplicates of those taken.

    Raises:
        ValueError: If `size` is less than 1.
    """
    if size < 1:
        raise ValueError(f"`size` must be at least 1, got {size}.")
    generator = torch.Generator().manual_seed(seed)
    features = features.float()
    current = torch.randint(len(features), (1,), generator=generator).to(features.device)
    if features.shape[1] > _PROJECTED_DIM:
        features = features @ torch.randn(features.shape[1], _PROJECTED_DIM, generator=generator).to(features.device)
    size = min(size, len(features))
    chosen = torch.empty(size, dtype=torch.int64, device=features.device)
    gaps = torch.empty(size, device=features.device)
    gap = torch.full((len(features),), torch.inf, device=features.device)
    for step in range(size):
        chosen[step] = current[0]
        gaps[step] = gap[current[0]]
        # Differences rather than products: a duplicate of a taken vector must come out at exactly zero.
        distance = torch.cdist(features, features[current], compute_mode="donot_use_mm_for_euclid_dist")[:, 0]
        gap = torch.minimum(gap, distance)
        current = gap.argmax().unsqueeze(0)
    return chosen[gaps > 0]
