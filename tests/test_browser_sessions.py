"""Visitors in real browsers before one server: lessons canceled or left, two at once, and names that are markup."""

import zipfile

import pytest
from PIL import Image

from anomalysd_pipeline.synthetic import normal_images

from .browser import PATIENCE, Visitor, open_browser
from .tiny_adaptations import SHORT, quick_pipeline

pytestmark = pytest.mark.full

pytest.importorskip("gradio")

LONG = {**SHORT, "steps": 600}
MARKUP = "<img src=x onerror=window.hacked=1>"


@pytest.fixture(scope="module")
def browser():
    with open_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def served(browser, tmp_path_factory):
    """The page on a tiny pipeline whose lessons "Standard" are long, and its address."""
    folder = tmp_path_factory.mktemp("tiny")
    pipe = quick_pipeline()
    pipe.register_to_config(adaptation=LONG)
    pipe.save_pretrained(folder / "tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "gradio"))
        from anomalysd_pipeline.app import desk
        from anomalysd_pipeline.app.limits import Limits
        from anomalysd_pipeline.app.model import Models
        from anomalysd_pipeline.app.page import build

        patch.setattr(desk, "GRACE_SECONDS", 1.0)
        page = build(Limits(), Models(str(folder / "tiny"), full=False))
        _, url, _ = page.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
        yield page, url
        page.close()


@pytest.fixture
def visitors(browser, served):
    """Opens the page in browsers of their own."""
    opened = []

    def new(**kwargs):
        opened.append(Visitor(browser, served[1], **kwargs))
        return opened[-1]

    yield new
    for visitor in opened:
        visitor.close()


@pytest.fixture
def visitor(visitors):
    return visitors()


@pytest.fixture(scope="module")
def nuts(tmp_path_factory):
    """Paths of three normal pictures."""
    folder = tmp_path_factory.mktemp("nuts")
    paths = [folder / f"nut_{i}.png" for i in range(3)]
    for path, image in zip(paths, normal_images("hex_nut", 3, seed=5, size=64), strict=True):
        image.save(path)
    return paths


def begin_a_long_lesson(visitor, pictures, name="slow"):
    visitor.teach(name, pictures, "Standard")
    visitor.text_of("#teach-progress", "step")


def learn(visitor, pictures, name):
    visitor.teach(name, pictures)
    visitor.text_of("#teach-result", f"“{name}” is ready")


class TestLessons:
    def test_a_canceled_one_changes_nothing(self, visitor, nuts):
        learn(visitor, nuts[:2], "nut")
        before = visitor.inspect(nuts[2])
        begin_a_long_lesson(visitor, nuts[:2])
        visitor.page.locator("#teach-cancel").click()
        assert "Nothing was changed" in visitor.text_of("#teach-result", "Canceled")
        assert visitor.parts() == ["Any part", "nut"]
        assert "No verdict" in visitor.inspect(nuts[0], "Any part")
        assert visitor.inspect(nuts[2], "nut") == before
        assert visitor.faults == []

    def test_its_loss_is_drawn_and_nothing_moves(self, visitor, nuts):
        places = [f"#teach-{name}" for name in ("result", "progress", "loss-denoiser", "loss-decoder", "validation")]

        def layout():  # in the page, whose view may have been scrolled
            return visitor.page.evaluate(
                """places => places.map(place => {
                    const box = document.querySelector(place).getBoundingClientRect();
                    return [box.x, box.y + window.scrollY, box.width, box.height].map(Math.round);
                })""",
                places,
            )

        visitor.tab("Teach")
        visitor.page.locator("#teach-validation").wait_for()
        before = layout()
        begin_a_long_lesson(visitor, nuts[:2])
        visitor.page.wait_for_function(
            """() => {
                const line = document.querySelector('#teach-loss-denoiser .mark-line path');
                return line && line.getAttribute('d').split('L').length > 4;
            }"""
        )
        words = visitor.page.locator("#teach-loss-denoiser").inner_text().split("\n")
        assert "Loss of the denoiser" in words and {"step", "loss"} <= set(words)
        assert visitor.page.locator("#teach-loss-decoder .mark-line path").count() == 0
        assert layout() == before
        visitor.page.locator("#teach-cancel").click()
        visitor.text_of("#teach-result", "Canceled")
        assert layout() == before and visitor.faults == []

    def test_one_left_by_a_reload_ends(self, visitor, nuts, served):
        from anomalysd_pipeline.app import work

        store = served[0].desk.stores["embedded"]
        learn(visitor, nuts[:2], "nut")
        begin_a_long_lesson(visitor, nuts[:2])
        (old,) = work._lessons
        visitor.page.reload()
        visitor.text_of("#inspect-verdict")  # the page is there
        assert visitor.parts() == ["Any part"]
        learn(visitor, nuts[:2], "other")
        for _ in range(1200):
            if old.dropped and old not in work._lessons:
                break
            visitor.page.wait_for_timeout(100)  # lets the server's threads run
        assert old.dropped and not old.folder.exists() and old.key not in store._sessions
        assert visitor.parts() == ["Any part", "other"]

    def test_who_comes_back_is_told_what_became_of_the_parts(self, visitors, nuts, monkeypatch):
        from anomalysd_pipeline.app import desk

        monkeypatch.setattr(desk, "GRACE_SECONDS", 1000.0)  # a session that is still there when the page comes back
        visitor = visitors()
        learn(visitor, nuts[:2], "nut")
        assert visitor.page.locator("#note", has_text="Welcome back").count() == 0
        visitor.page.reload()
        assert "not here" in visitor.text_of("#note", "Welcome back")
        assert visitors().page.locator("#note", has_text="Welcome back").count() == 0

    def test_who_comes_back_may_go_on_with_the_parts(self, visitors, nuts, monkeypatch):
        from anomalysd_pipeline.app import desk

        monkeypatch.setattr(desk, "GRACE_SECONDS", 1000.0)
        visitor = visitors()
        learn(visitor, nuts[:2], "nut")
        before = visitor.inspect(nuts[2], "nut")
        visitor.page.reload()
        visitor.page.locator("#take-up").click()
        visitor.page.locator("#note").wait_for(state="hidden")
        assert visitor.parts() == ["Any part", "nut"] and visitor.inspect(nuts[2], "nut") == before

    def test_the_parts_of_an_open_page_stay_there(self, visitors, nuts):
        visitor = visitors()
        learn(visitor, nuts[:2], "nut")
        first, visitor.page = visitor.page, visitor.context.new_page()
        visitor.page.goto(first.url)
        visitor.page.locator("#take-up").click()
        visitor.page.get_by_text("are on another page of yours").first.wait_for()
        assert visitor.parts() == ["Any part"]
        visitor.page = first
        assert visitor.parts() == ["Any part", "nut"]

    def test_an_inspection_comes_between_the_steps(self, visitors, nuts):
        teacher, other = visitors(), visitors()
        begin_a_long_lesson(teacher, nuts[:2])
        assert "No verdict" in other.inspect(nuts[2])
        assert "step" in teacher.page.locator("#teach-progress").inner_text()
        teacher.page.locator("#teach-cancel").click()
        teacher.text_of("#teach-result", "Canceled")


class TestTwoAtOnce:
    @pytest.mark.canary
    @pytest.mark.timeout(300)  # starts the app and a browser
    def test_parts_results_and_files_do_not_mix(self, visitors, nuts, tmp_path):
        one, two = visitors(), visitors()
        one.teach("first", nuts[:2])
        two.teach("second", nuts[1:])
        one.text_of("#teach-result", "“first” is ready")
        two.text_of("#teach-result", "“second” is ready")
        assert one.parts() == ["Any part", "first"] and two.parts() == ["Any part", "second"]
        Image.open(nuts[0]).rotate(90).save(tmp_path / "mine.png")
        assert one.inspect(tmp_path / "mine.png") and two.inspect(nuts[2])
        links = [v.page.locator("#inspect-downloads a[download]").all() for v in (one, two)]
        names = [[link.get_attribute("download") for link in of] for of in links]
        assert all(name.startswith("mine") for name in names[0]) and len(names[0]) == 4
        assert all(name.startswith("nut_2") for name in names[1])
        for link in links[0]:
            address = link.get_attribute("href")
            assert one.context.request.get(address).status == 200
            refused = two.context.request.get(address)
            assert refused.status == 403 and "not yours" in refused.json()["detail"]


class TestMarkup:
    def test_in_names_is_shown_and_not_run(self, visitor, nuts, tmp_path):
        (tmp_path / f"{MARKUP}.png").write_text("no picture")
        with zipfile.ZipFile(tmp_path / "batch.zip", "w") as archive:
            archive.write(nuts[0], f"{MARKUP}.png")
            archive.writestr(f"{MARKUP}bad.png", "no picture")
        visitor.tab("Batch")
        visitor.give("batch-files", tmp_path / "batch.zip", tmp_path / f"{MARKUP}.png")
        visitor.page.locator("#batch-run").click()
        assert "could not be read" in visitor.text_of("#batch-progress", "done")
        assert "onerror" in visitor.text_of("#batch-table", "onerror")
        visitor.teach(MARKUP, nuts[:2])
        assert "onerror" in visitor.text_of("#teach-result", "is ready")
        assert visitor.parts() == ["Any part", MARKUP]
        assert visitor.page.evaluate("() => window.hacked") is None
        assert visitor.page.locator("img[src='x']").count() == 0


class TestLayout:
    @pytest.mark.parametrize("size", [(1280, 900), (390, 844)])
    def test_nothing_is_wider_than_the_window(self, visitors, size):
        visitor = visitors(size=size)
        for name in ("Inspect", "Teach", "Batch", "Gallery", "About"):
            visitor.tab(name)
            visitor.page.locator("[role=tabpanel]:visible").first.wait_for()
            width = visitor.page.evaluate("() => document.documentElement.scrollWidth")
            assert width <= size[0], name
        assert visitor.faults == []

    @pytest.mark.parametrize("size", [(1280, 900), (390, 844)])
    def test_the_tabs_have_one_width_and_programs_find_their_address(self, visitors, size):
        visitor, widths = visitors(size=size), set()
        for name in ("Inspect", "Teach", "Batch", "Gallery", "About"):
            visitor.tab(name)
            visitor.page.locator("[role=tabpanel]:visible").first.wait_for()
            widths.add(visitor.page.locator("main").first.bounding_box()["width"])
        assert len(widths) == 1
        visitor.page.locator("footer .show-api").click()
        visitor.page.locator(".api-docs-wrap", has_text="/teach").wait_for()
        assert visitor.page.locator(".snippet:visible", has_text="MCP").count() == 0

    def test_nothing_jumps_and_a_phone_shows_the_verdict(self, visitors, nuts):
        visitor = visitors(size=(390, 844))
        tops = """() => [...document.querySelectorAll('[id^=inspect-]')].filter(one => one.offsetParent)
            .map(one => [one.id, Math.round(one.getBoundingClientRect().top + scrollY)])"""
        visitor.page.wait_for_function(
            "() => [...document.querySelectorAll('#inspect-examples img')].filter(one => one.naturalWidth).length == 8"
        )
        visitor.give("inspect-picture", nuts[0])
        before = visitor.page.evaluate(tops)
        visitor.page.locator("#inspect-run").click()
        visitor.text_of("#inspect-verdict", "No verdict")
        assert -1 <= visitor.page.locator("#inspect-verdict").bounding_box()["y"] < 100  # fractions of a pixel
        assert visitor.shown_pictures("inspect-masks") == 1 and visitor.page.evaluate(tops) == before

    def test_another_picture_takes_the_result_away_also_while_it_comes(self, visitors, nuts):
        visitor = visitors()
        visitor.inspect(nuts[0])
        visitor.give("inspect-picture", nuts[1])
        visitor.text_of("#inspect-verdict", "Press Inspect")
        assert visitor.page.locator("#inspect-heatmap img, #inspect-masks img").count() == 0
        visitor.page.locator("#inspect-run").click()
        visitor.give("inspect-picture", nuts[2])
        visitor.page.wait_for_timeout(3000)
        assert visitor.text_of("#inspect-verdict").startswith("Press Inspect")

    def test_the_page_fetches_nothing_from_elsewhere(self, browser, served):
        asked = []
        context = browser.new_context()
        page = context.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.goto(served[1])
        page.locator("#inspect-run").wait_for(timeout=PATIENCE * 1000)
        context.close()
        assert asked and all(url.startswith((served[1], "data:", "blob:")) for url in asked)
