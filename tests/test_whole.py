"""How a picture differs from normal ones as a whole."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from anomalysd_pipeline.method.deviations import TOLERANCE, stress, unlikeness, views_of
from anomalysd_pipeline.models.bank import PrototypeBank
from anomalysd_pipeline.models.collection import collect_prototypes, fill_bank
from anomalysd_pipeline.models.extractor import PrototypeExtractor

from .banks import check_copies


def vectors(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def expected(copies, queries):
    """`unlikeness` from averages [turns, K, C] and [N, C] by brute force."""
    turns, pictures, _ = copies.shape
    flat, sources = copies.reshape(turns * pictures, -1), np.tile(np.arange(pictures), turns)
    between = cdist(flat, flat, "sqeuclidean")
    between[sources[:, None] == sources[None]] = np.inf
    nearest = cdist(queries, flat, "sqeuclidean").min(axis=1)
    return np.maximum(1, np.sqrt(nearest / (TOLERANCE * between.min(axis=1).max())))


class TestUnlikeness:
    def test_compares_averages_with_those_of_all_turned_copies(self):
        copies, psi = vectors(3, 4, 6, 5).double(), torch.cat([vectors(2, 5, 2, 3, seed=1), 3 + vectors(2, 5, 2, 3)])
        views = views_of(copies.flatten(end_dim=2), pictures=4, unturned=24)
        assert views.shape == (12, 6)
        found = unlikeness(views, psi)
        wanted = expected(copies.mean(dim=2).numpy(), psi.double().mean(dim=(2, 3)).numpy())
        np.testing.assert_allclose(found, wanted, rtol=1e-5)
        assert (wanted == 1).any() and (wanted > 1).any()

    @pytest.mark.parametrize("offset", [0.0, 1000.0])
    def test_a_normal_picture_is_not_unlike_itself(self, offset):
        pictures = vectors(3, 5, 2, 3) + offset
        features = pictures.permute(0, 2, 3, 1).reshape(-1, 5)
        assert torch.equal(unlikeness(views_of(features, 3, len(features)), pictures), torch.ones(3))

    def test_equal_pictures_tell_nothing(self):
        views = views_of(torch.ones(8, 5), pictures=2, unturned=8)
        assert torch.equal(unlikeness(views, torch.arange(3.0).view(3, 1, 1, 1).expand(3, 5, 2, 2)), torch.ones(3))


class TestStress:
    def test_the_highest_is_multiplied_and_zero_stays(self):
        maps = torch.tensor([[[0.0, 1.0], [2.0, 4.0]], [[0.0, 1.0], [2.0, 4.0]], [[0.0, 0.0], [0.0, 0.0]]])
        found = stress(maps, torch.tensor([16.0, 1.0, 3.0]))
        torch.testing.assert_close(found[0], torch.tensor([[0.0, 2.0], [8.0, 64.0]]))
        assert torch.equal(found[1:], maps[1:])


class TestInABank:
    def bank(self, **options):
        bank = PrototypeBank()
        features = vectors(2 * 3 * 4, 7)
        sources = torch.arange(3).repeat_interleave(4).repeat(2)
        bank.add("lid", features, sources=sources, unturned=12, **options)
        return bank, features

    def test_deviations_count_more_in_a_picture_that_is_unlike(self):
        (bank, features), (plain, _) = self.bank(whole=3), self.bank()
        psi = vectors(2, 7, 2, 2, seed=3) + torch.tensor([0.0, 4.0])[:, None, None, None]
        plain.register_buffer("gap_0", bank.gaps("lid"))
        factor = expected(features.view(2, 3, 4, 7).mean(2).double().numpy(), psi.double().mean(dim=(2, 3)).numpy())
        before = plain.deviations("lid", psi).double().numpy()
        wanted = before * factor[:, None, None] ** (before / before.max(axis=(1, 2), keepdims=True))
        np.testing.assert_allclose(bank.deviations("lid", psi), wanted, rtol=1e-5)
        assert factor[1] > 2

    def test_one_picture_tells_nothing(self):
        bank, _ = self.bank(whole=1)
        assert len(bank.views("lid")) == 0 and "views" not in bank.packed("lid")

    def test_is_known_where_what_is_missing_is_not(self):
        bank = PrototypeBank(max_size=5)
        bank.add("lid", vectors(24, 7), sources=torch.arange(24) % 3, unturned=12, whole=3)
        assert len(bank.gaps("lid")) == 0 and bank.views("lid").shape == (6, 8)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_is_packed_saved_and_removed(self, tmp_path, dtype):
        bank, _ = self.bank(whole=3)
        bank.add("axle", vectors(20, 7, seed=4))
        bank, psi = bank.to(dtype), vectors(1, 7, 2, 2, seed=5) + 3
        wanted = bank.deviations("lid", psi)
        check_copies(bank, "lid", psi, tmp_path)
        bank.remove("axle")
        assert torch.equal(bank.deviations("lid", psi), wanted)

    def test_a_filled_bank_knows_its_pictures(self):
        extractor, images = PrototypeExtractor("resnet10t"), vectors(3, 3, 64, 64, seed=1).clamp(-1, 1)
        bank = PrototypeBank()
        fill_bank(bank, "lid", extractor, images, rotations=2, compare=True)
        features = collect_prototypes(extractor, images, 2)
        torch.testing.assert_close(bank.views("lid"), views_of(features, 3, len(features) // 2))

    def test_what_a_larger_bank_allows_can_be_taken_over(self):
        extractor, images = PrototypeExtractor("resnet10t"), vectors(4, 3, 64, 64, seed=1).clamp(-1, 1)
        images[3] = 0.5  # unlike the others
        known, held_out = PrototypeBank(), PrototypeBank()
        fill_bank(known, "lid", extractor, images, rotations=2, compare=True)
        fill_bank(held_out, "lid", extractor, images[:3], rotations=2, compare=True)
        psi = extractor(images[3:])
        assert unlikeness(held_out.views("lid"), psi) > 2
        held_out.take_reach("lid", known)
        assert unlikeness(held_out.views("lid"), psi) == 1
        averages = views_of(collect_prototypes(extractor, images[:3], 2), 3, 768)[:, :-1]
        assert torch.equal(held_out.views("lid")[:, :-1], averages)
