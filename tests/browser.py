"""The app as a process of its own, and a browser in front of it."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

httpx = pytest.importorskip("httpx")  # comes with gradio

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = int(os.environ.get("TEST_PATIENCE", 900))
"""Seconds to wait for a condition; on a busy machine everything takes many times as long."""

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


class App:
    """`python app.py` on a free port.

    Args:
        folder: for its temporary files and its log.
        arguments: of Python; others start the app in another way.
        environment: variables on top of this process's.
    """

    def __init__(self, folder: Path, arguments: Sequence[str] = ("app.py",), **environment: str):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.log = folder, folder / "log.txt"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        own = {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port), "TMPDIR": str(folder)}
        own |= {"GRADIO_TEMP_DIR": str(folder / "gradio"), "GRADIO_ANALYTICS_ENABLED": "False"}
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("ANOMALYSD", "GRADIO"))}
        self.url = f"http://127.0.0.1:{port}/"
        self.began = time.monotonic()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=ROOT,
                env={**inherited, **own, **environment},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def wait(self, pause: float = 0.05) -> float:
        """Until the page can be opened; seconds since the start of the process."""
        while time.monotonic() - self.began < PATIENCE:
            if self.process.poll() is not None:
                raise RuntimeError(f"The app ended by itself:\n{self.log.read_text()[-2000:]}")
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(self.url, timeout=PATIENCE).status_code == 200:
                    return time.monotonic() - self.began
            time.sleep(pause)
        raise RuntimeError(f"The app did not start:\n{self.log.read_text()[-2000:]}")

    def memory(self) -> int:
        """Bytes of memory that the process has now."""
        return psutil.Process(self.process.pid).memory_info().rss

    def is_alive(self) -> bool:
        """Whether it still serves its page."""
        return self.process.poll() is None and httpx.get(self.url, timeout=PATIENCE).status_code == 200

    def stop(self) -> None:
        """Ends the process."""
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextlib.contextmanager
def running_app(folder: Path, arguments: Sequence[str] = ("app.py",), **environment: str):
    """An `App` that can be opened, to the end of the block."""
    app = App(folder, arguments, **environment)
    try:
        app.wait()
        yield app
    finally:
        app.stop()


@contextlib.contextmanager
def open_browser():
    """A browser of Playwright's, to the end of the block; the test is skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no browser tests: playwright is not installed")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no browser tests: chromium is not installed (Debian, Ubuntu: apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, headless=True, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


class Visitor:
    """A person with a browser of their own: cookies, downloads and pages are shared with nobody.

    Attributes:
        page: Playwright's page.
        faults: errors in the page's own scripts, and files that it was refused.
    """

    def __init__(self, browser, url: str, size: tuple[int, int] = (1280, 900)):
        self.context = browser.new_context(
            accept_downloads=True, viewport={"width": size[0], "height": size[1]}, locale="en-US"
        )
        self.context.set_default_timeout(PATIENCE * 1000)
        self.page = self.context.new_page()
        self.faults: list[str] = []
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("response", self._note_refusal)
        self.page.goto(url)
        self.text_of("#inspect-verdict")

    def _note_refusal(self, answer) -> None:
        if answer.status >= 400 and "/file=" in answer.url:
            self.faults.append(f"{answer.status}: {answer.url}")

    def shown_pictures(self, element: str) -> int:
        """How many pictures an element shows, once all of them have arrived."""
        self.page.wait_for_function(
            """element => {
                const pictures = [...document.querySelectorAll(`#${element} img`)];
                return pictures.length && pictures.every(picture => picture.complete && picture.naturalWidth > 0);
            }""",
            arg=element,
        )
        return self.page.locator(f"#{element} img").count()

    def close(self) -> None:
        """Closes all their pages."""
        self.context.close()

    def tab(self, name: str) -> None:
        """Goes to a tab, which on a narrow page may be in the menu of those that have no room."""
        wanted = self.page.get_by_role("tab", name=name, exact=True)
        if wanted.count() and wanted.first.is_visible():
            wanted.first.click()
        else:
            self.page.locator("button.overflow-menu, .overflow-menu button").first.click()
            self.page.locator(".overflow-dropdown button", has_text=name).click()

    def text_of(self, selector: str, holding: str = "") -> str:
        """The text of an element, once it is there and holds another."""
        found = self.page.locator(selector).filter(has_text=holding)
        found.wait_for()
        return found.inner_text()

    def give(self, element: str, *paths) -> None:
        """Uploads files in place of those that are there, and waits until the server has them."""
        place = self.page.locator(f"#{element}")
        for label in ("Remove Image", "Clear"):
            if place.get_by_label(label).count():
                place.get_by_label(label).first.click()
                place.locator("input[type=file]").first.wait_for(state="attached")
        place.locator("input[type=file]").first.set_input_files([str(path) for path in paths])
        if element == "inspect-picture":
            place.locator("img").first.wait_for()
        else:
            place.get_by_text(Path(paths[-1]).stem[:8]).first.wait_for()

    def teach(self, name: str, pictures, length: str = "Quick") -> None:
        """Fills in the tab Teach and starts."""
        self.tab("Teach")
        self.page.locator("#teach-name input, #teach-name textarea").fill(name)
        self.give("teach-pictures", *pictures)
        self.page.locator("#teach-length").get_by_text(f"{length}:").click()
        self.page.locator("#teach-run").click()

    def inspect(self, picture, part: str | None = None) -> str:
        """Inspects a picture in the tab Inspect; the verdict in words."""
        self.tab("Inspect")
        self.give("inspect-picture", picture)
        if part is not None:
            box = self.page.locator("#inspect-part input")
            box.fill(part)
            box.press("Enter")
        before = self.page.locator("#inspect-downloads a[download]").count()
        old = self.page.locator("#inspect-gauge .values").inner_text()
        self.page.locator("#inspect-run").click()
        self.page.wait_for_function(
            """([old, before]) => document.querySelector('#inspect-gauge .values').innerText !== old
               && document.querySelectorAll('#inspect-downloads a[download]').length === 4""",
            arg=[old, before],
        )
        return self.text_of("#inspect-verdict .words")

    def download(self, element: str, ending: str, folder: Path) -> Path:
        """Downloads the file of a list whose name ends so."""
        with self.page.expect_download() as waiting:
            self.page.locator(f"#{element} a[download$='{ending}']").first.click()
        path = folder / waiting.value.suggested_filename
        waiting.value.save_as(path)
        return path

    def parts(self) -> list[str]:
        """The parts that the tab Inspect offers."""
        self.tab("Inspect")
        box = self.page.locator("#inspect-part input")
        box.click()
        options = self.page.locator("#inspect-part [role=option]")
        options.first.wait_for()
        names = [option.strip().lstrip("✓").strip() for option in options.all_inner_texts()]
        box.press("Escape")
        return names
