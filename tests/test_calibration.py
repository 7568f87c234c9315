"""Thresholds from normal scores, settings, and the batching of passes."""

import numpy as np
import pytest
import torch

from anomalysd_pipeline.calibration import prediction_threshold
from anomalysd_pipeline.masks import multi_scale_masks
from anomalysd_pipeline.settings import PRESETS, InspectionSettings
from anomalysd_pipeline.workload import Workload, in_batches

FULL = {"noise_strength": 0.4, "prototype_weight": 0.1, "feature_weight": 0.0, "guidance_scale": 1.0}


class TestPredictionThreshold:
    @pytest.mark.parametrize("rate", [0.02, 0.1, 0.3])
    @pytest.mark.parametrize("count", [3, 8])
    def test_false_alarms_come_at_the_rate_asked_for(self, count, rate):
        """Monte Carlo: for log-normal scores, a new one exceeds the bound at most as often as promised."""
        rng = np.random.default_rng(0)
        draws = np.exp(rng.normal(-3, 0.5, (4000, count + 1)))
        exceeded = np.mean([row[-1] > prediction_threshold(row[:-1], rate) for row in draws])
        # The bound is the larger of the prediction bound, exact at `rate`, and the highest score, exceeded at 1/(n+1).
        ceiling = min(rate, 1 / (count + 1))
        assert exceeded <= ceiling + 3 * np.sqrt(rate / 4000)
        assert exceeded >= 0.4 * ceiling

    def test_scales_with_the_scores(self):
        scores = [0.2, 0.3, 0.25]
        doubled = prediction_threshold([2 * s for s in scores], 0.05)
        assert doubled == pytest.approx(2 * prediction_threshold(scores, 0.05))

    def test_is_never_below_a_score_seen(self):
        assert prediction_threshold([0.1] * 50 + [9.0], 0.4) >= 9.0

    def test_equal_scores_give_that_score(self):
        assert prediction_threshold([0.5, 0.5, 0.5], 0.02) == pytest.approx(0.5)

    @pytest.mark.parametrize("scores", [[1.0], [], [1.0, 0.0], [1.0, -1.0], [1.0, float("nan")], [1.0, float("inf")]])
    def test_refuses_scores_without_a_spread(self, scores):
        with pytest.raises(ValueError, match="`scores`"):
            prediction_threshold(scores, 0.02)


class TestSettings:
    def test_later_layers_win_and_none_is_not_given(self):
        settings = InspectionSettings.resolve("fast", [FULL, {"noise_strength": 0.6}, {"noise_strength": None}])
        assert settings.noise_strength == 0.6
        assert settings.mask_grouping == PRESETS["fast"]["mask_grouping"]

    def test_the_paper_s_preset(self):
        settings = InspectionSettings.resolve("paper", [FULL])
        assert (settings.num_inference_steps, settings.mask_scales, settings.mask_grouping) == (
            50,
            (1, 2, 4, 8),
            "none",
        )

    def test_a_setting_nobody_knows(self, tiny_pipeline):
        with pytest.raises(TypeError, match="strength"):
            tiny_pipeline.settings(strength=0.5)


class TestWorkload:
    def test_every_picture_meets_every_mask(self):
        scales = multi_scale_masks(16, 16, (1, 2), "none")
        own = torch.zeros(3, 1, 16, 16, dtype=torch.bool)
        own[0, :, :4], own[2, :, 8:] = True, True  # the second picture has an empty prototype mask: no pass for it
        work = Workload(3, scales, own)
        assert len(work) == 3 * 5 + 2
        pictures, masks, rows = work.select(range(len(work)), "cpu")
        for picture in range(3):
            mine = pictures == picture
            for row, scale in enumerate(scales):
                assert torch.equal(masks[mine & (rows == row)], scale.masks)
            guided = masks[mine & (rows == 2)]
            assert len(guided) == own[picture].any()
            assert all(torch.equal(mask > 0, own[picture]) for mask in guided)

    def test_zero_shot(self):
        assert len(Workload(2, multi_scale_masks(16, 16, (1, 2, 4, 8), "none"), None)) == 170


class TestInBatches:
    def test_covers_everything_once_in_order(self):
        seen = []
        assert in_batches(lambda jobs: seen.extend(jobs), 10, 4) == 4
        assert seen == list(range(10))

    def test_halves_until_it_fits(self):
        seen, tried = [], []

        def run(jobs):
            tried.append(len(jobs))
            if len(jobs) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            seen.extend(jobs)

        assert in_batches(run, 9, 8) == 2
        assert seen == list(range(9)) and tried[:3] == [8, 4, 2]

    def test_a_single_job_that_does_not_fit_is_an_error(self):
        def run(jobs):
            raise MemoryError("full")

        with pytest.raises(MemoryError):
            in_batches(run, 4, 4)
