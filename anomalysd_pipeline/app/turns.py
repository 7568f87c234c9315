"""Whose turn it is at the model: first come, first served, and a long piece of work gives way between its steps."""

from __future__ import annotations

import contextvars
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

Result = TypeVar("Result")


class Turns:
    """A fair lock around the one model that all sessions share.

    A turn belongs to whoever entered `turn()`, not to a thread: it may end in another one. It must not be held while a
    generator is suspended, because nobody knows when that goes on.
    """

    def __init__(self):
        self._condition = threading.Condition()
        self._tickets: deque[object] = deque()  # those who wait, in the order they came
        self._taken = False
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="model")

    @property
    def waiting(self) -> int:
        """How many wait for a turn now."""
        with self._condition:
            return len(self._tickets)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Waits for everybody who came before, then holds the model to the end of the block, errors included."""
        with self._condition:
            self._take()
        try:
            yield
        finally:
            with self._condition:
                self._taken = False
                self._condition.notify_all()

    def give_way(self) -> None:
        """Called by the holder of a turn between two steps: everybody who waits now goes first, then the next turn is
        the caller's. Those who come later wait for the caller's step. Returns at once where nobody waits.

        Raises:
            RuntimeError: nobody holds a turn.
        """
        with self._condition:
            if not self._taken:
                raise RuntimeError("`give_way` must be called within a turn; enter `turn()` first.")
            if self._tickets:
                self._taken = False
                self._condition.notify_all()
                try:
                    self._take()
                except BaseException:
                    # The caller's block ends with this, and must then have a turn to give back.
                    self._condition.wait_for(lambda: not self._taken)
                    self._taken = True
                    raise

    def compute(self, function: Callable[..., Result], *arguments) -> Result:
        """Calls a function within a turn, in a thread that is the same for all: PyTorch keeps working memory and
        helpers for each thread that ever computed, and a server has many."""
        context = contextvars.copy_context()
        with self.turn():
            return self._worker.submit(context.run, function, *arguments).result()

    def _take(self) -> None:
        """Waits in line; called with the condition held."""
        ticket = object()
        self._tickets.append(ticket)
        try:
            self._condition.wait_for(lambda: not self._taken and self._tickets[0] is ticket)
            self._taken = True
        finally:
            # Also of one who is interrupted while waiting, for whom nobody must wait.
            self._tickets.remove(ticket)
            self._condition.notify_all()
