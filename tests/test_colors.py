"""Colors by themselves, beside all channels together."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from anomalysd_pipeline.models.bank import COLOR_WEIGHT, PrototypeBank
from anomalysd_pipeline.models.collection import fill_bank
from anomalysd_pipeline.models.coreset import greedy_coreset
from anomalysd_pipeline.models.extractor import PrototypeExtractor

from .banks import check_copies


def vectors(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bank_of(features, colors=2, **options):
    bank = PrototypeBank(**options)
    bank.add("lid", features, sources=torch.arange(len(features)) % 3, unturned=12, colors=colors)
    return bank


def spread_between(features, sources):
    between = cdist(features, features, "sqeuclidean")
    between[sources[:, None] == sources[None]] = np.inf
    return between.min(axis=1)


def relative(queries, features, sources):
    """`PrototypeBank.relative_distances` by brute force."""
    spread, squares = spread_between(features, sources), cdist(queries, features, "sqeuclidean")
    local = spread[np.argsort(squares, axis=1)[:, :9]].mean(axis=1)
    return squares.min(axis=1) / (2 * spread.mean() + local)


def test_deviations_are_the_larger_of_all_channels_and_of_colors_alone():
    features, psi = vectors(40, 7), vectors(2, 7, 3, 4, seed=1)
    found = bank_of(features).deviations("lid", psi).flatten()
    queries, sources = psi.permute(0, 2, 3, 1).reshape(-1, 7).double().numpy(), np.arange(40) % 3
    features = features.double().numpy()
    together, alone = relative(queries, features, sources), relative(queries[:, 5:], features[:, 5:], sources)
    np.testing.assert_allclose(found, np.maximum(together, COLOR_WEIGHT * alone), rtol=1e-3)
    assert 0 < (COLOR_WEIGHT * alone > together).mean() < 1


def test_a_wrong_color_among_many_channels_is_seen():
    features = torch.cat([vectors(60, 40), 0.01 * vectors(60, 2, seed=1)], dim=1)
    tested = features[:1].clone()
    tested[0, 40:] = 1.0
    psi = tested.view(1, 42, 1, 1)
    plain, both = bank_of(features, colors=0), bank_of(features)
    assert plain.deviations("lid", psi).item() < 0.1 < 10 < both.deviations("lid", psi).item()


def test_a_coreset_of_the_colors_is_kept_beside_what_was_not_turned(monkeypatch):
    monkeypatch.setattr("anomalysd_pipeline.models.bank._COLORS", 4)
    features = vectors(40, 7)
    bank = bank_of(features, max_size=10)
    chosen = sorted({*range(12), *greedy_coreset(features[:, 5:], 4).tolist()})
    assert torch.equal(bank.colors["lid"], features[chosen, 5:])
    spread = spread_between(features[:, 5:].double().numpy(), np.arange(40) % 3)[chosen]
    np.testing.assert_allclose(bank.colors.spread("lid"), spread, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_packed_saved_and_removed(tmp_path, dtype):
    bank, psi = bank_of(vectors(40, 7)), vectors(1, 7, 2, 3, seed=1)
    bank.add("axle", vectors(20, 7, seed=4), colors=2)
    bank = bank.to(dtype)
    expected = bank.deviations("lid", psi)
    check_copies(bank, "lid", psi, tmp_path)
    bank.remove("axle")
    assert bank.colors.categories == ["lid"] and torch.equal(bank.deviations("lid", psi), expected)
    bank.save_pretrained(tmp_path / "less")
    assert PrototypeBank.from_pretrained(tmp_path / "less").colors.categories == ["lid"]
    assert bank.empty().colors is None


def test_a_category_may_be_without(tmp_path):
    bank, psi = bank_of(vectors(40, 7)), vectors(1, 7, 2, 3, seed=1)
    bank.add("axle", vectors(20, 7, seed=4))
    expected = bank.relative_distances("axle", psi)
    assert torch.equal(bank.deviations("axle", psi), expected) and set(bank.packed("axle")) == {"bank"}
    bank.add("lid", vectors(20, 7, seed=4))
    assert torch.equal(bank.deviations("lid", psi), expected) and bank.colors.categories == []
    bank.remove("lid")
    bank.save_pretrained(tmp_path)
    assert torch.equal(PrototypeBank.from_pretrained(tmp_path).deviations("axle", psi), expected)


def test_a_refused_category_leaves_the_colors_it_had():
    bank, psi = bank_of(vectors(40, 7)), vectors(1, 7, 2, 3, seed=1)
    bank.add("axle", vectors(20, 7, seed=4), colors=2)
    expected, packed = bank.deviations("lid", psi), bank.packed("lid")
    with pytest.raises(ValueError, match="must have 2 channels"):
        bank.add("lid", vectors(20, 7, seed=5), colors=3)
    with pytest.raises(ValueError, match="must be finite"):
        bank.add_packed("lid", packed | {"colors": torch.full_like(packed["colors"], torch.nan)})
    assert torch.equal(bank.deviations("lid", psi), expected)


def test_the_only_category_may_change_its_colors(tmp_path):
    bank, psi = bank_of(vectors(40, 7)), vectors(1, 7, 2, 3, seed=1)
    other = bank_of(vectors(40, 7, seed=5), colors=4)
    bank.add("lid", vectors(40, 7, seed=5), sources=torch.arange(40) % 3, unturned=12, colors=4)
    bank.save_pretrained(tmp_path)
    for found in (bank, PrototypeBank.from_pretrained(tmp_path)):
        assert torch.equal(found.deviations("lid", psi), other.deviations("lid", psi))


@pytest.mark.parametrize(("weight", "compare"), [(0.5, True), (0.5, False), (0.0, True)])
def test_a_filled_bank_knows_the_colors_of_an_extractor_that_has_them(weight, compare):
    extractor = PrototypeExtractor("resnet10t", color_weight=weight)
    bank, images = PrototypeBank(), torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    fill_bank(bank, "lid", extractor, images, rotations=2, compare=compare)
    assert extractor.color_channels == 27 * (weight > 0)
    assert (bank.colors is not None) == (weight > 0 and compare)
    if bank.colors:
        rows = extractor(images)[:, -27:].permute(0, 2, 3, 1).flatten(end_dim=2)
        torch.testing.assert_close(bank.colors["lid"][: len(rows)], rows)
