"""What is said to the system's allocator, so that memory that was used goes back to the system."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator

# From glibc's malloc.h.
_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8

_LARGE = 2**20
_LARGEST_THRESHOLD = 2**25
"""What glibc itself raises the threshold to, once blocks of that size were freed."""


def _glibc(function: str, *arguments: int) -> bool:
    """Calls one of its allocator's functions, which tell by 1 whether they did what was asked."""
    if sys.platform != "linux":
        return False
    found = getattr(ctypes.CDLL(None), function, None)  # musl does not have it
    return found is not None and found(*arguments) == 1


def share_arenas(count: int = 2) -> bool:
    """Bounds the number of heaps that glibc keeps, up to 8 for each core otherwise: each thread that works on a
    picture leaves one behind that stays as large as it ever was. To be called before there are threads.

    Args:
        count: heaps that all threads share.

    Returns:
        Whether the system's allocator is one that can be told.
    """
    return _glibc("mallopt", _M_ARENA_MAX, count)


@contextlib.contextmanager
def large_blocks_returned() -> Iterator[None]:
    """Before, what is free goes back to the system, and meanwhile blocks of a MiB and more as soon as they are freed.

    Otherwise glibc keeps blocks of up to 32 MiB in its heap, where what is stored between them stops them from ever
    being returned. For work that makes many of different sizes and stores little; where the same sizes come again and
    again, as in a network, it would cost time. On other systems nothing changes.
    """
    _glibc("malloc_trim", 0)
    _glibc("mallopt", _M_MMAP_THRESHOLD, _LARGE)
    try:
        yield
    finally:
        _glibc("mallopt", _M_MMAP_THRESHOLD, _LARGEST_THRESHOLD)
