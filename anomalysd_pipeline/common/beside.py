"""Work beside the computing: make items ahead of their use, and make calls after it, in a thread each."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
_WAIT = 5  # seconds for a thread that nobody needs any more; a slow network would hold up an interruption for longer


def ahead(items: Iterable[Item], most: int) -> Iterator[Item]:
    """Yields items in order, while a thread makes at most `most` of them before they are asked for.

    What making an item raises is raised here, in its turn. Closing the generator ends the thread.
    """
    made: queue.SimpleQueue[tuple[str, object]] = queue.SimpleQueue()
    room, unwanted = threading.Semaphore(most - 1), threading.Event()

    def make() -> None:
        try:
            for item in items:
                made.put(("item", item))
                room.acquire()
                if unwanted.is_set():
                    return
            made.put(("end", None))
        except BaseException as error:
            made.put(("error", error))

    thread = threading.Thread(target=make, name="ahead", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = made.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            room.release()
            yield value
    finally:
        unwanted.set()
        room.release()
        thread.join(_WAIT)


class Behind:
    """Makes calls in a thread, one after the other; the end of a `with` block waits for them, also after an error.

    What a call raises is raised by the next one, or at the end of the block; calls that wait are then left out.

    Args:
        most: calls that may wait; a further one waits for room.
    """

    def __init__(self, most: int):
        self._calls: queue.Queue[tuple[Callable, tuple] | None] = queue.Queue(most)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="behind", daemon=True)

    def __enter__(self) -> Behind:
        self._thread.start()
        return self

    def __call__(self, function: Callable, *arguments) -> None:
        """Has `function` called with the arguments; from any thread."""
        if self._error is not None:
            raise self._error
        self._calls.put((function, arguments))

    def __exit__(self, kind, *_) -> None:
        self._calls.put(None)
        self._thread.join()
        if self._error is not None and kind is None:
            raise self._error

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            if self._error is None:
                try:
                    call[0](*call[1])
                except BaseException as error:
                    self._error = error
