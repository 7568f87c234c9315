import math
import sys

import numpy as np
import pytest
from PIL import Image

from anomalysd_pipeline.common.drawing import heatmap
from anomalysd_pipeline.evaluation.figures import COLORS, best_and_worst, draw_cases, draw_curves

GRAY = (120, 120, 120)


def case(label=True, threshold=0.4, mask=None, height=60, width=90, peak=0.8, **more):
    values = np.zeros((30, 45), np.float32)
    values[10:20, 15:30] = peak
    image = Image.new("RGB", (width, height), GRAY)
    return {"category": "gear", "image": image, "mask": mask, "anomaly_map": values, "score": peak, "label": label} | {
        "threshold": threshold,
        "caption": "dent/000.png",
        **more,
    }


class TestCurves:
    @pytest.fixture(autouse=True)
    def needs_matplotlib(self):
        pytest.importorskip("matplotlib")

    def shares(self, path, color):
        """How much of each third of the picture's width, in each half of its height, is of a line's color."""
        rgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
        hit = (np.abs(np.asarray(Image.open(path).convert("RGB")).astype(int) - rgb) < 6).all(axis=-1)
        return np.array([[part.sum() for part in np.array_split(half, 3, axis=1)] for half in np.array_split(hit, 2)])

    def test_a_line_for_each_name_in_each_panel(self, tmp_path):
        x = np.linspace(0, 1, 50)
        every = {"image_roc": [x, x**0.3], "image_pr": [x, 1 - x**4 / 2], "pixel_roc": [x, x**0.2]}
        every |= {"pixel_pr": [x, 1 - x**3], "pro": [x * 0.3, x**0.5]}
        image_only = {"image_roc": [x, x**0.5], "image_pr": [x, 1 - x**2 / 2], "pixel_roc": [[], []]}
        curves = {"gear": every, "$bad_name$ of a part with a very long name": image_only, "_none": {}}
        path = draw_curves(curves, tmp_path / "curves.png", "1-shot, seed 0")
        assert path == tmp_path / "curves.png"
        first, second, third = (self.shares(path, color) for color in COLORS[:3])
        assert (first > 50).all()  # five panels, and the legend in the sixth place
        assert (second[0] > 50).all()
        assert (second[1] == 0).all()
        assert (third == 0).all()

    def test_panels_are_those_with_points(self, tmp_path):
        x = np.linspace(0, 1, 9)
        small = Image.open(draw_curves({"a": {"image_roc": [x, x], "image_pr": [x, x]}}, tmp_path / "small.png"))
        both = {"image_roc": [x, x], "image_pr": [x, x], "pixel_roc": [x, x], "pixel_pr": [x, x], "pro": [x, x]}
        large = Image.open(draw_curves({"a": both}, tmp_path / "large.png"))
        assert small.width == large.width
        assert small.height < 0.6 * large.height
        assert draw_curves({"a": {"image_roc": [[], []]}}, tmp_path / "none.png") is None
        assert not (tmp_path / "none.png").exists()

    def test_same_input_same_bytes(self, tmp_path):
        from matplotlib import rcParams

        before, imported = dict(rcParams), "matplotlib.pyplot" in sys.modules
        curves = {f"part {i}": {"pro": [[0, 0.1, 0.3], [0, i / 30, 1]]} for i in range(27)}
        one, two = (draw_curves(curves, tmp_path / f"{name}.png", "x") for name in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()
        assert not Image.open(one).info.keys() & {"Software", "Creation Time"}
        assert dict(rcParams) == before
        assert ("matplotlib.pyplot" in sys.modules) == imported

    def test_wrong_shape_is_refused(self, tmp_path):
        with pytest.raises(
            ValueError, match=r"`curves` must be \[2, P\] each, but 'pro' of 'a' has the shape \[3, 2\]"
        ):
            draw_curves({"a": {"pro": [[0, 1], [0, 1], [0, 1]]}}, tmp_path / "x.png")


class TestCases:
    def columns(self, path):
        """The picture, the true mask and the heatmap of each row, [3, R, C, 3] with R rows of pixels."""
        figure = np.asarray(Image.open(path).convert("RGB"))
        # The three columns of pictures end at the right edge, 208 pixels each with 8 between them.
        return np.stack(
            [figure[:, figure.shape[1] - 216 * (3 - i) : figure.shape[1] - 216 * (2 - i) - 8] for i in range(3)]
        )

    def count(self, pixels, color):
        return int((np.abs(pixels.astype(int) - color) < 4).all(axis=-1).sum())

    def test_a_row_for_each_case(self, tmp_path):
        mask = np.zeros((60, 90), bool)
        mask[20:40, 30:60] = True  # a ninth of the picture
        found = self.columns(draw_cases([case(mask=mask)], tmp_path / "one.png"))
        area = 208 * 139  # of 90 x 60 pixels, fitted into a square of 208
        assert self.count(found[0], GRAY) == pytest.approx(area, rel=0.01)
        assert self.count(found[1], (0, 0, 0)) == pytest.approx(area * 8 / 9, rel=0.02)
        # 0.8 is twice the threshold of 0.4: the hottest color, at half its opacity, within a bright outline.
        hottest = heatmap(np.ones((1, 1)), threshold=0.5).getpixel((0, 0))
        assert self.count(found[2], np.rint((np.array(hottest) + GRAY) / 2)) > 0.7 * area / 9
        assert self.count(found[2], (255, 70, 60)) > 100
        two = Image.open(draw_cases([case(mask=mask)] * 2, tmp_path / "two.png"))
        assert two.height == Image.open(tmp_path / "one.png").height + 216
        assert (tmp_path / "one.png").read_bytes() == draw_cases(
            [case(mask=mask)], tmp_path / "again.png"
        ).read_bytes()

    def test_without_a_mask(self, tmp_path):
        normal = self.columns(draw_cases([case(label=False)], tmp_path / "normal.png"))
        defective = self.columns(draw_cases([case(label=True)], tmp_path / "defective.png"))
        assert self.count(normal[1], (0, 0, 0)) > 25000
        assert self.count(defective[1], (0, 0, 0)) < 2000  # nothing but the column's title

    def test_heat_has_a_fixed_scale(self, tmp_path):
        calm, faint = ({"threshold": None, "peak": peak} for peak in (0.2, 0.5))
        calm, faint, hot = (
            self.columns(draw_cases([case(**options)], tmp_path / "x.png"))[2]
            for options in (calm, faint, {"threshold": None, "peak": 0.5, "maximum": 0.5})
        )
        # Without a threshold 1.0 is hottest, unless the case says otherwise.
        assert self.count(calm, GRAY) > 25000
        middle, hottest = (heatmap(np.ones((1, 1)), maximum=m).getpixel((0, 0)) for m in (2.0, 1.0))
        assert self.count(faint, np.rint((np.array(middle) + GRAY) / 2)) > 1000
        assert self.count(hot, np.rint((np.array(hottest) + GRAY) / 2)) > 1000
        assert self.count(calm, (255, 70, 60)) == self.count(hot, (255, 70, 60)) == 0  # no threshold, no outline

    def test_smallest_spot_keeps_its_outline(self, tmp_path):
        spot = case(height=900, width=900)
        spot["anomaly_map"] = np.zeros((900, 900), np.float32)
        spot["anomaly_map"][450, 450] = 0.5
        found = self.columns(draw_cases([spot], tmp_path / "x.png"))
        assert self.count(found[2], (255, 70, 60)) >= 1

    def test_bad_input_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="`cases` must hold at least one case"):
            draw_cases([], tmp_path / "x.png")
        with pytest.raises(ValueError, match=r"`cases` must hold maps \[h, w\], but one of shape \[1, 4, 4\]"):
            draw_cases([case(anomaly_map=np.zeros((1, 4, 4)))], tmp_path / "x.png")


class TestBestAndWorst:
    def rows(self, *groups):
        return [
            {"category": category, "label": label, "score": score, "threshold": None}
            for category, label, scores in groups
            for score in scores
        ]

    def test_scores_count_relative_to_the_normal_ones(self):
        # Median 2 and deviation 1 in one category, 200 and 100 in the other.
        rows = self.rows(
            ("a", False, [1, 3, 1, 3]),
            ("a", True, [9, 3]),
            ("b", False, [100, 300, 100, 300]),
            ("b", True, [500, 100]),
        )
        # Distances of the defective ones: 7, 1, 3 and -1.
        assert best_and_worst(rows, 1) == {"found": [4], "missed": [11], "false_alarms": [1]}
        assert best_and_worst(rows, 2) == {"found": [4, 10], "missed": [11, 5], "false_alarms": [1, 3]}

    def test_no_picture_is_chosen_twice(self):
        rows = self.rows(("a", False, [0, 1]), ("a", True, [5, 4, 3]))
        assert best_and_worst(rows, 9) == {"found": [2, 3], "missed": [4], "false_alarms": [1, 0]}

    def test_normal_ones_without_spread_and_categories_without_normal_ones(self):
        rows = self.rows(("a", False, [1, 1]), ("a", True, [1, 5]), ("b", True, [2, 8]), ("c", False, [3]))
        chosen = best_and_worst(rows, 1)
        # In a: 0 and 4 in deviations of 1.73 from 1; in b: -1 and 1 of 3 from 5.
        assert (chosen["found"], chosen["missed"]) == ([3], [4])
        assert sorted(best_and_worst(rows, 9)["false_alarms"]) == [0, 1, 6]

    def test_pictures_that_failed_are_left_out(self):
        rows = self.rows(("a", False, [1, None]), ("a", True, [None, 4]))
        assert best_and_worst(rows, 3) == {"found": [3], "missed": [], "false_alarms": [0]}
        assert best_and_worst([], 3) == {"found": [], "missed": [], "false_alarms": []}

    def test_bad_input_is_refused(self):
        with pytest.raises(ValueError, match="`count` must be at least 1, but 0 was given"):
            best_and_worst([], 0)
        with pytest.raises(ValueError, match="`rows` must hold finite scores, but nan was given in row 1"):
            best_and_worst(self.rows(("a", False, [1, math.nan])), 1)
