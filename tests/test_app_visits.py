"""Whose session a page has, and how a visitor goes on with what another page of theirs has left."""

from types import SimpleNamespace

import pytest

pytest.importorskip("gradio")

from anomalysd_pipeline.app.desk import Desk
from anomalysd_pipeline.app.handouts import COOKIE
from anomalysd_pipeline.app.limits import Limits
from anomalysd_pipeline.app.sessions import Part

MINE, THEIRS = "m" * 24, "t" * 24


@pytest.fixture
def desk(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    return Desk(Limits(), SimpleNamespace(names=["embedded"], pipeline=lambda name: None))


def page(number: str, visitor: str | None = MINE):
    """A request as it comes from a page, of which gradio numbers each."""
    return SimpleNamespace(session_hash=number, headers={"cookie": f"{COOKIE}={visitor}"} if visitor else {})


def taught(desk, request):
    visit = desk.visit(None, request)
    visit.session.parts["nut"] = Part("nut")
    return visit


def test_a_page_that_is_gone_leaves_its_parts_to_the_next(desk):
    first = taught(desk, page("1"))
    desk.gone(page("1"))
    assert desk.has_taught(page("2"))
    again = desk.take_up(None, page("2"))
    assert again.session is first.session and again.key != first.key
    assert desk.visit(again.key, page("2")).session is first.session


def test_the_old_page_neither_opens_nor_ends_it(desk):
    first = taught(desk, page("1"))
    desk.gone(page("1"))
    again = desk.take_up(None, page("2"))
    assert desk.visit(first.key, page("1")).session is not again.session
    desk.leave(first.key)
    assert not again.session.dropped and "nut" in desk.visit(again.key, page("2")).session.parts


def test_an_empty_session_of_the_new_page_ends(desk):
    taught(desk, page("1"))
    desk.gone(page("1"))
    empty = desk.visit(None, page("2"))
    desk.take_up(empty.key, page("2"))
    assert empty.session.dropped


@pytest.mark.parametrize("other", [THEIRS, None])
def test_another_visitor_finds_nothing(desk, other):
    taught(desk, page("1"))
    desk.gone(page("1"))
    assert not desk.has_taught(page("2", other))
    with pytest.raises(ValueError, match="are gone; teach them anew"):
        desk.take_up(None, page("2", other))


def test_without_a_cookie_nobody_can_be_known_again(desk):
    taught(desk, page("1", None))
    desk.gone(page("1", None))
    with pytest.raises(ValueError, match="are gone"):
        desk.take_up(None, page("2", None))


def test_an_open_page_keeps_its_parts(desk):
    first = taught(desk, page("1"))
    with pytest.raises(ValueError, match="on another page of yours"):
        desk.take_up(None, page("2"))
    assert desk.visit(first.key, page("1")).session is first.session


def test_parts_of_the_new_page_are_not_lost(desk):
    taught(desk, page("1"))
    desk.gone(page("1"))
    second = taught(desk, page("2"))
    with pytest.raises(ValueError, match="has parts of its own"):
        desk.take_up(second.key, page("2"))
    assert desk.visit(second.key, page("2")).session is second.session


def test_of_several_the_one_used_last(desk):
    older = taught(desk, page("1"))
    newer = taught(desk, page("2"))
    older.session._last_used -= 10
    desk.gone(page("1"))
    desk.gone(page("2"))
    assert desk.take_up(None, page("3")).session is newer.session
