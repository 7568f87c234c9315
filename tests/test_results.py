"""The folder of results, and what was learned from normal pictures as a file."""

import dataclasses
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from anomalysd_pipeline.data.picture import Picture
from anomalysd_pipeline.data.sources import Files, Listing
from anomalysd_pipeline.inspection.folder import MONTAGE_ROWS, ResultFolder
from anomalysd_pipeline.inspection.result import Inspection, load_part, register, save_part

from .conftest import make_tiny_pipeline
from .detect_driver import table


def rows_of(out):
    return [json.loads(line) for path in out.glob("rows/*.jsonl") for line in path.read_bytes().splitlines(True)]


def picture(name, row=0):
    return Picture(f"{name}.png", name, "x", 0, row, f"{name}.png")


def result(score=0.5, threshold=1.0, size=(20, 16)):
    image = Image.new("RGB", size, (90, 120, 150))
    anomaly_map = np.full(size[::-1], score, np.float32)
    return Inspection(image, image, anomaly_map, score, threshold, None if threshold is None else score > threshold, 1)


def listing(names):
    return Listing({0: Files("x", [f"{name}.png" for name in names], names)}, {})


class TestInspection:
    def test_a_normal_picture_has_no_outline_though_a_pixel_lies_above_the_threshold(self):
        values = np.zeros((16, 20), np.float32)
        values[4:8, 4:8] = 2.0
        normal, defective, open_ = (
            dataclasses.replace(result(score, threshold), anomaly_map=values)
            for score, threshold in ((0.5, 1.0), (1.5, 1.0), (1.5, None))
        )
        assert not normal.predicted.any() and np.array_equal(defective.predicted, values > 1)
        assert open_.predicted is None
        assert np.any(np.asarray(normal.overlay()) != np.asarray(defective.overlay()))


class TestFolder:
    def test_the_table_is_in_the_order_of_the_listing(self, tmp_path):
        names = [str(i) for i in range(7)]
        folders = [ResultFolder(tmp_path / "out", rank=rank) for rank in range(3)]
        folders[0].begin({"--seed": 0}, {})
        for index in (5, 3, 6, 0, 1, 4):
            folders[index % 3].add(picture(names[index]), result(index / 4 + 0.1))
        folders[1].fail(picture("2"), "torn")
        counts = folders[0].finish(listing(names))
        rows = table(tmp_path / "out")
        assert [row["file"] for row in rows] == [f"{name}.png" for name in names]
        assert [row["score"] for row in rows] == ["0.1", "0.35", "", "0.85", "1.1", "1.35", "1.6"]
        assert [row["verdict"] for row in rows] == ["normal"] * 2 + [""] + ["normal"] + ["defective"] * 3
        assert (counts.inspected, counts.defective, counts.failed, counts.verdicts) == (6, 3, 1, True)

    def test_the_montage_shows_the_highest_scores_of_all_processes(self, tmp_path):
        names = [str(i) for i in range(40)]
        folders = [ResultFolder(tmp_path / "out", rank=rank) for rank in range(2)]
        folders[0].begin({}, {})
        scores = [(index * 7) % 40 / 10 + 0.1 for index in range(40)]
        for index, score in enumerate(scores):
            folders[index % 2 if index < 36 else 0].add(picture(names[index]), result(score))
        folders[0].finish(listing(names))
        assert len(list((tmp_path / "out" / "heatmaps").iterdir())) == 40
        kept = {row["file"] for row in rows_of(tmp_path / "out") if self.strip(tmp_path / "out", row)}
        highest = sorted(range(40), key=lambda index: -scores[index])[:MONTAGE_ROWS]
        assert {f"{index}.png" for index in highest} <= kept
        assert len(list((tmp_path / "out" / "rows").glob("*.png"))) == len(kept) <= 2 * MONTAGE_ROWS - 8

    def strip(self, out, row):
        return "shown" in row and (out / "rows" / row["shown"]).is_file()

    def test_the_montage_does_not_depend_on_who_inspected(self, tmp_path):
        names = [str(i) for i in range(5)]
        figures = []
        for processes in (1, 2):
            out = tmp_path / str(processes)
            folders = [ResultFolder(out, rank=rank) for rank in range(processes)]
            folders[0].begin({}, {})
            for index, name in enumerate(names):
                folders[index % processes].add(picture(name), result(0.3 + 0.4 * (index % 2)))
            folders[0].finish(listing(names))
            figures.append((out / "montage.png").read_bytes())
        assert figures[0] == figures[1]

    def test_a_picture_without_a_thumbnail_is_shown_by_its_heatmap(self, tmp_path):
        folder = ResultFolder(tmp_path / "out")
        folder.begin({}, {})
        folder.add(picture("a"), result())
        for strip in (tmp_path / "out" / "rows").glob("*.png"):
            strip.unlink()
        assert folder.finish(listing(["a"])).inspected == 1
        assert (tmp_path / "out" / "montage.png").is_file()

    def test_pictures_that_are_not_listed_any_more_are_left_out(self, tmp_path):
        folder = ResultFolder(tmp_path / "out")
        folder.begin({}, {})
        for name in "abc":
            folder.add(picture(name), result())
        assert folder.finish(listing(["c", "a"])).inspected == 2
        assert [row["file"] for row in table(tmp_path / "out")] == ["c.png", "a.png"]

    def test_masks_and_boxes_and_anomalibs_words(self, tmp_path):
        values = np.zeros((16, 20), np.float32)
        values[2:5, 3:10], values[5, 10], values[12:14, 0:2] = 1.5, 1.25, 2.0  # one touches by a corner
        folder, out = ResultFolder(tmp_path / "out"), tmp_path / "out"
        folder.begin({}, {})
        folder.fail(picture("a"), "torn")
        folder.add(picture("b"), dataclasses.replace(result(1.5), anomaly_map=values))
        folder.add(picture("c"), dataclasses.replace(result(0.5), anomaly_map=values))
        counts = folder.finish(listing("abc"))
        assert (counts.threshold, counts.worst) == (1.0, (("b.png", 1.5),))
        with Image.open(out / "masks" / "b.png") as mask:
            assert np.array_equal(np.asarray(mask), 255 * (values > 1))
        with Image.open(out / "masks" / "c.png") as mask:
            assert mask.size == (20, 16) and not np.asarray(mask).any()
        coco = json.loads((out / "coco.json").read_text())
        assert [(image["file_name"], image["width"], image["height"]) for image in coco["images"]] == [
            ("b.png", 20, 16),
            ("c.png", 20, 16),
        ]
        assert [(own["image_id"], own["bbox"], own["area"], own["score"]) for own in coco["annotations"]] == [
            (1, [3, 2, 8, 4], 22, 1.5),
            (1, [0, 12, 2, 2], 4, 2.0),
        ]
        torn, bad, good = json.loads((out / "results.json").read_text())
        assert torn == {"image_path": "a.png", "error": "torn"}
        assert (bad["pred_score"], bad["pred_label"], bad["pred_mask"]) == (1.5, True, "masks/b.png")
        assert (good["image_path"], good["pred_label"], good["threshold"]) == ("c.png", False, 1.0)

    def test_without_a_threshold_there_are_no_masks_and_no_boxes(self, tmp_path):
        folder, out = ResultFolder(tmp_path / "out"), tmp_path / "out"
        folder.begin({}, {})
        folder.add(picture("a"), result(threshold=None))
        (out / "coco.json").write_text("of an earlier run")
        folder.finish(listing("a"))
        (row,) = json.loads((out / "results.json").read_text())
        assert row["pred_label"] is row["pred_mask"] is None and row["heatmap"] == "heatmaps/a.png"
        assert not (out / "masks").exists() and not (out / "coco.json").exists()

    def test_without_a_row_nothing_is_written(self, tmp_path):
        folder = ResultFolder(tmp_path / "out")
        assert folder.finish(listing(["a"])) is None
        assert not (tmp_path / "out").exists()

    def test_a_name_that_is_no_text_keeps_its_bytes(self, tmp_path):
        name = os.fsdecode(b"\xff")
        folder = ResultFolder(tmp_path / "out")
        folder.begin({}, {})
        folder.fail(picture(name), "torn")
        folder.finish(listing([name]))
        assert b"\n\xff.png," in (tmp_path / "out" / "results.csv").read_bytes()

    def test_a_failure_is_replaced_by_a_result_and_tried_again(self, tmp_path):
        first = ResultFolder(tmp_path / "out")
        first.begin({"--seed": 0}, {})
        first.fail(picture("a"), "torn")
        first.close()
        second = ResultFolder(tmp_path / "out", resume=True)
        assert not second.earlier().names
        second.begin({"--seed": 0}, {})
        second.add(picture("a"), result())
        assert second.finish(listing(["a"])).failed == 0

    def test_shards_are_done_when_every_picture_is(self, tmp_path):
        first = ResultFolder(tmp_path / "out")
        first.begin({}, {})
        for shard, row in ((0, 0), (0, 1), (1, 0)):
            first.add(Picture(f"d#{shard}/{row}", f"d/{shard}-{row}", "d", shard, row, None), result())
        for shard in range(2):
            first.end("d", shard, 2)
        first.close()
        assert ResultFolder(tmp_path / "out", resume=True).earlier().shards == {("d", 0)}

    def test_starting_anew_forgets_the_rows(self, tmp_path):
        first = ResultFolder(tmp_path / "out")
        first.begin({"--seed": 0}, {})
        first.add(picture("a"), result())
        first.keep_part(lambda path: path.write_text("old"))
        first.finish(listing(["a"]))
        second = ResultFolder(tmp_path / "out", overwrite=True)
        second.begin({"--seed": 1}, {})
        assert not second.part.exists() and not rows_of(tmp_path / "out")
        assert json.loads((tmp_path / "out" / "run.json").read_text())["facts"] == {"--seed": 1}


class TestPart:
    def test_it_is_what_was_registered(self, nuts, tmp_path):
        first, second = make_tiny_pipeline(), make_tiny_pipeline()
        register(first, "hex nut", nuts[:2], preset="fast", feature_weight=2.0)
        save_part(first, "hex nut", tmp_path / "part")
        load_part(second, "hex nut", tmp_path / "part")
        assert torch.equal(first.bank.packed("hex nut")["bank"], second.bank.packed("hex nut")["bank"])
        assert first.config.categories == second.config.categories
        assert first.config.prompts == second.config.prompts
        one, other = (pipe(nuts[2], category="hex nut", preset="fast", feature_weight=2.0) for pipe in (first, second))
        assert one.pred_scores == other.pred_scores and one.thresholds == other.thresholds != [None]

    @pytest.mark.parametrize("content", [b"", b"\x08\0\0\0\0\0\0\0{}      "])
    def test_a_damaged_one_is_one_sentence(self, content, tiny_pipeline, tmp_path):
        (tmp_path / "part").write_bytes(content)
        with pytest.raises(ValueError, match="delete it"):
            load_part(tiny_pipeline, "ring", tmp_path / "part")

    def test_one_without_prototypes_is_one_sentence(self, tiny_pipeline, tmp_path):
        save_file({"colors": torch.zeros(2, 3)}, tmp_path / "part", metadata={"record": "{}"})
        with pytest.raises(ValueError, match="delete it"):
            load_part(tiny_pipeline, "ring", tmp_path / "part")
