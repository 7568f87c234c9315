"""Sessions: each visitor's key, folder, parts, and own pipeline on the shared weights."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from .limits import Limits

IDLE_ENOUGH = 300
"""Seconds after which an idle session makes room for a new visitor where all places are taken."""

EMPTY_ENOUGH = 1
"""The same for a session without parts: nothing is lost with it, and a program may open many of them."""


@dataclass
class Part:
    """Describes a part that a visitor has taught.

    Attributes:
        name: its category in the session's pipeline.
        pictures: normal pictures, RGB, see `uploads.kept_size`; none where the part came as a file.
        prompts: as `PromptBook.add` takes them; None: the generic ones.
        taught: whether an adaptation was fine-tuned for it, beyond prototypes and threshold.
        facts: facts that the page shows, JSON-serializable.
    """

    name: str
    pictures: list[Image.Image] = field(default_factory=list)
    prompts: dict[str, list[str]] | None = None
    taught: bool = False
    facts: dict = field(default_factory=dict)


class Session:
    """Keeps the parts, files and pipeline of one visitor; made by `SessionStore.get`.

    Attributes:
        key: secret that opens the session; it is in no path and no address. `SessionStore.renew` changes it.
        folder: readable only by the owner of the process; its name tells nothing of the key.
        parts: name to part.
        lock: held while `parts` or `pipe` change.
        limits: the app's bounds.
        shown: the result that the page shows, a `heat.Shown`, or None.
    """

    def __init__(self, folder: Path, limits: Limits, make_pipeline: Callable[[], object], clock=time.monotonic):
        self.key = secrets.token_urlsafe(16)
        self.folder = folder
        self.limits = limits
        self.parts: dict[str, Part] = {}
        self.shown = None
        self.lock = threading.RLock()
        self._make_pipeline = make_pipeline
        self._pipe = None
        self._pipe_lock = threading.Lock()
        self._clock = clock
        self._last_used = clock()
        self._users = 0
        self._state = threading.Lock()
        self._dropped = False

    @property
    def pipe(self):
        """Pipeline of the session, made at first use, which may have to wait until the base is loaded."""
        with self._pipe_lock:
            if self._pipe is None:
                self._pipe = self._make_pipeline()
            return self._pipe

    @property
    def idle(self) -> float:
        """Seconds since the last use; 0 while the session is `in_use`."""
        with self._state:
            return 0.0 if self._users else self._clock() - self._last_used

    @property
    def may_leave(self) -> bool:
        """Whether the session has been idle for long enough to make room for another."""
        return self.idle > (IDLE_ENOUGH if self.parts else EMPTY_ENOUGH)

    @property
    def dropped(self) -> bool:
        """Whether the session has ended, so that work still running for it may end too."""
        return self._dropped

    def touch(self) -> None:
        """Counts as a use."""
        with self._state:
            self._last_used = self._clock()

    @contextmanager
    def in_use(self) -> Iterator[Session]:
        """Keeps the session from being idle, and its files from being deleted, to the end of the block.

        Raises:
            ValueError: the session has ended.
        """
        with self._state:
            if self._dropped:
                raise ValueError("This session has ended; reload the page to start a new one.")
            self._users += 1
        try:
            yield self
        finally:
            with self._state:
                self._users -= 1
                self._last_used = self._clock()
                last = self._dropped and not self._users
            if last:
                self._delete()

    def disk_used(self) -> int:
        """Sums the bytes of all files in its folder; links count as themselves."""
        total = 0
        for root, folders, files in os.walk(self.folder):
            for name in folders + files:
                try:
                    total += os.lstat(os.path.join(root, name)).st_size
                except FileNotFoundError:  # deleted meanwhile
                    continue
        return total

    def require_room(self, size: int) -> None:
        """Checks that `size` more bytes fit into the folder; call it before they are written.

        Raises:
            ValueError: they would exceed the session's bound.
        """
        used, allowed = self.disk_used(), self.limits.disk_bytes
        if used + size > allowed:
            raise ValueError(
                f"This session has {used / 1e6:.0f} of {allowed / 1e6:.0f} MB in use, and {size / 1e6:.0f} MB more do "
                "not fit; give fewer or smaller files, or reload the page to start anew."
            )

    def require_part(self, name: str) -> None:
        """Checks that there is room for a part; call it before one of that name is added or replaced.

        Raises:
            ValueError: the session is full.
        """
        if name not in self.parts and len(self.parts) >= self.limits.parts:
            raise ValueError(
                f"A session has room for {self.limits.parts} parts, and it has {', '.join(map(repr, self.parts))}; "
                "teach one of these anew, or reload the page to start anew."
            )

    def new_folder(self) -> Path:
        """Makes an empty folder within the session's, for the files of one result.

        Raises:
            ValueError: the session has ended.
        """
        try:
            return Path(tempfile.mkdtemp(dir=self.folder))
        except FileNotFoundError as error:
            raise ValueError("This session has ended; reload the page to start a new one.") from error

    def _end(self) -> None:
        with self._state:
            self._dropped = True
            used = self._users > 0
        if not used:
            self._delete()

    def _delete(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        # Without a lock: work that still holds one must not hold up the visitor whose call ended this session.
        self.parts, self.shown = {}, None
        self._pipe = None


class SessionStore:
    """Keeps all sessions; safe to use from many threads.

    Args:
        limits: the app's bounds.
        make_pipeline: makes a session's pipeline; called at first use, by one thread at a time for each session.
        root: folder of all sessions' folders, made if missing; None: a new one, deleted at the end of the process.
        clock: returns seconds that never decrease.
    """

    def __init__(
        self,
        limits: Limits,
        make_pipeline: Callable[[], object],
        root: str | os.PathLike | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.limits = limits
        self._make_pipeline = make_pipeline
        self._clock = clock
        self._sessions: dict[str, Session] = {}
        self._lock = threading.Lock()
        if root is None:
            self.root = Path(tempfile.mkdtemp(prefix="anomalysd-"))
            weakref.finalize(self, shutil.rmtree, self.root, ignore_errors=True)
        else:
            self.root = Path(root)
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)

    def __len__(self) -> int:
        with self._lock:
            return len(self._sessions)

    def get(self, key: str | None) -> Session:
        """Returns the session of a key, which counts as a use, or a new one.

        Args:
            key: None, or an unknown or expired key, for a new session.

        Raises:
            ValueError: there is no place for a new session.
        """
        self.sweep()
        leaving = None
        with self._lock:
            session = self._sessions.get(key) if isinstance(key, str) else None
            if session is not None:
                session.touch()
                return session
            if len(self._sessions) >= self.limits.sessions:
                # Sessions without parts leave first, and among equals the one that was idle longest.
                leaving = max(self._sessions.values(), key=lambda one: (one.may_leave, not one.parts, one.idle))
                if not leaving.may_leave:
                    raise ValueError(
                        f"The app is busy: all {self.limits.sessions} places are taken; try again in a few minutes."
                    )
                del self._sessions[leaving.key]
            session = Session(Path(tempfile.mkdtemp(dir=self.root)), self.limits, self._make_pipeline, self._clock)
            self._sessions[session.key] = session
        if leaving is not None:
            leaving._end()
        return session

    def renew(self, key: str) -> Session | None:
        """Gives a session a new key in place of the old; returns the session, or None for an unknown key."""
        with self._lock:
            session = self._sessions.pop(key, None)
            if session is not None:
                session.key = secrets.token_urlsafe(16)
                session.touch()
                self._sessions[session.key] = session
        return session

    def drop(self, key: str | None) -> None:
        """Ends a session and deletes its files, once its running work has ended; ignores unknown keys."""
        with self._lock:
            session = self._sessions.pop(key, None) if isinstance(key, str) else None
        if session is not None:
            session._end()

    def sweep(self) -> int:
        """Ends the sessions whose time to live is over.

        Returns:
            Their number.
        """
        with self._lock:
            over = [session for session in self._sessions.values() if session.idle > self.limits.idle_seconds]
            for session in over:
                del self._sessions[session.key]
        for session in over:
            session._end()
        return len(over)
