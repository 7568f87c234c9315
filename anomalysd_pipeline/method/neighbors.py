"""Search the nearest of many vectors by squared Euclidean distance, Eq. (14) of AnomalySD (arXiv 2408.01960)."""

import torch
from torch import Tensor

ENTRIES = 2**22
"""Float32 values of a block of distances, 16 MiB: bounds the memory that a search takes."""
_ROUNDING = 1e-10


class NeighborSearch:
    """Searches vectors in float32 and centered, which loses less to rounding.

    Args:
        vectors: [M, C], M >= 1.
    """

    def __init__(self, vectors: Tensor):
        self.center = vectors.float().mean(dim=0)
        self.vectors = vectors.float() - self.center
        self.squares = self.vectors.square().sum(dim=1)  # [M]

    def nearest(self, queries: Tensor, chunk: int | None = None, total: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Finds the nearest vector of each query, and the distance to it.

        Matrix products find the vectors. The distance is then computed by differences, so that small ones are not lost
        to cancellation.

        Args:
            queries: [Q, C].
            chunk: queries compared at once; None: as many as fit in `ENTRIES`.
            total: float32 [Q, M], to which the distances to all vectors are added, with the errors of cancellation.

        Returns:
            - float32 [Q], >= 0; exactly 0 where the distance is below 1e-10 of the squared length of the query.
            - int64 [Q], the nearest.
        """
        distances, indices = [], []
        chunk = chunk or max(1, ENTRIES // len(self.vectors))
        for start, rows in zip(range(0, len(queries), chunk), queries.split(chunk), strict=True):
            part = rows.float() - self.center
            # Less the queries' own squares, which change no order.
            far = torch.addmm(self.squares, part, self.vectors.T, alpha=-2)  # [chunk, M]
            index = far.argmin(dim=1)
            if total is not None:
                total[start : start + chunk] += far.add_(part.square().sum(dim=1, keepdim=True))
            distance = (part - self.vectors[index]).square().sum(dim=1)
            # A vector compared with itself differs by rounding alone, which must not look like a pattern.
            rounding = _ROUNDING * (part + self.center).square().sum(dim=1)
            distances.append(torch.where(distance <= rounding, torch.zeros_like(distance), distance))  # NaN stays
            indices.append(index)
        return torch.cat(distances), torch.cat(indices)
