"""Search the nearest of many vectors by squared Euclidean distance, Eq. (14) of AnomalySD (arXiv 2408.01960)."""

from collections.abc import Iterator

import torch
from torch import Tensor

ENTRIES = 2**22
"""Float32 values of a block of distances, 16 MiB: bounds the memory that a search takes."""
_ROUNDING = 1e-10


class NeighborSearch:
    """Searches vectors in float32 and centered, which loses less to rounding.

    Args:
        vectors: [M, C], M >= 1.
        center: [C], subtracted from vectors and queries; None: the mean of `vectors`.
        inplace: whether `vectors` may be overwritten, which saves the memory of a copy.

    Attributes:
        chunk: queries compared at once, as many as fit in `ENTRIES`.
    """

    def __init__(self, vectors: Tensor, center: Tensor | None = None, inplace: bool = False):
        vectors = vectors.float()
        self.center = vectors.mean(dim=0) if center is None else center
        self.vectors = vectors.sub_(self.center) if inplace else vectors - self.center
        self.squares = self.vectors.square().sum(dim=1)  # [M]
        self.chunk = max(1, ENTRIES // len(self.vectors))

    def nearest(self, queries: Tensor, count: int = 1, chunk: int | None = None) -> tuple[Tensor, Tensor]:
        """Finds the `count` nearest vectors of each query, and the distance to the first.

        Matrix products find the vectors. The distance is then computed by differences, so that small ones are not lost
        to cancellation.

        Args:
            queries: [Q, C].
            count: 1 ... M.
            chunk: queries compared at once; None: as many as fit in `ENTRIES`.

        Returns:
            - float32 [Q], >= 0; exactly 0 where the distance is below 1e-10 of the squared length of the query.
            - int64 [Q, count], the nearest first.
        """
        distances, indices = [], []
        for _, part, products in self._blocks(queries, chunk):
            index = products.topk(count, dim=1, largest=False).indices
            distance = (part - self.vectors[index[:, 0]]).square().sum(dim=1)
            # A vector compared with itself differs by rounding alone, which must not look like a pattern.
            rounding = _ROUNDING * (part + self.center).square().sum(dim=1)
            distances.append(torch.where(distance > rounding, distance, torch.zeros_like(distance)))
            indices.append(index)
        return torch.cat(distances), torch.cat(indices)

    def distances(self, queries: Tensor, excluded: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Computes the distance of each query to its nearest vector by matrix products alone.

        Args:
            queries: [Q, C].
            excluded: labels [Q] and [M]; vectors with the label of a query are not compared with it.

        Returns:
            float32 [Q], >= 0.
        """
        found = queries.new_empty(len(queries), dtype=torch.float32)
        # Into one tensor, and in place: small results between large temporaries leave memory that is not given back.
        for rows, part, products in self._blocks(queries):
            products += part.square().sum(dim=1, keepdim=True)
            if excluded is not None:
                labels, own = excluded
                products.masked_fill_(labels[rows][:, None] == own[None], torch.inf)
            torch.amin(products, dim=1, out=found[rows])
        return found.clamp_(min=0)

    def _blocks(self, queries: Tensor, chunk: int | None = None) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yields rows, their centered queries [B, C], and squared distances less the queries' own squares, [B, M]."""
        chunk = chunk or self.chunk
        for start in range(0, len(queries), chunk):
            rows = slice(start, min(start + chunk, len(queries)))
            part = queries[rows].float() - self.center
            yield rows, part, torch.addmm(self.squares, part, self.vectors.T, alpha=-2)
