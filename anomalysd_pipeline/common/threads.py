"""Let one thread at a time use objects that threads share."""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator


class _Lock:
    """A lock that its holder may take again, and that counts how often it was taken."""

    def __init__(self):
        self.lock, self.taken = threading.RLock(), 0


_guard = threading.Lock()
# Kept here and not on the objects, which are copied and pickled.
_locks: weakref.WeakKeyDictionary[object, _Lock] = weakref.WeakKeyDictionary()
_kept = threading.local()  # `blocks`: the locks of each `alone` that this thread is in


def _locks_of(shared: Iterable[object]) -> list[_Lock]:
    """Finds the lock of each object, in an order that is the same in all threads, so that none waits in a circle."""
    with _guard:
        return [_locks.setdefault(one, _Lock()) for one in sorted(shared, key=id) if one is not None]


@contextlib.contextmanager
def alone(shared: Iterable[object]) -> Iterator[None]:
    """Waits until no other thread uses any of some objects, and keeps them for the block; None stands for nothing."""
    locks = _locks_of(shared)
    with contextlib.ExitStack() as held:
        for own in locks:
            held.enter_context(own.lock)
            own.taken += 1
        blocks = _kept.__dict__.setdefault("blocks", [])
        blocks.append(locks)
        try:
            yield
        finally:
            blocks.pop()


def takes_turns(shared: Callable[[object], Iterable[object]]):
    """Decorates a method that one thread at a time may run, of all whose `shared(self)` have an object in common."""

    def decorate(method):
        @functools.wraps(method)
        def run(self, *args, **kwargs):
            with alone(shared(self)):
                return method(self, *args, **kwargs)

        return run

    return decorate


def give_way(function: Callable, *arguments) -> tuple[object, bool]:
    """Calls a function while other threads may use what the innermost `alone` keeps for this one.

    Returns:
        What the function returned, and whether the objects were in use meanwhile.
    """
    locks = _kept.blocks[-1]
    before = [own.taken for own in locks]
    for own in locks:
        own.lock.release()
    try:
        answer = function(*arguments)
    finally:
        for own in locks:
            own.lock.acquire()
    return answer, before != [own.taken for own in locks]
