"""Choose a device and the precision to compute in, and keep accelerate's state apart."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType, parse_flag_from_env

_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, mixed_precision: str) -> contextlib.AbstractContextManager:
    """Gives a context that computes in "bf16" or "fp16" where PyTorch can; "no" gives one without effect.

    Raises:
        ValueError: for any other word.
    """
    if mixed_precision == "no":
        return contextlib.nullcontext()
    if mixed_precision not in _PRECISIONS:
        raise ValueError(f"`mixed_precision` must be 'no', 'bf16' or 'fp16', got {mixed_precision!r}.")
    return torch.autocast(device.type, _PRECISIONS[mixed_precision])


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
        ValueError: "cuda" or "mps", and PyTorch finds no such GPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("`--device` is 'cuda', but PyTorch finds no CUDA GPU here; use 'cpu' or 'auto'.")
    if device == "mps" and not torch.backends.mps.is_available():
        raise ValueError("`--device` is 'mps', but PyTorch finds no Apple GPU here; use 'cpu' or 'auto'.")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def on_cpu(asked: bool) -> bool:
    """Tells whether accelerate shall compute on the CPU: as `asked` for, or because there is nothing else.

    accelerate must be told so in the second case too: else each of several processes would work alone.
    """
    return asked or parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


_KINDS = (PartialState, AcceleratorState, GradientState)
_own: ContextVar[dict | None] = ContextVar("_own", default=None)
"""State of each kind within `own_accelerate_state`; each thread has its own, and new threads have none."""


class _Shared:
    """Stands for the dictionary in which a class of accelerate keeps its state: that of `_own`, or the program's."""

    def __init__(self, kind: type, program):
        self.kind, self.program = kind, program

    def __get__(self, instance, owner=None):
        own = _own.get()
        if own is not None:
            return own[self.kind]
        # With torch_xla, accelerate has put a descriptor there too.
        return self.program.__get__(instance, owner) if hasattr(self.program, "__get__") else self.program


@contextlib.contextmanager
def own_accelerate_state(one_process: bool = False) -> Iterator[None]:
    """Gives accelerate a new state inside, in this thread; `Accelerator` objects made before keep theirs.

    accelerate keeps its state in the class and refuses a second `Accelerator` with another precision. Several
    processes that a launcher started go on in the new state, and those started inside go on after it, because they
    cannot be started again.

    Args:
        one_process: whether accelerate works inside as in a program of one process. Else a fine-tuning in one of
            several would wait for the others at every step, and with all of them it would see other batches than one
            process alone.
    """
    for kind in _KINDS:
        if not isinstance(kind.__dict__["_shared_state"], _Shared):
            kind._shared_state = _Shared(kind, kind.__dict__["_shared_state"])
    own = {kind: {} for kind in _KINDS}
    several = _several(PartialState._shared_state)
    # Within a state of one of several processes too: a new one would find the launcher's others again, and wait.
    if several or (_own.get() is not None and PartialState._shared_state):
        own[PartialState].update(PartialState._shared_state)
        if several and one_process:
            own[PartialState].update(distributed_type=DistributedType.NO, num_processes=1)
            own[PartialState].update(process_index=0, local_process_index=0)
    before = _own.set(own)
    try:
        yield
    finally:
        _own.reset(before)
        if not PartialState._shared_state and _several(own[PartialState]):
            PartialState._shared_state.update(own[PartialState])


def _several(processes: Mapping) -> bool:
    """Tells whether a launcher started the process, along with others."""
    return processes.get("distributed_type", DistributedType.NO) != DistributedType.NO
