"""Hugging Face Spaces: a GPU that is lent for seconds at a time, and visitors who sign in.

With ZeroGPU a function that needs the GPU runs in another process: its arguments are copied there, and its results
back. Elsewhere `on_gpu` changes nothing.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.metadata
import importlib.util
import math
import os
from collections.abc import Callable, Iterator

from .memory import share_arenas

LONGEST = 300
"""Most seconds of GPU for one call."""


def is_space() -> bool:
    """Tells whether this runs on a Hugging Face Space."""
    return bool(os.environ.get("SPACE_ID"))


def links() -> dict[str, str]:
    """Returns the addresses of the paper and, where they are known, of the repository and the docs.

    On a Space these are its own files; elsewhere those that the installed package names.
    """
    known = {"Paper": "https://arxiv.org/abs/2408.01960"}
    if is_space():
        files = f"https://huggingface.co/spaces/{os.environ['SPACE_ID']}"
        return {**known, "Repository": f"{files}/tree/main", "Docs": f"{files}/blob/main/docs/app.md"}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        named = importlib.metadata.metadata("anomalysd-pipeline").get_all("Project-URL") or []
        pairs = dict(entry.split(", ", 1) for entry in named)
        known |= {name: pairs[name] for name in ("Repository", "Docs") if name in pairs}
    return known


def is_zero_gpu() -> bool:
    """Tells whether a GPU is lent call by call."""
    return bool(os.environ.get("SPACES_ZERO_GPU")) and importlib.util.find_spec("spaces") is not None


@contextlib.contextmanager
def prepared() -> Iterator[None]:
    """Prepares the process for building the app in this block, before PyTorch is imported.

    On ZeroGPU its package must be imported first. No garbage is collected meanwhile: modules that were just imported
    hold none, and searching them again and again would delay the page.
    """
    share_arenas()
    if is_zero_gpu():
        import spaces  # noqa: F401
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        if enabled:
            gc.enable()


def on_gpu(seconds: Callable[..., float]):
    """Decorates a function or generator that computes with the model.

    Args:
        seconds: estimates its time on a GPU from the same arguments; at most `LONGEST` are asked for.

    Returns:
        A decorator for functions whose arguments and results can be pickled.
    """

    def decorate(function):
        if not is_zero_gpu():
            return function
        import spaces

        @functools.wraps(seconds)
        def duration(*args, **kwargs) -> int:
            return min(LONGEST, math.ceil(seconds(*args, **kwargs)))

        return spaces.GPU(duration=duration)(function)

    return decorate


def local_token(host: str | None, forwarded: bool) -> str | None:
    """Returns the Hub token of the environment for a visitor at this machine, and None for all others.

    Args:
        host: the visitor's address.
        forwarded: whether the request came through a proxy, whose address `host` then is.
    """
    at_this_machine = host in ("127.0.0.1", "::1", "localhost") and not forwarded
    return os.environ.get("HF_TOKEN") or None if at_this_machine and not is_space() else None
