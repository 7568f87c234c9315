import math
import weakref
from itertools import pairwise

import numpy as np
import pytest
from scipy import ndimage
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from anomalysd_pipeline.evaluation.metrics import (
    aupr,
    auroc,
    f1_max,
    image_metrics,
    pixel_metrics,
    pro,
    rank_pixels,
)


def brute_force(labels, scores):
    """AUROC pair by pair, then AUPR and F1-max threshold by threshold."""
    defective, normal = scores[labels][:, None], scores[~labels]
    average_precision, best, recall = 0.0, 0.0, 0.0
    for threshold in np.unique(scores)[::-1]:
        predicted = scores >= threshold
        found, before = np.sum(predicted & labels), recall
        recall = found / labels.sum()
        average_precision += (recall - before) * found / predicted.sum()
        best = max(best, 2 * found / (predicted.sum() + labels.sum()))
    return {
        "auroc": np.mean((defective > normal) + (defective == normal) / 2),
        "aupr": average_precision,
        "f1_max": best,
    }


def scikit_learn(labels, scores):
    """The same by scikit-learn from the single scores, which the package hands to it in groups."""
    precision, recall, _ = precision_recall_curve(labels, scores)
    return {
        "auroc": roc_auc_score(labels, scores),
        "aupr": average_precision_score(labels, scores),
        "f1_max": np.max(2 * precision * recall / np.maximum(precision + recall, 1e-300)),
    }


def brute_force_overlap(masks, maps, structure):
    """The PRO curve, (false positive rate, mean overlap), threshold by threshold and region by region."""
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
    return curve


def brute_force_pro(masks, maps, limit, structure):
    """The area under the curve, with each segment clipped at the limit."""
    area = 0.0
    for (x0, y0), (x1, y1) in pairwise(brute_force_overlap(masks, maps, structure)):
        if x0 >= limit or x1 == x0:
            continue
        end = min(x1, limit)
        y_end = y0 + (y1 - y0) * (end - x0) / (x1 - x0)
        area += (end - x0) * (y0 + y_end) / 2
    return area / limit


def weighted_pro(masks, maps, limit, structure):
    """PRO from sorted pixels, each worth its share of its region; for more pixels than brute force can do."""
    shares = []
    for mask in masks:
        components, count = ndimage.label(mask, structure=structure)
        shares.append(np.append(0.0, 1 / np.bincount(components.ravel())[1:])[components])
    labels, scores, shares = np.ravel(masks), np.ravel(maps), np.ravel(shares)
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.diff(scores[order]) != 0, True)  # of each score
    false = np.append(0, np.cumsum(~labels[order])[last]) / np.sum(~labels)
    overlap = np.append(0, np.cumsum(shares[order])[last]) / shares.sum()
    grid = np.append(false[false < limit], limit)
    starts = np.append(overlap[false < limit], np.interp(limit, false, overlap))
    return np.sum(np.diff(grid) * (starts[1:] + starts[:-1])) / 2 / limit


def pictures(seed, decimals):
    """Three pictures of different sizes with several regions, one normal; few decimals make ties."""
    rng = np.random.default_rng(seed)
    masks = [np.zeros((12, 15), bool), np.zeros((9, 9), bool), np.zeros((7, 20), bool)]
    masks[0][1:4, 2:6] = True
    masks[0][8:11, 9:11] = True
    masks[0][4, 6] = True  # touches the first region at a corner only
    masks[0][2:6, 11:13] = True  # beside the first, so that a row's pixels belong to both
    masks[1][5, 5] = True
    maps = [np.round(rng.normal(size=mask.shape) + 1.2 * mask, decimals).astype(np.float32) for mask in masks]
    return masks, maps


RECORDED = {  # seed, decimals, limit of PRO, connectivity: AUROC, AUPR, F1-max, PRO
    (0, 0, 0.3, 8): (0.887112217541172, 0.42558195901538953, 0.5757575757575758, 0.6312786603054121),
    (1, 0, 0.05, 4): (0.8717924166985829, 0.2605131831626718, 0.37037037037037035, 0.20062453800240518),
    (2, 1, 0.3, 8): (0.800124473381846, 0.3246407148375013, 0.3673469387755102, 0.4214907237255595),
    (3, 1, 1.0, 4): (0.8381846036001532, 0.2877514879795734, 0.4230769230769231, 0.8364387846291331),
    (4, 9, 0.3, 8): (0.7872462657985446, 0.24324334551085983, 0.2830188679245283, 0.504654453380995),
}
"""Figures of `pictures`, as an implementation without scikit-learn gave them."""


class TestCurves:
    @pytest.mark.parametrize("decimals", [0, 1, 9])
    def test_agree_with_brute_force(self, decimals):
        rng = np.random.default_rng(decimals)
        labels = rng.random(400) < 0.3
        scores = np.round(rng.normal(size=400) + labels, decimals)
        expected = brute_force(labels, scores)
        assert image_metrics(labels, scores) == pytest.approx(expected, abs=1e-12)
        single = {"auroc": auroc(labels, scores), "aupr": aupr(labels, scores), "f1_max": f1_max(labels, scores)}
        assert single == pytest.approx(expected, abs=1e-12)
        assert scikit_learn(labels, scores) == pytest.approx(expected, abs=1e-12)

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
        overlap = brute_force_pro(masks, maps, 0.2, ndimage.generate_binary_structure(2, 1))
        assert values == pytest.approx(brute_force(labels, scores) | {"pro": overlap}, abs=1e-9)

    @pytest.mark.parametrize("connectivity", [4, 8])
    @pytest.mark.parametrize("decimals", [0, 1, 9])
    def test_many_pictures(self, decimals, connectivity):
        """Regions of many sizes, and a picture that is nearly all defect."""
        rng = np.random.default_rng(decimals)
        masks = [rng.random((40, 50)) < share for share in (0, 0.01, 0.3, 0, 0.9) * 4]
        maps = [np.round(rng.normal(size=mask.shape) + mask, decimals).astype(np.float32) for mask in masks]
        values = pixel_metrics(masks, maps, connectivity=connectivity)
        assert values.pop("pro") == pytest.approx(
            weighted_pro(masks, maps, 0.3, ndimage.generate_binary_structure(2, connectivity // 4)), abs=1e-9
        )
        assert values == pytest.approx(scikit_learn(np.ravel(masks), np.ravel(maps)), abs=1e-12)

    @pytest.mark.parametrize(("seed", "decimals", "limit", "connectivity"), list(RECORDED))
    def test_figures_stay_as_they_were(self, seed, decimals, limit, connectivity):
        expected = dict(
            zip(("auroc", "aupr", "f1_max", "pro"), RECORDED[seed, decimals, limit, connectivity], strict=True)
        )
        values = pixel_metrics(*pictures(seed, decimals), fpr_limit=limit, connectivity=connectivity)
        assert values == pytest.approx(expected, abs=1e-12)

    def test_normal_pixels_that_no_threshold_separates_are_one_group(self):
        """Else the memory and the time of scikit-learn would be those of all pixels."""
        rng = np.random.default_rng(10)
        mask, scores = np.zeros((100, 100), bool), rng.normal(size=(100, 100))
        mask[50, 50:53] = True
        ranking = rank_pixels([mask], [scores])
        assert len(ranking.places) <= 2 * 3 + 1
        assert ranking.counts.sum() == mask.size and ranking.counts[ranking.labels].sum() == 3

    def test_takes_zeros_and_ones_and_stacked_maps(self):
        masks, maps = pictures(seed=4, decimals=2)
        stacked = np.stack([maps[0], maps[0][::-1]])
        expected = pixel_metrics([masks[0], masks[0]], list(stacked))
        assert pixel_metrics(np.stack([masks[0], masks[0]]).astype(np.uint8), stacked) == expected

    def test_single_and_double_precision(self):
        masks, maps = pictures(seed=5, decimals=9)
        labels = np.concatenate([mask.ravel() for mask in masks])
        for dtype in (np.float16, np.float32, np.float64, ">f4"):
            typed = [anomaly_map.astype(dtype) for anomaly_map in maps]
            scores = np.concatenate([anomaly_map.ravel() for anomaly_map in typed]).astype(np.float64)
            assert pixel_metrics(masks, typed)["auroc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
        mixed = pixel_metrics(masks, [maps[0].astype(np.float64), *maps[1:]])
        assert mixed == pytest.approx(pixel_metrics(masks, maps), abs=1e-12)

    def test_scores_that_differ_in_double_precision_only(self):
        mask, scores = np.array([[False, True]]), np.array([[1.0, 1.0 + 1e-12]])
        assert pixel_metrics([mask], [scores])["auroc"] == 1.0
        assert pixel_metrics([mask], [scores.astype(np.float32)])["auroc"] == 0.5
        assert pixel_metrics([mask, ~mask], [scores, scores.astype(np.float32)])["auroc"] == 0.75
        assert pixel_metrics([mask] * 4, [*[scores.astype(np.float32)] * 3, scores])["auroc"] == 0.625

    def test_integers_too_large_for_floating_point(self):
        mask, scores = np.array([[False, True]]), np.array([[2**60, 2**60 + 1]])
        assert pixel_metrics([mask], [scores])["auroc"] == 1.0

    def test_positive_and_negative_zero_are_one_threshold(self):
        assert pixel_metrics([np.array([[False, True]])], [np.array([[0.0, -0.0]])])["auroc"] == 0.5

    def test_pictures_from_generators_are_let_go_one_by_one(self):
        masks, maps = pictures(seed=7, decimals=2)
        handed_out, alive = [], []

        def read(source):
            for array in source:
                alive.append(sum(reference() is not None for reference in handed_out))
                copy = array.copy()
                handed_out.append(weakref.ref(copy))
                yield copy
                del copy

        assert pixel_metrics(read(masks * 4), read(maps * 4)) == pytest.approx(pixel_metrics(masks * 4, maps * 4))
        assert len(handed_out) == 24
        assert max(alive) <= 4  # this picture's and the one before, mask and map each

    def test_a_generator_may_use_its_array_again(self):
        masks, maps = pictures(seed=8, decimals=2)
        masks, maps = [masks[0], np.zeros_like(masks[0]), ~masks[0]], [maps[0], maps[0] + 1, maps[0] * 2]

        def read(source):
            buffer = np.empty_like(source[0])
            for array in source:
                buffer[:] = array
                yield buffer

        assert pixel_metrics(read(masks), read(maps)) == pixel_metrics(masks, maps)

    @pytest.mark.parametrize(("number_of_masks", "ended"), [(1, "`masks` held 1"), (3, "`maps` held 2")])
    def test_generators_of_different_length_are_refused(self, number_of_masks, ended):
        masks = (np.zeros((2, 2), bool) for _ in range(number_of_masks))
        with pytest.raises(ValueError, match=f"of equal number, but {ended}"):
            pixel_metrics(masks, (np.zeros((2, 2)) for _ in range(2)))

    @pytest.mark.parametrize("options", [{"fpr_limit": 0}, {"connectivity": 5}])
    def test_options_are_checked_before_any_picture_is_read(self, options):
        def unread():
            raise AssertionError
            yield

        with pytest.raises(ValueError, match=f"`{next(iter(options))}`"):
            pixel_metrics(unread(), unread(), **options)


def degenerate(name):
    """Masks [2, 8, 8] and maps of an unusual kind."""
    rng = np.random.default_rng(9)
    masks, maps = np.zeros((2, 8, 8), bool), rng.normal(size=(2, 8, 8)).astype(np.float32)
    masks[0, 2:5, 3:6] = masks[1, 0, 0] = masks[1, 6:, 5:] = True
    if name == "all normal":
        masks[:] = False
    elif name == "all defective":
        masks[:] = True
    elif name == "constant scores":
        maps[:] = 0.3
    elif name == "one defective pixel":
        masks[:] = False
        masks[1, 3, 4] = True
    elif name == "one normal pixel":
        masks[:] = True
        masks[1, 3, 4] = False
    elif name == "one normal pixel each":
        masks[:] = True
        masks[:, 3, 4] = False
    elif name == "ties":
        maps = np.round(maps)
    elif name == "infinite scores":
        maps[0, :3] = np.inf
        maps[1, 5:] = -np.inf
    elif name == "perfect":
        maps = masks.astype(np.float32)
    elif name == "reversed":
        maps = 1 - masks.astype(np.float32)
    return masks, maps


KINDS = ["random", "ties", "constant scores", "one defective pixel", "one normal pixel each", "infinite scores"]
KINDS += ["perfect", "reversed"]


class TestAgainstOthers:
    @pytest.mark.parametrize("name", [*KINDS, "one normal pixel"])
    def test_ranking_by_definition(self, name):
        masks, maps = degenerate(name)
        labels, scores = masks.ravel(), maps.ravel()
        expected = brute_force(labels, scores)
        assert image_metrics(labels, scores) == pytest.approx(expected, abs=1e-12)
        values = pixel_metrics(masks, maps)
        assert {key: values[key] for key in expected} == pytest.approx(expected, abs=1e-12)
        # scikit-learn refuses infinite scores; metrics depend on their order only.
        finite = np.nan_to_num(scores, posinf=9, neginf=-9)
        assert scikit_learn(labels, finite) == pytest.approx(expected, abs=1e-12)

    @pytest.mark.parametrize("name", [*KINDS, "one normal pixel"])
    def test_pro_by_definition(self, name):
        masks, maps = degenerate(name)
        for limit in (0.01, 0.3, 1.0):
            expected = brute_force_pro(masks, maps, limit, np.ones((3, 3)))
            assert pro(masks, maps, fpr_limit=limit) == pytest.approx(expected, abs=1e-9)

    @pytest.mark.parametrize("limit", [0.05, 0.3, 1.0])
    @pytest.mark.parametrize("name", KINDS)
    def test_anomalib(self, anomalib_pro, name, limit):
        """Its curve is exact too (all thresholds, no bins), its regions are connected by 8 neighbors.

        It takes a picture without any normal pixel for one without defects, so such a picture is left out here.
        """
        masks, maps = degenerate(name)
        assert pro(masks, maps, fpr_limit=limit) == pytest.approx(anomalib_pro(masks, maps, limit), abs=1e-6)

    @pytest.mark.parametrize("name", ["all normal", "all defective"])
    def test_anomalib_calls_zero_what_is_undefined(self, anomalib_pro, name):
        masks, maps = degenerate(name)
        assert anomalib_pro(masks, maps, 0.3) == 0
        assert all(math.isnan(value) for value in pixel_metrics(masks, maps).values())

    @pytest.mark.parametrize("label", [False, True])
    def test_a_picture_of_one_pixel_is_undefined(self, label):
        assert all(math.isnan(value) for value in pixel_metrics([[[label]]], [[[0.5]]]).values())
        assert all(math.isnan(value) for value in image_metrics([label], [0.5]).values())


@pytest.fixture(scope="module")
def anomalib_pro():
    """anomalib's AUPRO of masks and maps [N, H, W]."""
    torch = pytest.importorskip("torch")
    metrics, data = pytest.importorskip("anomalib.metrics"), pytest.importorskip("anomalib.data")

    def compute(masks, maps, limit):
        metric = metrics.AUPRO(fields=["anomaly_map", "gt_mask"], fpr_limit=limit)
        masks, maps = torch.from_numpy(masks), torch.from_numpy(maps)
        metric.update(data.ImageBatch(image=torch.zeros(len(masks), 3, 8, 8), anomaly_map=maps, gt_mask=masks))
        return float(metric.compute())

    return compute
