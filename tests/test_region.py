"""The region of interest: outside of it nothing counts, in learning and in inspection."""

import numpy as np
import pytest
import torch
from PIL import Image

from anomalysd_pipeline import AnomalySDPipeline
from anomalysd_pipeline.data.region import inside, pack_region, unpack_region
from anomalysd_pipeline.inspection.result import load_part, save_part
from anomalysd_pipeline.method.masks import multi_scale_masks, prototype_mask
from anomalysd_pipeline.method.scoring import ScoreMaps, image_score
from anomalysd_pipeline.method.workload import Workload

from .conftest import make_tiny_pipeline

LEFT = np.arange(64)[None, :].repeat(64, axis=0) < 32


@pytest.fixture(scope="module")
def learned(nuts):
    pipe = make_tiny_pipeline()
    pipe.add_category("nut", nuts[:2], region=LEFT)
    pipe.calibrate("nut", nuts[:2])
    return pipe


class TestPacking:
    def test_pictures_arrays_and_polygons(self, tmp_path):
        Image.fromarray(LEFT.astype(np.uint8)).save(tmp_path / "mask.png")  # 0 and 1: dark to the eye
        wanted = torch.from_numpy(LEFT)
        for mask in (tmp_path / "mask.png", LEFT, torch.from_numpy(LEFT), Image.fromarray(LEFT).convert("RGB")):
            assert unpack_region(pack_region(mask)).equal(wanted)
        drawn = unpack_region(pack_region([(0, 0), (0.5, 0), (0.5, 1), (0, 1)]))
        assert drawn.shape == (1024, 1024) and drawn.float().mean().item() == pytest.approx(0.5, abs=0.002)
        assert drawn[:, :500].all() and not drawn[:, 520:].any()
        large = np.zeros((600, 3000), dtype=bool)
        large[:, :1500] = True
        small = unpack_region(pack_region(large))
        assert small.shape == (205, 1024) and small[:, :512].all() and not small[:, 512:].any()

    def test_a_cell_counts_where_any_of_it_lies_inside(self):
        one = torch.zeros(64, 64, dtype=torch.bool)
        one[40, 9] = True
        assert inside(one, (4, 4)).nonzero().tolist() == [[2, 0]]
        assert inside(one, (128, 128)).nonzero().tolist() == [[80, 18], [80, 19], [81, 18], [81, 19]]

    @pytest.mark.parametrize(
        ("mask", "sentence"),
        [
            (np.zeros((64, 64), bool), "`mask` must mark some of the picture"),
            ([(0, 0), (1, 1)], "`mask` must be a picture, or a polygon of 3"),
            ([(0, 0), (640, 0), (0, 480)], "`mask` must have points .* from 0 to 1"),
            ([(0, 0), (float("nan"), 0), (0, 1)], "`mask` must have points"),
            ("absent.png", "`mask`.*absent.png"),
        ],
    )
    def test_refuses(self, mask, sentence):
        with pytest.raises(ValueError, match=sentence):
            pack_region(mask)


class TestLearning:
    def test_prototypes_outside_are_left_out(self, learned, nuts):
        whole = make_tiny_pipeline()
        whole.add_category("nut", nuts[:2])
        assert len(learned.bank["nut"]) == len(whole.bank["nut"]) // 2
        number, row, column = learned.bank.shots("nut").places.long().unbind(dim=1)
        last = int(whole.bank.shots("nut").places[:, 1].max())
        turn = number // 2
        # The left half of the picture, wherever a turn by 90, 180 and 270 degrees (counterclockwise) brings it.
        halves = torch.stack([column, last - row, last - column, row])
        assert (halves.gather(0, turn[None])[0] < (last + 1) / 2).all() and set(turn.tolist()) == {0, 1, 2, 3}

    def test_set_anew_from_the_kept_pictures(self, learned, nuts):
        pipe = make_tiny_pipeline()
        pipe.add_category("nut", nuts[:2])
        pipe.calibrate("nut", nuts[:2])
        before, record = pipe.bank["nut"].clone(), dict(pipe.config.categories["nut"])
        pipe.set_region("nut", LEFT)
        assert pipe.bank["nut"].equal(learned.bank["nut"]) and pipe.bank.sources("nut").unique().tolist() == [0, 1]
        assert pipe.config.categories["nut"] == {**learned.config.categories["nut"], "calibration": None}
        pipe.set_region("nut", None)
        assert pipe.bank["nut"].equal(before)
        assert pipe.config.categories["nut"] == {**record, "calibration": None}

    def test_registered_anew_the_region_stays(self, nuts):
        pipe = make_tiny_pipeline()
        pipe.add_category("nut", nuts[:1], region=LEFT)
        pipe.add_category("nut", nuts[:2])
        assert unpack_region(pipe.config.categories["nut"]["region"]).equal(torch.from_numpy(LEFT))

    def test_refused_without_a_trace(self, registered_pipeline, nuts):
        with pytest.raises(
            ValueError, match="`category` must be a part whose normal pictures are kept, and whole, got 'bolt'"
        ):
            registered_pipeline.set_region("bolt", LEFT)
        with pytest.raises(ValueError, match="`mask` must mark"):
            registered_pipeline.set_region("hex_nut", ~np.ones((64, 64), bool))
        with pytest.raises(ValueError, match="`region` must mark"):
            registered_pipeline.add_category("hex_nut", nuts, region=np.zeros((64, 64), np.uint8))


class TestInspection:
    def test_nothing_outside(self, learned, tested_nuts):
        for start in ("image", "exemplar"):
            out = learned(tested_nuts, category="nut", start=start, feature_weight=1.0)
            for maps in (out.anomaly_maps, out.prototype_masks):
                assert maps[:, LEFT].any() and not maps[:, ~LEFT].any()
            for picture, shown in zip(tested_nuts, out.inpainted, strict=True):
                assert np.array_equal(np.asarray(picture)[~LEFT], np.asarray(shown)[~LEFT])
                assert not np.array_equal(np.asarray(picture)[LEFT], np.asarray(shown)[LEFT])
        np.testing.assert_allclose(out.pred_scores, out.anomaly_maps.max(axis=(1, 2)), rtol=1e-5)

    def test_threshold_and_mask_are_of_the_inside(self, learned, tested_nuts):
        out = learned(tested_nuts, category="nut")
        assert out.thresholds[0] is not None and not out.pred_masks[:, ~LEFT].any()

    def test_all_inside_is_as_without(self, nuts, tested_nuts):
        found = []
        for region in (None, np.ones((64, 64), bool)):
            pipe = make_tiny_pipeline()
            pipe.add_category("nut", nuts[:2], region=region)
            found.append(pipe(tested_nuts, category="nut", feature_weight=1.0, top_share=0.1))
        np.testing.assert_allclose(found[0].anomaly_maps, found[1].anomaly_maps, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found[0].pred_scores, found[1].pred_scores, rtol=1e-4)
        assert np.array_equal(found[0].prototype_masks, found[1].prototype_masks)

    def test_smoothing_does_not_darken_the_border(self):
        region = torch.from_numpy(LEFT)[None, None]
        flat = torch.full((1, 64, 64), 2.0) + 50 * ~region[0]
        maps = ScoreMaps(flat, None, None, flat[:, None], None, regions=region)
        torch.testing.assert_close(maps.fused(0.1, 0.0)[0][LEFT], torch.full((2048,), 2.0))
        assert image_score(flat, 0.0, region).item() == 2 and image_score(flat, 1.0, region).item() == 2

    def test_passes_outside_are_left_out_and_masks_are_cut(self):
        region = torch.zeros(1, 1, 64, 64, dtype=torch.bool)
        region[..., :8, :12] = True
        work = Workload(1, multi_scale_masks(64, 64, (1, 2, 4, 8), "none"), region, region)
        masks, rows = work.select(range(len(work)), "cpu")[1:]
        assert rows.tolist() == [0, 1, 2, 3, 3, 4] and not masks[:, ~region[0]].any()
        assert [int(mask.sum()) for mask in masks] == [96, 96, 96, 64, 32, 96]

    def test_far_cells_outside_move_no_threshold(self):
        distances = torch.tensor([[[1.0, 2.0, 900.0], [1.0, 2.0, 900.0]]])
        counts = torch.tensor([[True, True, False]] * 2)
        mask = prototype_mask(distances, (2, 3), counts)
        assert mask[0, 0].tolist() == [[False, True, False]] * 2


def test_saved_and_loaded(learned, tested_nuts, tmp_path):
    expected = learned(tested_nuts, category="nut").pred_scores
    learned.save_pretrained(tmp_path / "saved")
    loaded = AnomalySDPipeline.from_pretrained(tmp_path / "saved")
    loaded.set_progress_bar_config(disable=True)
    save_part(learned, "nut", tmp_path / "part.safetensors")
    other = make_tiny_pipeline()
    load_part(other, "nut", tmp_path / "part.safetensors")
    for pipe in (loaded, other):
        assert np.array_equal(pipe(tested_nuts, category="nut").pred_scores, expected)
