"""Evaluations from the shell on one process: data sets and folders, tables, draws, and what is refused. Interrupted
runs and several processes: see test_evaluate_runs.py."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score

from anomalysd_pipeline import AnomalySDPipeline, synthetic
from anomalysd_pipeline.common.progress import Progress
from anomalysd_pipeline.data.datasets import draw_shots
from anomalysd_pipeline.evaluation.metrics import pixel_metrics
from anomalysd_pipeline.evaluation.results import read_results

from .tiny_evaluation import BRIEF, FLOOR, PARTS, contents, draw_parts, refused, run

SIDE = 32


def summary_of(out) -> dict:
    return json.loads((out / "summary.json").read_text())


def table_of(out) -> list[dict]:
    return read_results(out)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return draw_parts(tmp_path_factory.mktemp("parts") / "data")


@pytest.fixture(scope="module")
def finished(parts, tmp_path_factory):
    """Two numbers of shots and two seeds; its categories and seeds not in order."""
    out = tmp_path_factory.mktemp("finished") / "out"
    given = ["--categories", "ring", "hex_nut", "--shots", 2, 1, "--seeds", 3, 0, "--keep_maps"]
    assert run("--data", parts, *given, *FLOOR, "--out", out) == 0
    return out


def rows_of(out, shots, seed, category):
    own = (shots, seed, category)
    return [row for row in table_of(out) if (row["shots"], row["seed"], row["category"]) == own]


def figure(out, shots, category, metric):
    (result,) = [result for result in summary_of(out)["results"] if result["shots"] == shots]
    return (result["mean"] if category is None else result["categories"][category])[metric]


def test_each_stage_is_told_and_counted(parts, tmp_path, monkeypatch):
    told, init = [], Progress.__init__

    def heard(self, title, total=None, unit=None, **options):
        told.append((title, total, unit))
        init(self, title, total, unit, **options)

    monkeypatch.setattr(Progress, "__init__", heard)
    given = ["--shots", 1, 2, "--seeds", 0, "--limit", 1, *FLOOR, "--out", tmp_path / "out"]
    assert run("--data", parts, *given) == 0
    expected = [(title, None, None) for title in ("reading the data set", "loading the model", "checking the masks")]
    for words in ("1 shot, seed 0", "2 shots, seed 0"):
        expected.append((f"learning from {words}", 2, "category"))
        expected += [(f"inspecting, {words}", 4, "picture"), (f"measuring {words}", 2, "category")]
    assert told == [*expected, ("writing the report", None, None)]


def test_the_time_left_is_that_of_all_draws(parts, tmp_path, monkeypatch):
    notes, say = [], Progress.say

    def heard(self, title=None, note=""):
        notes.append(note)
        say(self, title, note)

    monkeypatch.setattr(Progress, "say", heard)
    given = ["--shots", 1, "--seeds", 0, 1, "--limit", 1, *FLOOR, "--out", tmp_path / "out"]
    assert run("--data", parts, *given) == 0
    assert notes[0] == "" and set(notes[4:]) == {""}  # the first picture, and the last draw
    assert all(re.fullmatch(r"1 more draw, all done in 0:\d\d:\d\d", note) for note in notes[1:4])


class TestTables:
    def test_a_row_per_picture_and_draw(self, finished, parts):
        rows = table_of(finished)
        tests = sorted(path.relative_to(parts).as_posix() for path in parts.glob("*/test/*/*.png"))
        assert len(tests) == 10 and len(rows) == 4 * 10
        for draw in ((1, 0), (1, 3), (2, 0), (2, 3)):
            assert [row["image"] for row in rows if (row["shots"], row["seed"]) == draw] == tests
        for row in rows:
            assert row["defect"] == Path(row["image"]).parent.name and row["label"] == (row["defect"] != "good")
            assert row["threshold"] is None and row["seconds"] > 0
        assert len({row["score"] for row in rows}) > 20

    @pytest.mark.parametrize("category", PARTS)
    def test_image_metrics_are_those_of_the_table(self, finished, category):
        for shots in (1, 2):
            expected = {"image_auroc": [], "image_aupr": []}
            for seed in (0, 3):
                rows = rows_of(finished, shots, seed, category)
                labels, scores = [row["label"] for row in rows], [row["score"] for row in rows]
                expected["image_auroc"].append(roc_auc_score(labels, scores))
                expected["image_aupr"].append(average_precision_score(labels, scores))
            for metric, values in expected.items():
                found = figure(finished, shots, category, metric)
                assert found["values"] == pytest.approx(values, abs=1e-6)
                assert found["mean"] == pytest.approx(sum(values) / 2, abs=1e-6)
                assert found["std"] == pytest.approx(abs(values[0] - values[1]) / 2, abs=1e-6)

    def test_pixel_metrics_are_those_of_the_maps(self, finished, parts):
        masks, maps = [], []
        for index, row in enumerate(rows_of(finished, 2, 3, "hex_nut")):
            maps.append(np.load(finished / "maps" / "k2-s3" / "0" / f"{index:06d}.npy"))
            picture = parts / row["image"]
            mask = parts / "hex_nut" / "ground_truth" / row["defect"] / f"{picture.stem}_mask.png"
            if row["label"]:
                soft = Image.open(mask).convert("F").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
                masks.append(np.asarray(soft) > 127.5)
            else:
                masks.append(np.zeros((SIDE, SIDE), bool))
        assert maps[0].shape == (SIDE, SIDE) and sum(mask.any() for mask in masks) == 3
        truth, found = np.stack(masks).ravel(), np.stack(maps).ravel()
        assert figure(finished, 2, "hex_nut", "pixel_auroc")["values"][1] == pytest.approx(
            roc_auc_score(truth, found), abs=1e-6
        )
        pro = pixel_metrics(masks, maps, fpr_limit=0.3)["pro"]
        assert figure(finished, 2, "hex_nut", "pixel_pro")["values"][1] == pytest.approx(pro, abs=1e-6)

    def test_means_over_the_categories_that_have_the_metric(self, finished):
        image, pixel = (figure(finished, 1, None, metric) for metric in ("image_auroc", "pixel_auroc"))
        by_category = [figure(finished, 1, category, "image_auroc")["values"] for category in PARTS]
        assert image["values"] == pytest.approx(np.mean(by_category, axis=0), abs=2e-6) and image["categories"] == 2
        assert pixel["values"] == figure(finished, 1, "hex_nut", "pixel_auroc")["values"] and pixel["categories"] == 1

    def test_missing_masks_are_said(self, finished):
        assert figure(finished, 1, "ring", "pixel_auroc")["mean"] is None
        assert figure(finished, 1, "ring", "image_auroc")["mean"] is not None
        report = (finished / "report.md").read_text()
        assert "No masks for ring: image metrics only." in report and f"at {SIDE} px" in report
        counts = summary_of(finished)["dataset"]["categories"]
        assert counts["ring"] == {"normal": 2, "defective": 3, "masks": 0} and counts["hex_nut"]["masks"] == 3

    def test_the_report_has_its_pictures_and_costs(self, finished):
        report = (finished / "report.md").read_text()
        for name in ("curves_1-shot.png", "curves_2-shot.png", "cases.png"):
            assert f"(figures/{name})" in report and (finished / "figures" / name).stat().st_size > 1000
        for word in ("Seconds per picture", "Seconds to learn from the shots", "Peak memory, GiB", "Device"):
            assert word in report

    def test_what_was_asked_for_is_in_the_summary(self, finished, parts):
        summary = summary_of(finished)
        assert summary["system"]["name"] == "color_patches" and summary["dataset"]["name"] == "data"
        assert summary["protocol"]["shots"] == [1, 2] and summary["protocol"]["seeds"] == [0, 3]
        assert summary["protocol"]["resolution"] == SIDE and list(summary["dataset"]["categories"]) == list(PARTS)
        assert str(parts) not in json.dumps(summary)

    def test_nothing_but_results_is_left(self, finished):
        assert {path.name for path in finished.iterdir()} == {
            *("run.json", "shots.json", "rows", "maps", "classes", "cases", "costs"),
            *("results.csv", "summary.json", "report.md", "figures"),
        }


class TestGoingOn:
    def test_a_complete_one_is_left_as_it_is(self, finished, parts):
        """Whatever the order of its options."""
        before = contents(finished)
        given = ["--categories", "hex_nut", "ring", "--shots", 1, 2, "--seeds", 0, 3, "--keep_maps"]
        assert run("--data", parts, *given, *FLOOR, "--out", finished) == 0
        assert contents(finished) == before

    def test_another_is_refused(self, finished, parts, capfd):
        before = contents(finished)
        given = ["--data", parts, *FLOOR, "--seeds", 0, 3, "--out", finished]
        assert "--shots = [1, 2], but [1] is asked for now" in refused(capfd, *given)
        given += ["--shots", 1, 2]
        assert "--map_resolution = 32, but 64" in refused(capfd, *given, "--map_resolution", 64)
        assert "hex_nut.normal = 2, but 1 is" in refused(capfd, *given, "--limit", 1)
        assert "--fpr_limit = 0.3, but 0.2" in refused(capfd, *given, "--fpr_limit", 0.2)
        assert "--peer = 'color_patches', but 'spade'" in refused(capfd, *given, "--peer", "spade")
        assert contents(finished) == before

    def test_overwrite(self, parts, tmp_path, capfd):
        out = tmp_path / "out"
        given = ["--data", parts, "--categories", "hex_nut", "--limit", 1, *FLOOR, "--out", out]
        assert run(*given, "--seeds", 0) == 0
        (out / "notes.txt").write_text("mine")
        before = contents(out)
        # What is refused loses nothing.
        assert "`--base` " in refused(capfd, *given, "--overwrite", "--peer", "plain_inpainting", "--base", out)
        assert contents(out) == before
        assert run(*given, "--seeds", 1, "--overwrite") == 0
        assert summary_of(out)["protocol"]["seeds"] == [1] and (out / "notes.txt").read_text() == "mine"
        assert {row["seed"] for row in table_of(out)} == {1}

    def test_a_damaged_picture_is_named_and_may_be_replaced(self, parts, tmp_path, capfd):
        root, out = tmp_path / "data", tmp_path / "out"
        synthetic.write_dataset(root, ["ring"], train=1, good=2, defective=2, seed=3, size=64)
        damaged = sorted((root / "ring" / "test").rglob("*.png"))[2]
        whole = damaged.read_bytes()
        damaged.write_bytes(whole[: len(whole) // 2])
        given = ["--data", root, *FLOOR, "--seeds", 0, "--out", out]
        sentence = refused(capfd, *given)
        assert f"the picture '{damaged}' is cut short or damaged" in sentence and "copy it anew" in sentence
        assert not (out / "summary.json").exists()
        (rows,) = contents(out / "rows").values()
        damaged.write_bytes(whole)
        assert run(*given) == 0
        assert len(table_of(out)) == 4 and rows in contents(out / "rows").values()


class TestPointedOut:
    @pytest.fixture
    def root(self, tmp_path):
        root = tmp_path / "data"
        synthetic.write_dataset(root, ["ring"], train=1, good=2, defective=3, seed=3, size=64)
        return root

    def test_what_makes_figures_wrong_is_named(self, root, tmp_path, capfd):
        """An empty mask, a line of 2 pixels, and good pictures in a folder of another name."""
        empty, thin, other = sorted((root / "ring" / "ground_truth").rglob("*.png"))
        line = np.zeros((64, 64), np.uint8)
        Image.fromarray(line).save(empty)
        line[20:22] = 255
        Image.fromarray(line).save(thin)
        (root / "ring" / "test" / "good").rename(root / "ring" / "test" / "Non_defective")
        given = ["--data", root, "--peer", "color_patches", "--seeds", 0]
        assert run(*given, "--map_resolution", 8, "--out", tmp_path / "small") == 0
        told, report = capfd.readouterr().out, (tmp_path / "small" / "report.md").read_text()

        def tested(mask):
            return f"'ring/test/{mask.parent.name}/{mask.stem.removesuffix('_mask')}.png'"

        for sentence in (
            "'ring' has no good test picture, but only 'Non_defective', ",
            "'ring' has a defect called 'Non_defective'; if its pictures are good, call the folder 'good'.",
            f"The masks of {tested(empty)}, filed as defective, are empty",
            f"Of the defects in {tested(thin)} more than half vanishes at 8 x 8 pixels; give `--map_resolution",
        ):
            assert sentence in told and sentence in report
        assert run(*given, "--map_resolution", "original", "--out", tmp_path / "original") == 0
        assert "vanishes" not in capfd.readouterr().out

    def test_a_mask_of_another_size_is_refused_before_anything_is_inspected(self, root, tmp_path, capfd):
        mask = next((root / "ring" / "ground_truth").rglob("*.png"))
        Image.new("L", (64, 32)).save(mask)
        sentence = refused(capfd, "--data", root, *FLOOR, "--out", tmp_path / "out")
        assert f"the mask '{mask}' has 64 x 32 pixels (width x height), but its picture" in sentence
        assert "has 64 x 64; give" in sentence and not (tmp_path / "out").exists()

    def test_ordinary_data_need_no_word(self, parts, capfd, tmp_path):
        assert run("--data", parts, *FLOOR, "--seeds", 0, "--out", tmp_path / "out") == 0
        assert [line for line in capfd.readouterr().out.splitlines() if "ring" in line or "nut" in line] == []


class TestDrawnParts:
    def test_interrupted_while_drawing(self, tmp_path, monkeypatch, capfd):
        """A family that is drawn in part is drawn again: its tables would be of fewer pictures."""
        saved, save = [], Image.Image.save

        def interrupted(image, path, *rest, **options):
            saved.append(path)
            if len(saved) == 20:  # all to learn from, and some to test with
                raise KeyboardInterrupt
            save(image, path, *rest, **options)

        given = ["--synthetic", "ring", "--limit", 1, *FLOOR, "--seeds", 0, "--out", tmp_path / "out"]
        with monkeypatch.context() as patch:
            patch.setattr(Image.Image, "save", interrupted)
            assert run(*given) == 130
        assert "the same command goes on" in capfd.readouterr().err
        assert Path(saved[-1]).parent.parent.name == "test"
        (tmp_path / "out" / "pictures" / ".ab12" / "ring" / "test").mkdir(parents=True)  # as a kill would leave it
        assert run(*given) == 0
        pictures = tmp_path / "out" / "pictures"
        assert len(list(pictures.glob("ring/test/*/*.png"))) == 24 and [p.name for p in pictures.iterdir()] == ["ring"]


class TestDraws:
    def test_they_are_written_down(self, finished, parts):
        shots = json.loads((finished / "shots.json").read_text())
        assert {count: list(by_seed) for count, by_seed in shots.items()} == {"1": ["0", "3"], "2": ["0", "3"]}
        drawn = draw_shots((parts / "ring" / "train" / "good").iterdir(), 2, seed=3)
        assert shots["2"]["3"]["ring"] == [path.relative_to(parts).as_posix() for path in drawn]

    def test_given_back_they_give_the_same_summary(self, finished, parts, tmp_path):
        given = ["--shots_file", finished / "shots.json", "--out", tmp_path / "out"]
        assert run("--data", parts, *FLOOR, *given) == 0
        for name in ("summary.json", "shots.json", "run.json"):
            assert (tmp_path / "out" / name).read_bytes() == (finished / name).read_bytes()
        left_out = {"seconds": None}
        assert [row | left_out for row in table_of(tmp_path / "out")] == [row | left_out for row in table_of(finished)]

    def test_no_test_picture_may_be_learned_from(self, parts, tmp_path, capfd):
        """Not even one that a limit leaves out."""
        tests = sorted(path.relative_to(parts).as_posix() for path in (parts / "ring" / "test" / "good").iterdir())
        path = tmp_path / "shots.json"
        for picture in tests:
            path.write_text(json.dumps({"1": {"0": {"ring": [picture]}}}))
            given = ["--data", parts, "--categories", "ring", "--limit", 1, "--shots_file", path]
            sentence = refused(capfd, *given, *FLOOR, "--out", tmp_path / "out")
            assert "`--shots_file` " in sentence and "is a test picture" in sentence
        assert not (tmp_path / "out").exists()

    def test_a_limit_spreads(self, tmp_path, parts):
        given = ["--data", parts, "--categories", "ring", "--seeds", 0, "--limit", 2, "--out", tmp_path / "out"]
        assert run(*given, *FLOOR) == 0
        rows = table_of(tmp_path / "out")
        bad = sorted(
            p.relative_to(parts).as_posix() for p in (parts / "ring").glob("test/*/*") if "good" not in str(p)
        )
        assert [row["image"] for row in rows if row["label"]] == [bad[0], bad[2]]
        assert sum(not row["label"] for row in rows) == 2


SIZES = ((40, 32), (48, 64))  # width, height


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    """Good and bad pictures of two sizes, one of each turned by EXIF alone; two of three defects have masks."""
    root = tmp_path_factory.mktemp("line")
    samples = synthetic.test_samples("ring", 5, 3, seed=2, size=64)
    for index, sample in enumerate(samples):
        folder, size = root / ("bad" if sample.defect else "good"), SIZES[index % 2]
        folder.mkdir(exist_ok=True)
        picture, exif = Image.fromarray(sample.image).resize(size), Image.Exif()
        if index in (1, 6):
            picture = picture.transpose(Image.Transpose.ROTATE_90)
            exif[0x0112] = 6  # to be turned back
        picture.save(folder / f"{index}.png", exif=exif)
        if sample.defect and index != 7:
            (root / "masks").mkdir(exist_ok=True)
            mask = Image.fromarray(sample.mask.astype(np.uint8) * 255).resize(size, Image.Resampling.NEAREST)
            mask.save(root / "masks" / f"{index}.png")
    return root


class TestPlainFolders:
    def test_at_the_pictures_own_sizes(self, line, tmp_path, monkeypatch):
        monkeypatch.chdir(line)  # folders may be given in any way
        given = ["--normal_dir", "good", "--abnormal_dir", line / "bad", "--mask_dir", "masks", "--category", "a ring"]
        given += ["--peer", "color_patches", "--map_resolution", "original", "--seeds", 0, "--keep_maps"]
        assert run(*given, "--out", tmp_path / "out") == 0
        rows, truth, found = table_of(tmp_path / "out"), [], []
        assert [row["image"] for row in rows if row["label"]] == ["bad/5.png", "bad/6.png", "bad/7.png"]
        assert sum(not row["label"] for row in rows) == 2 and {row["category"] for row in rows} == {"a ring"}
        for index, row in enumerate(rows):
            number = int(Path(row["image"]).stem)
            anomaly_map = np.load(tmp_path / "out" / "maps" / "k1-s0" / "0" / f"{index:06d}.npy")
            assert anomaly_map.shape == SIZES[number % 2][::-1]
            if number != 7:
                mask = Image.open(line / "masks" / f"{number}.png") if row["label"] else None
                truth.append(np.zeros(anomaly_map.size, bool) if mask is None else np.asarray(mask).ravel() > 0)
                found.append(anomaly_map.ravel())
        expected = roc_auc_score(np.concatenate(truth), np.concatenate(found))
        assert figure(tmp_path / "out", 1, "a ring", "pixel_auroc")["mean"] == pytest.approx(expected, abs=1e-6)
        report = (tmp_path / "out" / "report.md").read_text()
        assert "at the pictures' own size" in report
        assert "a ring: masks for only 2 of the 3 defective pictures." in report
        (drawn,) = json.loads((tmp_path / "out" / "shots.json").read_text())["1"]["0"]["a ring"]
        assert (line / drawn).is_file()


@pytest.fixture(scope="module")
def evaluated(parts, tiny_pipeline_folder, tmp_path_factory):
    """The tiny pipeline, with no and with two normal pictures."""
    out = tmp_path_factory.mktemp("ours") / "out"
    given = ["--data", parts, "--categories", "hex_nut", "--shots", 0, 2, "--seeds", 4, 5]
    given += ["--base", tiny_pipeline_folder, "--false_alarm_rate", 0.2, "--mixed_precision", "no", *BRIEF]
    assert run(*given, "--out", out) == 0
    return out


class TestOurs:
    def test_zero_shots_are_one_draw(self, evaluated):
        assert [(result["shots"], result["seeds"]) for result in summary_of(evaluated)["results"]] == [
            (0, [4]),
            (2, [4, 5]),
        ]
        assert all((row["threshold"] is None) == (row["shots"] == 0) for row in table_of(evaluated))

    def test_scores_are_those_of_the_pipeline(self, evaluated, parts, tiny_pipeline_folder):
        pipe = AnomalySDPipeline.from_pretrained(tiny_pipeline_folder)
        pipe.set_progress_bar_config(disable=True)
        options = {"num_inference_steps": 3, "mask_scales": (1,)}
        for shots, seed in ((0, 4), (2, 5)):
            if shots:
                drawn = draw_shots((parts / "hex_nut" / "train" / "good").iterdir(), shots, seed)
                pipe.add_category("hex_nut", [*drawn])
                pipe.calibrate("hex_nut", [*drawn], 0.2, seed, **options)
            for row in rows_of(evaluated, shots, seed, "hex_nut")[::3]:
                noise = torch.Generator().manual_seed(seed)
                out = pipe(parts / row["image"], category="hex_nut", generator=noise, **options)
                assert row["score"] == pytest.approx(float(out.pred_scores[0]), rel=1e-5)
                assert row["threshold"] == (pytest.approx(out.thresholds[0], rel=1e-5) if shots else None)

    def test_false_alarms_and_misses_are_counted(self, evaluated):
        for index, seed in enumerate((4, 5)):
            rows = rows_of(evaluated, 2, seed, "hex_nut")
            above = [[row["score"] > row["threshold"] for row in rows if row["label"] == kind] for kind in (0, 1)]
            alarms, found = (sum(own) / len(own) for own in above)
            assert figure(evaluated, 2, "hex_nut", "false_alarms")["values"][index] == alarms
            assert figure(evaluated, 2, "hex_nut", "misses")["values"][index] == pytest.approx(1 - found, abs=1e-6)
        assert figure(evaluated, 0, "hex_nut", "misses")["mean"] is None
        assert "2-shot false alarms" in (evaluated / "report.md").read_text()

    def test_what_changes_a_threshold_is_another_evaluation(self, evaluated, parts, tiny_pipeline_folder, capfd):
        given = ["--data", parts, "--categories", "hex_nut", "--shots", 0, 2, "--seeds", 4, 5, *BRIEF]
        given += ["--base", tiny_pipeline_folder, "--mixed_precision", "no", "--out", evaluated]
        assert "system.false_alarm_rate = 0.2, but 0.05" in refused(capfd, *given)
        assert "system.false_alarm_rate = 0.2, but None" in refused(capfd, *given, "--no_calibration")

    def test_the_embedded_checkpoint(self, tmp_path):
        given = ["--synthetic", "hex_nut", "--limit", 1, "--seeds", 0, "--resolution", 64, "--map_resolution", 64]
        given += ["--num_inference_steps", 4, "--mask_scales", 1]
        assert run(*given, "--out", tmp_path / "out") == 0
        assert len(table_of(tmp_path / "out")) == 2
        system = summary_of(tmp_path / "out")["system"]
        assert (system["base"], system["model_resolution"], system["mask_scales"]) == ("embedded", 64, [1])
        assert not (tmp_path / "out" / "maps").exists() and not (tmp_path / "out" / "prepared").exists()
