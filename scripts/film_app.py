"""Draw the pictures of the app in the documents: a screenshot of a verdict, and an animation of teaching and
inspecting.

    python -m scripts.film_app --out docs

Starts the app and drives it in a browser, with drawn hex nuts and the embedded checkpoint. Writes `app.png` and
`app.gif`. Needs Chromium and the packages of the extra `test`. On a busy machine the times on the page are longer than
a visitor's.
"""

import argparse
import io
import tempfile
from pathlib import Path

from PIL import Image

from anomalysd_pipeline import synthetic

FAMILY, DEFECT, SEED, SIDE = "hex_nut", "crack", 7, 512
WINDOW = (1280, 1120)  # a lesson with its pictures fits
WIDTH = 800  # of the animation
SHORT, LONG = 1200, 2600  # milliseconds that a frame of it stays


def draw_parts(folder: Path) -> tuple[list[Path], Path]:
    """Draws four good parts and a defective one into a folder; returns their files."""
    number = synthetic.DEFECTS.index(DEFECT)
    broken = synthetic.test_samples(FAMILY, 0, number + 1, SEED, SIDE)[number].image
    images = [*synthetic.normal_images(FAMILY, 4, SEED, SIDE), Image.fromarray(broken)]
    paths = [folder / name for name in ("good1.png", "good2.png", "good3.png", "good4.png", "part.png")]
    for path, image in zip(paths, images, strict=True):
        image.save(path)
    return paths[:-1], paths[-1]


class Film:
    """Takes frames of a page.

    Args:
        page: Playwright's.
    """

    def __init__(self, page):
        self.page, self.frames, self.times = page, [], []

    def take(self, time: int = SHORT) -> Image.Image:
        """Adds the page as it is now, for so many milliseconds; returns it in full size."""
        self.page.mouse.move(0, 0)  # nothing is lit up under it
        self.page.evaluate("document.activeElement.blur(); window.scrollTo(0, 0)")
        self.page.wait_for_timeout(500)  # transitions end
        shot = Image.open(io.BytesIO(self.page.screenshot())).convert("RGB")
        self.frames.append(shot.resize((WIDTH, WIDTH * shot.height // shot.width), Image.Resampling.LANCZOS))
        self.times.append(time)
        return shot

    def save(self, path: Path) -> None:
        """Writes an animation that repeats, in one palette, so that nothing flickers."""
        width, height = self.frames[0].size
        strip = Image.new("RGB", (width, height * len(self.frames)))
        for number, frame in enumerate(self.frames):
            strip.paste(frame, (0, number * height))
        palette = strip.quantize(256, Image.Quantize.MEDIANCUT)
        first, *others = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in self.frames]
        first.save(path, save_all=True, append_images=others, duration=self.times, loop=0, optimize=True)


def move_threshold(page, times: float) -> None:
    """Moves the threshold to so many times its value, and waits until the page follows."""
    box = page.locator("#inspect-threshold input[type=number]")
    before = page.locator("#inspect-gauge .values").inner_text()
    box.fill(f"{float(box.input_value()) * times:.3f}")
    box.press("Enter")
    page.wait_for_function("old => document.querySelector('#inspect-gauge .values').innerText !== old", arg=before)


def film(visitor, good: list[Path], broken: Path) -> tuple[Film, Image.Image]:
    """Teaches a part and inspects another; returns the film, and its frame with the verdict in full size."""
    page, roll = visitor.page, Film(visitor.page)
    visitor.tab("Teach")
    page.locator("#teach-length").get_by_text("Quick:").click()
    page.get_by_label("Name of the part").fill("hex nut")
    visitor.give("teach-pictures", *good)
    visitor.shown_pictures("teach-pictures-thumbnails")
    roll.take(LONG)
    page.get_by_role("button", name="Teach this part").click()
    visitor.text_of("#teach-result", "Teaching")
    roll.take()
    visitor.text_of("#teach-result", "is ready")
    roll.take(LONG)
    page.get_by_role("button", name="Inspect this part").click()
    page.locator("#inspect-picture").wait_for()
    visitor.give("inspect-picture", broken)
    visitor.shown_pictures("inspect-picture")
    roll.take()
    visitor.inspect(broken)
    visitor.shown_pictures("inspect-heatmap")
    whole = roll.take(LONG)
    move_threshold(page, 1.6)
    roll.take()
    move_threshold(page, 1 / 1.6)
    roll.take(LONG)
    return roll, whole


def main() -> None:
    from tests.browser import Visitor, open_browser, running_app

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of the pictures (default: docs)")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, open_browser() as browser, running_app(Path(folder) / "app") as app:
        good, broken = draw_parts(Path(folder))
        visitor = Visitor(browser, app.url, WINDOW)
        roll, whole = film(visitor, good, broken)
        visitor.close()
    whole.quantize(256, Image.Quantize.MEDIANCUT).save(arguments.out / "app.png", optimize=True)
    roll.save(arguments.out / "app.gif")
    for name in ("app.png", "app.gif"):
        print(f"{arguments.out / name}: {(arguments.out / name).stat().st_size / 1000:.0f} KB")


if __name__ == "__main__":
    main()
