"""The synthetic pictures: seeded, exact masks, natural variation within a product, and the folder on disk."""

import numpy as np
import pytest
from PIL import Image

from anomalysd_pipeline import synthetic
from anomalysd_pipeline.synthetic import DEFECTS, FAMILIES, OBJECTS, TEXTURES, UNSEEN


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_names():
    assert FAMILIES == TEXTURES + OBJECTS
    assert len(set(FAMILIES)) == len(FAMILIES) >= 16
    assert len(TEXTURES) >= 6 and len(OBJECTS) >= 9 and len(DEFECTS) >= 7
    assert set(UNSEEN) & set(TEXTURES) and len(set(UNSEEN) & set(OBJECTS)) >= 2


@pytest.mark.parametrize("size", [64, 256])
@pytest.mark.parametrize("family", FAMILIES)
def test_normal_picture(family, size):
    sample = synthetic.draw_normal(family, rng(), size)
    assert sample.image.shape == (size, size, 3) and sample.image.dtype == np.uint8
    assert sample.mask.shape == (size, size) and not sample.mask.any()
    assert sample.image.std() > 3
    assert sample.defect is None and sample.family == family
    share = sample.foreground.mean()
    assert share == 1 if family in TEXTURES else 0.03 < share < 0.8


@pytest.mark.parametrize("family", OBJECTS)
def test_foreground_stands_out_from_the_ground(family):
    sample = synthetic.draw_normal(family, rng(3), 128)
    image = sample.image.astype(float)
    part, ground = image[sample.foreground], image[~sample.foreground]
    spread = np.sqrt(part.var(0).sum() + ground.var(0).sum())
    assert np.linalg.norm(part.mean(0) - ground.mean(0)) > 0.2 * spread


@pytest.mark.parametrize("family", ["weave", "gear", "biscuit", "hanging_plate"])
def test_same_seed_gives_the_same_picture(family):
    one = synthetic.draw_defective(family, rng(5), 64)
    two = synthetic.draw_defective(family, rng(5), 64)
    other = synthetic.draw_defective(family, rng(6), 64)
    assert one.defect == two.defect
    assert np.array_equal(one.image, two.image) and np.array_equal(one.mask, two.mask)
    assert not np.array_equal(one.image, other.image)


# Each family with two defects, so that each defect comes on surfaces and on objects.
PAIRS = [(family, DEFECTS[(i + step) % len(DEFECTS)]) for i, family in enumerate(FAMILIES) for step in (0, 3)]


def test_pairs_hold_each_defect_on_surfaces_and_on_objects():
    for families in (TEXTURES, OBJECTS):
        assert {defect for family, defect in PAIRS if family in families} == set(DEFECTS)


@pytest.mark.parametrize(("family", "defect"), PAIRS)
def test_mask_holds_exactly_the_change(family, defect):
    style = synthetic.sample_style(family, rng(1))
    normal = synthetic.draw_normal(family, rng(2), 64, style)
    broken = synthetic.draw_defective(family, rng(2), 64, defect, style)
    differs = (broken.image != normal.image).any(2)
    assert broken.defect == defect
    assert not differs[~broken.mask].any()
    assert differs[broken.mask].mean() > 0.75
    assert 0.002 <= broken.mask.mean() <= 0.12
    change = np.abs(broken.image.astype(int) - normal.image).max(2)
    assert change[broken.mask].mean() > 8
    assert normal.foreground[broken.mask].mean() > 0.3


@pytest.mark.parametrize("defect", DEFECTS)
def test_defects_at_full_size(defect):
    normal = synthetic.draw_normal("washer", rng(4))
    image, mask, name = synthetic.apply_defect(normal.image, normal.foreground, rng(7), defect)
    assert name == defect and 0.002 <= mask.mean() <= 0.12
    assert np.array_equal(image[~mask], normal.image[~mask])
    assert (image[mask] != normal.image[mask]).any(1).mean() > 0.75


def test_defect_on_a_flat_picture_is_still_visible():
    flat = np.full((64, 64, 3), 128, np.uint8)
    foreground = np.zeros((64, 64), bool)
    foreground[20:40, 20:40] = True
    for defect in DEFECTS:
        image, mask, _ = synthetic.apply_defect(flat, foreground, rng(1), defect)
        assert mask.any()
        assert np.array_equal(image[~mask], flat[~mask])


def test_defect_on_a_single_pixel_in_the_corner():
    flat = np.full((64, 64, 3), 60, np.uint8)
    foreground = np.zeros((64, 64), bool)
    foreground[0, 0] = True
    image, mask, name = synthetic.apply_defect(flat, foreground, rng(1), "scratch")
    assert name == "scratch" and mask.any()
    assert np.array_equal(image[~mask], flat[~mask])


def test_defect_does_not_change_its_input():
    normal = synthetic.draw_normal("tiles", rng(), 64)
    before = normal.image.copy()
    synthetic.apply_defect(normal.image, normal.foreground, rng(1), "stain")
    assert np.array_equal(normal.image, before)


def test_random_defects_reach_every_kind():
    normal = synthetic.draw_normal("leather", rng(), 32)
    chance = rng(1)
    seen = {synthetic.apply_defect(normal.image, normal.foreground, chance)[2] for _ in range(80)}
    assert seen == set(DEFECTS)


def test_pictures_of_one_product_look_alike():
    def colors(family, seed):
        return np.array([np.asarray(image).mean((0, 1)) for image in synthetic.normal_images(family, 3, seed, 48)])

    for family in FAMILIES:
        products = [colors(family, seed) for seed in range(5)]
        centers = np.array([p.mean(0) for p in products])
        within = np.mean([np.linalg.norm(p - p.mean(0), axis=1).mean() for p in products])
        across = np.linalg.norm(centers[:, None] - centers[None], axis=2).sum() / 20
        assert within < 0.5 * across, family


def test_pictures_of_one_product_differ():
    images = [np.asarray(image) for image in synthetic.normal_images("screw", 3, 0, 64)]
    assert np.abs(images[0].astype(int) - images[1]).mean() > 2
    assert np.abs(images[1].astype(int) - images[2]).mean() > 2


def test_more_pictures_only_adds():
    few, many = synthetic.normal_images("ring", 2, 3, 32), synthetic.normal_images("ring", 4, 3, 32)
    assert all(np.array_equal(a, b) for a, b in zip(few, many[:2], strict=True))


def test_test_samples_are_the_same_product_in_other_pictures():
    train = [np.asarray(image) for image in synthetic.normal_images("button", 3, 1, 48)]
    samples = synthetic.test_samples("button", 3, len(DEFECTS), 1, 48)
    assert [s.defect for s in samples] == [None] * 3 + list(DEFECTS)
    assert all(s.mask.any() == (s.defect is not None) for s in samples)
    assert not any(np.array_equal(s.image, image) for s in samples for image in train)
    other = np.mean([np.asarray(image).mean((0, 1)) for image in synthetic.normal_images("button", 3, 2, 48)], 0)
    own = np.mean([image.mean((0, 1)) for image in train], 0)
    tested = np.mean([s.image.mean((0, 1)) for s in samples[:3]], 0)
    assert np.linalg.norm(tested - own) < np.linalg.norm(tested - other)


def test_surfaces_are_broad_and_seeded():
    samples = [synthetic.draw_surface(rng(seed), 48) for seed in range(24)]
    assert all(s.family == "surface" and s.image.shape == (48, 48, 3) and not s.mask.any() for s in samples)
    full = sum(bool(s.foreground.all()) for s in samples)
    assert 0 < full < len(samples)
    assert np.array([s.image.mean((0, 1)) for s in samples]).std(0).min() > 20
    assert np.array_equal(samples[3].image, synthetic.draw_surface(rng(3), 48).image)


def test_dataset_on_disk(tmp_path):
    done = []
    synthetic.write_dataset(
        tmp_path, ["gear", "wood"], train=2, good=3, defective=12, seed=9, size=48, progress=done.append
    )
    assert done == ["gear", "wood"]
    assert sorted(p.name for p in (tmp_path / "gear/train/good").iterdir()) == ["000.png", "001.png"]
    assert len(list((tmp_path / "wood/test/good").iterdir())) == 3
    assert {p.name for p in (tmp_path / "gear/test").iterdir()} == {"good", *DEFECTS}
    assert {p.name for p in (tmp_path / "gear/ground_truth").iterdir()} == set(DEFECTS)
    again = synthetic.test_samples("gear", 3, 12, 9, 48)
    first = DEFECTS[0]
    image = np.asarray(Image.open(tmp_path / f"gear/test/{first}/001.png"))
    mask = np.asarray(Image.open(tmp_path / f"gear/ground_truth/{first}/001_mask.png"))
    expected = [s for s in again if s.defect == first][1]
    assert np.array_equal(image, expected.image)
    assert set(np.unique(mask)) == {0, 255} and np.array_equal(mask > 0, expected.mask)
    train = np.asarray(Image.open(tmp_path / "wood/train/good/001.png"))
    assert np.array_equal(train, np.asarray(synthetic.normal_images("wood", 2, 9, 48)[1]))


def test_dataset_refuses_to_mix_with_existing_files(tmp_path):
    synthetic.write_dataset(tmp_path, ["wood"], train=1, good=0, defective=0, size=32)
    before = (tmp_path / "wood/train/good/000.png").read_bytes()
    with pytest.raises(ValueError, match="`out`.*wood"):
        synthetic.write_dataset(tmp_path, ["ring", "wood"], train=1, good=0, defective=0, seed=1, size=32)
    assert (tmp_path / "wood/train/good/000.png").read_bytes() == before
    assert not (tmp_path / "ring").exists()
    synthetic.write_dataset(tmp_path, ["ring"], train=1, good=0, defective=0, size=32)
    assert (tmp_path / "ring/train/good/000.png").exists()


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: synthetic.sample_style("bolt", rng()), "`family`"),
        (lambda: synthetic.draw_normal("bolt", rng()), "`family`"),
        (lambda: synthetic.draw_normal("wood", rng(), 8), "`size`"),
        (lambda: synthetic.draw_surface(rng(), 0), "`size`"),
        (lambda: synthetic.draw_normal("wood", rng(), 32, synthetic.sample_style("gear", rng())), "`style`"),
        (lambda: synthetic.draw_defective("wood", rng(), 32, "explosion"), "`defect`"),
        (lambda: synthetic.normal_images("wood", -1, 0), "`count`"),
        (lambda: synthetic.test_samples("wood", -1, 0, 0), "`good`"),
        (lambda: synthetic.test_samples("wood", 0, -1, 0), "`defective`"),
        (lambda: synthetic.write_dataset("unused", ["bolt"]), "`family`"),
        (lambda: synthetic.apply_defect(np.zeros((8, 9, 3), np.uint8), np.ones((8, 9), bool), rng()), "`image`"),
        (lambda: synthetic.apply_defect(np.zeros((9, 9, 3), np.uint8), np.zeros((9, 9), bool), rng()), "`foreground`"),
        (
            lambda: synthetic.apply_defect(np.zeros((9, 9, 3), np.uint8), np.ones((9, 9), bool), rng(), "hole"),
            "`defect`",
        ),
    ],
)
def test_bad_input_names_the_argument(call, name):
    with pytest.raises(ValueError, match=name):
        call()
