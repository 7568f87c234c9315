"""What the app's tabs do with the model, on the tiny pipeline: sessions, lessons, batches, files."""

import pickle
import threading

import numpy as np
import pytest
import torch

from anomalysd_pipeline.app import model, teaching, views, work
from anomalysd_pipeline.app.handouts import KEPT, Handouts
from anomalysd_pipeline.app.lessons import Canceled, Lesson, make_lesson
from anomalysd_pipeline.app.limits import Limits
from anomalysd_pipeline.app.model import Carried, Knowledge, own_pipeline
from anomalysd_pipeline.app.sessions import SessionStore
from anomalysd_pipeline.app.turns import Turns
from anomalysd_pipeline.app.uploads import expand
from anomalysd_pipeline.knowledge import KEYS

from .tiny_adaptations import adapted_to, defective, drawn, inspected, learned, pictures, quick_pipeline


@pytest.fixture(scope="module")
def base():
    pipe = quick_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def store(base):
    return SessionStore(Limits(), lambda: own_pipeline(base))


@pytest.fixture
def session(store):
    return store.get(None)


def taught(session, length="quick", name="nut", turns=None, cancel=None, prompts=None):
    lesson = Lesson(name, pictures("nut"), prompts, length)
    return list(work.teach(session, turns or Turns(), lesson, cancel or threading.Event()))


def facts_of(pipe):
    """What a lesson may change, comparable."""
    return (
        {name: pipe.config[name] for name in KEYS},
        sorted(pipe.bank.state_dict()),
        sorted(pipe.adapters.state_dict()),
    )


class TestOwnPipeline:
    def test_shares_weights_but_no_parts(self, base):
        mine = own_pipeline(base)
        assert mine.unet is base.unet and mine.vae is base.vae and mine.bank is not base.bank
        mine.add_category("ring", pictures("ring"))
        assert mine.categories == ["ring"] and base.categories == [] and "ring" not in base.bank
        assert mine.config.resolution == base.config.resolution

    def test_keeps_the_adaptations_of_the_checkpoint_and_its_own(self):
        base = adapted_to("ring")
        base.add_category("nut", pictures("nut"))
        expected = inspected(base, "ring", "ring"), inspected(base, "nut")
        mine, other = own_pipeline(base), own_pipeline(base)
        assert mine.adaptations == ["ring"] and mine.adapters is not base.adapters
        mine.learn({"nut": pictures("nut")}, learned("nut"), calibrate=False)
        other.learn({"nut": pictures("nut")}, drawn(1), calibrate=False)
        maps = [inspected(pipe, "nut") for pipe in (base, mine, other)]
        assert len({m.numpy().tobytes() for m in maps}) == 3 and torch.equal(maps[0], expected[1])
        assert base.adaptations == ["ring"] and mine.adaptations == ["nut", "ring"]
        assert all(torch.equal(inspected(pipe, "ring", "ring"), expected[0]) for pipe in (mine, base, other))

    def test_knowledge_goes_from_one_to_another(self):
        source = own_pipeline(adapted_to("nut"))
        target = own_pipeline(quick_pipeline())
        Knowledge.of(source).give(target)
        assert torch.equal(inspected(target, "nut"), inspected(source, "nut"))
        assert target.categories == ["nut"] and target.adaptations == ["nut"]


class TestCarried:
    """What happens to a pipeline on a GPU that is lent: it is copied to another process."""

    def test_weights_stay_and_results_are_the_same(self, tmp_path, monkeypatch):
        quick_pipeline().save_pretrained(tmp_path)
        monkeypatch.setenv("ANOMALYSD_MODEL", str(tmp_path))
        model.shared_models.cache_clear()
        pipe = adapted_to("nut", pipe=own_pipeline(model.Models(str(tmp_path)).base()))
        sent = pickle.dumps(Carried(pipe))
        arrived = pickle.loads(sent).pipe
        model.shared_models.cache_clear()
        assert torch.equal(inspected(arrived, "nut"), inspected(pipe, "nut"))
        weights = sum(p.numel() * p.element_size() for p in pipe.unet.parameters())
        assert len(sent) < weights
        assert arrived.unet is not pipe.unet


class TestInspect:
    def test_a_part_without_threshold(self, session):
        found = work.inspect_one(session, Turns(), None, pictures("nut")[0], "a.png")
        assert found.sentence == "No verdict: this part has no threshold yet" and "Teach" in found.remedy
        assert found.proposed is None and found.result.anomaly_map.shape == (64, 64)
        values = found.values()
        assert values["threshold"] is None and values["file"] == "a.png" and values["part"] == "Any part"

    def test_equals_the_pipeline(self, session):
        taught(session)
        found = work.inspect_one(session, Turns(), "nut", defective("nut"))
        out = session.pipe(defective("nut"), category="nut")
        assert found.result.score == pytest.approx(float(out.pred_scores[0]))
        assert found.result.threshold == out.thresholds[0] and "× the threshold" in found.sentence
        assert found.values()["times_threshold"] == pytest.approx(found.result.score / out.thresholds[0])
        assert found.proposed.shape == (64, 64) and found.proposed.dtype == bool

    def test_another_thoroughness_has_no_threshold(self, session):
        taught(session)
        session.pipe.register_to_config(preset_overrides={"paper": {"num_inference_steps": 3, "mask_scales": [1, 2]}})
        found = work.inspect_one(session, Turns(), "nut", defective("nut"), preset="paper")
        assert found.result.threshold is None and "Fast" in found.remedy

    @pytest.mark.parametrize(
        ("part", "preset", "named"),
        [
            ("../x", "fast", "`part`"),
            ("x" * 65, "fast", "`part`|part"),
            ("nut", "slow", "`preset`"),
            (5, "fast", "part"),
        ],
    )
    def test_refused(self, session, part, preset, named):
        with pytest.raises(ValueError, match=named):
            work.inspect_one(session, Turns(), part, pictures("nut")[0], preset=preset)

    def test_a_session_that_has_ended(self, store, session):
        store.drop(session.key)
        with pytest.raises(ValueError, match="has ended"):
            work.inspect_one(session, Turns(), None, pictures("nut")[0])


class TestAccept:
    def test_the_threshold_follows_as_by_calibrate(self, base, session):
        taught(session)
        (good,) = pictures("ring")[:1]
        found = work.accept(session, Turns(), "nut", good)
        alone = own_pipeline(base)
        alone.add_category("nut", pictures("nut"))
        before = alone.calibrate("nut", pictures("nut"))
        after = alone.calibrate("nut", [good])
        assert found == alone.config.categories["nut"]["calibration"]
        assert found["pictures"] == before.pictures + 1 and after.threshold != before.threshold
        assert work.inspect_one(session, Turns(), "nut", good).result.threshold == after.threshold

    def test_a_picture_that_was_taught_changes_nothing(self, session):
        taught(session)
        before = session.pipe.config.categories["nut"]["calibration"]
        assert work.accept(session, Turns(), "nut", pictures("nut")[0]) == before

    def test_from_one_picture_a_doubt_is_told_until_others_are_accepted(self, session):
        lesson = Lesson("nut", pictures("nut")[:1], None, "quick")
        *_, last = work.teach(session, Turns(), lesson, threading.Event())
        assert last.facts["is_guess"]
        told = work.inspect_one(session, Turns(), "nut", pictures("nut")[1])
        assert "is a guess, from one picture" in told.remedy
        work.accept(session, Turns(), "nut", pictures("nut")[1])
        assert work.inspect_one(session, Turns(), "nut", pictures("nut")[1]).remedy == ""

    @pytest.mark.parametrize("part", ["ring", work.ANY_PART])
    def test_only_for_parts_that_were_taught(self, session, part):
        taught(session)
        with pytest.raises(ValueError, match=f"`part` must be one that you have taught, got '{part}'"):
            work.accept(session, Turns(), part, pictures("ring")[0])

    def test_not_while_a_part_is_taught(self, session):
        taught(session)
        for state in work.teach(session, Turns(), Lesson("ring", pictures("ring")), threading.Event()):
            if state.stage == "denoiser":
                with pytest.raises(ValueError, match="being taught in this session already"):
                    work.accept(session, Turns(), "nut", pictures("nut")[0])
                break


class TestKeptThreshold:
    def test_verdicts_follow_it_until_another_picture_is_accepted(self, session):
        taught(session)
        record, score = session.pipe.config.categories["nut"], None
        for factor, expected in ((0.5, True), (2.0, False)):
            score = work.inspect_one(session, Turns(), "nut", defective("nut")).result.score
            work.keep_threshold(session, "nut", factor * score)
            found = work.inspect_one(session, Turns(), "nut", defective("nut")).result
            assert (found.threshold, found.is_defective) == (factor * score, expected)
        kept = session.pipe.config.categories["nut"]
        calibration = {**record["calibration"], "threshold": 2 * score}
        assert kept == {**record, "calibration": calibration}
        assert work.accept(session, Turns(), "nut", pictures("nut")[1]) == record["calibration"]

    @pytest.mark.parametrize("threshold", [0, -1.0, float("nan"), float("inf"), None, "2", True])
    def test_only_numbers_above_0(self, session, threshold):
        taught(session)
        before = session.pipe.config.categories["nut"]
        with pytest.raises(ValueError, match="`threshold` must be a number above 0"):
            work.keep_threshold(session, "nut", threshold)
        assert session.pipe.config.categories["nut"] == before

    @pytest.mark.parametrize("part", ["ring", work.ANY_PART])
    def test_only_for_parts_that_were_taught(self, session, part):
        with pytest.raises(ValueError, match=f"`part` must be one that you have taught, got '{part}'"):
            work.keep_threshold(session, part, 1.0)


class TestTeach:
    def test_quick(self, session):
        states = taught(session, prompts={"coarse": ["A nut."], "fine": ["A nut with a hole."]})
        assert states[0].stage == "preparing" and states[-1].stage == "done"
        assert [s.share for s in states] == sorted(s.share for s in states) and states[-1].share == 1
        record = session.pipe.config.categories["nut"]
        assert states[-1].facts["threshold"] == record["calibration"]["threshold"]
        assert session.parts["nut"].pictures == list(pictures("nut")) and not session.parts["nut"].taught
        assert session.pipe.prompt_book.prompts("nut") == ["A nut.", "A nut with a hole."]

    def test_it_waits_only_while_another_has_the_turn(self, session):
        turns, cancel = Turns(), threading.Event()
        with turns.turn():
            states = work.teach(session, turns, Lesson("nut", pictures("nut"), None, "quick"), cancel)
            assert next(states).stage == "waiting"
        assert "waiting" not in {state.stage for state in states}

    def test_one_whose_news_are_all_read_late_has_its_facts(self, session):
        lesson = Lesson("nut", pictures("nut"), None, "quick")
        before = set(threading.enumerate())
        states = work.teach(session, Turns(), lesson, threading.Event())
        assert next(states).stage == "preparing"
        for thread in set(threading.enumerate()) - before:
            thread.join()
        *_, last = states
        assert last.stage == "done" and last.facts["threshold"] > 0
        assert session.parts["nut"].facts == last.facts

    def test_the_threshold_is_that_of_calibrate(self, base, session):
        taught(session)
        alone = own_pipeline(base)
        alone.add_category("nut", pictures("nut"))
        expected = alone.calibrate("nut", pictures("nut")).threshold
        assert session.pipe.config.categories["nut"]["calibration"]["threshold"] == expected

    def test_fewer_false_alarms_raise_the_threshold_also_after_another_picture(self, base, session):
        lesson = Lesson("nut", pictures("nut"), None, "quick", false_alarm_rate=0.01)
        *_, last = work.teach(session, Turns(), lesson, threading.Event())
        alone = own_pipeline(base)
        alone.add_category("nut", pictures("nut"))
        assert last.facts["threshold"] == alone.calibrate("nut", pictures("nut"), 0.01).threshold
        assert last.facts["false_alarm_rate"] == 0.01
        found = work.accept(session, Turns(), "nut", pictures("ring")[0])
        assert found == alone.calibrate("nut", [pictures("ring")[0]], 0.01).to_dict()

    def test_fine_tuned_as_by_adapt(self, base, session):
        states = taught(session, "standard")
        alone = own_pipeline(base)
        alone.adapt({"nut": pictures("nut")})
        assert torch.equal(inspected(session.pipe, "nut"), inspected(alone, "nut"))
        assert session.pipe.config.categories == alone.config.categories and session.parts["nut"].taught
        last = states[-1]
        assert {name: len(values) for name, values in last.losses.items()} == {"denoiser": 2, "decoder": 2}
        assert last.picture.size == (2 * 64 + 4, 64)

    def test_thorough_takes_three_times_as_many_steps(self, base):
        lesson = Lesson("nut", pictures("nut"), length="thorough")
        assert teaching.lesson_steps(base, lesson) == {"steps": 6, "decoder_steps": 6}

    @pytest.mark.parametrize("stage", ["denoiser", "decoder", "calibrating"])
    def test_canceled(self, session, stage):
        taught(session, name="kept")
        before, scores = facts_of(session.pipe), inspected(session.pipe, "kept")
        cancel, seen = threading.Event(), []

        def until_canceled():
            for state in work.teach(session, Turns(), Lesson("nut", pictures("nut"), length="standard"), cancel):
                seen.append(state.stage)
                if state.stage == stage:
                    assert work.cancel_lesson(session)

        with pytest.raises(Canceled):
            until_canceled()
        assert seen[-1] == stage and "done" not in seen
        assert facts_of(session.pipe) == before and list(session.parts) == ["kept"]
        assert torch.equal(inspected(session.pipe, "kept"), scores)
        assert not work.cancel_lesson(session)

    def test_left_by_the_visitor(self, session):
        turns = Turns()
        states = work.teach(session, turns, Lesson("nut", pictures("nut")), threading.Event())
        next(states)
        states.close()
        with turns.turn():  # nobody holds it any more
            assert session.parts == {} and session.pipe.categories == []

    def test_an_error_leaves_the_session(self, session):
        with pytest.raises(ValueError, match="learning_rate|nothing|`"):
            taught(session, name="a/b", length="standard")
        assert session.parts == {} and session.pipe.categories == []
        taught(session)

    def test_one_at_a_time_in_a_session(self, session):
        first = work.teach(session, Turns(), Lesson("nut", pictures("nut")), threading.Event())
        next(first)
        with pytest.raises(ValueError, match="already"):
            taught(session)
        first.close()
        taught(session)

    def test_gives_way_to_inspections_and_neither_disturbs_the_other(self, base, store):
        other = store.get(None)
        taught(other, "standard", name="mine")
        expected = work.inspect_one(other, Turns(), "mine", defective("nut")).result
        alone = store.get(None)
        taught(alone, "standard")
        session, turns, found = store.get(None), Turns(), []

        def inspect_often():
            for _ in range(6):
                found.append(work.inspect_one(other, turns, "mine", defective("nut")).result)

        thread, during = threading.Thread(target=inspect_often), 0
        for state in work.teach(session, turns, Lesson("nut", pictures("nut"), length="standard"), threading.Event()):
            if state.stage == "denoiser" and not thread.ident:
                thread.start()
            if state.stage != "done":
                during = len(found)
        thread.join()
        assert during >= 1 and len(found) == 6
        assert {result.score for result in found} == {expected.score}
        assert torch.equal(inspected(session.pipe, "nut"), inspected(alone.pipe, "nut"))
        one, two = (s.pipe.config.categories["nut"]["calibration"] for s in (session, alone))
        assert one == two

    def test_parts_are_bounded(self, base):
        session = SessionStore(Limits(parts=1), lambda: own_pipeline(base)).get(None)
        taught(session)
        with pytest.raises(ValueError, match="room for 1"):
            taught(session, name="ring")
        taught(session)  # the same one anew


class TestLesson:
    def test_prompts_come_from_lines(self):
        lesson = make_lesson(" hex  nut ", [], "A nut.\n\n A good nut. \n", "", "quick", Limits())
        assert lesson.name == "hex nut" and lesson.prompts == {"coarse": ["A nut.", "A good nut."], "fine": []}
        assert make_lesson("hex_nut", [], "", "Sharp edges.", "quick", Limits()).prompts["coarse"] == [
            "A perfect hex nut."
        ]
        assert make_lesson("nut", [], None, "\n", "quick", Limits()).prompts is None

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ({"name": ""}, "name"),
            ({"name": "a/b"}, "name"),
            ({"name": None}, "name"),
            ({"coarse": "x" * 301}, "coarse"),
            ({"fine": "x\n" * 9}, "fine"),
            ({"fine": "x" * 100_000}, "fine"),
            ({"coarse": ["x"]}, "coarse"),
            ({"length": "forever"}, "length"),
            ({"length": 3}, "length"),
            ({"false_alarm_rate": 0.5}, "false_alarm_rate"),
            ({"false_alarm_rate": "1 in 20"}, "false_alarm_rate"),
            ({"false_alarm_rate": float("nan")}, "false_alarm_rate"),
        ],
    )
    def test_refused(self, change, named):
        given = {"name": "nut", "pictures": [], "coarse": "", "fine": "", "length": "quick", **change}
        with pytest.raises(ValueError, match=named):
            make_lesson(**given, limits=Limits())


class TestBatch:
    def test_a_bad_file_does_not_stop_the_rest(self, session, tmp_path):
        for index, picture in enumerate(pictures("nut")):
            picture.save(tmp_path / f"{index}.png")
        (tmp_path / "bad.png").write_text("no picture")
        files = [tmp_path / name for name in ("0.png", "bad.png", "1.png")]
        items = list(work.batch(session, Turns(), None, expand(files)))
        assert [(item.number, item.total, item.file) for item in items] == [
            (1, 3, "0.png"),
            (2, 3, "bad.png"),
            (3, 3, "1.png"),
        ]
        assert items[1].inspected is None and "'bad.png'" in items[1].error and str(tmp_path) not in items[1].error
        alone = work.inspect_one(session, Turns(), None, pictures("nut")[1])
        assert items[2].inspected.result.score == alone.result.score


class TestHandouts:
    @pytest.fixture
    def handouts(self, tmp_path):
        return Handouts(tmp_path / "gradio")

    def test_a_file_is_for_its_visitor_alone(self, handouts, session):
        mine, anybodys = handouts.new_folder(session, "me") / "a.png", handouts.new_folder(session, None) / "a.png"
        for path in (mine, anybodys):
            path.write_text("x")
        readers = {who: (handouts.may_read(str(mine), who), handouts.may_read(str(anybodys), who)) for who in
                   ("me", "you", None)}  # fmt: skip
        assert readers == {"me": (True, True), "you": (False, True), None: (False, True)}
        assert not handouts.may_read(str(mine.parent / ".." / mine.parent.name / "a.png"), "you")
        assert not handouts.may_read(str(handouts.folder / "unknown" / "a.png"), "me")

    def test_files_go_with_the_session_or_when_there_are_many(self, handouts, store):
        session = store.get(None)
        folders = [handouts.new_folder(session, "me") for _ in range(KEPT + 2)]
        assert [folder.exists() for folder in folders] == [False] * 2 + [True] * KEPT
        handouts.end(session)
        assert not any(folder.exists() for folder in folders)
        last = handouts.new_folder(session, "me")
        store.drop(session.key)
        del session
        assert not last.exists()

    def test_uploads_are_for_those_who_sent_them(self, handouts, tmp_path):
        handouts.uploads.mkdir()
        sent, elsewhere = handouts.uploads / "a.png", tmp_path / "b.png"
        for path in (sent, elsewhere):
            path.write_text("x")
        handouts.claim(str(sent), "me")
        assert handouts.require_upload(str(sent), "me", "picture") == str(sent)
        (handouts.uploads / "link.png").symlink_to(elsewhere)
        hostile = (sent, "you"), (elsewhere, "me"), (handouts.uploads / ".." / "b.png", "me"), (None, "me")
        for path, who in (*hostile, (handouts.uploads / "link.png", "me"), ("a\0b", "me"), (handouts.uploads, "me")):
            with pytest.raises(ValueError, match="`picture` is no file"):
                handouts.require_upload(path if path is None else str(path), who, "picture")
        handouts.claim(str(sent), "you")  # the same picture, uploaded by two
        assert handouts.may_read(str(sent), "me") and handouts.may_read(str(sent), "you")

    def test_a_file_without_an_owner_is_for_nobody(self, handouts, tmp_path):
        """Neither one that an earlier process left, nor a file elsewhere, nor the folder of all files."""
        left = handouts.uploads / "0123" / "left.png"
        left.parent.mkdir(parents=True)
        left.write_text("x")
        for path in (left, left.parent, handouts.uploads, tmp_path, handouts.uploads / "gone.png"):
            assert not handouts.may_read(str(path), "me") and not handouts.may_read(str(path), None)
        with pytest.raises(ValueError, match="`picture` is no file"):
            handouts.require_upload(str(left), "me", "picture")

    def test_an_upload_that_is_forgotten_is_for_nobody(self, handouts, monkeypatch):
        monkeypatch.setattr("anomalysd_pipeline.app.handouts.UPLOADS", 1)
        first, second = (handouts.uploads / name for name in ("a.png", "b.png"))
        for path in (first, second):
            handouts.claim(str(path), "me")
        assert not handouts.may_read(str(first), "me") and handouts.may_read(str(second), "me")

    def test_a_published_file_is_for_everybody(self, handouts):
        published = handouts.uploads / "0123" / "example.png"
        handouts.publish([str(published)])
        assert handouts.may_read(str(published), "me") and handouts.may_read(str(published), None)
        assert not handouts.may_read(str(published.with_name("other.png")), "me")


class TestViews:
    def test_what_visitors_type_is_escaped(self):
        bad = "<img src=x onerror=alert(1)>'\""
        for shown in (views.verdict(bad, None, bad), views.waiting(bad), views.bar(0.5, bad), views.no_heatmap(bad)):
            assert "<img" not in shown and "&lt;img" in shown

    def test_the_gauge_ends_at_twice_the_threshold(self):
        assert "left:50.00%" in views.gauge(1.0, 1.0) and "left:25.00%" in views.gauge(0.5, 1.0)
        assert "left:100.00%" in views.gauge(9.0, 1.0)
        assert "needle" not in views.gauge(1.0, None) and "needle" not in views.gauge()

    def test_the_curve_of_a_loss_is_smooth_starts_with_the_first_and_keeps_its_steps(self):
        rng = np.random.default_rng(0)
        values = (np.linspace(3, 1, 1000) + rng.normal(0, 0.3, 1000)).tolist()
        curve = views.loss_curve(values)
        assert curve["step"].tolist() == list(range(1, 1001, 5)) and curve["loss"][0] == pytest.approx(values[0])
        assert np.abs(curve["loss"].diff()).mean() < np.abs(np.diff(values[::5])).mean() / 2
        assert curve["loss"].iloc[-1] == pytest.approx(1, abs=0.3)
        assert len(views.loss_curve([])) == 0
        assert views.loss_curve([2.0, 2.0])["loss"].tolist() == pytest.approx([2, 2])
