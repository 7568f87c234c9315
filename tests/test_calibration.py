"""Thresholds from normal scores, settings, and the batching of passes."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from anomalysd_pipeline.data.inputs import Inputs
from anomalysd_pipeline.method.calibration import (
    TYPICAL_SPREAD,
    calibrate_threshold,
    expected_above,
    prediction_threshold,
    threshold_between,
)
from anomalysd_pipeline.method.masks import multi_scale_masks
from anomalysd_pipeline.method.scoring import NotFiniteError
from anomalysd_pipeline.method.settings import PRESETS, InspectionSettings
from anomalysd_pipeline.method.workload import Workload, in_batches
from anomalysd_pipeline.synthetic import normal_images

SETTINGS = InspectionSettings.resolve(
    "sota", [{"noise_strength": 0.4, "prototype_weight": 0.1, "guidance_scale": 1.0}]
)
FULL = {"noise_strength": 0.4, "prototype_weight": 0.1, "feature_weight": 0.0, "guidance_scale": 1.0}


def draws(spread, count, seed=0):
    """Of 2000 parts, `count` normal scores and one more."""
    return np.exp(np.random.default_rng(seed).normal(-3, spread, (2000, count + 1)))


def exceeded(scores, rate):
    """How often the last score of a row is above what the others give."""
    return np.mean([row[-1] > prediction_threshold(row[:-1], rate) for row in scores])


class TestPredictionThreshold:
    @pytest.mark.parametrize("rate", [0.02, 0.1, 0.3])
    @pytest.mark.parametrize("count", [3, 8])
    def test_false_alarms_come_at_the_rate_asked_for(self, count, rate):
        """Monte Carlo: for log-normal scores that differ as is typical."""
        found = exceeded(draws(TYPICAL_SPREAD, count), rate)
        assert found == pytest.approx(rate, rel=0.25, abs=4 * np.sqrt(rate / 2000))

    def test_the_scores_count_beside_what_is_typical(self):
        """Parts whose scores differ more have more false alarms, but the fewer the more scores are known."""
        found = [exceeded(draws(0.5, count), 0.05) for count in (3, 8, 15)]
        alone = np.mean(draws(0.5, 1) > np.exp(-3 + stats.norm.ppf(0.95) * TYPICAL_SPREAD))
        assert 0.05 < found[2] < found[1] < found[0] < alone

    @pytest.mark.parametrize("rate", [0.05, 0.1, 0.3])
    def test_many_scores_of_any_distribution(self, rate):
        """One in ten scores is ten times as high."""
        scores = draws(0.2, 40) * np.where(np.random.default_rng(1).random((2000, 41)) < 0.1, 10, 1)
        found = exceeded(scores, rate)
        assert rate - 1 / 41 - 3 * np.sqrt(rate / 2000) < found < rate + 3 * np.sqrt(rate / 2000)

    def test_few_scores(self):
        """By hand: the geometric mean is 2 ** 2.4, half of the logarithms are at most log 2 away from their median,
        and 8 further scores say 0.15."""
        spread = np.log(2) / stats.norm.ppf(0.75)
        pooled = np.sqrt((8 * 0.15**2 + 4 * spread**2) / 12)
        found = prediction_threshold([1.0, 2.0, 4.0, 8.0, 64.0], 0.1)
        expected = 2**2.4 * np.exp(1.3562 * pooled * np.sqrt(6 / 5))  # t of 90 %, 12 degrees
        assert found == pytest.approx(expected, rel=1e-4)

    def test_one_score(self):
        """Its spread is what is typical: t of 95 % with 8 degrees is 1.8595."""
        assert prediction_threshold([3.0], 0.05) == pytest.approx(3 * np.exp(1.8595 * 0.15 * np.sqrt(2)), rel=1e-4)

    def test_one_unlike_the_others_moves_the_center_alone(self):
        usual = [1.0, 1.1, 0.9, 1.05, 0.95, 1.0, 1.02, 0.98]
        moved = prediction_threshold([*usual[:-1], 50.0], 0.05) / prediction_threshold(usual, 0.05)
        assert moved == pytest.approx((50 / 0.98) ** (1 / 8), rel=0.05)

    def test_scales_with_the_scores(self):
        scores = [0.2, 0.3, 0.25]
        doubled = prediction_threshold([2 * s for s in scores], 0.05)
        assert doubled == pytest.approx(2 * prediction_threshold(scores, 0.05))

    def test_many_equal_scores_give_that_score(self):
        assert prediction_threshold([0.5] * 20, 0.05) == pytest.approx(0.5)

    @pytest.mark.parametrize("scores", [[], [1.0, 0.0], [1.0, -1.0], [1.0, float("nan")], [1.0, float("inf")]])
    def test_refuses_scores_without_a_logarithm(self, scores):
        with pytest.raises(ValueError, match="`scores`"):
            prediction_threshold(scores, 0.02)


class TestKnownDefects:
    def test_the_middle_of_equally_many_scores(self):
        """By hand: equal numbers and spreads leave the middle of the logarithms."""
        normal, defective = [1.0, 1.1, 1.21], [4.0, 4.4, 4.84]
        found = threshold_between(normal, defective)
        assert found == pytest.approx(1.1 * 2, rel=1e-6)
        below = 1 - expected_above(defective, found)
        assert expected_above(normal, found) == pytest.approx(below, rel=1e-6)
        # As the upper bound of normal scores has it: t of 10 degrees at half of log 4.
        pooled = np.sqrt((8 * 0.15**2 + 2 * (np.log(1.1) / stats.norm.ppf(0.75)) ** 2) / 10)
        assert below == pytest.approx(stats.t.sf(np.log(2) / (pooled * np.sqrt(4 / 3)), 10), rel=1e-6)

    def test_the_bound_of_a_rate_is_expected_at_that_rate(self):
        scores = [1.0, 1.3, 1.2, 1.1]
        for rate in (0.02, 0.2):
            assert expected_above(scores, prediction_threshold(scores, rate)) == pytest.approx(rate, rel=1e-6)

    @pytest.mark.parametrize(("normals", "defects"), [(4, 4), (8, 3)])
    def test_no_more_are_on_the_wrong_side_than_expected(self, normals, defects):
        """Monte Carlo: log-normal scores whose centers are 0.6 apart."""
        good, bad = draws(TYPICAL_SPREAD, normals)[:1000], draws(TYPICAL_SPREAD, defects, seed=1)[:1000] * np.exp(0.6)
        alarms, misses, expected = [], [], []
        for own, other in zip(good, bad, strict=True):
            threshold = threshold_between(own[:-1], other[:-1])
            alarms.append(own[-1] > threshold)
            misses.append(other[-1] <= threshold)
            expected.append(expected_above(own[:-1], threshold))
        for found in (np.mean(alarms), np.mean(misses)):  # four standard errors
            assert found < np.mean(expected) + 4 * np.sqrt(np.mean(expected) / 1000)
            assert found > np.mean(expected) / 4


class TestCalibrateThreshold:
    """With a score that is known: the mean of a picture, and a thousandth for what was left out."""

    @staticmethod
    def inputs(*levels):
        squares = torch.stack([torch.full((3, 8, 8), level) for level in levels])
        return Inputs(squares, list(squares))

    @staticmethod
    def calibrate(pictures, shots, before=None, settings=SETTINGS, calls=None, marks=(), defective=None):
        def score(picture, left_out):
            if calls is not None:
                calls.append(left_out)
            return picture.squares.mean().item() + 1 + (0 if left_out is None else 0.001 * (left_out + 1))

        return calibrate_threshold(score, pictures, shots, settings, 0.05, 0, before, marks, defective)

    def test_pictures_of_the_bank_are_scored_without_themselves(self):
        pictures, calls = self.inputs(0.1, 0.2, 0.4), []
        shots = pictures.digests()
        found = self.calibrate(pictures, shots, calls=calls)
        growth = (2 / 3) ** 0.2  # of three pictures two are left
        assert calls == [0, 1, 2] and found.held_out and found.pictures == 3 and found.digests == shots
        assert found.scores == pytest.approx([growth * s for s in (1.101, 1.202, 1.403)], rel=1e-5)
        assert found.threshold == prediction_threshold(found.scores, 0.05)

    def test_further_pictures_count_beside_earlier_ones_and_equal_ones_once(self):
        pictures, more = self.inputs(0.1, 0.2), self.inputs(0.3, 0.3, 0.1)
        shots = pictures.digests()
        first = self.calibrate(pictures, shots)
        both = self.calibrate(more, shots, first.to_dict())
        whole = self.calibrate(self.inputs(0.1, 0.2, 0.3), shots)
        assert both.pictures == 3 and sorted(both.scores) == sorted(whole.scores)
        assert both.threshold == pytest.approx(whole.threshold, rel=1e-9)

    def test_copies_that_come_later_count_no_further(self):
        """With the noise of another exposure, of a picture of the bank and of a further one."""
        good = normal_images("hex_nut", 4, seed=2, size=64)
        noise = np.random.default_rng(3).normal(0, 2, (2, 64, 64, 3))
        copies = [
            Image.fromarray((np.asarray(good[index]) + noise[place]).round().clip(0, 255).astype(np.uint8))
            for place, index in enumerate((1, 2))
        ]
        bank, third, later = (
            Inputs.of(pictures, 64, lambda height, width: None) for pictures in (good[:2], good[2:3], copies)
        )
        shots, marks = bank.digests(), bank.fingerprints()
        first = self.calibrate(bank, shots, marks=marks)
        second = self.calibrate(third, shots, first.to_dict(), marks=marks)
        assert (first.pictures, second.pictures) == (2, 3)
        assert self.calibrate(later, shots, second.to_dict(), marks=marks) == second
        # Without the picture of the bank itself, its copy stands for it.
        calls = []
        alone = self.calibrate(later, shots, calls=calls, marks=marks)
        assert calls == [1, None] and alone.digests == [shots[1], later.digests()[1]]

    def test_a_picture_without_a_score_is_named(self):
        def score(picture, left_out):
            if picture.squares.mean() > 0.3:
                raise NotFiniteError("Picture 1 of 1", "repainting")
            return 1.0

        pictures = self.inputs(0.1, 0.2, 0.4)
        with pytest.raises(ValueError, match="^Normal picture 3 of 3 has no score, because the repainting"):
            calibrate_threshold(score, pictures, pictures.digests(), SETTINGS, 0.05, 0)

    def test_known_defective_pictures_count_on(self):
        pictures, bad = self.inputs(0.1, 0.2), self.inputs(0.8, 0.9, 0.9)
        shots = pictures.digests()
        first = self.calibrate(pictures, shots, defective=bad)
        assert first.defective_scores == pytest.approx([1.8, 1.9], rel=1e-5)  # equal ones once
        assert first.threshold == pytest.approx(threshold_between(first.scores, [1.8, 1.9]), rel=1e-5)
        assert first.expected_false_alarms == pytest.approx(first.expected_misses, rel=1e-3)
        later = self.calibrate(self.inputs(0.3), shots, first.to_dict(), defective=self.inputs(0.7))
        assert later.defective_scores == pytest.approx([1.8, 1.9, 1.7], rel=1e-5) and later.pictures == 3
        assert self.calibrate(self.inputs(0.3), shots, later.to_dict()) == later
        with pytest.raises(ValueError, match="`defective_images` has a picture, number 2, that is a normal one too"):
            self.calibrate(pictures, shots, defective=self.inputs(0.8, 0.2))

    def test_known_defective_pictures_lower_a_guess(self):
        picture = self.inputs(0.2)
        guess = self.calibrate(picture, picture.digests())
        found = self.calibrate(picture, picture.digests(), defective=self.inputs(0.8, 0.9))
        assert not found.held_out and found.expected_misses is None and found.scores == guess.scores
        assert max(found.scores) < found.threshold < min(1.8, guess.threshold)

    def test_scores_of_other_settings_do_not_count(self):
        pictures = self.inputs(0.1, 0.2)
        shots = pictures.digests()
        other = dataclasses.replace(SETTINGS, noise_strength=0.5)
        first = self.calibrate(pictures, shots, settings=other)
        assert self.calibrate(self.inputs(0.3), shots, first.to_dict()).pictures == 1
        old = {**self.calibrate(pictures, shots).to_dict(), "version": 1}
        assert self.calibrate(self.inputs(0.3), shots, old).pictures == 1

    def test_a_single_picture_gives_a_guess_from_copies_of_it(self):
        picture, calls = self.inputs(0.2), []
        found = self.calibrate(picture, picture.digests(), calls=calls)
        assert calls == [None] * 4 and not found.held_out and found.pictures == 1
        assert found.threshold == pytest.approx(2.5 * np.exp(np.median(np.log(found.scores))))
        # Another picture ends the guess; the first one still cannot be compared with others.
        more = self.calibrate(self.inputs(0.2, 0.3), picture.digests(), found.to_dict())
        assert more.held_out and more.scores == pytest.approx([1.3])

    def test_without_the_feature_term_a_larger_bank_changes_nothing(self):
        pictures = self.inputs(0.1, 0.2)
        plain = InspectionSettings.resolve("paper", [FULL])
        found = self.calibrate(pictures, pictures.digests(), settings=plain)
        assert found.scores == pytest.approx([1.101, 1.202], rel=1e-5)


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
