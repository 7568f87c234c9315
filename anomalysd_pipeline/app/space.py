"""What is different on a Hugging Face Space: its GPU, which is lent for seconds at a time, and who is signed in.

With ZeroGPU a function that needs the GPU runs in another process, which gets copies of its arguments, and whose
results are copied back. Elsewhere `on_gpu` changes nothing.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.util
import math
import os
from collections.abc import Callable, Iterator

from ..common.memory import share_arenas

LONGEST = 300
"""Seconds of GPU that one call may ask for."""


def is_space() -> bool:
    """Whether this runs on a Hugging Face Space."""
    return bool(os.environ.get("SPACE_ID"))


def is_zero_gpu() -> bool:
    """Whether a GPU is lent call by call."""
    return bool(os.environ.get("SPACES_ZERO_GPU")) and importlib.util.find_spec("spaces") is not None


@contextlib.contextmanager
def prepared() -> Iterator[None]:
    """To be held while the app is built, before anything imports PyTorch: on ZeroGPU its package must come first.

    Meanwhile no garbage is collected: looking again and again through what was just imported, where there is none,
    takes a seventh of the time to the page.
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
    """Decorates a function, or a generator, that computes with the model; its arguments and results can be pickled.

    Args:
        seconds: how long it takes on a GPU, from the same arguments; at most `LONGEST` are asked for.
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
    """The Hub token of the environment, for a visitor who sits at this machine: others must not publish with it.

    Args:
        host: the visitor's address.
        forwarded: whether the request came through a proxy, so that the address says nothing.
    """
    at_this_machine = host in ("127.0.0.1", "::1", "localhost") and not forwarded
    return os.environ.get("HF_TOKEN") or None if at_this_machine and not is_space() else None
