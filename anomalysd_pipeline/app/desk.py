"""What all tabs share: the bases, the sessions, whose turn it is, and the files handed out."""

from __future__ import annotations

import functools
import html
import inspect
import threading
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import gradio as gr
from gradio.utils import get_upload_folder

from .handouts import Handouts, cookie_of
from .limits import Limits
from .model import Models, shared_models
from .sessions import Session, SessionStore
from .turns import Turns

SWEEP_SECONDS = 60.0
GRACE_SECONDS = 600.0
"""How long a session outlives its page: long enough to sign in elsewhere and come back."""


@dataclass(frozen=True)
class Visit:
    """One call by one visitor.

    key: to be kept in the page's state.
    session: theirs.
    base: name of the base that it rests on.
    visitor: value of their cookie, or None.
    """

    key: tuple[str, str]
    session: Session
    base: str
    visitor: str | None


class Desk:
    """One for each page; safe to use from many threads.

    Args:
        limits: None: those of the environment.
        models: None: those of this process.
    """

    def __init__(self, limits: Limits | None = None, models: Models | None = None):
        self.limits = Limits.from_environment() if limits is None else limits
        self.models = shared_models() if models is None else models
        self.turns = Turns()
        self.handouts = Handouts(get_upload_folder())
        self.stores = {
            name: SessionStore(self.limits, functools.partial(self.models.pipeline, name))
            for name in self.models.names
        }
        self._sessions: weakref.WeakValueDictionary = weakref.WeakValueDictionary()  # by key
        self._visitors: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # session to cookie
        self._pages: OrderedDict[str, tuple[str, str]] = OrderedDict()  # gradio's number of a page to a key

    def visit(self, key: tuple[str, str] | None, request: gr.Request | None, base: str | None = None) -> Visit:
        """Who calls, by the page's state and the request; a new session where there is none, or it has ended.

        Args:
            base: what a new session rests on; None: the first.

        Raises:
            ValueError: all places are taken.
        """
        visitor = visitor_of(request)
        held = self.present(key)
        if held is not None and self._visitors.get(held) != visitor:
            key = None  # gradio knows sessions by a number that a browser makes up; a guessed one opens nothing
        name, secret = key if isinstance(key, tuple) else (base or self.models.names[0], None)
        session = self.stores[name].get(secret)
        key = (name, session.key)
        self._visitors[session] = visitor
        self._sessions[key] = session
        page = getattr(request, "session_hash", None)
        if page:
            self._pages[page] = key
            self._pages.move_to_end(page)
            while len(self._pages) > 10 * self.limits.sessions:
                self._pages.popitem(last=False)
        return Visit(key, session, name, visitor)

    def present(self, key: tuple[str, str] | None) -> Session | None:
        """The session of a key, if it is still there."""
        session = self._sessions.get(key) if isinstance(key, tuple) else None
        return None if session is None or session.dropped else session

    def has_taught(self, request: gr.Request | None) -> bool:
        """Whether this visitor has a session with parts, on another page or from before a reload."""
        return bool(self._with_parts(visitor_of(request)))

    def take_up(self, key: tuple[str, str] | None, request: gr.Request | None) -> Visit:
        """Goes on with the parts that the visitor had on a page that is gone: reloaded, closed, or left to sign in.

        Args:
            key: of the page they are on now, whose session, which has no parts yet, ends.

        Raises:
            ValueError: this page has parts already, or there are none to go on with.
        """
        from .work import cancel_lesson

        own = self.present(key)
        if own is not None and own.parts:
            raise ValueError("This page has parts of its own already; download their adaptations, then reload it.")
        visitor, in_use = visitor_of(request), set(self._pages.values())
        had = self._with_parts(visitor)
        left = {one: session for one, session in had.items() if one not in in_use}
        if not left:
            said = "are on another page of yours; go on there, or close it" if had else "are gone; teach them anew"
            raise ValueError(f"The parts that you taught before {said}.")
        old = min(left, key=lambda one: left[one].idle)
        # The page that is gone still has the old key, and ends that session when gradio forgets it.
        session = self.stores[old[0]].renew(old[1])
        if session is None:
            raise ValueError("The parts that you taught before are gone; teach them anew.")
        cancel_lesson(session)  # nobody sees it
        if own is not None:
            self.leave(key)
        self._sessions.pop(old, None)
        key = (old[0], session.key)
        self._sessions[key] = session
        return self.visit(key, request)

    def _with_parts(self, visitor: str | None) -> dict[tuple[str, str], Session]:
        """A visitor's sessions with parts, by key."""
        if visitor is None:
            return {}
        mine = [(key, session) for key, session in list(self._sessions.items()) if not session.dropped]
        return {key: session for key, session in mine if session.parts and self._visitors.get(session) == visitor}

    def leave(self, key: tuple[str, str] | None) -> None:
        """Ends a session: the visitor has gone, or wants to start anew."""
        from .work import cancel_lesson

        session = self.present(key)
        if session is not None:
            cancel_lesson(session)
            self.handouts.end(session)
            self.stores[key[0]].drop(key[1])

    def gone(self, request: gr.Request | None) -> None:
        """A page was closed or reloaded, or a phone was locked: its session ends unless it is used again soon."""
        key = self._pages.pop(getattr(request, "session_hash", None), None)
        session = self.present(key)
        if session is None:
            return

        def end() -> None:
            if session.idle >= GRACE_SECONDS - 1:
                self.leave(key)

        timer = threading.Timer(GRACE_SECONDS, end)
        timer.daemon = True
        timer.start()

    def sweep(self) -> None:
        """Ends sessions whose time is over, now and from then on every minute; for as long as the desk is there."""
        own = weakref.ref(self)

        def again() -> None:
            desk = own()
            if desk is not None:
                desk.sweep()

        for store in self.stores.values():
            store.sweep()
        timer = threading.Timer(SWEEP_SECONDS, again)
        timer.daemon = True
        timer.start()

    def new_folder(self, visit: Visit) -> Path:
        """An empty folder from which files are served to that visitor alone."""
        return self.handouts.new_folder(visit.session, visit.visitor)

    def upload_of(self, visitor: str | None, data: object, argument: str) -> tuple[str, str]:
        """Path and name of an uploaded file, as it comes in a call.

        Raises:
            ValueError: it is none, or not this visitor's.
        """
        from .uploads import visible_name

        if not isinstance(data, dict):
            raise ValueError(f"`{argument}` is missing; upload it first.")
        path = self.handouts.require_upload(data.get("path"), visitor, argument)
        name = data.get("orig_name")
        return path, visible_name(name if isinstance(name, str) and name else Path(path).name)

    def uploads_of(self, visitor: str | None, data: object, argument: str) -> list[tuple[str, str]]:
        """The same of several files.

        Raises:
            ValueError: there are none, or one of them is none.
        """
        files = data if isinstance(data, list) else [] if data is None else [data]
        if not files:
            raise ValueError(f"`{argument}` are missing; upload at least one.")
        return [self.upload_of(visitor, one, argument) for one in files]


def visitor_of(request: gr.Request | None) -> str | None:
    """The value of the visitor's cookie, or None."""
    try:
        return cookie_of(request.headers.get("cookie") or "")
    except AttributeError:  # a call without a request
        return None


def sentences(function):
    """Shows a ValueError to the visitor as the sentence it is; for functions and generators."""
    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def wrapped(*args, **kwargs):
            try:
                yield from function(*args, **kwargs)
            except ValueError as error:
                raise shown(error) from error
    else:

        @functools.wraps(function)
        def wrapped(*args, **kwargs):
            try:
                return function(*args, **kwargs)
            except ValueError as error:
                raise shown(error) from error

    return wrapped


def shown(error: ValueError) -> gr.Error:
    """An error for the page, which would render what looks like HTML in it."""
    return gr.Error(html.escape(str(error), quote=False), print_exception=False)
