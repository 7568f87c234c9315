"""The heaps of many threads go back to the system."""

import ctypes
import subprocess
import sys

import pytest

from anomalysd_pipeline.app.memory import give_back, share_arenas

pytest.importorskip("psutil")

# Threads that exist at the same time and each free all but a crumb at the end of their heap.
THREADS = """
import ctypes, sys, threading
from anomalysd_pipeline.app.memory import share_arenas
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


def kept(how: str) -> tuple[bool, int]:
    told = subprocess.run([sys.executable, "-c", THREADS, how], capture_output=True, text=True, check=True).stdout
    word, size = told.split()
    return word == "True", int(size)


def test_little_stays_behind():
    bounded, little = kept("bounded")
    if not bounded:
        pytest.skip("the system's allocator cannot be told")
    assert little < kept("free")[1] / 2


def test_free_memory_is_given_back():
    code = """
import ctypes, psutil
from anomalysd_pipeline.app.memory import give_back
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
blocks, crumbs = zip(*((libc.malloc(100_000), libc.malloc(2_000)) for _ in range(600)))
for block in blocks: ctypes.memset(block, 1, 100_000)
for block in blocks: libc.free(block)  # between crumbs, so that the heap cannot shrink by itself
rss = psutil.Process().memory_info
before = rss().rss
give_back()
print(before - rss().rss)
"""
    given = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    if not hasattr(ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("the system's allocator cannot be told")
    assert int(given) > 40_000_000


def test_systems_that_cannot_be_told_change_nothing(monkeypatch):
    """ctypes.CDLL(None), which finds the allocator, is an error on Windows."""
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(ctypes, "CDLL", None)
    assert not share_arenas()
    give_back()
