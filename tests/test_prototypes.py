import numpy as np
import pytest
import torch
from scipy import ndimage, stats
from scipy.spatial.distance import cdist
from sklearn.neighbors import NearestNeighbors

from anomalysd_pipeline.data.shots import Shots
from anomalysd_pipeline.data.tensors import resample_rotated
from anomalysd_pipeline.models import collection
from anomalysd_pipeline.models.bank import PrototypeBank
from anomalysd_pipeline.models.collection import collect_prototypes, fill_bank
from anomalysd_pipeline.models.coreset import greedy_coreset
from anomalysd_pipeline.models.extractor import PrototypeExtractor


def pictures(n, height=64, width=64, seed=1):
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def vectors(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def extractor():
    torch.manual_seed(0)
    return PrototypeExtractor("resnet10t")


class TestPrototypeBank:
    @pytest.mark.parametrize("offset", [0.0, 100.0])
    @pytest.mark.parametrize("chunk", [None, 7])
    def test_distances_equal_brute_force(self, offset, chunk):
        bank = PrototypeBank()
        features, psi = vectors(60, 9) + offset, vectors(2, 9, 5, 6, seed=1) + offset
        bank.add("bottle", features)
        queries = psi.permute(0, 2, 3, 1).reshape(-1, 9).double().numpy()
        expected = cdist(queries, features.double().numpy(), "sqeuclidean").min(axis=1).reshape(2, 5, 6)
        actual = bank.distances("bottle", psi, chunk=chunk)
        assert actual.dtype == torch.float32
        np.testing.assert_allclose(actual, expected, rtol=1e-4)

    def test_distances_equal_sklearn_on_a_chunked_bank(self, monkeypatch):
        monkeypatch.setattr("anomalysd_pipeline.method.neighbors.ENTRIES", 1000)
        bank = PrototypeBank()
        features, psi = vectors(300, 16), vectors(1, 16, 8, 8, seed=1)
        bank.add("bottle", features)
        neighbors = NearestNeighbors(n_neighbors=1).fit(features.numpy())
        expected = neighbors.kneighbors(psi[0].flatten(1).T.numpy())[0].reshape(1, 8, 8) ** 2
        np.testing.assert_allclose(bank.distances("bottle", psi), expected, rtol=1e-4)

    def test_a_prototype_is_at_distance_zero_and_a_near_one_is_exact(self):
        bank = PrototypeBank()
        features = vectors(50, 8) * 10
        bank.add("bottle", features)
        psi = features[:16].T.reshape(1, 8, 4, 4).clone()
        psi[0, 0, 0, 0] += 1e-3
        distances = bank.distances("bottle", psi).flatten()
        assert (distances[1:] == 0).all()
        assert distances[0].item() == pytest.approx(1e-6, rel=1e-2)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
    def test_save_and_load(self, tmp_path, dtype):
        bank = PrototypeBank(max_size=50).to(dtype)
        names = ["zipper", "metal nut.v2", "Schraube ü/漢字", "bottle"]
        for index, name in enumerate(names):
            bank.add(name, vectors(3 + index, 6, seed=index))
        bank.save_pretrained(tmp_path)
        loaded = PrototypeBank.from_pretrained(tmp_path, dtype=dtype)
        assert loaded.categories == bank.categories == sorted(names)
        assert loaded.config.max_size == 50 and loaded.config.dim == 6
        for index, name in enumerate(names):
            assert torch.equal(loaded[name], vectors(3 + index, 6, seed=index).to(dtype))
            assert loaded[name].dtype == dtype

    def test_save_and_load_without_categories(self, tmp_path):
        PrototypeBank().save_pretrained(tmp_path)
        loaded = PrototypeBank.from_pretrained(tmp_path)
        assert loaded.categories == [] and loaded.config.dim == 0
        loaded.add("bottle", vectors(3, 4))
        assert torch.equal(loaded["bottle"], vectors(3, 4))

    def test_add_replaces_and_remove_forgets(self):
        bank = PrototypeBank()
        bank.add("b", vectors(3, 4))
        bank.add("a", vectors(5, 4, seed=1))
        bank.add("b", vectors(2, 4, seed=2))
        assert bank.config.sizes == {"a": 5, "b": 2} and "b" in bank
        assert torch.equal(bank["b"], vectors(2, 4, seed=2)) and torch.equal(bank["a"], vectors(5, 4, seed=1))
        bank.remove("a")
        assert "a" not in bank and bank.categories == ["b"] and torch.equal(bank["b"], vectors(2, 4, seed=2))
        bank.remove("b")
        bank.add("c", vectors(2, 7))
        names = {"placeholder", "bank_0", "source_0"}
        assert bank.config.dim == 7 and set(bank.state_dict()) == names

    def test_does_not_share_memory_with_its_input(self):
        bank, features = PrototypeBank(), vectors(3, 4)
        bank.add("bottle", features)
        features.zero_()
        assert torch.equal(bank["bottle"], vectors(3, 4))

    def test_caps_its_size(self):
        bank = PrototypeBank(max_size=10)
        features = vectors(40, 4)
        bank.add("bottle", features, seed=3)
        assert torch.equal(bank["bottle"], features[greedy_coreset(features, 10, seed=3)])

    @pytest.mark.parametrize(
        ("unturned", "straight"), [(6, range(6)), (8, range(8)), (15, (0, 2, 4, 6, 8, 10, 12, 14))]
    )
    def test_keeps_what_was_not_turned_and_fills_up_with_the_rest(self, unturned, straight):
        bank, features = PrototypeBank(max_size=20, max_unturned=8), vectors(40, 4)
        bank.add("bottle", features, torch.arange(40) % 4, unturned, seed=3)
        (kept,) = torch.where((features[:, None] == bank["bottle"]).all(dim=2).any(dim=1))
        assert kept[: len(straight)].tolist() == list(straight)
        assert len(kept) == 20 and (kept[len(straight) :] >= unturned).all()
        assert torch.equal(bank.sources("bottle"), (kept % 4).int())
        again = PrototypeBank(max_size=20, max_unturned=8)
        again.add("bottle", features, None, unturned, seed=4)
        assert not torch.equal(again["bottle"], bank["bottle"])

    def test_what_fits_is_kept_once_and_whole(self):
        bank, features = PrototypeBank(max_size=40, max_unturned=8), vectors(40, 4)
        bank.add("bottle", features, unturned=8)
        assert torch.equal(bank["bottle"], features)

    def test_what_was_packed_is_not_thinned_again(self):
        bank, small = PrototypeBank(max_size=10), PrototypeBank(max_size=5)
        bank.add("bottle", vectors(40, 4), torch.arange(40) // 10)
        small.add_packed("bottle", bank.packed("bottle"))
        assert torch.equal(small["bottle"], bank["bottle"]) and len(small["bottle"]) == 10
        assert torch.equal(small.sources("bottle"), bank.sources("bottle"))

    def test_an_earlier_version_packed_two_columns_more(self):
        bank, old = PrototypeBank(), torch.cat([vectors(5, 4), torch.ones(5, 2)], dim=1)
        bank.add_packed("bottle", {"bank": old, "views": torch.zeros(2, 5)})
        assert torch.equal(bank["bottle"], vectors(5, 4)) and bank.sources("bottle").tolist() == [0] * 5

    def test_rejects(self):
        bank = PrototypeBank()
        bank.add("bottle", vectors(3, 4))
        for call in (bank.remove, bank.__getitem__, lambda c: bank.distances(c, torch.zeros(1, 4, 2, 2))):
            with pytest.raises(ValueError, match='`category` .*"bottle".*cable'):
                call("cable")
        for psi in (torch.zeros(4, 2, 2), torch.zeros(1, 5, 2, 2)):
            with pytest.raises(ValueError, match="`psi`"):
                bank.distances("bottle", psi)
        bad = torch.zeros(2, 4)
        bad[1, 2] = float("nan")
        for features in (torch.zeros(3, 5), torch.zeros(0, 4), torch.zeros(4), bad):
            with pytest.raises(ValueError, match="`features`"):
                bank.add("cable", features)
        with pytest.raises(ValueError, match="`category`"):
            bank.add("", torch.zeros(2, 4))
        with pytest.raises(ValueError, match="float16"):
            PrototypeBank().to(torch.float16).add("bottle", torch.full((1, 2), 1e6))


class TestParts:
    """Distances of parts of the channels, one picture left out, and their unit."""

    def bank(self, count=60, dim=10, pictures=3):
        features, sources = vectors(count, dim), torch.arange(count) % pictures
        bank = PrototypeBank()
        bank.add("bottle", features, sources)
        return bank, features.numpy(), sources.numpy()

    def expected(self, features, psi, parts):
        """By scikit-learn: the geometric mean of the nearest squared distances of each part."""
        queries = psi.permute(0, 2, 3, 1).flatten(0, 2).numpy()
        found = [
            NearestNeighbors(n_neighbors=1).fit(own).kneighbors(asked)[0][:, 0] ** 2
            for own, asked in zip(np.split(features, parts, 1), np.split(queries, parts, 1), strict=True)
        ]
        return stats.gmean(found).reshape(psi.shape[0], *psi.shape[2:])

    @pytest.mark.parametrize("parts", [1, 2, 5])
    def test_distance_is_the_geometric_mean_of_the_parts(self, parts):
        bank, features, _ = self.bank()
        psi = vectors(2, 10, 3, 4, seed=9)
        expected = self.expected(features, psi, parts)
        np.testing.assert_allclose(bank.distances("bottle", psi, parts), expected, rtol=1e-4)
        np.testing.assert_allclose(bank.distances("bottle", psi, parts, chunk=5), expected, rtol=1e-4)

    def test_a_position_that_one_part_has_already_seen_is_at_distance_zero(self):
        bank, features, _ = self.bank()
        psi = vectors(1, 10, 1, 2, seed=9)
        psi[0, :5, 0, 0] = torch.from_numpy(features[7, :5])
        assert (bank.distances("bottle", psi, 2)[0, 0] > 0).tolist() == [False, True]

    @pytest.mark.parametrize("left_out", [0, 2])
    def test_a_picture_that_is_left_out_might_as_well_not_be_there(self, left_out):
        bank, features, sources = self.bank()
        psi = vectors(1, 10, 3, 4, seed=9)
        before = bank.distances("bottle", psi, 2)
        expected = self.expected(features[sources != left_out], psi, 2)
        np.testing.assert_allclose(bank.distances("bottle", psi, 2, left_out), expected, rtol=1e-4)
        assert torch.equal(bank.distances("bottle", psi, 2), before)

    @pytest.mark.parametrize("left_out", [None, 1])
    @pytest.mark.parametrize("parts", [1, 2, 5])
    def test_distances_to_all_prototypes(self, parts, left_out):
        """By scipy, in all channels, and as those that the nearest are found among."""
        bank, features, sources = self.bank()
        psi = vectors(2, 10, 3, 4, seed=9)
        queries = psi.permute(0, 2, 3, 1).flatten(0, 2).numpy()
        expected = cdist(queries, features[sources != left_out], "sqeuclidean").reshape(2, 3, 4, -1)
        found = bank.all_distances("bottle", psi, parts, left_out)
        np.testing.assert_allclose(found, expected, rtol=1e-4)
        total = torch.zeros(24, expected.shape[-1])
        bank.distances("bottle", psi, parts, left_out, total=total)
        np.testing.assert_allclose(found.flatten(end_dim=2), total, rtol=1e-4)

    def test_there_must_be_another_picture(self):
        bank, _, _ = self.bank(pictures=1)
        with pytest.raises(ValueError, match="`left_out` must leave prototypes of another picture, got 0"):
            bank.distances("bottle", vectors(1, 10, 1, 1), left_out=0)

    def test_relative_distances_have_no_unit(self):
        bank, features, _ = self.bank()
        psi = vectors(1, 10, 3, 4, seed=9)
        found = bank.relative("bottle", bank.distances("bottle", psi, 2), 2)
        lengths = [np.square(part).sum(1).mean() for part in np.split(features, 2, 1)]
        np.testing.assert_allclose(found, self.expected(features, psi, 2) / stats.gmean(lengths), rtol=1e-4)
        large = PrototypeBank()
        large.add("bottle", 100 * torch.from_numpy(features))
        torch.testing.assert_close(large.relative("bottle", large.distances("bottle", 100 * psi, 2), 2), found)

    def test_relative_distances_of_unit_vectors_are_twice_one_minus_the_cosine(self):
        bank = PrototypeBank()
        bank.add("bottle", torch.eye(4)[:1])
        psi = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [-1, 0, 0, 0]]).T.view(1, 4, 1, 3)
        found = bank.relative("bottle", bank.distances("bottle", psi))
        assert found.flatten().tolist() == [0, 2, 4]

    def test_packed_and_saved_banks_keep_their_sources(self, tmp_path):
        bank, _, sources = self.bank()
        copied = PrototypeBank()
        copied.add_packed("lid", bank.packed("bottle"))
        bank.add("cable", vectors(3, 10, seed=5))
        bank.to(torch.float16).save_pretrained(tmp_path)
        loaded = PrototypeBank.from_pretrained(tmp_path, dtype=torch.float16)
        for found in (copied.sources("lid"), loaded.sources("bottle")):
            assert found.dtype == torch.int32 and found.tolist() == sources.tolist()
        assert loaded.sources("cable").tolist() == [0, 0, 0] and loaded["bottle"].dtype == torch.float16

    def test_half_precision_is_what_files_keep(self):
        bank, whole = PrototypeBank(half=True), PrototypeBank()
        for each in (bank, whole):
            each.add("bottle", vectors(60, 10))
        packed = bank.packed("bottle")
        assert packed["bank"].dtype == torch.float16 and bank["bottle"].dtype == torch.float32
        psi = vectors(1, 10, 3, 4, seed=9)
        copied = PrototypeBank(half=True)
        copied.add_packed("bottle", packed)
        assert torch.equal(copied.distances("bottle", psi), bank.distances("bottle", psi))
        torch.testing.assert_close(bank.distances("bottle", psi), whole.distances("bottle", psi), rtol=2e-3, atol=1e-5)
        with pytest.raises(ValueError, match="`features` must fit"):
            bank.add("bottle", torch.full((1, 10), 1e6))

    def test_a_filled_bank_knows_what_was_turned_and_where_it_is_from(self):
        images = pictures(3, 4, 6)
        bank, expected = (PrototypeBank(max_size=100, max_unturned=100) for _ in range(2))
        fill_bank(bank, "bottle", torch.nn.Identity(), images, rotations=3)
        features, places = collect_prototypes(torch.nn.Identity(), images, rotations=3)
        expected.add("bottle", features, places[:, 0] % 3, unturned=72)
        assert torch.equal(bank["bottle"], expected["bottle"])
        assert torch.equal(bank.sources("bottle"), expected.sources("bottle"))
        assert bank.distances("bottle", images).max() == 0  # the pictures themselves are all there

    @pytest.mark.parametrize("rotations", [3, 4])
    def test_vectors_that_numbers_leave_out_are_never_gathered(self, rotations):
        images = [*pictures(2, 4, 6), *pictures(1, 6, 4), *pictures(1, 5, 5)]
        region = torch.ones(12, 12, dtype=torch.bool)
        region[:, 9:] = False
        bank, expected = (PrototypeBank(max_size=60, max_unturned=50) for _ in range(2))
        asked = []

        def describe(copy):
            asked.append(copy.shape)
            return copy

        fill_bank(bank, "bottle", describe, images, rotations, [region] * 4)
        features, places = collect_prototypes(torch.nn.Identity(), images, rotations, [region] * 4)
        unturned = int((places[:, 0] < 4).sum())
        expected.add("bottle", features, places[:, 0] % 4, unturned, shots=Shots.of(images, places, rotations))
        assert len(bank["bottle"]) == 60 < len(features) and len(asked) <= 4 * rotations
        assert torch.equal(bank["bottle"], expected["bottle"])
        assert torch.equal(bank.sources("bottle"), expected.sources("bottle"))
        assert torch.equal(bank.shots("bottle").places, expected.shots("bottle").places)
        # With a bank full of unturned ones, a copy of each size is turned for its grid, and no more.
        asked.clear()
        fill_bank(PrototypeBank(max_size=50, max_unturned=50), "bottle", describe, images, rotations)
        assert len(asked) == 4

    def test_a_coreset_of_many_pictures_is_taken_in_parts(self, monkeypatch):
        images, held = list(pictures(12, 8, 8)), []
        sizes = PrototypeBank(max_size=20), PrototypeBank(max_size=20)
        features, places = collect_prototypes(torch.nn.Identity(), images)
        sizes[0].add("bottle", features, places[:, 0] % 12)
        thin = collection.greedy_coreset
        monkeypatch.setattr(collection, "greedy_coreset", lambda f, *rest: held.append(len(f)) or thin(f, *rest))
        fill_bank(sizes[1], "bottle", torch.nn.Identity(), images)
        assert torch.equal(sizes[0]["bottle"], sizes[1]["bottle"]) and not held
        monkeypatch.setattr(collection, "_HELD", 1000)
        fill_bank(sizes[1], "bottle", torch.nn.Identity(), images)
        assert held == [33 * 64]  # more than 8 pictures in 4 turns, of 48 copies
        bank, every = sizes[1], features
        assert len(bank["bottle"]) == 20
        for vector, place, source in zip(
            bank["bottle"], bank.shots("bottle").places, bank.sources("bottle"), strict=True
        ):
            assert place[0] % 12 == source
            number = (places == place).all(dim=1).nonzero()[0, 0]
            assert torch.equal(every[number], vector)
        # Their largest gap is within the bound of one coreset of all, twice over.
        gaps = [torch.cdist(every, bank["bottle"]).amin(dim=1).max() for bank in sizes]
        assert gaps[1] <= 2 * gaps[0]

    def test_places_of_collected_vectors_of_pictures_of_several_sizes(self):
        rows, columns = torch.arange(6.0)[:, None], torch.arange(4.0)
        whole = torch.stack([torch.zeros(6, 4), rows.expand(6, 4), columns.expand(6, 4)])
        images = [whole[:, : 2 + size] + torch.tensor([size, 0, 0])[:, None, None] for size in range(5)]
        features, places = collect_prototypes(torch.nn.Identity(), images, rotations=4)
        assert torch.equal(places[:, 0] % 5, features[:, 0].long())
        assert len(features) == 4 * sum(4 * (2 + size) for size in range(5))
        first = places[:, 0] < 5  # not turned
        assert torch.equal(places[first, 1:], features[first, 1:].long())
        # A quarter turn: the right column becomes the upper row.
        number = places[:, 0] == 5 + 4
        assert torch.equal(
            places[number, 1:].flip(1), (features[number, 1:] * torch.tensor([1, -1]) + torch.tensor([0, 3])).long()
        )


class TestGreedyCoreset:
    def test_takes_the_farthest_vector_each_time(self):
        features = vectors(80, 5)
        chosen = greedy_coreset(features, 12).tolist()
        distances = cdist(features.double().numpy(), features.double().numpy())
        for step in range(1, 12):
            assert chosen[step] == distances[:, chosen[:step]].min(axis=1).argmax()

    def test_is_seeded_and_distinct_in_many_channels(self):
        features = vectors(60, 100)
        chosen = greedy_coreset(features, 20, seed=1)
        assert torch.equal(chosen, greedy_coreset(features, 20, seed=1))
        assert not torch.equal(chosen, greedy_coreset(features, 20, seed=2))
        assert len(set(chosen.tolist())) == 20

    def test_projection_keeps_clusters_apart(self):
        centers = vectors(10, 200, seed=4) * 10
        features = (centers[:, None] + 0.01 * vectors(10, 30, 200)).flatten(0, 1)
        assert sorted(i // 30 for i in greedy_coreset(features, 10).tolist()) == list(range(10))

    def test_drops_duplicates(self):
        features = vectors(3, 40).repeat(10, 1)
        assert sorted(i % 3 for i in greedy_coreset(features, 20).tolist()) == [0, 1, 2]

    def test_keeps_everything_that_fits(self):
        assert sorted(greedy_coreset(vectors(5, 3), 9).tolist()) == list(range(5))

    def test_rejects(self):
        with pytest.raises(ValueError, match="`size`"):
            greedy_coreset(vectors(5, 3), 0)


class TestCollectPrototypes:
    def test_quarter_turns_are_exact(self):
        images = pictures(5, 4, 6)
        collected, _ = collect_prototypes(torch.nn.Identity(), images, rotations=4)
        expected = [np.rot90(i.numpy(), k, (1, 2)).reshape(3, -1).T for k in range(4) for i in images]
        np.testing.assert_array_equal(collected, np.concatenate(expected))

    @pytest.mark.parametrize(("rotations", "turns"), [(1, (0,)), (2, (0, 2))])
    def test_fewer_turns(self, rotations, turns):
        images = pictures(1, 4, 4)
        expected = [np.rot90(images[0].numpy(), k, (1, 2)).reshape(3, -1).T for k in turns]
        np.testing.assert_array_equal(
            collect_prototypes(torch.nn.Identity(), images, rotations)[0], np.concatenate(expected)
        )

    def test_resampled_quarter_turn_equals_the_exact_one(self):
        images = pictures(1, 9, 9)
        torch.testing.assert_close(resample_rotated(images, 90.0), torch.rot90(images, 1, (2, 3)), atol=1e-5, rtol=0)

    def test_oblique_turn_of_an_oblong_picture_equals_scipy(self):
        height, width = 40, 60
        rows, columns = np.mgrid[:height, :width]
        pattern = np.sin(rows / 5) + np.cos(columns / 7)
        images = torch.from_numpy(pattern).float().expand(1, 3, -1, -1)
        expected = ndimage.rotate(pattern, 45, reshape=False, order=1)
        actual = resample_rotated(images, 45.0)[0, 0]
        center = (slice(10, 30), slice(20, 40))
        np.testing.assert_allclose(actual[center], expected[center], atol=1e-4)

    def test_eight_turns_of_a_real_extractor(self, extractor):
        images = pictures(2)
        collected, _ = collect_prototypes(extractor, images, rotations=8)
        psi = extractor(images).detach()
        assert collected.shape == (2 * 8 * psi.shape[2] * psi.shape[3], psi.shape[1])
        torch.testing.assert_close(collected[: collected.shape[0] // 8], psi.permute(0, 2, 3, 1).flatten(0, 2))
        assert not collected.requires_grad

    def test_rejects(self):
        with pytest.raises(ValueError, match="`images`"):
            collect_prototypes(torch.nn.Identity(), torch.zeros(1, 4, 4, 4))
        with pytest.raises(ValueError, match="`rotations`"):
            collect_prototypes(torch.nn.Identity(), pictures(1), rotations=0)
        with pytest.raises(ValueError, match="not finite"):
            collect_prototypes(torch.nn.Identity(), torch.full((1, 3, 2, 2), torch.nan))
