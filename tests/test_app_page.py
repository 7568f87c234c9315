"""What the page shows and when it stops showing it: its own functions, called as a browser calls them."""

import inspect
import json
import zipfile
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio")

import gradio as gr

from anomalysd_pipeline.app import work
from anomalysd_pipeline.app.heat import HeatView, Shown
from anomalysd_pipeline.app.inspect_tab import CHANGED, EMPTY
from anomalysd_pipeline.app.limits import Limits
from anomalysd_pipeline.app.model import Models, own_pipeline
from anomalysd_pipeline.app.pace import PROPORTIONS, Pace, Plan, pace_of
from anomalysd_pipeline.app.space import links
from anomalysd_pipeline.app.thumbnails import MOST, pictures_of, strip

from .tiny_adaptations import pictures, quick_pipeline

BASE = "embedded"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    quick_pipeline().save_pretrained(folder / "tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "gradio"))
        from anomalysd_pipeline.app.page import build

        yield build(Limits(), Models(str(folder / "tiny"), full=False))


class Browser:
    """A visitor's page without a browser; components are known by their names, functions by theirs."""

    def __init__(self, page):
        self.page, self.key = page, None
        self.request = SimpleNamespace(session_hash=str(id(self)), headers={})

    def upload(self, image, name="a.png"):
        """Uploads a picture; returns its description as gradio passes it."""
        uploads = self.page.desk.handouts.uploads
        path = uploads / f"{len(list(uploads.iterdir())) if uploads.is_dir() else 0}" / name
        path.parent.mkdir(parents=True)
        image.save(path)
        self.page.desk.handouts.claim(str(path), None)
        return {"path": str(path), "orig_name": name}

    def call(self, name, *values):
        """Calls the page's function of that name; returns the latest value of each output."""
        found = next(one for one in self.page.fns.values() if one.name == name and one.api_visibility == "private")
        named = {"request": self.request} if "request" in inspect.signature(found.fn).parameters else {}
        answer = found.fn(self.key, *values, **named)
        told = {}
        for one in answer if inspect.isgenerator(answer) else [answer]:
            if not isinstance(one, dict):
                one = dict(zip(found.outputs, one if isinstance(one, tuple) else (one,), strict=True))
            told |= {component.elem_id or component: value for component, value in one.items()}
        self.key = next((value for value in told.values() if isinstance(value, tuple) and value[0] == BASE), self.key)
        return told

    def select(self, name, value, row):
        """Calls the function of that name for a selected row."""
        found = next(one for one in self.page.fns.values() if one.name == name)
        return found.fn(value, SimpleNamespace(row_value=row))

    @property
    def session(self):
        return self.page.desk.present(self.key)


@pytest.fixture
def browser(page):
    return Browser(page)


def teach(browser, given, name="nut", coarse="", depth=0):
    return browser.call("give_lesson", name, given, coarse, "", "quick", 0.05, depth)


@pytest.fixture
def taught(browser):
    """A browser that has taught nuts."""
    told = teach(browser, [browser.upload(image) for image in pictures("nut")])
    assert "“nut” is ready" in told["teach-result"]
    return browser


def is_active(update) -> bool:
    return (update if isinstance(update, dict) else update.get_config())["interactive"]


class TestNothingOld:
    def test_another_picture_part_or_thoroughness_clears_the_result(self, taught):
        picture, other = taught.upload(pictures("nut")[0]), taught.upload(pictures("ring")[0])
        for inputs in ((other, "nut", "fast"), (picture, "Any part", "fast"), (picture, "nut", "paper")):
            told = taught.call("show", "nut", picture, "fast")
            assert "× the threshold" in told["inspect-verdict"]
            assert told["inspect-masks"] and told["inspect-compare"] and told["inspect-downloads"]
            told = taught.call("clear", *inputs)
            assert CHANGED in told["inspect-verdict"] and "No score yet" in told["inspect-gauge"]
            assert "<img" not in told["inspect-heatmap"]
            assert told["inspect-masks"] is told["inspect-compare"] is told["inspect-downloads"] is None
            assert not is_active(told["inspect-good"]) and not is_active(told["inspect-threshold"])
            assert taught.session.shown is None

    def test_the_result_of_these_very_inputs_stays(self, taught):
        picture = taught.upload(pictures("nut")[0])
        taught.call("show", "nut", picture, "fast")
        told = taught.call("clear", picture, "nut", "fast")
        assert all(value == gr.skip() for value in told.values()) and taught.session.shown is not None

    def test_without_a_picture_it_asks_for_one(self, browser):
        assert EMPTY in browser.call("clear", None, "Any part", "fast")["inspect-verdict"]

    def test_a_lesson_takes_away_what_was_said_before(self, browser):
        picture = browser.upload(pictures("nut")[0])
        assert "no threshold yet" in browser.call("show", "nut", picture, "fast")["inspect-verdict"]
        told = teach(browser, [picture, browser.upload(pictures("nut")[1])])
        assert "“nut” is chosen" in told["inspect-verdict"] and told["inspect-downloads"] is None
        assert browser.session.shown is None


class TestThreshold:
    @pytest.fixture
    def shown(self, taught):
        taught.picture = taught.upload(pictures("ring")[0])
        taught.call("show", "nut", taught.picture, "fast")
        return taught

    def test_verdict_gauge_and_heatmap_move_at_once(self, shown):
        score, own = shown.session.shown.score, shown.session.shown.threshold
        low, high = (shown.call("try_out", factor * score) for factor in (0.5, 2.0))
        assert "Defect likely: 2.0 ×" in low["inspect-verdict"] and "Looks normal: 0.5 ×" in high["inspect-verdict"]
        assert "left:100.00%" in low["inspect-gauge"] and "left:25.00%" in high["inspect-gauge"]
        assert "Outline" in low["inspect-heatmap"] and "Outline" not in high["inspect-heatmap"]
        assert is_active(high["inspect-keep"])
        assert shown.session.pipe.config.categories["nut"]["calibration"]["threshold"] == own

    def test_it_is_kept_for_the_next_picture(self, shown):
        value = 2 * shown.session.shown.score
        told = shown.call("hold", "nut", shown.picture, "fast", value)
        assert "Looks normal: 0.5 ×" in told["inspect-verdict"] and "You have set" in told["inspect-verdict"]
        told = shown.call("show", "nut", shown.upload(pictures("nut")[0]), "fast")
        assert f"threshold {value:.3f}" in told["inspect-gauge"]

    def test_without_a_result_it_changes_nothing(self, browser):
        assert all(value == gr.skip() for value in browser.call("try_out", 1.0).values())

    @pytest.mark.parametrize(("threshold", "score"), [(4.184348, 10.67), (0.0123, 0.001), (731.2, 900.0)])
    def test_the_slider_reaches_beyond_the_score_in_round_steps(self, threshold, score):
        reach = Shown((), None, None, score, threshold).reach()
        assert 0 < reach["minimum"] < threshold < reach["maximum"] and reach["maximum"] > score
        assert reach["value"] == pytest.approx(threshold, rel=0.01)
        assert all(len(f"{value!r}") <= 7 for value in reach.values()), reach


class TestHeatView:
    def test_it_has_an_outline_where_something_is_marked(self):
        values = np.zeros((64, 64), np.float32)
        values[10:20, 10:20] = 2.0
        view = HeatView(pictures("nut")[0], values)
        assert view.html(1.0, outlined=True).count("<img") == 3
        assert view.html(3.0, outlined=True).count("<img") == view.html(1.0).count("<img") == 2
        assert view.html(None, 1.0).count("<img") == 2

    def test_a_region_narrower_than_a_pixel_of_the_page_is_outlined(self):
        values = np.zeros((1000, 2000), np.float32)
        values[501, 777] = 2.0
        assert "Outline" in HeatView(Image.new("RGB", (2000, 1000)), values).html(1.9, outlined=True)


class TestFaults:
    def test_they_stand_at_their_field_in_the_words_of_the_page(self, browser):
        told = browser.call("show", "Any part", None, "fast")
        assert "Add a picture to inspect." in told["inspect-picture-fault"] and "inspect-verdict" not in told
        told = teach(browser, None)
        assert "Add at least one picture of a good part." in told["teach-pictures-fault"]
        assert told["teach-name-fault"] == ""
        picture = browser.upload(pictures("nut")[0])
        told = teach(browser, [picture], " ")
        assert "Give the part a name." in told["teach-name-fault"] and told["teach-pictures-fault"] == ""
        told = teach(browser, [picture], "a/b")
        assert "The name must be" in told["teach-name-fault"] and "`" not in told["teach-name-fault"]
        told = teach(browser, [picture], coarse="x" * 301)
        assert "“In short” has 301 characters" in told["teach-coarse-fault"] and is_active(told["teach-run"])

    def test_a_file_that_is_no_picture(self, browser):
        picture = browser.upload(pictures("nut")[0], "notes.png")
        Path(picture["path"]).write_text("no picture")
        told = browser.call("show", "Any part", picture, "fast")
        assert "&#x27;notes.png&#x27; is damaged" in told["inspect-picture-fault"]
        assert "&#x27;notes.png&#x27; is damaged" in teach(browser, [picture])["teach-pictures-fault"]

    def test_those_of_no_field_are_raised(self, taught):
        picture = taught.upload(pictures("nut")[0])
        with work.only_lesson(taught.session, None), pytest.raises(gr.Error, match="being taught in this session"):
            teach(taught, [picture])


class TestPublishing:
    def test_what_is_wrong_is_said_at_its_field(self, taught, monkeypatch):
        def publish(repo="ann/nut", part="nut"):
            told = taught.call("locally", repo, part, True, True)
            return {name[6:-6]: text for name, text in told.items() if str(name).endswith("-fault") and text}

        taught.request.client = SimpleNamespace(host="127.0.0.1")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        assert "There is no sign-in" in publish()["push"]
        monkeypatch.setenv("HF_TOKEN", "hf_none")
        assert publish().keys() == {"push-part"} and "teach it with Standard" in publish()["push-part"]
        assert "Name the repository" in publish(" ")["repo"]
        with monkeypatch.context() as patch:
            patch.setattr(taught.session.parts["nut"], "taught", True)
            known = taught.session.pipe.knowledge
            known.store("nut", adaptation="nut")
            known.add_adaptation("nut", {"settings": {}}, {})
            taught.session.pipe.knowledge = known
            assert "must be &#x27;user/name&#x27;" in publish("nut")["repo"]


class TestRegion:
    LEFT = [[0.0, 0.0], [0.5, 1.0]]  # two opposite corners

    @staticmethod
    def alone(page, *region):
        pipe = own_pipeline(page.desk.models.base())
        pipe.add_category("nut", pictures("nut"))
        for one in region:
            pipe.set_region("nut", one)
        return pipe, pipe.calibrate("nut", pictures("nut")).threshold

    def test_only_what_lies_inside_counts(self, taught):
        picture = taught.upload(pictures("ring")[0])
        taught.call("show", "nut", picture, "fast")
        drawn = taught.call("look", "nut")["region-picture"]
        assert drawn["picture"].startswith("data:image") and drawn["corners"] == []
        told = taught.call("set_to", "nut", self.LEFT)
        assert "Only the region counts now" in told["inspect-verdict"] and "<img" not in told["inspect-heatmap"]
        assert told["region-picture"]["picture"] != drawn["picture"]  # darkened outside
        pipe, threshold = self.alone(taught.page, [(0, 0), (0.5, 0), (0.5, 1), (0, 1)])
        assert taught.session.pipe.config.categories["nut"]["calibration"]["threshold"] == pytest.approx(threshold)
        told = taught.call("show", "nut", picture, "fast")
        assert "outside of the region" in told["inspect-heatmap"]
        out = pipe(pictures("ring")[0], category="nut")
        assert taught.session.shown.score == pytest.approx(float(out.pred_scores[0]))
        (_, npy, *_) = told["inspect-downloads"]
        found = np.load(npy)
        assert not found[:, 33:].any() and found[:, :32].any()

    def test_it_travels_with_the_part_and_can_be_removed_there(self, taught):
        told = taught.call("set_to", "nut", [[0.1, 0.1], [0.9, 0.2], [0.5, 0.9]])
        kept = taught.session.pipe.config.categories["nut"]["region"]
        other = Browser(taught.page)
        file = told["teach-download"].value["path"]
        told = other.call("take_in", {"path": file, "orig_name": "nut.safetensors"})
        assert "Loaded “nut”" in told["teach-result"]
        assert other.session.pipe.config.categories["nut"]["region"] == kept
        assert other.call("look", "nut")["region-picture"]["picture"]  # of the pictures in the file
        assert not other.session.parts["nut"].pictures
        told = other.call("set_to", "nut", [])
        assert "whole picture counts" in told["inspect-verdict"]
        record = other.session.pipe.config.categories["nut"]
        assert "region" not in record and record["calibration"]["threshold"] == pytest.approx(
            self.alone(other.page)[1], rel=0.05
        )

    def test_taught_again_it_keeps_its_region_and_says_so(self, taught):
        taught.call("set_to", "nut", self.LEFT)
        told = teach(taught, [taught.upload(image) for image in pictures("nut")])
        assert "region of interest" in told["teach-result"]
        assert taught.session.pipe.config.categories["nut"]["region"]

    def test_what_is_wrong_is_said_in_the_box_and_changes_nothing(self, taught):
        before = taught.session.pipe.config.categories["nut"]
        for wrong in ("x.png", [[0, 0]], [[0, 0], [2, 1]], [[0, 0], [float("nan"), 1]], [[0, 0], "ab"], [[0, 0], [1]]):
            assert "The region must" in taught.call("set_to", "nut", wrong)["region-whole-fault"], wrong
        assert "no corners yet" in taught.call("set_inside", "nut", [])["region-whole-fault"]
        assert "too small" in taught.call("set_to", "nut", [[0.5, 0.5], [0.51, 0.9]])["region-whole-fault"]
        assert "teach it first" in taught.call("set_to", "Any part", self.LEFT)["inspect-part-fault"]
        assert taught.session.pipe.config.categories["nut"] == before
        assert "Teach a part" in taught.call("look", "Any part")["region-picture"]["text"]

    def test_a_threshold_that_is_kept_is_in_the_part_s_file(self, taught):
        told = taught.call("hold", "nut", taught.upload(pictures("nut")[0]), "fast", 7.5)
        other = Browser(taught.page)
        other.call("take_in", {"path": told["teach-download"].value["path"], "orig_name": "nut.safetensors"})
        assert other.session.pipe.config.categories["nut"]["calibration"]["threshold"] == 7.5


class TestDepth:
    """Gray of 12 bits in files of 16: one depth for a part."""

    @pytest.fixture
    def deep(self):
        return [np.asarray(image.convert("L")).astype(np.uint16) * 16 for image in pictures("nut")]

    def test_is_one_for_a_part_and_what_is_inspected_as_it(self, browser, deep):
        deep[0] = deep[0] // 4  # alone it would be taken for 10 bits
        told = teach(browser, [browser.upload(Image.fromarray(one)) for one in deep])
        assert "16-bit gray was read as 12 bits" in told["teach-result"]
        pipe = browser.session.pipe
        assert pipe.config.categories["nut"]["bit_depth"] == 12
        alone = quick_pipeline()
        alone.add_category("nut", deep)
        assert pipe.config.categories["nut"]["digests"] == alone.config.categories["nut"]["digests"]

        dark = browser.upload(Image.fromarray(deep[1] // 16))
        wanted = float(pipe(deep[1] // 16, category="nut").pred_scores[0])
        browser.call("show", "nut", dark, "fast")
        assert browser.session.shown.score == pytest.approx(wanted)
        told = browser.call("inspect_all", [dark], "nut", "fast")
        assert told["batch-table"][0][3] == pytest.approx(wanted, abs=1e-4)

    def test_values_beyond_it_are_refused(self, browser, deep):
        teach(browser, [browser.upload(Image.fromarray(one)) for one in deep])
        told = browser.call("show", "nut", browser.upload(Image.fromarray(deep[0] * 8)), "fast")
        assert "12 bits end at 4095" in told["inspect-picture-fault"]

    def test_it_can_be_given(self, browser, deep):
        told = teach(browser, [browser.upload(Image.fromarray(one)) for one in deep], depth=16)
        assert "16-bit gray" not in told["teach-result"]
        assert browser.session.pipe.config.categories["nut"]["bit_depth"] == 16
        for wrong in (7, 17, "12", 12.0, None, True):
            told = teach(browser, [browser.upload(Image.fromarray(deep[0]))], depth=wrong)
            assert "from 8 to 16" in told["teach-depth-fault"], wrong


class TestTimes:
    def test_they_are_told_once_the_machine_is_measured(self, browser, monkeypatch):
        def words(given) -> list[str]:
            return [words for words, _ in browser.call("offer", given)["teach-length"].choices]

        desk = browser.page.desk
        monkeypatch.setattr(desk, "_paces", {})
        assert not any("about" in text for text in words(None))
        desk._paces[BASE] = Pace(1.0, 10.0, 60.0, 60.0, 0.0, measured=True)
        assert words([{}])[0].endswith("about 40 s") and words([{}] * 8)[0].endswith("about 1.5 min")
        assert [text.rpartition(", ")[2] for text in words(None)] == ["about 45 s", "about 5 min", "about 13 min"]

    def test_the_machine_is_measured_in_the_background(self, browser, monkeypatch):
        desk = browser.page.desk
        monkeypatch.setattr(desk, "_paces", {})
        desk.warm_up().join(60)
        pace = desk.pace(BASE)
        assert pace.measured and min(pace.denoiser, pace.decoder, pace.score, pace.preview) > 0
        assert desk.models.base().categories == [] and desk.models.base().adaptations == []

    def test_the_time_left_falls_though_the_stages_take_other_times_than_planned(self):
        plan, left, elapsed = Plan(Pace().stages(4, 4, 20, 10), measured=True), [], 0.0
        taken = {"preparing": 1.0, "denoiser": 25.0, "decoder": 10.0, "calibrating": 6.0}
        for stage, seconds in taken.items():
            for part in range(10):
                plan.share(stage, part / 10)
                left.append(plan.seconds_left(elapsed + seconds * part / 10) + 0.0)
            elapsed += seconds
        rises = [after - before for before, after in pairwise(left)]
        assert max(rises) < 0.05 * left[0] and left[-1] < 0.1 * left[0]
        assert plan.share("denoiser", 0.0) > 0.9  # a share never falls

    def test_nothing_is_told_of_an_unmeasured_machine_at_first(self):
        plan = Plan(PROPORTIONS.stages(4, 4))
        assert plan.seconds_left(1.0) is None
        assert plan.seconds_left(6.0 * plan.share("calibrating", 0.5)) == pytest.approx(6.0 * (1 - plan._share))

    def test_the_pace_is_that_of_the_later_steps(self):
        marks = [(0.0, "preparing", 0, None)]
        for stage, start in (("denoiser", 5.0), ("decoder", 20.0)):
            marks += [(start, stage, 1, marks[-1][3]), (start + 0.5, stage, 1, object())]
            marks += [(start + 2.5, stage, 2, marks[-1][3]), (start + 3.0, stage, 2, object())]
        marks += [(24.0, "calibrating", 0, marks[-1][3]), (30.0, "calibrating", 100, marks[-1][3])]
        assert pace_of(marks, 2) == Pace(0.5, 3.0, 2.0, 2.0, 0.5, measured=True)


class TestBatch:
    @pytest.fixture
    def files(self, taught):
        odd = pictures("nut")[0].copy()
        odd.paste((255, 0, 255), (20, 20, 44, 44))
        given = {"good.png": pictures("nut")[0], "odd.png": odd, "ring.png": pictures("ring")[0]}
        return [taught.upload(image, name) for name, image in given.items()]

    def test_the_most_suspicious_comes_first_and_a_row_opens_its_heatmap(self, taught, files):
        notes = taught.upload(pictures("nut")[0], "notes.png")
        Path(notes["path"]).write_text("no picture")
        told = taught.call("inspect_all", [notes, *files], "nut", "fast")
        table = told["batch-table"]
        scores = [row[3] for row in table[:-1]]
        assert scores == sorted(scores, reverse=True) and table[0][0] != "good.png"
        assert table[-1][:2] == ["notes.png", "Could not be read"]
        shown = [{"image": {"path": path}, "caption": caption} for path, caption in told["batch-gallery"]]
        for number, row in enumerate(table[:-1]):
            assert taught.select("open_row", shown, row).selected_index == number
        assert taught.select("open_row", shown, table[-1]).selected_index is None
        assert "4 done as “nut”" in told["batch-progress"]

    def test_the_zip_has_masks_and_json(self, taught, files):
        told = taught.call("inspect_all", files, "nut", "fast")
        with zipfile.ZipFile(told["batch-downloads"][1]) as archive:
            rows = json.loads(archive.read("results.json"))["pictures"]
            assert [row["file"] for row in rows] == ["good.png", "odd.png", "ring.png"]
            assert rows[1]["score"] == pytest.approx(
                next(r[3] for r in told["batch-table"] if r[0] == "odd.png"), abs=1e-4
            )
            with Image.open(archive.open(rows[1]["mask"])) as mask:
                assert mask.size == (64, 64) and mask.mode == "1"

    def test_canceled_it_keeps_what_is_done(self, taught, files, monkeypatch):
        from anomalysd_pipeline.app import batch_work

        def add(work_, item, add=batch_work.BatchWork._add):
            add(work_, item)
            assert work.cancel_batch(taught.session)

        monkeypatch.setattr(batch_work.BatchWork, "_add", add)
        told = taught.call("inspect_all", files, "nut", "fast")
        assert "Canceled: 1 of 3 done" in told["batch-progress"] and [row[0] for row in told["batch-table"]] == [
            "good.png"
        ]
        assert len(told["batch-downloads"]) == 2 and is_active(told["batch-run"])

    def test_other_files_clear_it(self, taught, files):
        taught.call("inspect_all", files[:1], "nut", "fast")
        told = taught.call("clear_batch")
        assert told["batch-table"] == [] and told["batch-downloads"] is None

    def test_without_files_it_says_so_at_the_field(self, browser):
        told = browser.call("inspect_all", None, "Any part", "fast")
        assert "Add at least one picture" in told["batch-files-fault"] and is_active(told["batch-run"])


class TestExamples:
    def test_one_shows_its_stored_result_until_another_picture_comes(self, browser):
        told = browser.call("example", "Any part", "fast", 1)
        assert "Defect likely" in told["inspect-verdict"] and "stored result" in told["inspect-verdict"]
        assert told["inspect-masks"] and told["inspect-compare"]
        picture = {"path": told["inspect-picture"]}
        kept = browser.call("clear", picture, "Any part", "fast")
        assert all(value == gr.skip() for value in kept.values())
        other = browser.upload(pictures("nut")[0])
        assert CHANGED in browser.call("clear", other, "Any part", "fast")["inspect-verdict"]


class TestLinks:
    def test_of_a_space_are_its_own_files(self, monkeypatch):
        monkeypatch.setenv("SPACE_ID", "ann/nuts")
        found = links()
        assert list(found) == ["Paper", "Repository", "Docs"]
        assert found["Docs"] == "https://huggingface.co/spaces/ann/nuts/blob/main/docs/app.md"

    def test_elsewhere_are_those_of_the_package(self, monkeypatch):
        named = SimpleNamespace(get_all=lambda name: ["Repository, https://a/b", "Other, https://c"])
        monkeypatch.setattr("importlib.metadata.metadata", lambda name: named)
        monkeypatch.delenv("SPACE_ID", raising=False)
        assert links() == {"Paper": "https://arxiv.org/abs/2408.01960", "Repository": "https://a/b"}


class TestThumbnails:
    def test_each_upload_is_seen_and_a_bad_one_is_marked(self, browser):
        good, bad = browser.upload(pictures("nut")[0], "‹b›.png"), browser.upload(pictures("nut")[1], "<i>.png")
        Path(bad["path"]).write_text("no picture")
        named = [(one["path"], one["orig_name"]) for one in (good, bad)]
        shown = strip(pictures_of(named, Limits()))
        assert shown.count("<img") == 1 and "‹b›.png" in shown and "<i>" not in shown
        assert "is damaged" in shown
        assert "and 3 more" in strip(pictures_of(named[:1] * (MOST + 3), Limits()))
