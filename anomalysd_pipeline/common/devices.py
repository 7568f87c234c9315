"""Devices, and the precision to compute in on them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType


def autocast(device: torch.device, mixed_precision: str) -> contextlib.AbstractContextManager:
    """Computes in `mixed_precision`, "bf16" or "fp16", what can be; "no" leaves everything as it is."""
    if mixed_precision == "no":
        return contextlib.nullcontext()
    return torch.autocast(device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}[mixed_precision])


def resolve_precision(mixed_precision: str, device: torch.device) -> str:
    """ "auto" as "bf16" where the device computes in it, else as "no"; other words as they are."""
    if mixed_precision != "auto":
        return mixed_precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    # On processors without these instructions bfloat16 is emulated, and several times slower than float32.
    able = device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False)
    return "bf16" if able else "no"


def choose_device(device: str | torch.device) -> torch.device:
    """What "auto" stands for.

    Raises:
        ValueError: there is no such device here.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("`--device` is 'cuda', but PyTorch finds no CUDA GPU here; use 'cpu' or 'auto'.")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


@contextlib.contextmanager
def own_accelerate_state(one_process: bool = False) -> Iterator[None]:
    """Gives accelerate a new state inside; `Accelerator` objects made before keep theirs, inside and after.

    accelerate keeps its state in the class and refuses a second `Accelerator` with another precision.

    Args:
        one_process: whether accelerate works inside as in a program of one process. Else a fine-tuning in one of
            several would wait for the others at every step, and with all of them it would see other batches than one
            process alone.
    """
    before = {kind: kind._shared_state for kind in (PartialState, AcceleratorState, GradientState)}
    processes = dict(PartialState._shared_state)  # they are there already, and cannot be started again
    if processes and one_process:
        processes |= {"distributed_type": DistributedType.NO, "num_processes": 1}
        processes |= {"process_index": 0, "local_process_index": 0}
    try:
        for kind, shared in before.items():
            kind._shared_state = type(shared)()
        PartialState._shared_state.update(processes)
        yield
    finally:
        for kind, shared in before.items():
            kind._shared_state = shared
