"""Heaps of glibc's allocator, bounded for a server of many threads."""

from __future__ import annotations

import ctypes
import sys

_M_ARENA_MAX = -8  # from glibc's malloc.h


def share_arenas(count: int = 2) -> bool:
    """Bounds the number of heaps that glibc keeps; call it before there are threads.

    Otherwise there are up to 8 for each core: each thread that works on a picture may leave a heap of its own behind,
    which stays as large as it ever was.

    Args:
        count: heaps that all threads share.

    Returns:
        Whether the system's allocator took the bound.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl does not have it
    return mallopt is not None and mallopt(_M_ARENA_MAX, count) == 1


def give_back() -> None:
    """Returns memory that is free in the heaps to the system, where the allocator can; after work that needed much."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
