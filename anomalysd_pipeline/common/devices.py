"""Choose a device and the precision to compute in, and keep accelerate's state apart."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType, parse_flag_from_env


def autocast(device: torch.device, mixed_precision: str) -> contextlib.AbstractContextManager:
    """Gives a context that computes in "bf16" or "fp16" where PyTorch can; "no" gives one without effect."""
    if mixed_precision == "no":
        return contextlib.nullcontext()
    return torch.autocast(device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}[mixed_precision])


def resolve_precision(mixed_precision: str, device: torch.device) -> str:
    """Resolves "auto" to "bf16" where the device computes in it, else to "no"; returns other words unchanged."""
    if mixed_precision != "auto":
        return mixed_precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    # On processors without these instructions bfloat16 is emulated, and several times slower than float32.
    able = device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False)
    return "bf16" if able else "no"


def choose_device(device: str | torch.device) -> torch.device:
    """Resolves "auto" to CUDA, where there is a GPU, or else to the CPU.

    Raises:
        ValueError: "cuda", and PyTorch finds no GPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("`--device` is 'cuda', but PyTorch finds no CUDA GPU here; use 'cpu' or 'auto'.")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def on_cpu(asked: bool) -> bool:
    """Tells whether accelerate shall compute on the CPU: as `asked` for, or because there is nothing else.

    accelerate must be told so in the second case too: else each of several processes would work alone.
    """
    return asked or parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


_KINDS = (PartialState, AcceleratorState, GradientState)
_states: list[dict] = []
"""The states of accelerate that are set aside, the host program's first, and last the one in use."""
_switching = threading.Lock()


@contextlib.contextmanager
def own_accelerate_state(one_process: bool = False) -> Iterator[None]:
    """Gives accelerate a new state inside; `Accelerator` objects made before keep theirs, inside and after.

    accelerate keeps its state in the class and refuses a second `Accelerator` with another precision. Several
    processes that a launcher started go on in the new state, and those started inside go on after it, because they
    cannot be started again. Blocks in several threads may end in any order.

    Args:
        one_process: whether accelerate works inside as in a program of one process. Else a fine-tuning in one of
            several would wait for the others at every step, and with all of them it would see other batches than one
            process alone.
    """
    own = {kind: type(kind._shared_state)() for kind in _KINDS}
    with _switching:
        if _several(PartialState._shared_state):
            own[PartialState].update(PartialState._shared_state)
            if one_process:
                own[PartialState].update(distributed_type=DistributedType.NO, num_processes=1)
                own[PartialState].update(process_index=0, local_process_index=0)
        if not _states:
            _states.append({kind: kind._shared_state for kind in _KINDS})
        _states.append(own)
        _use(own)
    try:
        yield
    finally:
        with _switching:
            _states[:] = [state for state in _states if state is not own]
            _use(_states[-1])
            if len(_states) == 1:
                _states.clear()
            if not PartialState._shared_state and _several(own[PartialState]):
                PartialState._shared_state.update(own[PartialState])


def _several(processes: Mapping) -> bool:
    """Tells whether a launcher started the process, along with others."""
    return processes.get("distributed_type", DistributedType.NO) != DistributedType.NO


def _use(state: Mapping) -> None:
    for kind, shared in state.items():
        kind._shared_state = shared
