import math

import numpy as np
import pytest
from PIL import Image

from anomalysd_pipeline.common.drawing import contour, heatmap, montage, overlay, verdict_text


def picture(height=12, width=16, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


class TestHeatmap:
    def test_same_value_same_color_in_any_map(self):
        calm, hot = np.full((4, 6), 0.3), np.full((5, 5), 9.0)
        hot[2, 2] = 0.3
        assert heatmap(calm, threshold=0.5).getpixel((0, 0)) == heatmap(hot, threshold=0.5).getpixel((2, 2))
        assert heatmap(calm, maximum=2.0).getpixel((0, 0)) == heatmap(hot, maximum=2.0).getpixel((2, 2))

    def test_threshold_is_the_middle_and_its_double_the_end(self):
        values = np.array([[0.0, 0.2, 0.4, 0.6, 0.8, 5.0]])
        by_threshold = np.asarray(heatmap(values, threshold=0.4))
        assert np.array_equal(by_threshold, np.asarray(heatmap(values, maximum=0.8)))
        assert np.array_equal(by_threshold[0, 4], by_threshold[0, 5])
        assert len(np.unique(by_threshold[0, :5], axis=0)) == 5
        # Cold is blue, hot is red.
        assert by_threshold[0, 0].argmax() == 2
        assert by_threshold[0, 5].argmax() == 0

    def test_neighboring_values_have_neighboring_colors(self):
        ramp = np.asarray(heatmap(np.linspace(0, 1, 512)[None], maximum=1.0)).astype(int)
        assert np.abs(np.diff(ramp, axis=1)).max() <= 4

    def test_size_and_mode(self):
        figure = heatmap(np.zeros((5, 9), np.float32), threshold=1.0)
        assert (figure.size, figure.mode) == ((9, 5), "RGB")

    @pytest.mark.parametrize(
        ("values", "options", "message"),
        [
            (np.zeros((4, 4)), {}, "`maximum` is required"),
            (np.zeros((4, 4)), {"threshold": 0.0}, "`threshold` must be a finite number above 0"),
            (np.zeros((4, 4)), {"threshold": math.nan}, "`threshold` must be a finite number above 0"),
            (np.zeros((4, 4)), {"maximum": -1.0}, "`maximum` must be a finite number above 0"),
            (np.zeros((1, 4, 4)), {"threshold": 1.0}, "`anomaly_map` must be a finite array"),
            (np.full((4, 4), np.inf), {"threshold": 1.0}, "`anomaly_map` must be a finite array"),
        ],
    )
    def test_bad_input_is_refused(self, values, options, message):
        with pytest.raises(ValueError, match=message):
            heatmap(values, **options)
        with pytest.raises(ValueError, match=message):
            overlay(picture(4, 4), values, **options)


class TestOverlay:
    def test_normal_parts_stay_untouched(self):
        image = picture()
        values = np.random.default_rng(1).uniform(0, 0.5, image.shape[:2])
        assert np.array_equal(np.asarray(overlay(image, values, threshold=1.0)), image)
        assert np.array_equal(np.asarray(overlay(image, values, maximum=2.0)), image)

    def test_blends_with_full_opacity_from_the_threshold_on(self):
        image = picture()
        values = np.random.default_rng(1).uniform(1, 3, image.shape[:2])
        heat = np.asarray(heatmap(values, threshold=1.0)).astype(float)
        mixed = np.asarray(overlay(image, values, threshold=1.0, opacity=0.4)).astype(float)
        assert np.abs(mixed - (0.6 * image + 0.4 * heat)).max() <= 1

    def test_fades_in_between(self):
        image = np.zeros((1, 3, 3), np.uint8)
        shown = np.asarray(overlay(image, np.array([[0.5, 0.75, 1.0]]), threshold=1.0, opacity=1.0)).sum(axis=2)[0]
        assert 0 == shown[0] < shown[1] < shown[2]

    def test_takes_any_picture_mode_and_keeps_its_size(self):
        gray = Image.new("L", (16, 12), 90)
        out = overlay(gray, np.zeros((12, 16)), threshold=1.0)
        assert (out.size, out.mode) == ((16, 12), "RGB")
        assert out.getpixel((3, 3)) == (90, 90, 90)

    def test_bad_input_is_refused(self):
        with pytest.raises(ValueError, match="`anomaly_map` must have the picture's size, height × width 12 × 16"):
            overlay(picture(), np.zeros((16, 12)), threshold=1.0)
        with pytest.raises(ValueError, match="`opacity`"):
            overlay(picture(), np.zeros((12, 16)), threshold=1.0, opacity=1.5)
        with pytest.raises(ValueError, match="`image` must be a PIL picture or a uint8 array"):
            overlay(picture().astype(float), np.zeros((12, 16)), threshold=1.0)


class TestContour:
    def test_bright_inside_dark_around_and_nothing_else(self):
        image = np.full((30, 40, 3), 128, np.uint8)
        mask = np.zeros((30, 40), bool)
        mask[10:20, 12:28] = True
        drawn = np.asarray(contour(image, mask, color=(0, 255, 0)))
        bright = (drawn == (0, 255, 0)).all(axis=2)
        expected_bright = mask.copy()
        expected_bright[12:18, 14:26] = False
        dark = drawn.max(axis=2) < 64
        expected_dark = np.zeros_like(mask)
        expected_dark[8:22, 10:30] = True
        assert np.array_equal(bright, expected_bright)
        assert np.array_equal(dark, expected_dark & ~mask)
        assert (drawn[~(expected_dark | mask)] == 128).all()
        assert (drawn[12:18, 14:26] == 128).all()

    def test_region_cut_by_the_border_is_closed(self):
        drawn = np.asarray(contour(np.zeros((20, 20, 3), np.uint8), np.ones((20, 20), bool), color=(255, 255, 255)))
        expected = np.full((20, 20), 255)
        expected[2:18, 2:18] = 0
        assert np.array_equal(drawn[..., 0], expected)

    def test_empty_region_leaves_the_picture_and_the_input_alone(self):
        image = picture()
        assert np.array_equal(np.asarray(contour(image, np.zeros((12, 16), bool))), image)
        before = image.copy()
        contour(image, np.ones((12, 16), bool))
        assert np.array_equal(image, before)

    def test_bad_input_is_refused(self):
        with pytest.raises(ValueError, match="`pred_mask` must have the picture's size"):
            contour(picture(), np.zeros((4, 4), bool))
        with pytest.raises(ValueError, match="`pred_mask` must be bool"):
            contour(picture(), np.zeros((12, 16), np.uint8))
        with pytest.raises(ValueError, match="`width`"):
            contour(picture(), np.zeros((12, 16), bool), width=0)


class TestMontage:
    red, wide = Image.new("RGB", (64, 64), (200, 0, 0)), Image.new("RGB", (100, 50), (0, 0, 200))

    def test_pictures_lie_in_a_grid_on_white(self):
        figure = np.asarray(montage([[self.red, self.wide], [None, self.red]], cell=64))
        assert figure.shape == (2 * 64 + 3 * 8, 2 * 64 + 3 * 8, 3)
        assert (figure[8:72, 8:72] == (200, 0, 0)).all()
        assert (figure[24:56, 80:144] == (0, 0, 200)).all()
        assert (figure[8:24, 80:144] == 255).all()
        assert (figure[80:144, 8:72] == 255).all()
        assert (figure[80:144, 80:144] == (200, 0, 0)).all()

    def test_titles_and_labels_are_written_beside_the_pictures(self):
        bare = montage([[self.red], [self.wide]])
        full = montage([[self.red], [self.wide]], titles=["Input"], labels=["bottle", "a metal nut"])
        assert full.width > bare.width
        assert full.height > bare.height
        pixels = np.asarray(full)
        left, top = full.width - bare.width, full.height - bare.height
        assert pixels[: top + 8, left:].min() < 100
        assert pixels[top:, :left].min() < 100
        assert np.array_equal(pixels[top + 8 :, left + 8 :], np.asarray(bare)[8:, 8:])

    def test_long_titles_wrap_within_their_column(self):
        title = "a rather long title that needs several lines"
        figure = np.asarray(montage([[self.red, self.red]], titles=[title, ""], cell=96))
        header = figure[: len(figure) - 96 - 8]
        assert header[:, : 8 + 96 + 4].min() < 100
        assert (header[:, 8 + 96 + 4 :] == 255).all()

    def test_a_verdict_is_written_in_characters_the_font_has(self):
        verdict = verdict_text(0.46, 0.2)
        drawn = montage([[self.red]], titles=[verdict], labels=[verdict])
        missing = montage([[self.red]], titles=[verdict.replace("×", "\uffff")], labels=[verdict])
        plain = verdict.replace("×", "x")
        assert drawn.tobytes() == montage([[self.red]], titles=[plain], labels=[plain]).tobytes()
        assert drawn.tobytes() != missing.tobytes()

    def test_short_rows_are_filled_up(self):
        figure = np.asarray(montage([[self.red, self.red], [self.red]], cell=64))
        assert (figure[80:144, 80:144] == 255).all()

    @pytest.mark.parametrize(
        ("rows", "options", "message"),
        [
            ([], {}, "`rows` must hold at least one row"),
            ([[]], {}, "`rows` must hold at least one row"),
            ([[red, red]], {"titles": ["one"]}, "`titles` must hold one text for each of the 2 columns"),
            ([[red]], {"labels": ["one", "two"]}, "`labels` must hold one text for each of the 1 rows"),
            ([[red]], {"cell": 8}, "`cell` must be at least 32"),
        ],
    )
    def test_bad_input_is_refused(self, rows, options, message):
        with pytest.raises(ValueError, match=message):
            montage(rows, **options)


class TestVerdictText:
    @pytest.mark.parametrize(
        ("score", "threshold", "text"),
        [
            (0.46, 0.2, "Defect likely: 2.3 × the threshold"),
            (0.12, 0.2, "Looks normal: 0.6 × the threshold"),
            (0.2, 0.2, "Looks normal: 1.00 × the threshold"),
            (0.206, 0.2, "Defect likely: 1.03 × the threshold"),
            (0.0, 0.2, "Looks normal: 0.0 × the threshold"),
            (0.1234, None, "Score 0.123 (not calibrated: no threshold yet)"),
        ],
    )
    def test_wording(self, score, threshold, text):
        assert verdict_text(score, threshold) == text

    @pytest.mark.parametrize(("score", "threshold"), [(0.1, 0.0), (0.1, -1.0), (0.1, math.nan), (math.nan, None)])
    def test_bad_input_is_refused(self, score, threshold):
        with pytest.raises(ValueError, match="must be"):
            verdict_text(score, threshold)
