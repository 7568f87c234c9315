"""Turns at the model: first come, first served, and long work gives way between its steps."""

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
    """Locks the one model that all sessions share, fairly.

    A turn belongs to its block, not to a thread: it may end in another thread. It must not be held while a generator
    is suspended, because that may never go on.
    """

    def __init__(self):
        self._condition = threading.Condition()
        self._tickets: deque[object] = deque()  # of those who wait, in the order of arrival
        self._taken = False
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="model")

    @property
    def waiting(self) -> int:
        """Number of those who wait for a turn now."""
        with self._condition:
            return len(self._tickets)

    @property
    def taken(self) -> bool:
        """Whether one who comes now has to wait."""
        with self._condition:
            return self._taken or bool(self._tickets)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Waits for all who came before, then holds the model to the end of the block, errors included."""
        with self._condition:
            self._take()
        try:
            yield
        finally:
            with self._condition:
                self._taken = False
                self._condition.notify_all()

    def give_way(self) -> None:
        """Lets all who wait now go first; called by the holder of a turn between two steps.

        The next turn is then the caller's: those who come later wait for its step. Returns at once where nobody waits.

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
                    # The caller's block ends with this error, and must then have a turn to give back.
                    self._condition.wait_for(lambda: not self._taken)
                    self._taken = True
                    raise

    def compute(self, function: Callable[..., Result], *arguments) -> Result:
        """Calls a function within a turn, in one thread for all calls.

        PyTorch keeps working memory and helpers for each thread that ever computed, and a server has many threads.
        """
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
            # Also for a caller interrupted while waiting: nobody must wait for it.
            self._tickets.remove(ticket)
            self._condition.notify_all()
