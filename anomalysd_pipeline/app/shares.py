"""Bound what visitors upload: how long an upload may take, and how much a visitor may leave on the server."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable

from starlette.formparsers import MultiPartException

SILENT_SECONDS = 30.0
"""Longest time between two pieces of an upload."""
KEPT_SECONDS = 7200.0
"""Time for which uploads stay on the server, see `page.build`."""
VISITORS = 20_000
"""Visitors whose uploads are remembered."""


class Shares:
    """Counts the bytes that each visitor has uploaded and that are still on the server.

    Args:
        share: most bytes of a visitor.
        seconds: longest time of an upload.
        clock: returns seconds that never decrease.
    """

    def __init__(self, share: int, seconds: float, clock: Callable[[], float] = time.monotonic):
        self.share, self.seconds, self._clock = share, seconds, clock
        self._lock = threading.Lock()
        self._pieces: OrderedDict[str, deque[tuple[float, int]]] = OrderedDict()

    def add(self, visitor: str, size: int) -> bool:
        """Counts bytes of a visitor; False where these exceed the share, and are not counted."""
        now = self._clock()
        with self._lock:
            pieces = self._pieces.setdefault(visitor, deque())
            self._pieces.move_to_end(visitor)
            while len(self._pieces) > VISITORS:
                self._pieces.popitem(last=False)
            while pieces and pieces[0][0] < now - KEPT_SECONDS:
                pieces.popleft()
            if sum(own for _, own in pieces) + size > self.share:
                return False
            # By minutes: an upload comes in many pieces.
            if pieces and now - pieces[-1][0] < 60:
                pieces[-1] = (pieces[-1][0], pieces[-1][1] + size)
            else:
                pieces.append((now, size))
            return True

    def receiving(self, receive, visitor: str):
        """Wraps an ASGI `receive` of an upload, so that it ends: gradio then deletes what has come, and says why."""
        deadline = self._clock() + self.seconds

        async def bounded() -> dict:
            left = min(SILENT_SECONDS, deadline - self._clock())
            try:
                message = await asyncio.wait_for(receive(), max(left, 0.0))
            except (TimeoutError, asyncio.TimeoutError) as error:  # two kinds before Python 3.11
                raise MultiPartException("The upload takes too long; try again.") from error
            if message["type"] == "http.disconnect":
                raise MultiPartException("The upload was broken off; try again.")
            if not self.add(visitor, len(message.get("body", b""))):
                raise MultiPartException(
                    f"You have uploaded more than {self.share / 1e6:.4g} MB in two hours; go on later."
                )
            return message

        return bounded
