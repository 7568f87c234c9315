"""Work that one process does while the others wait."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Inside, accelerate works as in a program of one process.

    Else a fine-tuning in one of several would wait for the others at every step, and with all of them it would see
    other batches than one process alone.
    """
    shared = PartialState._shared_state
    before = dict(shared)
    if shared:
        shared.update(distributed_type=DistributedType.NO, num_processes=1, process_index=0, local_process_index=0)
    AcceleratorState._reset_state()
    try:
        yield
    finally:
        AcceleratorState._reset_state()  # it holds a copy
        shared.clear()
        shared.update(before)
