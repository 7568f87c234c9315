"""The desk that all tabs share: bases, sessions, turns at the model, and files for visitors."""

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
from .pace import PROPORTIONS, Pace
from .sessions import Session, SessionStore
from .space import is_zero_gpu
from .turns import Turns

SWEEP_SECONDS = 60.0
GRACE_SECONDS = 600.0
"""Time that a session outlives its page: enough to sign in elsewhere and come back."""


@dataclass(frozen=True)
class Visit:
    """Describes one call by one visitor.

    Attributes:
        key: base and secret of the session, to be kept in the page's state.
        session: the visitor's.
        base: name of the base under the session.
        visitor: value of the visitor's cookie, or None.
    """

    key: tuple[str, str]
    session: Session
    base: str
    visitor: str | None


class Desk:
    """Holds what all tabs of one page share; safe to use from many threads.

    Args:
        limits: bounds; None: those of the environment.
        models: bases; None: those of this process.
    """

    def __init__(self, limits: Limits | None = None, models: Models | None = None):
        self.limits = Limits.from_environment() if limits is None else limits
        self.models = shared_models() if models is None else models
        self.turns = Turns()
        self._paces: dict[str, Pace] = {}
        self.handouts = Handouts(get_upload_folder())
        self.stores = {
            name: SessionStore(self.limits, functools.partial(self.models.pipeline, name))
            for name in self.models.names
        }
        self._sessions: weakref.WeakValueDictionary = weakref.WeakValueDictionary()  # by key
        self._visitors: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # session to cookie
        self._pages: OrderedDict[str, tuple[str, str]] = OrderedDict()  # gradio's number of a page to a key

    def warm_up(self) -> threading.Thread:
        """Loads the first base in the background, then measures how long lessons take; returns the thread."""

        def work() -> None:
            try:
                pipe = self.models.pipeline(self.models.names[0])
            except ValueError:
                return  # told to the visitor who needs it
            if not is_zero_gpu():  # which is lent to visitors alone
                from .memory import give_back
                from .teaching import measured_pace

                pace = measured_pace(pipe, self.turns)
                give_back()  # a training takes some hundred megabytes more than inspections
                if pace is not None:
                    self._paces[self.models.names[0]] = pace

        thread = threading.Thread(target=work, name="warm up", daemon=True)
        thread.start()
        return thread

    def pace(self, base: str) -> Pace:
        """Returns the pace of lessons on a base; the mere proportions until it is measured."""
        return self._paces.get(base, PROPORTIONS)

    def visit(self, key: tuple[str, str] | None, request: gr.Request | None, base: str | None = None) -> Visit:
        """Finds the session of a call, or opens a new one where there is none or it has ended.

        Args:
            key: from the page's state.
            request: tells the visitor and the page.
            base: name of the base under a new session; None: the first.

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
        """Returns the session of a key, or None where it has ended."""
        session = self._sessions.get(key) if isinstance(key, tuple) else None
        return None if session is None or session.dropped else session

    def has_taught(self, request: gr.Request | None) -> bool:
        """Tells whether this visitor has a session with parts, on another page or from before a reload."""
        return bool(self._with_parts(visitor_of(request)))

    def take_up(self, key: tuple[str, str] | None, request: gr.Request | None) -> Visit:
        """Goes on with the parts of a page that is gone: reloaded, closed, or left to sign in.

        Args:
            key: of the visitor's present page; its session must have no parts, and ends.
            request: tells the visitor.

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
        # The page that is gone still has the old key, and would end this session when gradio forgets it.
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
        """Returns a visitor's sessions with parts, by key."""
        if visitor is None:
            return {}
        mine = [(key, session) for key, session in list(self._sessions.items()) if not session.dropped]
        return {key: session for key, session in mine if session.parts and self._visitors.get(session) == visitor}

    def leave(self, key: tuple[str, str] | None) -> None:
        """Ends a session whose visitor has gone or starts anew."""
        from .work import cancel_lesson

        session = self.present(key)
        if session is not None:
            cancel_lesson(session)
            self.handouts.end(session)
            self.stores[key[0]].drop(key[1])

    def gone(self, request: gr.Request | None) -> None:
        """Ends the session of a page that was closed, unless it is used again within `GRACE_SECONDS`.

        gradio also reports a page as closed when it is reloaded or a phone is locked.
        """
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
        """Ends sessions whose time is over, now and every `SWEEP_SECONDS` while the desk exists."""
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
        """Makes an empty folder from which files are served to that visitor alone."""
        return self.handouts.new_folder(visit.session, visit.visitor)

    def upload_of(self, visitor: str | None, data: object, argument: str) -> tuple[str, str]:
        """Returns path and name of an uploaded file.

        Args:
            visitor: value of the caller's cookie, or None.
            data: the file as gradio passes it in a call.
            argument: its name in errors.

        Raises:
            ValueError: it is no upload, or not this visitor's.
        """
        from .uploads import Missing, visible_name

        if not isinstance(data, dict):
            raise Missing(f"`{argument}` is missing; upload it first.")
        path = self.handouts.require_upload(data.get("path"), visitor, argument)
        name = data.get("orig_name")
        return path, visible_name(name if isinstance(name, str) and name else Path(path).name)

    def uploads_of(self, visitor: str | None, data: object, argument: str) -> list[tuple[str, str]]:
        """Returns path and name of several uploaded files; see `upload_of`.

        Raises:
            ValueError: there are none, or one of them is no upload of this visitor's.
        """
        from .uploads import Missing

        files = data if isinstance(data, list) else [] if data is None else [data]
        if not files:
            raise Missing(f"`{argument}` are missing; upload at least one.")
        return [self.upload_of(visitor, one, argument) for one in files]


def visitor_of(request: gr.Request | None) -> str | None:
    """Returns the value of the visitor's cookie, or None."""
    try:
        return cookie_of(request.headers.get("cookie") or "")
    except AttributeError:  # a call without a request
        return None


def sentences(function):
    """Decorates a function or generator: the visitor sees a ValueError as the sentence it is."""
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
    """Makes an error for the page, escaped because the page would render HTML in it."""
    return gr.Error(html.escape(str(error), quote=False), print_exception=False)
