"""Figures of a category and of all draws, against scikit-learn and sums by hand."""

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score

from anomalysd_pipeline.data.datasets import Category, TestImage
from anomalysd_pipeline.evaluation.store import Draw, Store
from anomalysd_pipeline.evaluation.summary import METRICS, evaluate_class, resize_map, summarize

DRAW = Draw(2, 7)
SHAPES = [(16, 20), (24, 12), (16, 16), (20, 20), (12, 28)]
LABELS = [False, True, True, False, True]
DEFECT = (slice(2, 8), slice(3, 9))


class Evaluated:
    """Five pictures of different sizes with random maps of those sizes, the last one defective without a mask."""

    def __init__(self, folder, labels=LABELS, thresholds=0.5, masked=(1, 2)):
        chance = np.random.default_rng(3)
        self.store, self.rows, self.maps, self.masks = Store(folder / "out"), [], [], []
        tests = []
        for index, (label, (height, width)) in enumerate(zip(labels, SHAPES, strict=True)):
            mask = np.zeros((height, width), bool)
            path = None
            if index in masked:
                mask[DEFECT] = True
                path = folder / f"{index}_mask.png"
                Image.fromarray(mask.astype(np.uint8) * 255).save(path)
                Image.new("L", (width, height)).save(folder / f"{index}.png")
            found = (chance.random((height, width)) + 0.3 * mask).astype(np.float32)
            test = TestImage(folder / f"{index}.png", label, "scratch" if label else "good", path)
            row = {"shots": 2, "seed": 7, "category": "nut", "number": 0, "index": index, "label": label}
            row |= {"score": float(chance.random()) + 0.2 * label, "threshold": thresholds}
            self.store.add(row, found)
            tests.append(test)
            self.rows.append(row)
            self.maps.append(found)
            self.masks.append(mask)
        self.category = Category("nut", [], tests)

    def pixels(self):
        """Truth and scores of all pixels but those of the picture without mask."""
        return (np.concatenate([array.ravel() for array in arrays[:4]]) for arrays in (self.masks, self.maps))

    def figures(self, **given):
        return evaluate_class(
            self.store, DRAW, 0, self.category, self.rows, **{"fpr_limit": 0.3, "connectivity": 8, **given}
        )


@pytest.fixture
def evaluated(tmp_path):
    return Evaluated(tmp_path)


class TestClass:
    def test_image_metrics_are_those_of_scikit_learn(self, evaluated):
        metrics = evaluated.figures()["metrics"]
        scores = [row["score"] for row in evaluated.rows]
        assert metrics["image_auroc"] == pytest.approx(roc_auc_score(LABELS, scores), abs=1e-12)
        assert metrics["image_aupr"] == pytest.approx(average_precision_score(LABELS, scores), abs=1e-12)
        assert 0 < metrics["image_auroc"] < 1

    def test_pixel_metrics_leave_out_a_defect_without_mask(self, evaluated):
        metrics = evaluated.figures()["metrics"]
        truth, found = (
            np.concatenate([a.ravel() for a in arrays[:4]]) for arrays in (evaluated.masks, evaluated.maps)
        )
        assert metrics["pixel_auroc"] == pytest.approx(roc_auc_score(truth, found), abs=1e-12)
        assert metrics["pixel_aupr"] == pytest.approx(average_precision_score(truth, found), abs=1e-12)

    def test_errors_at_the_threshold(self, evaluated):
        scores = [row["score"] for row in evaluated.rows]
        evaluated.rows = [{**row, "threshold": sorted(scores)[2]} for row in evaluated.rows]
        above = [score > sorted(scores)[2] for score in scores]
        metrics = evaluated.figures()["metrics"]
        assert metrics["false_alarms"] == (above[0] + above[3]) / 2
        assert metrics["misses"] == pytest.approx(1 - (above[1] + above[2] + above[4]) / 3)

    def test_a_score_at_the_threshold_is_no_alarm(self, evaluated):
        top = max(row["score"] for row in evaluated.rows)
        evaluated.rows = [{**row, "threshold": top} for row in evaluated.rows]
        assert evaluated.figures()["metrics"]["misses"] == 1

    def test_without_threshold(self, tmp_path):
        metrics = Evaluated(tmp_path, thresholds=None).figures()["metrics"]
        assert metrics["false_alarms"] is None and metrics["misses"] is None

    def test_without_masks(self, tmp_path):
        found = Evaluated(tmp_path, masked=()).figures()
        assert all((value is None) == name.startswith("pixel") for name, value in found["metrics"].items())
        assert set(found["curves"]) == {"image_roc", "image_pr"}

    @pytest.mark.parametrize("label", [False, True])
    def test_one_class_only(self, tmp_path, label):
        metrics = Evaluated(tmp_path, labels=[label] * 5, masked=(0, 3) if label else ()).figures()["metrics"]
        assert metrics["image_auroc"] is None
        assert (metrics["pixel_auroc"] is None) != label
        assert (metrics["misses"] is None) != label and (metrics["false_alarms"] is None) == label

    def test_a_mask_is_brought_to_the_size_of_the_map(self, evaluated):
        for index, (found, mask) in enumerate(zip(evaluated.maps, evaluated.masks, strict=True)):
            large = np.kron(found, np.ones((2, 2), np.float32))
            np.save(evaluated.store.map_path(DRAW, 0, index), large)
            evaluated.maps[index], evaluated.masks[index] = large, np.kron(mask, np.ones((2, 2), bool))
        truth, found = (
            np.concatenate([a.ravel() for a in arrays[:4]]) for arrays in (evaluated.masks, evaluated.maps)
        )
        # Antialiasing takes single pixels from the corners of what is scaled up.
        assert evaluated.figures()["metrics"]["pixel_auroc"] == pytest.approx(roc_auc_score(truth, found), abs=5e-3)

    def test_the_limit_of_pro_counts(self, evaluated):
        low, high = (evaluated.figures(fpr_limit=limit)["metrics"]["pixel_pro"] for limit in (0.05, 1.0))
        assert low < high

    def test_a_damaged_mask_is_named(self, evaluated):
        path = evaluated.category.test[1].mask_path
        path.write_bytes(path.read_bytes()[:40])
        with pytest.raises(ValueError, match=rf"the mask '{path}' is .*damaged"):
            evaluated.figures()


class TestResizing:
    def test_bilinear(self):
        found = resize_map(np.array([[0, 1]], np.float64), (1, 4))
        assert found.dtype == np.float32 and found.tolist() == [[0, 0.25, 0.75, 1]]

    def test_the_same_size_is_the_same_map(self):
        given = np.random.default_rng(0).random((5, 7)).astype(np.float32)
        assert np.array_equal(resize_map(given, (5, 7)), given)


class TestSummary:
    DRAWS = (Draw(0, 0), Draw(1, 0), Draw(1, 1), Draw(1, 2))

    def entry(self, **values):
        return {"metrics": {**dict.fromkeys(METRICS), **values}}

    @pytest.fixture
    def summary(self):
        chance = np.random.default_rng(1)
        self.values = {(draw, name): chance.random(2) for draw in self.DRAWS for name in ("nut", "ring")}
        found = {
            key: self.entry(image_auroc=float(a), **({"pixel_pro": float(b)} if key[1] == "nut" else {}))
            for key, (a, b) in self.values.items()
        }
        return summarize({"name": "x"}, {"d": 1}, {"p": 2}, self.DRAWS, found, ["nut", "ring"])

    def test_mean_and_spread_of_the_draws(self, summary):
        few = summary["results"][1]
        own = [self.values[draw, "ring"][0] for draw in self.DRAWS[1:]]
        found = few["categories"]["ring"]["image_auroc"]
        assert found["values"] == [round(value, 6) for value in own]
        assert found["mean"] == pytest.approx(sum(own) / 3, abs=1e-6)
        spread = (sum((value - sum(own) / 3) ** 2 for value in own) / 3) ** 0.5
        assert found["std"] == pytest.approx(spread, abs=1e-6) and spread > 0.01

    def test_the_mean_of_categories_is_taken_for_each_draw(self, summary):
        found = summary["results"][1]["mean"]["image_auroc"]
        own = [(self.values[draw, "nut"][0] + self.values[draw, "ring"][0]) / 2 for draw in self.DRAWS[1:]]
        assert found["values"] == pytest.approx(own, abs=1e-6)
        assert found["mean"] == pytest.approx(np.mean(own), abs=1e-6)
        assert found["std"] == pytest.approx(np.std(own), abs=1e-6)
        assert found["categories"] == 2

    def test_a_category_without_masks_is_left_out_of_pixel_means(self, summary):
        few = summary["results"][1]
        assert few["mean"]["pixel_pro"]["categories"] == 1
        assert few["mean"]["pixel_pro"]["mean"] == few["categories"]["nut"]["pixel_pro"]["mean"]
        assert few["categories"]["ring"]["pixel_pro"] == {"mean": None, "std": None, "values": [None] * 3}
        assert few["mean"]["misses"] == {"mean": None, "std": None, "values": [None] * 3, "categories": 0}

    def test_each_number_of_shots_has_its_seeds(self, summary):
        assert [(result["shots"], result["seeds"]) for result in summary["results"]] == [(0, [0]), (1, [0, 1, 2])]

    def test_facts_are_passed_on(self, summary):
        assert (summary["system"], summary["dataset"], summary["protocol"]) == ({"name": "x"}, {"d": 1}, {"p": 2})

    def test_rounding_comes_last(self):
        """The mean is of the figures, not of rounded ones."""
        draws = [Draw(1, seed) for seed in range(3)]
        values = (0.1234564, 0.1234564, 0.1234574)
        found = {(draw, "nut"): self.entry(image_auroc=v) for draw, v in zip(draws, values, strict=True)}
        mean = summarize({}, {}, {}, draws, found, ["nut"])["results"][0]["categories"]["nut"]["image_auroc"]["mean"]
        assert mean == 0.123457 and np.mean([round(v, 6) for v in values]) < 0.1234565
