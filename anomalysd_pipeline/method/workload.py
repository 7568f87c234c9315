"""List the passes of an inspection as jobs, and run a list in batches that shrink when memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from diffusers.utils import logging
from torch import Tensor

from .masks import ScalePasses

logger = logging.get_logger(__name__)


class Workload:
    """Numbers every picture with every one of its masks, 0 ... len - 1, all passes of a picture in a row.

    A pass belongs to a row: the index of its scale, or K (the number of scales) for the prototype-guided mask.
    Pictures whose prototype mask is empty have no pass for it.

    Args:
        pictures: their number N.
        scales: the masks shared by all pictures.
        prototype_masks: bool `[N, 1, H, W]`, one of its own for each picture, or None.
        regions: bool `[N, 1, H, W]`, what of each picture counts: masks are cut to it, and passes whose mask lies
            outside are left out. None: all.

    Attributes:
        scales: their number K.
    """

    def __init__(
        self,
        pictures: int,
        scales: Sequence[ScalePasses],
        prototype_masks: Tensor | None,
        regions: Tensor | None = None,
    ):
        self._masks = torch.cat([scale.masks for scale in scales])  # [P, 1, H, W]
        rows = [row for row, scale in enumerate(scales) for _ in range(len(scale.masks))]
        self.scales = len(scales)
        self._prototype_masks, self._regions = prototype_masks, regions
        self._jobs = []  # (picture, row, index of a shared mask or None)
        for picture in range(pictures):
            needed = range(len(rows))
            if regions is not None:
                needed = (self._masks * regions[picture].to(self._masks)).amax(dim=(1, 2, 3)).nonzero()[:, 0].tolist()
            self._jobs += [(picture, rows[index], index) for index in needed]
            if prototype_masks is not None and prototype_masks[picture].any():
                self._jobs.append((picture, self.scales, None))

    def __len__(self) -> int:
        return len(self._jobs)

    def select(self, jobs: range, device) -> tuple[Tensor, Tensor, Tensor]:
        """Looks up picture indices int64 `[B]`, masks float32 `[B, 1, H, W]` and rows int64 `[B]` of some jobs."""
        chosen = [self._jobs[job] for job in jobs]
        masks = [
            self._prototype_masks[picture].to(device, torch.float32)
            if index is None
            else self._masks[index].to(device)
            for picture, _, index in chosen
        ]
        if self._regions is not None:
            masks = [mask * self._regions[job[0]].to(mask) for mask, job in zip(masks, chosen, strict=True)]
        pictures, rows = (torch.tensor([job[part] for job in chosen], device=device) for part in (0, 1))
        return pictures, torch.stack(masks), rows


def in_batches(run: Callable[[range], None], total: int, batch_size: int) -> int:
    """Calls `run` with consecutive ranges that cover 0 ... total - 1, halving the batch each time memory runs out.

    A range that failed is run again in halves, so `run` must change nothing before it succeeds. Out of memory at a
    batch of one is raised.

    Returns:
        The batch size in use at the end.
    """
    start = 0
    while start < total:
        try:
            run(range(start, min(start + batch_size, total)))
        except (RuntimeError, MemoryError) as error:
            if batch_size == 1 or not (isinstance(error, MemoryError) or should_reduce_batch_size(error)):
                raise
            batch_size //= 2
            logger.warning(f"Out of memory: going on with `batch_size` {batch_size}.")
        else:
            start += batch_size
            continue
        # Outside the handler, where the traceback no longer holds the tensors that filled the memory.
        clear_device_cache(garbage_collection=True)
    return batch_size
