"""The app as a Space starts it, in a browser: signing in, and publishing to a repository of one's own."""

from pathlib import Path

import pytest
import yaml

from anomalysd_pipeline.synthetic import normal_images

from .browser import Visitor, open_browser, running_app
from .hub_server import HubServer
from .tiny_adaptations import quick_pipeline

pytestmark = pytest.mark.full

pytest.importorskip("gradio")
pytest.importorskip("authlib", reason="no sign-in: gradio's extra `oauth` is not installed")

README = Path(__file__).resolve().parents[1] / "README.md"


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    """The app with the variables of a Space, its Hub, and the place to sign in there."""
    from .openid_server import OpenIdServer

    folder = tmp_path_factory.mktemp("space")
    quick_pipeline().save_pretrained(folder / "tiny")
    metadata = yaml.safe_load(README.read_text(encoding="utf-8").split("---\n")[1])
    assert metadata["hf_oauth"] is True
    scopes = " ".join(["openid", "profile", *metadata["hf_oauth_scopes"]])
    with open_browser() as browser, HubServer() as hub, OpenIdServer(hub.token) as provider:
        environment = {
            "SYSTEM": "spaces",
            "SPACE_ID": "user/anomalysd",
            "ANOMALYSD_MODEL": str(folder / "tiny"),
            "HF_ENDPOINT": hub.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(folder / "home"),
            "NO_PROXY": "127.0.0.1",
            **provider.environment(scopes),
        }
        with running_app(folder / "app", **environment) as app:
            app.browser, app.hub, app.provider = browser, hub, provider
            yield app


@pytest.fixture
def visitor(space):
    visitor = Visitor(space.browser, space.url)
    yield visitor
    assert visitor.faults == []
    visitor.close()


def open_publishing(visitor):
    visitor.tab("Teach")
    button = visitor.page.locator("#teach-login")
    if not button.is_visible():
        visitor.page.get_by_text("Publish on the Hugging Face Hub").click()
    button.wait_for()
    return button


def publish(visitor, repo):
    visitor.page.locator("#teach-repo input, #teach-repo textarea").fill(repo)
    visitor.page.locator("#teach-push").click()


def test_publishing_asks_for_a_sign_in(visitor, space):
    assert open_publishing(visitor).inner_text() == "Sign in with Hugging Face"
    publish(visitor, "user/stranger")
    visitor.page.get_by_text("You are not signed in").first.wait_for()
    assert "user/stranger" not in space.hub.repositories


def test_from_a_lesson_to_a_repository_of_one_s_own(visitor, space, tmp_path):
    nuts = [tmp_path / f"nut_{i}.png" for i in range(2)]
    for path, image in zip(nuts, normal_images("hex_nut", 2, seed=5, size=64), strict=True):
        image.save(path)
    visitor.teach("nut", nuts, "Standard")
    visitor.text_of("#teach-result", "“nut” is ready")

    open_publishing(visitor).click()
    visitor.page.locator("#agree").click()
    visitor.text_of("#inspect-verdict")
    assert visitor.page.url.startswith(space.url) and "manage-repos" in space.provider.asked[-1]
    visitor.page.locator("#take-up").click()  # what was taught before the way there and back is still here
    visitor.page.locator("#note").wait_for(state="hidden")
    assert "nut" in visitor.parts()

    button = open_publishing(visitor)
    visitor.page.locator("#teach-login", has_text=f"Logout ({space.provider.user})").wait_for()
    publish(visitor, "user/nut")
    assert f"{space.hub.url}/user/nut" in visitor.text_of("#teach-pushed", "Published")
    arrived = space.hub.repositories["user/nut"]
    assert arrived.private and {"README.md", "adaptation.json"} <= set(arrived.branches["main"])

    # The token is neither on the page nor in the log; after signing out nothing more is published.
    assert space.hub.token not in visitor.page.content() and space.hub.token not in space.log.read_text()
    with visitor.page.expect_navigation():
        button.click()
    visitor.text_of("#inspect-verdict")
    open_publishing(visitor)
    visitor.page.locator("#teach-login", has_text="Sign in with Hugging Face").wait_for()
    publish(visitor, "user/again")
    visitor.page.get_by_text("You are not signed in").first.wait_for()
    assert "user/again" not in space.hub.repositories
