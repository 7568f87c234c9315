"""What was used goes back to the system: the heaps of many threads, and large blocks with small ones between them."""

import ctypes
import subprocess
import sys

import pytest

from anomalysd_pipeline.common.memory import large_blocks_returned, share_arenas

pytest.importorskip("psutil")

# Threads that exist at the same time and each free all but a crumb at the end of their heap.
THREADS = """
import ctypes, sys, threading
from anomalysd_pipeline.memory import share_arenas
bounded = sys.argv[1] == "bounded" and share_arenas(1)
import psutil
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
barrier = threading.Barrier(16)
def work():
    barrier.wait()
    blocks = [libc.malloc(100_000) for _ in range(60)]
    for block in blocks:
        ctypes.memset(block, 1, 100_000)
    barrier.wait()
    for block in blocks[:-1]:
        libc.free(block)
    barrier.wait()
    rest.append(blocks[-1])
rest = []
threads = [threading.Thread(target=work) for _ in range(16)]
before = psutil.Process().memory_info().rss
for t in threads: t.start()
for t in threads: t.join()
for block in rest: libc.free(block)
print(bounded, psutil.Process().memory_info().rss - before)
"""


# Blocks of a few MiB, each with something small behind it that stays.
BLOCKS = """
import contextlib, ctypes, sys
from anomalysd_pipeline.memory import _M_MMAP_THRESHOLD, _glibc, large_blocks_returned
import psutil
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
def use(size):
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    return block
libc.free(use(30 * 2**20))  # from now on glibc keeps blocks that are smaller
before = psutil.Process().memory_info().rss
bounded = sys.argv[1] == "bounded"
with large_blocks_returned() if bounded else contextlib.nullcontext():
    blocks = []
    for _ in range(20):
        blocks.append(use(4 * 2**20))
        use(1000)
    for block in blocks: libc.free(block)
print(bounded and _glibc("mallopt", _M_MMAP_THRESHOLD, 2**25), psutil.Process().memory_info().rss - before)
"""


def kept(script: str, how: str) -> tuple[bool, int]:
    told = subprocess.run([sys.executable, "-c", script, how], capture_output=True, text=True, check=True).stdout
    word, size = told.split()
    return word == "True", int(size)


@pytest.mark.parametrize("script", [THREADS, BLOCKS], ids=["threads", "blocks"])
def test_little_stays_behind(script):
    bounded, little = kept(script, "bounded")
    if not bounded:
        pytest.skip("the system's allocator cannot be told")
    assert little < kept(script, "free")[1] / 2


def test_systems_that_cannot_be_told_change_nothing(monkeypatch):
    """ctypes.CDLL(None), which finds the allocator, is an error on Windows."""
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(ctypes, "CDLL", None)
    assert not share_arenas()
    with large_blocks_returned():
        pass
