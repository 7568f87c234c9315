"""Masks: partitions of the picture, Eq. 15 against brute force, the foreground of drawn shapes, and training draws."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy import ndimage

from anomalysd_pipeline.method.foreground import foreground_mask
from anomalysd_pipeline.method.masks import (
    iou,
    latent_mask,
    multi_scale_masks,
    prototype_mask,
    random_rectangle_mask,
    training_mask,
    variance_threshold,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class TestMultiScaleMasks:
    @pytest.mark.parametrize("grouping, counts", [("none", [1, 4, 16, 64]), ("grouped", [1, 4, 4, 4])])
    @pytest.mark.parametrize("size", [(64, 64), (37, 53), (8, 9)])
    def test_each_scale_covers_the_picture_once(self, grouping, counts, size):
        passes = multi_scale_masks(*size, grouping=grouping)
        assert [entry.scale for entry in passes] == [1, 2, 4, 8]
        assert [len(entry.masks) for entry in passes] == counts
        for entry in passes:
            assert entry.masks.shape[1:] == (1, *size) and entry.masks.dtype == torch.float32
            assert set(entry.masks.unique().tolist()) <= {0.0, 1.0}
            assert torch.equal(entry.masks.sum(0), torch.ones(1, *size))

    def test_single_masks_are_the_cells_row_by_row(self):
        cells = multi_scale_masks(10, 6, scales=(2,))[0].masks
        expected = torch.zeros(4, 1, 10, 6)
        for index, (top, left) in enumerate([(0, 0), (0, 3), (5, 0), (5, 3)]):
            expected[index, 0, top : top + 5, left : left + 3] = 1
        assert torch.equal(cells, expected)

    @pytest.mark.parametrize("scale", [2, 3, 5, 8])
    def test_grouped_cells_do_not_touch_even_at_corners(self, scale):
        masks = multi_scale_masks(17, 29, scales=(scale,), grouping="grouped")[0].masks
        eight_neighbors = np.ones((3, 3))
        parts = [ndimage.label(mask[0].numpy(), structure=eight_neighbors)[1] for mask in masks]
        assert sum(parts) == scale**2

    @pytest.mark.parametrize("length", [7, 12, 100, 101])
    def test_cell_sizes_differ_by_at_most_one_pixel(self, length):
        masks = multi_scale_masks(length, length, scales=(7,))[0].masks
        heights = masks.amax(-1).sum(-1)
        assert heights.max() - heights.min() <= 1 and heights.min() >= 1

    @pytest.mark.parametrize(
        "arguments, word",
        [
            ({"grouping": "all"}, "`grouping`"),
            ({"scales": ()}, "`scales`"),
            ({"scales": (2, 2)}, "`scales`"),
            ({"scales": (0, 1)}, "`scales`"),
            ({"scales": (17,)}, "`scales`"),
        ],
    )
    def test_bad_arguments(self, arguments, word):
        with pytest.raises(ValueError, match=word):
            multi_scale_masks(16, 32, **arguments)


def brute_force_threshold(values):
    """Eq. 15 in exact fractions: for every r, both population variances; ties go to the higher r."""
    values = [Fraction(float(value)) for value in values]

    def variance(part):
        mean = sum(part) / len(part)
        return sum((value - mean) ** 2 for value in part) / len(part)

    candidates = sorted(set(values))[:-1]
    costs = [variance([v for v in values if v > r]) + variance([v for v in values if v <= r]) for r in candidates]
    best = min(costs)
    return float(max(r for r, cost in zip(candidates, costs, strict=True) if cost == best))


class TestVarianceThreshold:
    @pytest.mark.parametrize("seed", range(8))
    def test_equals_brute_force(self, seed):
        values = np.random.default_rng(seed).gamma(0.5, 3.0, 40)
        assert variance_threshold(values) == brute_force_threshold(values)

    @pytest.mark.parametrize("seed", range(8))
    def test_equals_brute_force_with_equal_values(self, seed):
        values = np.random.default_rng(seed).integers(0, 6, 30)
        assert variance_threshold(torch.tensor(values)) == brute_force_threshold(values)

    @pytest.mark.parametrize("offset", [0.0, 1e6])
    def test_far_from_zero(self, offset):
        values = np.random.default_rng(0).integers(0, 4096, 60) / 64 + offset
        assert variance_threshold(values) == brute_force_threshold(values)

    def test_is_not_otsus_weighted_sum(self):
        values = np.sort(np.random.default_rng(0).gamma(0.5, 3.0, 200))
        cuts = range(1, 200)
        otsu = min(cuts, key=lambda cut: cut * values[:cut].var() + (200 - cut) * values[cut:].var())
        plain = min(cuts, key=lambda cut: values[:cut].var() + values[cut:].var())
        assert otsu != plain
        assert variance_threshold(values) == values[plain - 1]

    def test_ties_go_to_the_higher_threshold(self):
        assert variance_threshold(np.array([0.0, 1.0, 2.0])) == 1.0
        assert variance_threshold(np.array([0.1, 0.2, 0.3])) == 0.2

    def test_constant_marks_nothing(self):
        values = torch.full((5, 5), 0.3)
        threshold = variance_threshold(values)
        assert threshold == values[0, 0].item() and not (values > threshold).any()

    @pytest.mark.parametrize("values", [[], [1.0, float("nan")], [1.0, float("inf")]])
    def test_bad_values(self, values):
        with pytest.raises(ValueError, match="`values`"):
            variance_threshold(np.array(values))


class TestPrototypeMask:
    def test_each_picture_has_its_own_threshold(self):
        distances = torch.rand(2, 4, 6, generator=seeded()) * 0.1
        distances[0, 1:3, 2:4] += 5
        distances[1, 0, 0] += 500
        mask = prototype_mask(distances, (8, 18))
        expected = torch.zeros(2, 1, 8, 18, dtype=torch.bool)
        expected[0, 0, 2:6, 6:12] = True
        expected[1, 0, :2, :3] = True
        assert mask.dtype == torch.bool and torch.equal(mask, expected)

    def test_equal_distances_give_an_empty_mask(self):
        assert not prototype_mask(torch.full((1, 4, 4), 2.0), 16).any()

    def test_bad_shape(self):
        with pytest.raises(ValueError, match="`distances`"):
            prototype_mask(torch.zeros(4, 4), 16)


SIDE = 128
Y, X = np.mgrid[:SIDE, :SIDE].astype(float)
DISC = (X - 60) ** 2 + (Y - 66) ** 2 < 30**2
SHAPES = {
    "disc": DISC,
    "ring": DISC & ~((X - 60) ** 2 + (Y - 66) ** 2 < 15**2),
    "bar to both borders": abs(X - 60) < 20,
    "thin bar": (abs(X - 60) < 5) & (abs(Y - 64) < 50),
    "two parts": (abs(X - 30) < 15) & (abs(Y - 64) < 30) | (abs(X - 95) < 15) & (abs(Y - 64) < 30),
    "touching one border": (X < 60) & (abs(Y - 64) < 35),
}


def as_image(gray, noise=0.03, seed=0):
    pixels = np.stack([gray, 0.9 * gray, 0.7 * gray])
    pixels = pixels + noise * np.random.default_rng(seed).standard_normal(pixels.shape)
    return torch.tensor(pixels * 2 - 1, dtype=torch.float32).clamp(-1, 1)


class TestForegroundMask:
    @pytest.mark.parametrize("name", SHAPES)
    @pytest.mark.parametrize("light", [0.85, 0.2])
    def test_finds_a_shape_and_fills_its_holes(self, name, light):
        gray = np.where(SHAPES[name], 1.05 - light, light) + 0.1 * (X / SIDE - 0.5)
        truth = torch.from_numpy(ndimage.binary_fill_holes(SHAPES[name]))
        mask = foreground_mask(as_image(gray))
        assert mask.shape == (SIDE, SIDE) and mask.dtype == torch.bool
        assert iou(mask, truth) > 0.9

    def test_parts_of_several_colors(self):
        pixels = torch.full((3, SIDE, SIDE), 0.8)
        disc = torch.from_numpy(DISC)
        pixels[0, disc & (torch.from_numpy(X) < 60)] = -0.8
        pixels[2, disc & (torch.from_numpy(X) >= 60)] = -0.8
        assert iou(foreground_mask(pixels), disc) > 0.9

    textures = {
        "noise": np.random.default_rng(0).random((SIDE, SIDE)),
        "blotches": 0.5 + 2.0 * (ndimage.gaussian_filter(np.random.default_rng(1).random((SIDE, SIDE)), 4) - 0.5),
        "wood": 0.5 + 1.5 * (ndimage.gaussian_filter(np.random.default_rng(2).random((SIDE, SIDE)), (1, 15)) - 0.5),
        "checkerboard": 0.3 + 0.4 * ((X // 16 + Y // 16) % 2),
        "grid": 0.8 - 0.6 * ((X % 16 < 4) | (Y % 16 < 4)),
        "stripes": 0.3 + 0.4 * (X // 8 % 2),
        "dots": 0.8 - 0.6 * ((X % 16 - 8) ** 2 + (Y % 16 - 8) ** 2 < 25),
        "flat": np.full((SIDE, SIDE), 0.5),
        "gradient": 0.1 + 0.8 * X / SIDE,
        "vignette": 0.8 - 0.25 * ((X / 64 - 1) ** 2 + (Y / 64 - 1) ** 2),
        "speck": 0.8 - 0.6 * ((X - 60) ** 2 + (Y - 60) ** 2 < 6**2),
    }

    @pytest.mark.parametrize("name", textures)
    @pytest.mark.parametrize("noise", [0.0, 0.02])
    def test_textures_are_all_foreground(self, name, noise):
        assert foreground_mask(as_image(self.textures[name], noise)).all()

    @pytest.mark.parametrize("shape", [(1, 3, 16, 16), (1, 16, 16), (3, 4, 16)])
    def test_bad_shape(self, shape):
        with pytest.raises(ValueError, match="`image`"):
            foreground_mask(torch.zeros(shape))


class TestRandomRectangleMask:
    def test_is_one_rectangle_within_its_limits(self):
        generator, sides, covered = seeded(), [], torch.zeros(1, 40, 60)
        for _ in range(300):
            mask = random_rectangle_mask(40, 60, generator, 0.25, 0.75)
            height, width = mask.amax(2).sum().item(), mask.amax(1).sum().item()
            rows, columns = mask[0].nonzero().unbind(1)
            assert mask.sum() == height * width == (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
            sides.append((height / 40, width / 60))
            covered += mask
        low, high = np.min(sides, axis=0), np.max(sides, axis=0)
        assert (low >= 0.25).all() and (high <= 0.75).all() and (low < 0.3).all() and (high > 0.7).all()
        assert covered.amax(1).min() > 0 and covered.amax(2).min() > 0

    def test_seeded(self):
        first, again = (random_rectangle_mask(32, 32, seeded(5)) for _ in range(2))
        assert torch.equal(first, again) and not torch.equal(first, random_rectangle_mask(32, 32, seeded(6)))

    @pytest.mark.parametrize("limits", [(0.0, 0.5), (0.6, 0.5), (0.5, 1.5)])
    def test_bad_limits(self, limits):
        with pytest.raises(ValueError, match="`min_fraction`"):
            random_rectangle_mask(16, 16, seeded(), *limits)


class TestTrainingMask:
    @pytest.mark.parametrize("gamma", [0.0, 0.2, 0.5])
    def test_exceeds_gamma(self, gamma):
        foreground = torch.zeros(48, 64, dtype=torch.bool)
        foreground[10:40, 12:50] = True
        generator = seeded()
        for _ in range(30):
            mask = training_mask(foreground, generator, gammas=(gamma,), max_draws=2000)
            assert mask.shape == (1, 48, 64) and mask.dtype == torch.float32
            assert iou(mask[0], foreground) > gamma

    def test_gammas_have_equal_odds(self):
        # At gamma 0 the first rectangle is taken, at 0.99 the best of many: their IoU tells which it was.
        foreground = torch.ones(16, 16)
        overlaps = [
            iou(training_mask(foreground, generator, gammas=(0.0, 0.99), max_draws=400)[0], foreground)
            for generator in [seeded()]
            for _ in range(150)
        ]
        assert 0.35 < np.mean(np.array(overlaps) > 0.85) < 0.68

    def test_thin_object_ends_with_the_best_rectangle_seen(self):
        foreground = torch.eye(32, dtype=torch.bool)
        mask = training_mask(foreground, seeded(3), gammas=(0.5,), max_draws=20)
        generator = seeded(3)
        torch.randint(1, (), generator=generator)
        seen = [iou(random_rectangle_mask(32, 32, generator)[0], foreground) for _ in range(20)]
        assert iou(mask[0], foreground) == max(seen) < 0.5

    @pytest.mark.parametrize(
        "foreground, arguments, word",
        [
            (torch.zeros(8, 8), {}, "`foreground`"),
            (torch.ones(8, 8), {"gammas": ()}, "`gammas`"),
            (torch.ones(8, 8), {"gammas": (1.0,)}, "`gammas`"),
            (torch.ones(8, 8), {"max_draws": 0}, "`max_draws`"),
        ],
    )
    def test_bad_arguments(self, foreground, arguments, word):
        with pytest.raises(ValueError, match=word):
            training_mask(foreground, seeded(), **arguments)


def test_iou():
    a, b = torch.zeros(2, 4, 4)
    assert iou(a, b) == 0
    a[:2], b[1:3] = 1, 1
    assert iou(a, b) == pytest.approx(1 / 3) and iou(a, a) == 1
    with pytest.raises(ValueError, match="`a`"):
        iou(a, b[:2])


@pytest.mark.parametrize("grid", [(8, 8), (6, 5), (7, 9)])
def test_latent_mask_takes_the_nearest_pixel(grid):
    mask = (torch.rand(2, 1, 48, 40, generator=seeded()) > 0.5).float()
    rows, columns = (np.arange(grid[i]) * (48, 40)[i] // grid[i] for i in (0, 1))
    expected = mask.numpy()[:, :, rows][..., columns]
    np.testing.assert_array_equal(latent_mask(mask, *grid), expected)
    np.testing.assert_array_equal(latent_mask(mask.bool(), *grid), expected)
