"""Memory of a server with many threads: what was used goes back to the system."""

from __future__ import annotations

import ctypes

_M_ARENA_MAX = -8
"""From glibc's malloc.h."""


def share_arenas(count: int = 2) -> bool:
    """Bounds the number of heaps that glibc keeps, up to 8 for each core otherwise: each thread that works on a
    picture leaves one behind that stays as large as it ever was. To be called before there are threads.

    Args:
        count: heaps that all threads share.

    Returns:
        Whether the system's allocator is one that can be told.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and mallopt(_M_ARENA_MAX, count) == 1
