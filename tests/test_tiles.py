"""Large pictures in tiles: one bank, one threshold, seams blended."""

import numpy as np
import pytest
import torch
from PIL import Image

from anomalysd_pipeline import AnomalySDPipeline
from anomalysd_pipeline.data.tiles import blend, cut

from .conftest import make_tiny_pipeline

TILES = {"tile_size": 64, "tile_overlap": 16}


def wide(pictures):
    """A picture of several, side by side."""
    return Image.fromarray(np.concatenate([np.asarray(picture) for picture in pictures], axis=1))


@pytest.fixture(scope="module")
def learned(nuts):
    pipe = make_tiny_pipeline(rotations=1)
    pipe.add_category("nut", [wide(nuts[:2]), wide(nuts[1:])], **TILES)
    return pipe


class TestCutting:
    @pytest.mark.parametrize(("height", "width"), [(64, 64), (40, 65), (200, 130), (1000, 333)])
    def test_tiles_cover_all_and_overlap(self, height, width):
        boxes, covered = cut(height, width, 64, 16), np.zeros((height, width), dtype=int)
        for left, top, right, bottom in boxes:
            assert right - left == min(64, width) and bottom - top == min(64, height)
            covered[top:bottom, left:right] += 1
        assert covered.min() >= 1
        for axis, low, high in ((0, 0, 2), (1, 1, 3)):
            spans = sorted({(box[low], box[high]) for box in boxes})
            assert all(a[1] - b[0] >= 16 for a, b in zip(spans, spans[1:], strict=False)), axis
        assert boxes[0][:2] == (0, 0) and boxes[-1][2:] == (width, height)

    def test_none_and_no_more_than_needed(self):
        assert cut(300, 200, 0, 0) == [(0, 0, 200, 300)]
        assert len(cut(128, 128, 64, 0)) == 4 and len(cut(129, 64, 64, 0)) == 3

    @pytest.mark.parametrize("overlap", [0, 16, 32])
    def test_what_agrees_is_put_together_as_it_was(self, overlap):
        whole = torch.rand(3, 150, 170)
        boxes = cut(150, 170, 64, overlap)
        parts = [whole[:, top:bottom, left:right] for left, top, right, bottom in boxes]
        torch.testing.assert_close(blend(parts, boxes, (150, 170), overlap), whole)

    def test_no_seam_between_tiles_that_differ(self):
        boxes = cut(64, 112, 64, 16)
        row = blend([torch.zeros(64, 64), torch.ones(64, 64)], boxes, (64, 112), 16)[30]
        assert row[0] == 0 and row[-1] == 1 and (row.diff() >= 0).all() and row.diff().max() < 0.1


class TestPipeline:
    def test_learns_the_tiles_of_pictures(self, learned, nuts):
        record = learned.config.categories["nut"]
        assert record["shots"] == 2 and record["tile_size"] == 64 and record["tile_overlap"] == 16
        shots = learned.bank.shots("nut")
        assert len(shots.sizes) == 6 and learned.bank.sources("nut").unique().tolist() == [0, 1]
        first = np.asarray(wide(nuts[:2]))[:, 32:96]
        assert np.array_equal(((shots.copy(1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy(), first)

    def test_a_tile_alone_is_scored_as_in_the_picture(self, learned, nuts, tested_nuts):
        picture = wide([nuts[2], tested_nuts[3]])
        whole = learned(picture, category="nut", start="image")
        tiles = [picture.crop(box) for box in cut(64, 128, 64, 16)]
        alone = learned(tiles, category="nut", start="image", tile_size=0)
        assert whole.pred_scores[0] == alone.pred_scores.max() and whole.anomaly_maps.shape == (1, 64, 128)
        np.testing.assert_allclose(whole.anomaly_maps[0][:, :32], alone.anomaly_maps[0][:, :32], rtol=1e-5)
        assert whole.inpainted[0].size == (128, 64)
        shown = [np.asarray(out.inpainted[0], dtype=int)[:, :32] for out in (whole, alone)]
        assert abs(shown[0] - shown[1]).max() <= 1
        two = learned([picture, nuts[0]], category="nut", start="image")  # sizes may differ
        assert two.pred_scores[0] == whole.pred_scores[0] and two.anomaly_maps[1].shape == (64, 64)

    def test_threshold_holds_for_the_same_tiles(self, nuts, tested_nuts, tmp_path):
        pipe = make_tiny_pipeline(rotations=1)
        good = [wide(nuts[:2]), wide(nuts[1:])]
        pipe.add_category("nut", good, **TILES)
        calibration = pipe.calibrate("nut", good)
        assert calibration.pictures == 2 and calibration.settings["tile_size"] == 64
        picture = wide(tested_nuts[2:])
        out = pipe(picture, category="nut")
        assert out.thresholds == [calibration.threshold]
        assert pipe(picture, category="nut", tile_overlap=8).thresholds == [None]
        pipe.save_pretrained(tmp_path / "saved")
        loaded = AnomalySDPipeline.from_pretrained(tmp_path / "saved")
        loaded.set_progress_bar_config(disable=True)
        again = loaded(picture, category="nut")
        assert again.thresholds == out.thresholds and np.array_equal(again.pred_scores, out.pred_scores)

    def test_with_a_region(self, nuts):
        pipe = make_tiny_pipeline(rotations=1)
        right = np.arange(192)[None, :].repeat(64, axis=0) >= 128
        pipe.add_category("nut", [wide(nuts)], region=right, **TILES)
        assert len(pipe.bank.shots("nut").sizes) == 2  # of four tiles
        maps = pipe(wide(nuts[::-1]), category="nut").anomaly_maps[0]
        assert maps[right].any() and not maps[~right].any()
        with pytest.raises(ValueError, match="normal pictures are kept, and whole"):
            pipe.set_region("nut", right)

    @pytest.mark.parametrize(
        ("given", "sentence"),
        [
            ({"tile_size": 8}, "`tile_size` must be at least 32"),
            ({"tile_size": -1}, "`tile_size` must be a whole number"),
            ({"tile_size": 64, "tile_overlap": 33}, "`tile_overlap` must be at most half of `tile_size`"),
            ({"tile_overlap": 4}, "`tile_overlap` must be at most half"),
        ],
    )
    def test_refuses(self, registered_pipeline, nuts, given, sentence):
        with pytest.raises(ValueError, match=sentence):
            registered_pipeline(nuts[0], **given)
        with pytest.raises(ValueError, match=sentence):
            registered_pipeline.add_category("hex_nut", nuts, **given)
