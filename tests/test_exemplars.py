"""Exemplars: the part as it should look, from patches of its normal pictures."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from anomalysd_pipeline import AnomalySDPipeline
from anomalysd_pipeline.data.shots import SHOT_NAMES, Shots
from anomalysd_pipeline.data.tensors import rotate
from anomalysd_pipeline.method.exemplars import (
    _choose,
    _copied,
    _nearest,
    _normality,
    build_exemplar,
    unexplained,
)
from anomalysd_pipeline.method.patches import _agreed
from anomalysd_pipeline.models.bank import PrototypeBank
from anomalysd_pipeline.models.collection import fill_bank

from .conftest import make_tiny_pipeline

DESCRIBE = torch.nn.PixelUnshuffle(8)
"""As exact as an extractor can be: all pixels of a cell."""


def textures(count, height=64, width=64, seed=0, detail=4):
    """Smooth random pictures [3, h, w] in [-1, 1], rounded to 8 bits: no two places look alike."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, height // detail, width // detail, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1)
    return list((fine * 255).round() / 127.5 - 1)


def bank_of(images, rotations=1):
    bank = PrototypeBank()
    fill_bank(bank, "part", DESCRIBE, images, rotations)
    return bank


def searches(bank, left_out=None, describe=DESCRIBE):
    """Gives a function that measures the distances of a picture to all prototypes."""

    def search(picture):
        psi = describe(picture[None])
        total = torch.zeros(psi[0, 0].numel(), len(bank.shots("part", left_out).places))
        bank.distances("part", psi, left_out=left_out, total=total)
        return total.view(*psi.shape[2:], -1)

    return search


def exemplar(bank, picture, left_out=None, describe=DESCRIBE, shares=None):
    search = searches(bank, left_out, describe)
    shares = torch.zeros(picture.shape[1:]) if shares is None else shares
    return build_exemplar(picture, search(picture), bank.shots("part", left_out), shares, search)


def copied(bank, picture, distances, shares):
    shots = bank.shots("part")
    return _copied(picture, distances, _nearest(distances), shots.places.long(), shares, shots.copy)


def mean_difference(a, b, border=0):
    inside = slice(border, -border or None)
    return (a - b)[:, inside, inside].abs().mean().item()


class TestBuildExemplar:
    @pytest.mark.parametrize("size", [(64, 64), (96, 40), (40, 104)])
    def test_a_normal_picture_comes_back_as_it_is(self, size):
        images = textures(2, *size)
        bank = bank_of(images)
        for image in images:
            torch.testing.assert_close(exemplar(bank, image), image, atol=2e-6, rtol=0)

    @pytest.mark.parametrize("turn", [1, 2, 3])
    def test_a_turned_picture_comes_back_from_the_copy_that_was_turned(self, turn):
        images = textures(2, 64, 96)
        turned = rotate(images[1][None], 90 * turn)[0]
        torch.testing.assert_close(exemplar(bank_of(images, rotations=4), turned), turned, atol=2e-6, rtol=0)

    def test_patches_move_by_less_than_a_cell(self):
        (wide,) = textures(1, 96, 96, detail=16)
        shot, moved = wide[:, 8:72, 8:72], wide[:, 11:75, 6:70]
        found = exemplar(bank_of([shot]), moved)
        assert mean_difference(found, moved, border=16) < 0.02 < 0.15 < mean_difference(shot, moved, border=16)

    def test_a_defect_is_gone_and_what_is_around_it_stays(self):
        shots = textures(3)
        defective = shots[1].clone()
        defective[:, 24:36, 28:40] = torch.tensor([1.0, -1.0, 1.0])[:, None, None]
        found = exemplar(bank_of(shots), defective)
        difference = (defective - shots[1])[:, 24:36, 28:40].square().mean()
        left = (found - shots[1])[:, 24:36, 28:40].square().mean() / difference
        # Features of pixels alone do not know what belongs there; no patch of a shot is of that color.
        assert left < 0.5 and (found[:, 24:36, 28:40] - defective[:, 24:36, 28:40]).square().mean() > 0.5 * difference
        torch.testing.assert_close(found[:, :, :8], shots[1][:, :, :8], atol=2e-6, rtol=0)

    def test_continues_what_is_around_a_defect(self):
        """A position that looks like nothing normal, or like a wrong place, has no say."""
        images = textures(4, 64, 64)
        bank = bank_of(images)
        total = torch.zeros(64, 256)
        psi = DESCRIBE(images[2][None])
        psi[:, :, 3:5, 3:5] = DESCRIBE(images[0][None])[:, :, :2, :2] + 0.5
        bank.distances("part", psi, total=total)
        places = bank.shots("part").places.long()
        distances = total.view(8, 8, 256)
        rows = _choose(distances, places, _nearest(distances))
        positions = torch.stack(torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij"), dim=-1)
        assert torch.equal(places[rows], torch.cat([torch.full((8, 8, 1), 2), positions], dim=-1))
        assert (places[total.argmin(dim=1)][:, 0] != 2).any()  # the nearest are of others

    def test_how_normal_positions_look(self):
        distances = np.random.default_rng(0).random((3, 5, 7)).astype(np.float32)
        distances[0, 0, 3] = 0
        nearest = distances.min(-1)
        expected = np.minimum((np.median(nearest) / np.maximum(nearest, 1e-6 * distances.mean())) ** 2, 1)
        found = _normality(_nearest(torch.from_numpy(distances)))
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        assert found[0, 0] == 1 and found.min() > 0
        assert torch.equal(_normality(_nearest(torch.zeros(3, 5, 7))), torch.ones(3, 5))

    def test_the_cost_of_a_choice(self):
        """Equal to a search over all prototypes by numpy, where every position is asked by all of its neighbors."""
        generator = np.random.default_rng(0)
        height, width, copies = 3, 4, 2
        distances = generator.random((height, width, copies * height * width)).astype(np.float32) + 0.1
        places = np.stack(np.unravel_index(np.arange(copies * height * width), (copies, height, width)), axis=1)
        nearest = distances.min(-1)

        def cost(y, x, copy, row, column):
            total = share = 0.0
            for dy in range(-2, 3):
                for dx in range(-2, 3):
                    inside = 0 <= y + dy < height and 0 <= x + dx < width
                    if inside and 0 <= row + dy < height and 0 <= column + dx < width:
                        weight = nearest[y + dy, x + dx] ** -2.0
                        number = np.ravel_multi_index((copy, row + dy, column + dx), (copies, height, width))
                        total += weight * distances[y + dy, x + dx, number]
                        share += weight
            return total / share

        asked = torch.from_numpy(distances)
        rows = _choose(asked, torch.from_numpy(places), _nearest(asked)).numpy()
        first = distances.argmin(-1)
        for y in range(height):
            for x in range(width):
                chosen = cost(y, x, *places[rows[y, x]])
                assert chosen <= cost(y, x, *places[first[y, x]]) + 1e-6
                # No neighbor's choice continues better.
                for dy, dx in ((-1, 0), (1, 0), (0, -1), (0, 1)):
                    if 0 <= y + dy < height and 0 <= x + dx < width:
                        copy, row, column = places[rows[y + dy, x + dx]]
                        if 0 <= row - dy < height and 0 <= column - dx < width:
                            assert chosen <= cost(y, x, copy, row - dy, column - dx) + 1e-6

    def test_patches_agree_where_they_do_not_look_normal(self):
        """Equal to a sum over all patches by numpy."""
        generator = np.random.default_rng(0)
        down, across, shifts = 9, 8, 4
        costs = generator.random((down, across, shifts)).astype(np.float32)
        numbers, offsets = generator.integers(0, 2, (down, across)), generator.integers(0, 2, (down, across, 2))
        normality = generator.random((down, across)).astype(np.float32)
        normality[2, 3] = 1
        expected = np.empty_like(costs)
        for y in range(down):
            for x in range(across):
                same = [
                    (i, j)
                    for i in range(max(y - 3, 0), min(y + 4, down))
                    for j in range(max(x - 3, 0), min(x + 4, across))
                    if numbers[i, j] == numbers[y, x] and (offsets[i, j] == offsets[y, x]).all()
                ]
                others = np.average([costs[at] for at in same], axis=0, weights=[normality[at] for at in same])
                expected[y, x] = normality[y, x] * costs[y, x] + (1 - normality[y, x]) * others
        found = _agreed(*(torch.from_numpy(each) for each in (costs, numbers, offsets, normality)))
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        np.testing.assert_array_equal(found[2, 3], costs[2, 3])

    def test_a_large_defect_moves_with_what_is_around_it(self):
        """Its own pixels would fit other places; the patches it continues know by how much they are moved."""
        (wide,) = textures(1, 176, 176, detail=16)
        shot, moved = wide[:, 8:168, 8:168], wide[:, 11:171, 6:166]
        defective = moved.clone()
        defective[:, 64:104, 72:112] = torch.tensor([1.0, -1.0, 1.0])[:, None, None]
        found = exemplar(bank_of([shot]), defective)
        inside = (slice(None), slice(64, 104), slice(72, 112))
        left = (found - moved)[inside].square().mean() / (defective - moved)[inside].square().mean()
        assert left < 0.02

    def test_distances_to_all_prototypes_are_those_in_all_channels(self):
        bank = PrototypeBank()
        generator = torch.Generator().manual_seed(0)
        vectors, psi = torch.randn(50, 6, generator=generator), torch.randn(1, 6, 5, 4, generator=generator)
        bank.add("part", vectors)
        total = torch.zeros(20, 50)
        kept = bank.distances("part", psi, parts=2, chunk=3, total=total)
        assert torch.equal(kept, bank.distances("part", psi, parts=2))
        queries = psi[0].flatten(1).T.numpy()
        expected = np.square(queries[:, None] - vectors.numpy()).sum(-1)
        np.testing.assert_allclose(total, expected, rtol=1e-4, atol=1e-4)

    def test_without_a_picture_it_comes_from_the_others(self):
        images = textures(3)
        bank = bank_of(images, rotations=4)
        assert mean_difference(exemplar(bank, images[1]), images[1]) < 1e-5
        assert mean_difference(exemplar(bank, images[1], left_out=1), images[1]) > 0.1
        others = bank_of([images[0], images[2]], rotations=4)
        assert torch.equal(exemplar(bank, images[1], left_out=1), exemplar(others, images[1]))

    def test_what_it_mends_is_compared_again(self):
        """The second exemplar is that of the picture that the first has mended, and replaces the first by as much."""
        shots, generator = textures(3), torch.Generator().manual_seed(0)
        bank, picture = bank_of(shots), textures(1, seed=1)[0]
        kept, shares = bank.shots("part"), torch.rand(64, 64, generator=generator)
        search, asked = searches(bank), []
        distances = search(picture)
        found = build_exemplar(picture, distances, kept, shares, lambda mended: asked.append(mended) or search(mended))

        first = copied(bank, picture, distances, shares)
        mended = shares * first + (1 - shares) * picture
        # How normal positions look is not asked again.
        places, nearest = kept.places.long(), _nearest(distances)
        second = _copied(mended, search(mended), nearest, places, shares, kept.copy)
        (seen,) = asked
        torch.testing.assert_close(seen, mended, atol=1e-6, rtol=0)
        torch.testing.assert_close(found, shares * second + (1 - shares) * first, atol=1e-5, rtol=0)
        assert mean_difference(first, second) > 0.01
        # Nothing to mend: the first stays.
        none = torch.zeros(64, 64)
        assert torch.equal(exemplar(bank, picture, shares=none), copied(bank, picture, distances, none))

    @pytest.mark.parametrize("seed", range(3))
    def test_features_that_see_a_defect_beside_them_see_it_no_more(self, seed):
        def wide(pictures):  # 3 x 3 cells
            padded = torch.nn.functional.pad(DESCRIBE(pictures), (1, 1, 1, 1), mode="replicate")
            return torch.nn.functional.avg_pool2d(padded, 3, stride=1)

        shots = textures(3, 128, 128, seed=seed, detail=8)
        bank, inside = PrototypeBank(), (slice(None), slice(40, 72), slice(48, 80))
        fill_bank(bank, "part", wide, shots, 1)
        defective, shares = shots[1].clone(), torch.zeros(128, 128)
        defective[inside] = torch.tensor([1.0, -1.0, 1.0])[:, None, None]
        shares[32:80, 40:88] = 1
        distances = searches(bank, describe=wide)(defective)
        once = copied(bank, defective, distances, shares)
        twice = exemplar(bank, defective, describe=wide, shares=shares)
        difference = (defective - shots[1])[inside].square().mean()
        left = [((found - shots[1])[inside].square().mean() / difference).item() for found in (once, twice)]
        assert left[0] > 0.01 > 0.001 > left[1]

    def test_patches_move_to_what_others_have_mended(self):
        """Patches that a defect covers in part fit badly at first."""
        left = []
        for rounds in (1, 2):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("anomalysd_pipeline.method.exemplars._ROUNDS", rounds)
                total = 0.0
                for seed in range(4):
                    shots = textures(3, 128, 128, seed=seed, detail=8)
                    defective, shares = shots[1].clone(), torch.zeros(128, 128)
                    defective[:, 40:72, 48:80] = torch.tensor([1.0, -1.0, 1.0])[:, None, None]
                    shares[32:80, 40:88] = 1
                    bank = bank_of(shots)
                    distances = searches(bank)(defective)
                    found = copied(bank, defective, distances, shares)
                    total += (found - shots[1])[:, 40:72, 48:80].square().mean().item()
                left.append(total)
        assert left[1] < 0.3 * left[0]

    def test_takes_over_the_light(self):
        (image,) = textures(1)
        darker = image * 0.5
        light = torch.tensor([0.2, 0.1, -0.1])[:, None, None]
        found = exemplar(bank_of([darker]), darker + light)
        torch.testing.assert_close(found, darker + light, atol=2e-2, rtol=0)

    def test_fine_grids_and_grids_that_do_not_divide_the_picture(self):
        image = textures(1, 136, 136)[0]  # 136 px in 34 cells of 4 px: more cells than patches
        fine = torch.nn.PixelUnshuffle(4)
        bank = PrototypeBank()
        fill_bank(bank, "part", fine, [image], 1)
        torch.testing.assert_close(exemplar(bank, image, describe=fine), image, atol=2e-6, rtol=0)

        def resized(pictures):  # 60 px become 7 cells, as vision transformers resize
            return DESCRIBE(torch.nn.functional.interpolate(pictures, size=56, mode="bilinear", antialias=True))

        image = textures(1, 60, 60)[0]
        bank = PrototypeBank()
        fill_bank(bank, "part", resized, [image], 1)
        found = exemplar(bank, image, describe=resized)
        assert found.shape == image.shape and mean_difference(found, image) < 0.06


class TestUnexplained:
    def test_is_the_gain_of_wieners_filter(self):
        """That gives signal + noise the least squared error on the mean: here signals of several strengths."""
        generator = np.random.default_rng(0)
        for signal in (0.5, 2.0, 10.0):
            signals = generator.normal(0, signal**0.5, 200_000)
            seen = signals + generator.normal(0, 1, 200_000)
            gains = np.linspace(0, 1, 1001)
            errors = [np.square(gain * seen[:2000] - signals[:2000]).mean() for gain in gains]
            best = (seen * signals).mean() / np.square(seen).mean()
            strength = torch.full((1, 8, 8), float(np.sqrt(np.square(seen).mean())))
            assert unexplained(strength, 1.0)[0, 0, 0] == pytest.approx(best, abs=0.02)
            assert gains[int(np.argmin(errors))] == pytest.approx(best, abs=0.06)

    def test_nothing_is_where_distances_are_usual(self):
        distances = torch.tensor([0.0, 0.5, 1.0])[:, None, None].expand(3, 8, 8)
        assert not unexplained(distances, 1.0).any()
        assert (unexplained(distances, 0.0)[1:] == 1).all()

    def test_a_picture_is_its_own_measure_where_normal_ones_are_too_few(self):
        distances = torch.rand(2, 16, 16, generator=torch.Generator().manual_seed(0))
        found = unexplained(distances, None)
        assert torch.equal(unexplained(2 * distances, None), found)
        np.testing.assert_allclose((found == 0).float().mean(dim=(1, 2)), 0.5, atol=0.01)

    @pytest.mark.parametrize("parts", [1, 2])
    def test_usual_is_the_median_between_normal_pictures(self, parts):
        images = textures(3, 64, 48)
        bank = bank_of(images, rotations=4)
        vectors, sources = bank["part"].numpy(), bank.sources("part").numpy()
        places = bank.shots("part").places.numpy()
        own = places[:, 0] < 3
        far = []
        for part in np.split(vectors, parts, axis=1):
            every = cdist(part[own], part, "sqeuclidean")
            every[sources[own][:, None] == sources] = np.inf
            far.append(np.log(every.min(axis=1)))
        expected = np.exp(np.median(np.mean(far, axis=0)))
        assert bank.usual_distance("part", parts) == pytest.approx(expected, rel=0.02)  # the median of torch is lower
        assert bank.usual_distance("part", parts) == bank.usual_distance("part", parts)

    def test_usual_is_not_known_of_one_picture(self):
        images = textures(2)
        assert bank_of(images[:1], rotations=4).usual_distance("part") is None
        unknown = PrototypeBank()
        unknown.add("part", torch.rand(50, 6))
        assert unknown.usual_distance("part") is None

    def test_usual_is_that_of_turned_copies_where_no_others_are_left(self):
        bank = bank_of(textures(3), rotations=4)
        packed = bank.packed("part")
        turned = packed["places"][:, 0] >= 3
        kept = {name: packed[name][turned] for name in ("bank", "sources", "places")}
        other = PrototypeBank()
        other.add_packed("part", {**packed, **kept})
        assert other.usual_distance("part") == pytest.approx(bank.usual_distance("part"), rel=0.1)

    def test_usual_follows_the_bank(self):
        images = textures(3)
        bank = bank_of(images)
        before = bank.usual_distance("part")
        fill_bank(bank, "part", DESCRIBE, [0.5 * image for image in images], 1)
        assert bank.usual_distance("part") == pytest.approx(before / 4, rel=0.05)


class TestShots:
    def test_are_saved_packed_and_forgotten_with_their_bank(self, tmp_path):
        images = [textures(1, 16, 24)[0], textures(1, 32, 8, seed=1)[0]]
        bank = bank_of(images, rotations=4)
        bank.add("another", torch.ones(3, 192))
        bank.half().save_pretrained(tmp_path)
        loaded = PrototypeBank.from_pretrained(tmp_path, dtype=torch.float16)
        copied = PrototypeBank()
        copied.add_packed("part", loaded.packed("part"))
        for own in (bank, loaded, copied):
            for number in range(8):
                expected = rotate(images[number % 2][None], 90 * (number // 2))[0]
                torch.testing.assert_close(own.shots("part").copy(number), expected, atol=1e-6, rtol=0)
            assert own.shots("another") is None and own.shots("part").sizes.tolist() == [[16, 24], [32, 8]]
        loaded.forget_shots("part")
        assert loaded.shots("part") is None and torch.equal(loaded["part"], bank["part"])
        assert set(loaded.packed("part")) == {"bank", "sources"}
        bank.remove("part")
        assert not bank.config.shots and set(bank.state_dict()) == {"placeholder", "bank_0", "source_0"}

    def test_places_follow_a_bank_that_is_thinned(self):
        images = textures(3, 32, 32)
        bank = PrototypeBank(max_size=20, max_unturned=8)
        fill_bank(bank, "part", DESCRIBE, images, 4)
        shots = bank.shots("part")
        assert len(bank["part"]) == len(shots.places) == 20
        for vector, (number, row, column) in zip(bank["part"], shots.places.tolist(), strict=True):
            assert torch.equal(DESCRIBE(shots.copy(number)[None])[0, :, row, column], vector)
        assert exemplar(bank, images[0]).isfinite().all()

    def test_take_less_than_a_megabyte_for_four_pictures(self):
        bank = PrototypeBank(half=True)
        fill_bank(bank, "part", DESCRIBE, textures(4, 256, 256), 4)
        packed = bank.packed("part")
        assert sum(packed[name].nbytes for name in SHOT_NAMES) < 1e6

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("places", torch.zeros(3, 3, dtype=torch.int16)),
            ("places", torch.full((16, 3), 4, dtype=torch.int16)),
            ("places", torch.full((16, 3), -1, dtype=torch.int16)),
            ("places", torch.zeros(16, 3)),
            ("pixels", torch.zeros(10, dtype=torch.uint8)),
            ("pixels", torch.zeros(3 * 32 * 32)),
            ("sizes", torch.tensor([[32, -32]], dtype=torch.int32)),
            ("sizes", torch.tensor([[32, 2**31 - 1]], dtype=torch.int32)),
            ("sizes", torch.zeros(0, 2, dtype=torch.int32)),
            ("rotations", torch.tensor(0, dtype=torch.int32)),
            ("rotations", torch.tensor(2**31 - 1, dtype=torch.int32)),
            ("rotations", torch.tensor([4], dtype=torch.int32)),
        ],
    )
    def test_that_do_not_fit_are_refused(self, name, value):
        packed = bank_of(textures(1, 32, 32)).packed("part")
        with pytest.raises(ValueError, match="normal pictures beside a bank that do not fit"):
            PrototypeBank().add_packed("part", {**packed, name: value})
        with pytest.raises(ValueError, match="lack 'sizes'"):
            PrototypeBank().add_packed("part", {key: packed[key] for key in packed if key != "sizes"})

    def test_that_do_not_fit_are_refused_in_a_saved_pipeline_too(self, nuts, tmp_path):
        pipe = make_tiny_pipeline()
        pipe.add_category("hex_nut", nuts)
        pipe.bank.places_0[0, 1] = 999
        pipe.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="normal pictures beside a bank that do not fit"):
            AnomalySDPipeline.from_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"`shots\['a'\]` must be two whole numbers, got 3"):
            PrototypeBank(sizes={"a": 1}, dim=1, shots={"a": 3})

    def test_more_copies_than_a_place_can_number_are_not_kept(self):
        assert Shots.of([torch.zeros(3, 1, 1)] * 9000, torch.zeros(1, 3), rotations=4) is None
