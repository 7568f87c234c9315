"""Uploads end: those that never finish, that are broken off, that are none, and those beyond a visitor's share."""

import asyncio
import logging

import gradio as gr
import pytest
from gradio.routes import App
from starlette.middleware import Middleware

from anomalysd_pipeline.app.handouts import COOKIE, Door, Handouts
from anomalysd_pipeline.app.shares import KEPT_SECONDS, Shares

HEAD = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
END = b"\r\n--x--\r\n"
FORM = b"multipart/form-data; boundary=x"


@pytest.fixture
def served(tmp_path, monkeypatch):
    """Makes gradio's own app behind the door: bytes of a share and seconds of an upload to a function that uploads."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    handouts = Handouts(tmp_path)

    def make(share=10**6, seconds=60.0):
        with gr.Blocks(analytics_enabled=False) as page:
            gr.File()
        page.max_file_size = 10**6
        door = Middleware(Door, handouts=lambda: handouts, shares=Shares(share, seconds))
        app = App.create_app(page, app_kwargs={"middleware": [door]})
        return lambda *given, **options: asyncio.run(upload(app, *given, **options))

    return make


async def upload(app, pieces, then=None, visitor="v" * 20, kind=FORM):
    """Sends an upload in pieces; `then` None: silence, else a last message. Returns status and text."""
    cookie = [] if visitor is None else [(b"cookie", f"{COOKIE}={visitor}".encode())]
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/gradio_api/upload",
        "raw_path": b"/gradio_api/upload",
        "query_string": b"",
        "root_path": "",
        "headers": [(b"host", b"x"), *([(b"content-type", kind)] if kind else []), *cookie],
        "scheme": "http",
        "server": ("x", 80),
        "client": ("127.0.0.1", 5),
        "http_version": "1.1",
    }
    messages = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    messages += [] if then is None else [then]
    sent = []

    async def receive():
        if not messages:
            await asyncio.sleep(3600)
        return messages.pop(0)

    async def send(message):
        sent.append(message)

    await asyncio.wait_for(app(scope, receive, send), 20)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent).decode()


def whole(size=1000):
    return [HEAD, bytes(size)], {"type": "http.request", "body": END, "more_body": False}


def left(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_whole_one_is_taken(served, tmp_path):
    status, text = served()(*whole())
    assert status == 200 and "a.png" in text and len(left(tmp_path)) == 1


def test_silence_is_ended_and_leaves_nothing(served, tmp_path):
    status, text = served(seconds=0.3)([HEAD, bytes(100)])
    assert (status, text) == (400, "The upload takes too long; try again.") and left(tmp_path) == []


def test_one_that_is_broken_off_leaves_nothing_and_no_traceback(served, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        status, text = served()([HEAD, bytes(100)], {"type": "http.disconnect"})
    assert status == 400 and "broken off" in text and left(tmp_path) == []
    assert not any(record.exc_info for record in caplog.records)


@pytest.mark.parametrize("kind", [None, b"text/plain", b"multipart/form-data", b"multipart/form-data; boundary="])
def test_what_is_no_upload_is_one_sentence(served, tmp_path, kind):
    status, text = served()(*whole(), kind=kind)
    assert status in (400, 413, 422) and "Traceback" not in text and left(tmp_path) == []


@pytest.mark.parametrize("visitor", ["v" * 20, None])
def test_a_visitors_share(served, visitor):
    send = served(share=2500)
    assert [send(*whole(), visitor=visitor)[0] for _ in range(3)] == [200, 200, 400]
    status, text = send(*whole(), visitor=visitor)
    assert status == 400 and "more than 0.0025 MB in two hours" in text
    assert send(*whole(), visitor="w" * 20)[0] == 200  # another's


def test_what_is_deleted_counts_no_more():
    now = [0.0]
    shares = Shares(100, 60, lambda: now[0])
    assert shares.add("v", 90) and not shares.add("v", 20)
    now[0] = KEPT_SECONDS + 1
    assert shares.add("v", 100)
