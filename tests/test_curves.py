import itertools

import numpy as np
import pytest
from scipy import ndimage

from anomalysd_pipeline.evaluation.curves import MAX_POINTS, image_curves, pixel_metrics_and_curves
from anomalysd_pipeline.evaluation.metrics import pixel_metrics

from .test_metrics import KINDS, brute_force_overlap, degenerate, pictures


def distance(curve, points):
    """How far the farthest of some points [2, M] lies off the line through a curve's points [2, P]."""
    starts, ends = curve[:, :-1, None], curve[:, 1:, None]
    lines, offsets = ends - starts, points[:, None] - starts
    lengths = np.maximum((lines**2).sum(axis=0), 1e-300)
    along = np.clip((lines * offsets).sum(axis=0) / lengths, 0, 1)
    return float(np.sqrt(((offsets - along * lines) ** 2).sum(axis=0)).min(axis=0).max())


def area(curve):
    return float(np.sum(np.diff(curve[0]) * (curve[1, 1:] + curve[1, :-1])) / 2)


def scored(count, decimals, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.random(count) < 0.2
    return labels, np.round(rng.normal(size=count) + 1.5 * labels, decimals)


def counts(labels, scores):
    """False and true positives at every threshold, the highest first; [2, M]."""
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.diff(scores[order]) != 0, True)  # of each score
    return np.stack([np.cumsum(~labels[order])[last], np.cumsum(labels[order])[last]])


def roc_points(labels, scores):
    """False positive rate and recall from their start on, at every threshold where the line turns; [2, M]."""
    points = np.pad(counts(labels, scores), ((0, 0), (1, 0)))
    turns = np.pad(np.diff(points, 2).any(axis=0), 1, constant_values=True)
    return points[:, turns] / [[np.sum(~labels)], [np.sum(labels)]]


def rising_points(labels, scores):
    """Recall and precision at every threshold at which recall rises; [2, M]."""
    false, true = counts(labels, scores)
    rises = np.diff(true, prepend=0) > 0
    return np.stack([true / true[-1], true / (true + false)])[:, rises]


def large_pictures():
    """Two pictures of 300 x 300 with defects of very different size, and continuous scores."""
    rng = np.random.default_rng(3)
    masks = np.zeros((2, 300, 300), bool)
    masks[0, 20:150, 30:200] = True
    masks[1, 5:9, 5:9] = masks[1, 200:260, 100:120] = masks[1, 290, 290] = True
    maps = ndimage.gaussian_filter(rng.normal(size=masks.shape), (0, 3, 3)) * 10 + 1.5 * masks
    return list(masks), list(maps)


class TestImageCurves:
    def test_known_points(self):
        curves = image_curves([1, 0, 1, 0, 0], [0.9, 0.8, 0.8, 0.4, 0.1])
        assert curves["roc"] == pytest.approx(np.array([[0, 0, 1 / 3, 1], [0, 0.5, 1, 1]]))
        assert curves["pr"] == pytest.approx(np.array([[0, 0.5, 1], [1, 1, 2 / 3]]))

    def test_precision_starts_as_the_first_threshold_that_finds_anything(self):
        assert image_curves([0, 1, 0], [0.9, 0.8, 0.1])["pr"].tolist() == [[0, 1], [0.5, 0.5]]

    @pytest.mark.parametrize("decimals", [0, 1, 9])
    @pytest.mark.parametrize("count", [20, 300])
    def test_run_through_the_points_of_every_threshold(self, count, decimals):
        labels, scores = scored(count, decimals)
        curves, every_point = image_curves(labels, scores), roc_points(labels, scores)
        assert distance(curves["roc"], every_point) < 2e-4
        assert distance(every_point, curves["roc"]) < 1e-12
        points = rising_points(labels, scores)
        assert distance(curves["pr"], points) < 2e-4
        assert all(np.abs(points - point[:, None]).sum(axis=0).min() < 1e-12 for point in curves["pr"].T[1:])

    @pytest.mark.parametrize("decimals", [2, 9])
    def test_many_pictures_take_few_points_without_visible_loss(self, decimals):
        labels, scores = scored(50_000, decimals)
        curves = image_curves(labels, scores)
        assert distance(curves["roc"], roc_points(labels, scores)) < 1e-3
        assert distance(curves["pr"], rising_points(labels, scores)) < 5e-3
        assert all(20 < curve.shape[1] <= MAX_POINTS for curve in curves.values())

    def test_precision_of_the_very_first_finds_is_kept(self):
        """A peak that is narrower than a step of the thresholds spread over the recall."""
        labels = np.repeat([False, True, False, True], [5, 150, 300, 199_850])
        recall, precision = image_curves(labels, np.arange(len(labels), 0, -1))["pr"]
        assert precision[recall < 0.001].max() == pytest.approx(150 / 155, abs=0.01)

    def test_constant_scores(self):
        curves = image_curves([0, 1, 0, 0], [0.5] * 4)
        assert curves["roc"].tolist() == [[0, 1], [0, 1]]
        assert curves["pr"].tolist() == [[0, 1], [0.25, 0.25]]

    @pytest.mark.parametrize("labels", [[], [0], [1, 1]])
    def test_undefined_curves_are_empty(self, labels):
        assert {name: curve.shape for name, curve in image_curves(labels, [0.5] * len(labels)).items()} == {
            "roc": (2, 0),
            "pr": (2, 0),
        }

    def test_bad_input_is_refused(self):
        with pytest.raises(ValueError, match="`scores` must hold numbers only, but NaN"):
            image_curves([0, 1], [0.5, float("nan")])


class TestPixelCurves:
    def test_metrics_are_those_of_pixel_metrics(self):
        masks, maps = pictures(seed=0, decimals=1)
        metrics, _ = pixel_metrics_and_curves(iter(masks), iter(maps), fpr_limit=0.2, connectivity=4)
        assert metrics == pixel_metrics(masks, maps, fpr_limit=0.2, connectivity=4)

    @pytest.mark.parametrize("decimals", [0, 1, 9])
    def test_roc_and_precision_recall_are_those_of_the_pixels(self, decimals):
        masks, maps = pictures(seed=1, decimals=decimals)
        _, curves = pixel_metrics_and_curves(masks, maps)
        expected = image_curves(
            np.concatenate([mask.ravel() for mask in masks]), np.concatenate([scores.ravel() for scores in maps])
        )
        for name, curve in expected.items():
            assert np.array_equal(curves[name], curve)

    @pytest.mark.parametrize("connectivity", [4, 8])
    @pytest.mark.parametrize("limit", [0.05, 0.3, 1.0])
    @pytest.mark.parametrize("decimals", [0, 1, 9])
    def test_pro_follows_the_definition(self, decimals, limit, connectivity):
        masks, maps = pictures(seed=2, decimals=decimals)
        structure = ndimage.generate_binary_structure(2, connectivity // 4)
        every_point = np.array(brute_force_overlap(masks, maps, structure)).T
        curve = pixel_metrics_and_curves(masks, maps, fpr_limit=limit, connectivity=connectivity)[1]["pro"]
        scale = np.array([[limit], [1.0]])
        inside = every_point[:, every_point[0] <= limit]
        assert distance(curve / scale, inside / scale) < 2e-4
        assert distance(every_point / scale, curve / scale) < 1e-9
        assert curve[:, 0].tolist() == [0, 0]
        assert curve[0, -1] == limit

    @pytest.mark.parametrize("limit", [0.3, 1.0])
    @pytest.mark.parametrize("name", KINDS)
    def test_area_is_the_metric(self, name, limit):
        metrics, curves = pixel_metrics_and_curves(*degenerate(name), fpr_limit=limit)
        assert area(curves["roc"]) == pytest.approx(metrics["auroc"], abs=2e-4)
        assert area(curves["pro"]) / limit == pytest.approx(metrics["pro"], abs=2e-4)
        if limit == 1.0:
            assert curves["pro"][:, -1].tolist() == [1, 1]

    def test_many_pixels_take_few_points_without_visible_loss(self):
        masks, maps = large_pictures()
        metrics, curves = pixel_metrics_and_curves(masks, maps)
        labels, scores = np.ravel(masks), np.ravel(maps)
        assert distance(curves["roc"], roc_points(labels, scores)) < 2e-3
        points = rising_points(labels, scores)
        dense_at_the_start = np.geomspace(1, points.shape[1], 5000).astype(int) - 1
        assert distance(curves["pr"], points[:, dense_at_the_start]) < 0.01
        assert area(curves["roc"]) == pytest.approx(metrics["auroc"], abs=1e-3)
        assert area(curves["pro"]) / 0.3 == pytest.approx(metrics["pro"], abs=2e-3)
        assert all(20 < curve.shape[1] <= MAX_POINTS for curve in curves.values())

    def test_loss_is_invisible_within_a_small_limit_too(self):
        metrics, curves = pixel_metrics_and_curves(*large_pictures(), fpr_limit=0.001)
        assert area(curves["pro"]) / 0.001 == pytest.approx(metrics["pro"], abs=1e-3)

    def test_values_stay_in_range_and_do_not_turn_back(self):
        for _, curve in itertools.chain(
            pixel_metrics_and_curves(*large_pictures())[1].items(), image_curves(*scored(999, 1)).items()
        ):
            assert curve.dtype == np.float64
            assert curve.min() >= 0
            assert curve.max() <= 1
            assert (np.diff(curve[0]) >= 0).all()

    @pytest.mark.parametrize("limit", [0.07, 0.29, 0.57, 0.58])
    def test_limit_at_a_pixel_in_spite_of_rounding(self, limit):
        """0.29 · 100 is a little less than 29 in floating point."""
        mask = np.zeros((1, 200), bool)
        mask[0, 1::2] = True
        scores = np.arange(200.0, 0, -1)[None]
        curve = pixel_metrics_and_curves([mask], [scores], fpr_limit=limit)[1]["pro"]
        assert curve[:, -1] == pytest.approx([limit, limit], abs=1e-9)

    def test_constant_scores(self):
        mask = np.array([[False, True, False, False]])
        curves = pixel_metrics_and_curves([mask], [np.full((1, 4), 0.5)])[1]
        assert curves["roc"].tolist() == [[0, 1], [0, 1]]
        assert curves["pr"].tolist() == [[0, 1], [0.25, 0.25]]
        assert curves["pro"] == pytest.approx(np.array([[0, 0.3], [0, 0.3]]))

    @pytest.mark.parametrize("name", ["all normal", "all defective"])
    def test_undefined_curves_are_empty(self, name):
        _, curves = pixel_metrics_and_curves(*degenerate(name))
        assert {key: curve.shape for key, curve in curves.items()} == {"roc": (2, 0), "pr": (2, 0), "pro": (2, 0)}

    def test_no_picture(self):
        metrics, curves = pixel_metrics_and_curves([], [])
        assert all(np.isnan(value) for value in metrics.values())
        assert all(curve.shape == (2, 0) for curve in curves.values())

    @pytest.mark.parametrize("options", [{"fpr_limit": 1.5}, {"connectivity": 1}])
    def test_bad_options_are_refused(self, options):
        with pytest.raises(ValueError, match=f"`{next(iter(options))}`"):
            pixel_metrics_and_curves(*pictures(seed=0, decimals=1), **options)
