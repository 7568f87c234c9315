"""A visitor's adaptation on its way to the Hub: to a repository of theirs, by their own token alone."""

import threading

import pytest

pytest.importorskip("gradio")

from anomalysd_pipeline.app import work
from anomalysd_pipeline.app.desk import Desk
from anomalysd_pipeline.app.hub_box import _publish
from anomalysd_pipeline.app.lessons import Lesson
from anomalysd_pipeline.app.limits import Limits
from anomalysd_pipeline.app.model import Models

from .tiny_adaptations import pictures, quick_pipeline


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("publish")
    quick_pipeline().save_pretrained(folder / "tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "gradio"))
        yield Desk(Limits(), Models(str(folder / "tiny"), full=False))


@pytest.fixture
def visit(desk):
    visit = desk.visit(None, None)
    lesson = Lesson("nut", tuple(pictures("nut")), None, "standard", (2, 1))
    list(work.teach(visit.session, desk.turns, lesson, threading.Event()))
    return visit


def test_what_was_taught_arrives(desk, visit, hub):
    said = _publish(desk, visit, "user/nut", "", True, hub.token)
    assert "Published" in said and f"{hub.url}/user/nut" in said
    arrived = hub.repositories["user/nut"]
    assert arrived.private and {"README.md", "adaptation.json"} <= set(arrived.branches["main"])
    assert not any("unet" in name for name in arrived.branches["main"])


def test_a_wrong_token_is_a_sentence_without_it(desk, visit, hub):
    token = "hf_" + "wrong" * 7
    with pytest.raises(ValueError) as refused:
        _publish(desk, visit, "user/nut", "", True, token)
    assert token not in str(refused.value) and str(visit.session.folder) not in str(refused.value)
    assert not hub.repositories and "nut" in visit.session.parts


def test_without_an_adaptation_there_is_nothing_to_publish(desk, hub):
    with pytest.raises(ValueError, match="teach it with Standard or Thorough"):
        _publish(desk, desk.visit(None, None), "user/nut", "", True, hub.token)
    assert hub.requests == []
