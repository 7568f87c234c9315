import math
import time
from itertools import pairwise

import numpy as np
import pytest
from scipy import ndimage
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from anomalysd_pipeline.metrics import aupr, auroc, f1_max, image_metrics, pixel_metrics, pro


def brute_force_f1(labels, scores):
    best = 0.0
    for threshold in np.unique(scores):
        predicted = scores >= threshold
        best = max(best, 2 * np.sum(predicted & labels) / (predicted.sum() + labels.sum()))
    return best


def brute_force_pro(masks, maps, limit, structure):
    """The curve threshold by threshold and region by region; the area with each segment clipped at the limit."""
    curve = [(0.0, 0.0)]
    for threshold in sorted({float(v) for m in maps for v in m.ravel()}, reverse=True):
        overlaps, false, normal = [], 0, 0
        for mask, anomaly_map in zip(masks, maps, strict=True):
            found = anomaly_map >= threshold
            false += np.sum(found & ~mask)
            normal += np.sum(~mask)
            components, count = ndimage.label(mask, structure=structure)
            overlaps += [found[components == i + 1].mean() for i in range(count)]
        curve.append((false / normal, float(np.mean(overlaps))))
    area = 0.0
    for (x0, y0), (x1, y1) in pairwise(curve):
        if x0 >= limit or x1 == x0:
            continue
        end = min(x1, limit)
        y_end = y0 + (y1 - y0) * (end - x0) / (x1 - x0)
        area += (end - x0) * (y0 + y_end) / 2
    return area / limit


def pictures(seed, decimals):
    """Three pictures of different sizes with several regions, one normal; few decimals make ties."""
    rng = np.random.default_rng(seed)
    masks = [np.zeros((12, 15), bool), np.zeros((9, 9), bool), np.zeros((7, 20), bool)]
    masks[0][1:4, 2:6] = True
    masks[0][8:11, 9:11] = True
    masks[0][4, 6] = True  # touches the first region at a corner only
    masks[1][5, 5] = True
    maps = [np.round(rng.normal(size=mask.shape) + 1.2 * mask, decimals).astype(np.float32) for mask in masks]
    return masks, maps


class TestCurves:
    @pytest.mark.parametrize("decimals", [0, 1, 9])
    def test_agree_with_scikit_learn(self, decimals):
        rng = np.random.default_rng(decimals)
        labels = rng.random(400) < 0.3
        scores = np.round(rng.normal(size=400) + labels, decimals)
        assert auroc(labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
        assert aupr(labels, scores) == pytest.approx(average_precision_score(labels, scores), abs=1e-12)
        precision, recall, _ = precision_recall_curve(labels, scores)
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-300)
        assert f1_max(labels, scores) == pytest.approx(f1.max(), abs=1e-12)
        assert f1_max(labels, scores) == pytest.approx(brute_force_f1(labels, scores), abs=1e-12)

    def test_known_values(self):
        assert image_metrics([0, 0, 1, 1], [0.1, 0.2, 0.3, 0.4]) == {"auroc": 1.0, "aupr": 1.0, "f1_max": 1.0}
        assert image_metrics([True, False], [0.5, 0.5]) == pytest.approx({"auroc": 0.5, "aupr": 0.5, "f1_max": 2 / 3})
        assert auroc([1, 0], [-math.inf, math.inf]) == 0.0

    def test_scale_and_order_do_not_matter(self):
        rng = np.random.default_rng(0)
        labels, scores = rng.random(50) < 0.5, rng.normal(size=50)
        order = rng.permutation(50)
        expected = image_metrics(labels, scores)
        assert image_metrics(labels[order], np.exp(scores[order]) * 1e6) == pytest.approx(expected, abs=1e-12)

    @pytest.mark.parametrize("labels", [[0, 0, 0], [1, 1, 1], []])
    def test_one_class_is_undefined(self, labels):
        values = image_metrics(labels, np.linspace(0, 1, len(labels)))
        assert set(values) == {"auroc", "aupr", "f1_max"}
        assert all(math.isnan(value) for value in values.values())

    @pytest.mark.parametrize(
        ("labels", "scores", "message"),
        [
            ([0, 1], [0.1], "equal length"),
            ([[0, 1]], [[0.1, 0.2]], "one-dimensional"),
            ([0, 2], [0.1, 0.2], "`labels` must hold booleans"),
            ([0, 1], [0.1, math.nan], "`scores` must hold numbers only, but NaN"),
            ([0, 1], ["a", "b"], "`scores` must hold real numbers"),
        ],
    )
    @pytest.mark.parametrize("metric", [image_metrics, auroc, aupr, f1_max])
    def test_bad_input_is_refused(self, metric, labels, scores, message):
        with pytest.raises(ValueError, match=message):
            metric(labels, scores)


class TestPro:
    @pytest.mark.parametrize("decimals", [0, 1, 9])
    @pytest.mark.parametrize("limit", [0.05, 0.3, 1.0])
    def test_agrees_with_brute_force(self, decimals, limit):
        masks, maps = pictures(seed=1, decimals=decimals)
        expected = brute_force_pro(masks, maps, limit, np.ones((3, 3)))
        assert 0 < expected < 1
        assert pro(masks, maps, fpr_limit=limit) == pytest.approx(expected, abs=1e-9)

    def test_connectivity(self):
        masks, maps = pictures(seed=2, decimals=1)
        cross = ndimage.generate_binary_structure(2, 1)
        expected = brute_force_pro(masks, maps, 0.3, cross)
        assert pro(masks, maps, connectivity=4) == pytest.approx(expected, abs=1e-9)
        assert abs(pro(masks, maps, connectivity=8) - expected) > 1e-6

    def test_small_regions_weigh_as_much_as_large_ones(self):
        mask = np.zeros((20, 20), bool)
        mask[:10, :10] = True
        mask[15, 15] = True
        found_large, found_small = np.zeros((20, 20)), np.zeros((20, 20))
        found_large[:10, :10] = 1
        found_small[15, 15] = 1
        # Half the regions at no false positive, then a line to (1, 1): 0.5 + 0.5 · 0.3 / 2 on average up to 0.3.
        assert pro([mask], [found_large]) == pytest.approx(0.575, abs=1e-12)
        assert pro([mask], [found_small]) == pytest.approx(0.575, abs=1e-12)

    def test_perfect_and_constant_maps(self):
        masks, maps = pictures(seed=0, decimals=1)
        assert pro(masks, [mask.astype(float) for mask in masks]) == pytest.approx(1.0, abs=1e-12)
        assert pro(masks, [np.ones_like(m) for m in maps]) == pytest.approx(0.15, abs=1e-12)

    @pytest.mark.parametrize("fill", [False, True])
    def test_no_region_or_no_normal_pixel_is_undefined(self, fill):
        masks = [np.full((4, 5), fill)]
        maps = [np.arange(20.0).reshape(4, 5)]
        assert math.isnan(pro(masks, maps))
        assert all(math.isnan(value) for value in pixel_metrics(masks, maps).values())

    def test_no_picture_is_undefined(self):
        assert math.isnan(pro([], []))
        assert all(math.isnan(value) for value in pixel_metrics([], []).values())

    @pytest.mark.parametrize(
        ("masks", "maps", "options", "message"),
        [
            ([np.zeros((4, 4), bool)], [], {}, "of equal number"),
            ([np.zeros((4, 4), bool)], [np.zeros((4, 5))], {}, "pairs of one shape"),
            ([np.zeros((1, 4, 4), bool)], [np.zeros((1, 4, 4))], {}, "pairs of one shape"),
            ([np.full((4, 4), 255, np.uint8)], [np.zeros((4, 4))], {}, "`masks` must hold booleans"),
            ([np.zeros((4, 4), bool)], [np.full((4, 4), np.nan)], {}, "`maps` must hold numbers only"),
            ([np.zeros((4, 4), bool)], [np.zeros((4, 4))], {"fpr_limit": 0}, "`fpr_limit`"),
            ([np.zeros((4, 4), bool)], [np.zeros((4, 4))], {"fpr_limit": 1.1}, "`fpr_limit`"),
            ([np.zeros((4, 4), bool)], [np.zeros((4, 4))], {"connectivity": 6}, "`connectivity`"),
        ],
    )
    @pytest.mark.parametrize("metric", [pro, pixel_metrics])
    def test_bad_input_is_refused(self, metric, masks, maps, options, message):
        with pytest.raises(ValueError, match=message):
            metric(masks, maps, **options)


class TestPixelMetrics:
    @pytest.mark.parametrize("decimals", [0, 9])
    def test_equal_the_single_metrics_over_all_pixels(self, decimals):
        masks, maps = pictures(seed=3, decimals=decimals)
        labels = np.concatenate([mask.ravel() for mask in masks])
        scores = np.concatenate([anomaly_map.ravel() for anomaly_map in maps])
        values = pixel_metrics(masks, maps, fpr_limit=0.2, connectivity=4)
        assert values == pytest.approx(
            {
                "auroc": roc_auc_score(labels, scores),
                "aupr": average_precision_score(labels, scores),
                "f1_max": brute_force_f1(labels, scores),
                "pro": brute_force_pro(masks, maps, 0.2, ndimage.generate_binary_structure(2, 1)),
            },
            abs=1e-9,
        )

    def test_takes_zeros_and_ones_and_stacked_maps(self):
        masks, maps = pictures(seed=4, decimals=2)
        stacked = np.stack([maps[0], maps[0][::-1]])
        expected = pixel_metrics([masks[0], masks[0]], list(stacked))
        assert pixel_metrics(np.stack([masks[0], masks[0]]).astype(np.uint8), stacked) == expected

    def test_a_million_pixels_take_seconds_at_most(self):
        rng = np.random.default_rng(0)
        masks = list(rng.random((16, 256, 256)) < 0.001)
        maps = list(rng.random((16, 256, 256), dtype=np.float32))
        start = time.perf_counter()
        pixel_metrics(masks, maps)
        assert time.perf_counter() - start < 8
