"""The whole story of a new user, in a browser, with `python app.py` and the embedded checkpoint."""

import csv
import io

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import binary_dilation

from anomalysd_pipeline import synthetic

from .browser import Visitor, open_browser, running_app

pytestmark = pytest.mark.full

pytest.importorskip("gradio")

FAMILY, SEED, DEFECT = "capsule", 11, "contamination"
REACH = 12
"""Pixels around a defect of a 256 px picture that still count as it: its edge is seen with its surroundings."""


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    # First the browser: without one, no app needs to be started.
    with open_browser() as browser, running_app(tmp_path_factory.mktemp("app")) as app:
        app.browser = browser
        yield app


@pytest.fixture
def visitor(app):
    visitor = Visitor(app.browser, app.url)
    yield visitor
    assert visitor.faults == []
    visitor.close()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Four pictures of good parts, three more, and three defective ones; and the mask of the first of these."""
    folder = tmp_path_factory.mktemp("pictures")
    images = {f"good_{i}": image for i, image in enumerate(synthetic.normal_images(FAMILY, 4, SEED))}
    samples = synthetic.test_samples(FAMILY, 3, len(synthetic.DEFECTS), SEED)
    good, broken = samples[:3], sorted(samples[3:], key=lambda sample: sample.defect != DEFECT)[:3]
    images |= {f"test_good_{i}": Image.fromarray(sample.image) for i, sample in enumerate(good)}
    images |= {f"defective_{i}": Image.fromarray(sample.image) for i, sample in enumerate(broken)}
    paths = {name: folder / f"{name}.png" for name in images}
    for name, image in images.items():
        image.save(paths[name])
    return paths, broken[0].mask > 0


def times(words: str) -> float:
    """How many times the threshold a verdict says."""
    return float(words.split(":")[1].split("×")[0])


def test_from_an_example_to_a_batch(visitor, pictures, tmp_path):
    paths, mask = pictures
    visitor.tab("Gallery")
    visitor.page.locator("#gallery-examples .thumbnail-item").first.click()
    assert times(visitor.text_of("#gallery-verdict .words", "×")) > 0
    visitor.page.locator("#gallery-heatmap img.heat").wait_for()
    counts = {name: visitor.shown_pictures(f"gallery-{name}") for name in ("examples", "compare", "masks")}
    assert counts == {"examples": 8, "compare": 2, "masks": 2}
    visitor.page.locator("#gallery-again").click()
    assert visitor.shown_pictures("inspect-picture") == 1
    visitor.page.locator("#inspect-run").click()
    visitor.text_of("#inspect-verdict", "No verdict")

    visitor.teach("my part", [paths[f"good_{i}"] for i in range(4)])
    told = visitor.text_of("#teach-result", "“my part” is ready")
    assert "Learned from 4 pictures" in told

    # The part that was just taught is chosen.
    assert visitor.page.locator("#inspect-part input").input_value() == "my part"
    words = visitor.inspect(paths["defective_0"])
    assert "Defect likely" in words and times(words) > 1
    assert visitor.page.locator("#inspect-heatmap img.heat").count() == 1
    assert visitor.shown_pictures("inspect-compare") == 2 and visitor.shown_pictures("inspect-masks") == 3
    values = np.load(visitor.download("inspect-downloads", "_map.npy", tmp_path))
    hottest = np.unravel_index(values.argmax(), values.shape)
    assert values.shape == mask.shape and binary_dilation(mask, iterations=REACH)[hottest]
    report = visitor.download("inspect-downloads", "_report.pdf", tmp_path)
    assert report.name == "defective_0_report.pdf" and report.read_bytes().startswith(b"%PDF")

    visitor.tab("Batch")
    given = [path for name, path in paths.items() if name.startswith(("test_good", "defective"))]
    visitor.give("batch-files", *given)
    visitor.page.locator("#batch-run").click()
    assert "6 done" in visitor.text_of("#batch-progress", "6 done")
    assert visitor.shown_pictures("batch-gallery") == 6
    table = visitor.download("batch-downloads", ".csv", tmp_path).read_text(encoding="utf-8-sig")
    rows = list(csv.DictReader(io.StringIO(table)))
    assert [row["file"] for row in rows] == [path.name for path in given]
    assert all(row["verdict"] and not row["error"] for row in rows)
    assert float(rows[3]["score"]) / float(rows[3]["threshold"]) == pytest.approx(times(words), abs=0.06)


def test_a_canceled_fine_tuning(visitor, pictures):
    paths, _ = pictures
    visitor.teach("slow part", [paths["good_0"], paths["good_1"]], "Standard")
    visitor.text_of("#teach-progress", "step")
    visitor.page.locator("#teach-cancel").click()
    visitor.text_of("#teach-result", "Canceled")
    assert visitor.parts() == ["Any part"]
    assert "No verdict" in visitor.inspect(paths["test_good_0"])


def test_a_region_that_is_drawn_counts_alone_until_it_is_removed(visitor, pictures, tmp_path):
    paths, _ = pictures
    visitor.teach("half", [paths["good_0"], paths["good_1"]])
    visitor.text_of("#teach-result", "“half” is ready")
    visitor.inspect(paths["defective_0"], "half")
    page = visitor.page
    page.locator("#region button").first.click()
    drawn = page.locator("#region-picture img")
    drawn.wait_for()
    page.locator("#region-apply").click()
    visitor.text_of("#region-whole-fault", "no corners yet")
    for share in (0.02, 0.48):
        box = drawn.bounding_box()
        drawn.click(position={"x": share * box["width"], "y": 2 * share * box["height"]})
    assert page.locator("#region-picture i").count() == 2
    page.locator("#region-apply").click()
    visitor.text_of("#inspect-verdict", "Only the region counts now")
    visitor.inspect(paths["defective_0"], "half")
    assert "outside of the region" in visitor.text_of("#inspect-heatmap")
    found = np.load(visitor.download("inspect-downloads", ".npy", tmp_path))
    assert found[:, :120].any() and not found[:, 130:].any()
    page.locator("#region-whole").click()
    visitor.text_of("#inspect-verdict", "The whole picture counts now")
