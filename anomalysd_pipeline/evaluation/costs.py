"""Measure the costs of an evaluation: time, memory and device."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState

_MEMORY = ("peak_memory_gib", "peak_gpu_memory_gib")


def measure(state: PartialState, fit_seconds: float) -> dict:
    """Measures the time and memory that this process has used so far; JSON-serializable."""
    costs = {
        "process": state.process_index,
        "processes": state.num_processes,
        "device": device_words(state.device),
        "fit_seconds": fit_seconds,
        "peak_memory_gib": peak_memory(),
    }
    if state.device.type == "cuda":
        costs["peak_gpu_memory_gib"] = torch.cuda.max_memory_allocated(state.device) / 2**30
    return costs


def total(costs: Sequence[Mapping], rows: Sequence[Mapping]) -> dict:
    """Combines the costs of all processes and runs: mean time of a picture, and the highest of all else.

    Args:
        costs: from `measure`.
        rows: of all pictures, with `seconds`.
    """
    seconds = [row["seconds"] for row in rows]
    found = {"seconds_per_image": float(np.mean(seconds)) if seconds else None}
    if costs:
        found["fit_seconds"] = max(cost["fit_seconds"] for cost in costs)
        found["processes"] = max(cost["processes"] for cost in costs)
        found["device"] = ", ".join(dict.fromkeys(cost["device"] for cost in costs))
        for key in _MEMORY:
            found[key] = max((cost[key] for cost in costs if cost.get(key) is not None), default=None)
    return found


def peak_memory() -> float | None:
    """Reads the peak memory of this process in GiB; None where the system does not tell it."""
    try:
        import resource
    except ImportError:
        return None
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used * (1 if sys.platform == "darwin" else 1024) / 2**30


def device_words(device: torch.device) -> str:
    """Names the device for a report."""
    if device.type != "cpu":
        return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
    threads = torch.get_num_threads()
    return f"{model}, {threads} thread{'s' * (threads != 1)}"
