"""Devices, and the precision to compute in on them."""

from __future__ import annotations

import contextlib

import torch


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
