"""What good parts have and a picture lacks, against brute force and on a part with a piece broken off."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from anomalysd_pipeline.method import neighbors
from anomalysd_pipeline.method.deviations import gaps_of, missing_distances, stress, unlikeness
from anomalysd_pipeline.models.bank import MISSING_WEIGHT, PrototypeBank
from anomalysd_pipeline.models.collection import fill_bank, held_out_bank


def vectors(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def squares(one, two):
    return cdist(one.double().numpy(), two.double().numpy(), "sqeuclidean")


def bank_of(grids, **options):
    """A bank that knows whole pictures [K, P, C]."""
    bank, features = PrototypeBank(**options), grids.flatten(end_dim=1)
    sources = torch.arange(len(grids)).repeat_interleave(grids.shape[1])
    bank.add("lid", features, sources=sources, unturned=len(features), whole=len(grids))
    return bank


class TestFormulas:
    @pytest.mark.parametrize("offset", [0.0, 100.0])
    @pytest.mark.parametrize("entries", [2**24, 7])
    def test_gaps_equal_brute_force(self, monkeypatch, offset, entries):
        monkeypatch.setattr(neighbors, "ENTRIES", entries)
        grids = vectors(3, 8, 5) + offset
        expected = [
            np.mean([squares(one, two).min(axis=1) for j, two in enumerate(grids) if j != i], axis=0)
            for i, one in enumerate(grids)
        ]
        np.testing.assert_allclose(gaps_of(grids), expected, rtol=1e-3)

    @pytest.mark.parametrize("entries", [2**24, 7])
    def test_distances_equal_brute_force(self, monkeypatch, entries):
        monkeypatch.setattr(neighbors, "ENTRIES", entries)
        grids, psi = vectors(3, 6, 5), vectors(4, 5, 2, 3, seed=1)
        gaps = gaps_of(grids)
        scale = 2 * gaps.double().mean().item() + gaps.double().numpy()
        expected = []
        for picture in psi:
            queries = picture.flatten(1).T
            relative = np.stack([squares(grid, queries).min(axis=1) for grid in grids]) / scale
            expected.append(relative[relative.max(axis=1).argmin()].reshape(2, 3))
        np.testing.assert_allclose(missing_distances(grids, gaps, psi), np.stack(expected), rtol=1e-4)

    def test_nothing_is_missing_in_a_normal_picture_however_its_positions_are_mixed(self):
        grids = vectors(3, 6, 5)
        order = torch.randperm(6, generator=torch.Generator().manual_seed(3))
        psi = grids[1][order].T.reshape(1, 5, 2, 3)
        assert missing_distances(grids, gaps_of(grids), psi).max() < 1e-5

    def test_what_is_missing_is_found_where_it_was(self):
        # A part on a plain ground; on the tested picture one of its positions is ground as well.
        ground, part = vectors(5, seed=1), vectors(3, 4, 5, seed=2) * 0.1 + vectors(4, 5, seed=3) * 3
        grids = ground.repeat(3, 12, 1)
        grids[:, [4, 5, 6, 7]] = part
        grids = grids + vectors(3, 12, 5, seed=4) * 0.05
        tested = (grids[0] + vectors(12, 5, seed=5) * 0.05).clone()
        tested[6] = ground
        psi = tested.T.reshape(1, 5, 3, 4)
        found, bank = missing_distances(grids, gaps_of(grids), psi).flatten(), bank_of(grids)
        assert found.argmax() == 6 and found[6] > 20 * found[[i for i in range(12) if i != 6]].max()
        # All that is left is as on good parts: the paper's distance does not see it, both together do.
        far, both = (measure("lid", psi).flatten() for measure in (bank.relative_distances, bank.deviations))
        assert far[6] < 1 < both[6] and both.argmax() == 6


class TestBanks:
    def test_deviations_are_the_larger_of_both(self):
        # A picture that lacks nearly everything, and one that is like nothing normal.
        grids, psi = vectors(3, 6, 5), vectors(2, 5, 2, 3, seed=1) * torch.tensor([0.1, 5.0]).view(2, 1, 1, 1)
        bank = bank_of(grids)
        there, lacking = bank.relative_distances("lid", psi), missing_distances(grids, gaps_of(grids), psi)
        torch.testing.assert_close(bank.missing_distances("lid", psi), lacking)
        expected = np.maximum(there.numpy(), MISSING_WEIGHT * lacking.numpy())
        stressed = stress(torch.from_numpy(expected), unlikeness(bank.views("lid"), psi))
        np.testing.assert_allclose(bank.deviations("lid", psi), stressed, rtol=1e-6)
        assert 0 < (expected > there.numpy()).mean() < 1

    def test_beside_a_coreset_the_pictures_stay_whole(self):
        grids, turned, psi = vectors(3, 6, 5), vectors(40, 5, seed=2), vectors(1, 5, 2, 3, seed=1)
        bank, features = PrototypeBank(max_size=10, max_unturned=18), torch.cat([grids.flatten(end_dim=1), turned])
        bank.add("lid", features, sources=torch.arange(58) % 3, unturned=18, whole=3)
        assert len(bank["lid"]) < 58
        torch.testing.assert_close(bank.missing_distances("lid", psi), missing_distances(grids, gaps_of(grids), psi))

    @pytest.mark.parametrize(
        ("whole", "max_unturned", "side"), [(0, 18, 3), (1, 18, 3), (3, 12, 3), (4, 18, 3), (3, 18, 2)]
    )
    def test_where_pictures_are_not_known_whole_nothing_is_missing(self, whole, max_unturned, side):
        bank = PrototypeBank(max_size=10, max_unturned=max_unturned)
        bank.add("lid", vectors(58, 5), sources=torch.arange(58) % 3, unturned=18, whole=whole)
        psi = vectors(1, 5, 2, side, seed=1)
        assert bank.missing_distances("lid", psi) is None
        assert torch.equal(bank.deviations("lid", psi), bank.relative_distances("lid", psi))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_is_packed_saved_and_kept_beside_others(self, tmp_path, dtype):
        bank, psi = bank_of(vectors(3, 6, 5)).to(dtype), vectors(1, 5, 2, 3, seed=1)
        expected = bank.missing_distances("lid", psi)
        bank.add("axle", vectors(7, 5, seed=4).to(dtype))
        bank.save_pretrained(tmp_path)
        loaded, copied = PrototypeBank.from_pretrained(tmp_path, torch_dtype=dtype), PrototypeBank().to(dtype)
        copied.add_packed("lid", bank.packed("lid"))
        copied.add_packed("axle", bank.packed("axle"))
        for other in (bank, loaded, copied):
            assert torch.equal(other.missing_distances("lid", psi), expected)
            assert other.missing_distances("axle", psi) is None
            assert torch.equal(other.packed("lid")["bank"], bank.packed("lid")["bank"])
        bank.remove("axle")
        assert torch.equal(bank.missing_distances("lid", psi), expected)

    @pytest.mark.parametrize("asked", [False, True])
    def test_a_filled_bank_knows_its_pictures_whole_where_asked(self, asked):
        images = torch.rand(3, 3, 4, 6, generator=torch.Generator().manual_seed(1)) * 2 - 1
        bank, tested = PrototypeBank(), images[:1].flip(3) * 0.5
        fill_bank(bank, "lid", torch.nn.Identity(), images, rotations=3, compare=asked)
        found = bank.missing_distances("lid", tested)
        grids = images.permute(0, 2, 3, 1).flatten(1, 2)
        assert (found is None) == (not asked)
        if asked:
            torch.testing.assert_close(found, missing_distances(grids, gaps_of(grids), tested))


class TestPipeline:
    @pytest.mark.parametrize(("count", "known"), [(2, False), (3, True)])
    def test_counts_from_three_pictures_on_also_in_the_calibration(self, tiny_pipeline_folder, nuts, count, known):
        from anomalysd_pipeline import AnomalySDPipeline

        pipe = AnomalySDPipeline.from_pretrained(tiny_pipeline_folder)
        pipe.set_progress_bar_config(disable=True)
        pipe.add_category("nut", nuts[:count])
        assert (len(pipe.bank.gaps("nut")) > 0) == known
        own = pipe._to_tensors(nuts[:count])
        for held_out in range(count if count > 1 else 0):
            bank = held_out_bank(pipe.bank, "nut", pipe.extractor, own, held_out, rotations=1)
            assert (len(bank.gaps("nut")) > 0) == known
