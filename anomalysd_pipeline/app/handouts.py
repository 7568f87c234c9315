"""Files that visitors may fetch, and the door that serves each to its owner alone.

gradio serves every file in its upload folder to anybody who knows the address. Here a cookie tells visitors apart: a
file is served to the visitor who uploaded it or for whom it was made, and to everybody if it was published. All others
are refused. Files of a visitor without a cookie are protected only by the 128 random bits in their address.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from http.cookies import CookieError, SimpleCookie
from pathlib import Path

from .shares import Shares

COOKIE = "anomalysd_visitor"
KEPT = 20
"""Results of a session that can be fetched at a time; files of older ones are deleted."""

UPLOADS = 20_000
"""Uploads whose owners are remembered; gradio deletes the files after two hours."""

REFUSED = "This file is not yours, or it is gone; make it anew."
BROKEN = "This is no complete upload; try again."

logger = logging.getLogger(__name__)


class Handouts:
    """Keeps the files of visitors, and knows who may fetch them.

    Args:
        root: gradio's upload folder, the only place from which it serves files.
    """

    def __init__(self, root: str | os.PathLike):
        self.uploads = Path(root).resolve()
        self.folder = self.uploads / "handed_out"
        # Reentrant: a session may be collected, and its folders removed, while this thread holds it.
        self._lock = threading.RLock()
        self._owners: dict[str, str | None] = {}  # name of a folder to its visitor
        self._given: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # session to the names of its folders
        self._uploaded: OrderedDict[str, set[str | None]] = OrderedDict()
        self._published: set[str] = set()

    def new_folder(self, session, visitor: str | None) -> Path:
        """Makes an empty folder, from which files are served to that visitor as long as the session lives.

        Args:
            session: a `sessions.Session`; the folder disappears with it, or after `KEPT` further folders.
            visitor: value of the visitor's cookie; None: files are served to everybody who knows the address.
        """
        folder = self.folder / secrets.token_urlsafe(16)
        folder.mkdir(parents=True)
        with self._lock:
            given = self._given.get(session)
            if given is None:
                given = self._given[session] = deque()
                weakref.finalize(session, self._remove_all, given)
            given.append(folder.name)
            self._owners[folder.name] = visitor
            old = given.popleft() if len(given) > KEPT else None
        if old is not None:
            self._remove(old)
        return folder

    def end(self, session) -> None:
        """Deletes all folders of a session."""
        with self._lock:
            given = self._given.get(session, ())
        self._remove_all(given)

    def claim(self, path: str, visitor: str | None) -> None:
        """Notes the visitor who uploaded a file; equal files of several visitors have one path."""
        path = os.path.realpath(path)
        with self._lock:
            self._uploaded.setdefault(path, set()).add(visitor)
            self._uploaded.move_to_end(path)
            while len(self._uploaded) > UPLOADS:
                self._uploaded.popitem(last=False)

    def publish(self, paths: Iterable[str]) -> None:
        """Lets everybody fetch these files: parts of the page itself, such as its examples."""
        resolved = [os.path.realpath(path) for path in paths]
        with self._lock:
            self._published.update(resolved)

    def may_read(self, path: str, visitor: str | None) -> bool:
        """Tells whether a visitor may fetch a file: their own, or a published one; gradio checks the rest."""
        if "://" in path:
            return False  # gradio would fetch it for anybody
        try:
            resolved = Path(os.path.realpath(path))
        except ValueError:  # a character that paths cannot have
            return False
        with self._lock:
            if resolved.is_relative_to(self.folder):
                parts = resolved.relative_to(self.folder).parts
                if len(parts) < 2 or parts[0] not in self._owners:
                    return False
                return self._owners[parts[0]] in (None, visitor)
            owners = self._uploaded.get(str(resolved), ())
            return None in owners or visitor in owners or str(resolved) in self._published

    def require_upload(self, path: object, visitor: str | None, argument: str) -> str:
        """Resolves the path of an upload of this visitor's, or of a published file.

        Args:
            path: as it came in a call.
            visitor: value of the caller's cookie, or None.
            argument: name of the file in errors.

        Raises:
            ValueError: it is any other path, or none.
        """
        if isinstance(path, str) and self.may_read(path, visitor):
            resolved = os.path.realpath(path)
            if Path(resolved).is_relative_to(self.uploads) and os.path.isfile(resolved):
                return resolved
        raise ValueError(f"`{argument}` is no file that you have uploaded, or it is gone; upload it again.")

    def _remove_all(self, given) -> None:
        while True:
            try:
                name = given.popleft()
            except (IndexError, AttributeError):
                return
            self._remove(name)

    def _remove(self, name: str) -> None:
        with self._lock:
            self._owners.pop(name, None)
        shutil.rmtree(self.folder / name, ignore_errors=True)


class Door:
    """Gives each visitor a cookie, notes uploads, and refuses files of others; ASGI middleware.

    Args:
        app: the application behind it.
        handouts: returns the `Handouts`; called with each request, as the page is complete only then.
        shares: bounds uploads.
    """

    def __init__(self, app, handouts: Callable[[], Handouts], shares: Shares):
        self.app, self._handouts, self._shares = app, handouts, shares

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        visitor, path = visitor_of(scope), scope["path"]
        asked = _asked_file(path)
        if asked is not None and not self._handouts().may_read(asked, visitor):
            await _refuse(send)
            return
        if path.endswith("/upload") and scope["method"] == "POST":
            await self._upload(scope, receive, send, visitor)
            return
        # Only with the page or a client's first request, which runs alone; two cookies at once would get mixed up.
        if visitor is None and scope["method"] == "GET":
            send = _greeting(send, path, _is_https(scope))
        await self.app(scope, receive, send)

    async def _upload(self, scope, receive, send, visitor: str | None) -> None:
        # Those without a cookie share a share: any other name could be made up for every file.
        receive = self._shares.receiving(receive, visitor or "")
        answered = []

        async def answering(message) -> None:
            answered.append(message["type"])
            await noted(message)

        noted = self._noting(send, visitor)
        try:
            await self.app(scope, receive, answering)
        except Exception as error:  # what is no upload can cause any error, which is no news for the log
            logger.warning("an upload was refused: %r", error)
            if not answered:
                await _refuse(send, 400, BROKEN)

    def _noting(self, send, visitor: str | None):
        body = bytearray()

        async def noted(message) -> None:
            if message["type"] == "http.response.body":
                body.extend(message.get("body", b""))
                if not message.get("more_body"):
                    for file in _paths(bytes(body)):
                        self._handouts().claim(file, visitor)
            await send(message)

        return noted


def visitor_of(scope) -> str | None:
    """Returns the value of the visitor's cookie in a request, or None."""
    return cookie_of(b"; ".join(value for name, value in scope["headers"] if name == b"cookie").decode("latin-1"))


def cookie_of(header: str) -> str | None:
    """Returns the value of the visitor's cookie from the text of a `Cookie` header, or None."""
    try:
        found = SimpleCookie(header).get(COOKIE)
    except CookieError:
        return None
    return found.value if found is not None and 16 <= len(found.value) <= 64 else None


def _asked_file(path: str) -> str | None:
    for mark in ("/file=", "/file/"):
        _, found, file = path.partition(mark)
        if found:
            return file if os.path.isabs(file) or "://" in file else os.path.abspath(file)
    return None


def _greeting(send, path: str, https: bool):
    async def greeted(message) -> None:
        if message["type"] == "http.response.start":
            headers = list(message.get("headers", []))
            kind = next((value for name, value in headers if name.lower() == b"content-type"), b"")
            if kind.startswith(b"text/html") or path.endswith("/config"):
                # A Space is shown within the page of another site; browsers send only such a cookie from there.
                rules = "SameSite=None; Secure; Partitioned" if https else "SameSite=Lax"
                cookie = f"{COOKIE}={secrets.token_urlsafe(24)}; Path=/; HttpOnly; Max-Age=86400; {rules}"
                message = {**message, "headers": [*headers, (b"set-cookie", cookie.encode())]}
        await send(message)

    return greeted


def _is_https(scope) -> bool:
    forwarded = next((value for name, value in scope["headers"] if name == b"x-forwarded-proto"), b"")
    return scope.get("scheme") == "https" or forwarded.split(b",")[0].strip() == b"https"


def _paths(body: bytes) -> list[str]:
    try:
        found = json.loads(body)
    except ValueError:
        return []
    return [path for path in found if isinstance(path, str)] if isinstance(found, list) else []


async def _refuse(send, status: int = 403, sentence: str = REFUSED) -> None:
    body = json.dumps({"detail": sentence}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
