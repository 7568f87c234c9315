"""Pictures in the sizes at which the networks take them."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from anomalysd_pipeline.app.uploads import kept_size
from anomalysd_pipeline.data.inputs import Inputs
from anomalysd_pipeline.data.tensors import to_tensor
from anomalysd_pipeline.synthetic import normal_images


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def own_shape(height, width):
    return (16, 32) if width > height else None


def test_each_network_gets_its_size():
    wide, square = noise(60, 20), noise(40, 40, 1)
    inputs = Inputs.of([wide, square], 24, own_shape)
    assert inputs.squares.shape == (2, 3, 24, 24) and len(inputs) == 2
    assert torch.equal(inputs.squares[0], to_tensor(wide, 24))
    assert torch.equal(inputs.shaped[0], to_tensor(wide, (16, 32)))  # from the picture, not from the square
    assert torch.equal(inputs.shaped[1], inputs.squares[1])
    one = inputs[1]
    assert (
        len(one) == 1 and torch.equal(one.squares, inputs.squares[1:]) and torch.equal(one.shaped[0], inputs.shaped[1])
    )


def test_digests_tell_pictures_apart_and_nothing_else():
    first, second = noise(30, 20), noise(30, 20, 1)
    inputs = Inputs.of([first, second, first.copy()], 24, own_shape)
    a, b, again = inputs.digests()
    assert a == again != b and len(a) == 16
    assert Inputs.of([first], 24, lambda height, width: None).digests() == [a]


def test_copies_vary_alike_for_both_networks():
    inputs = Inputs.of([noise(40, 40)], 24, lambda height, width: (24, 24))
    varied = inputs.varied(3, brightness=0.1, contrast=0.2, scale=0.1, degrees=20.0)
    assert torch.equal(varied.squares[0], varied.shaped[0]) and not torch.equal(varied.squares, inputs.squares)
    assert torch.equal(inputs.varied(3, brightness=0.1).squares, inputs.varied(3, brightness=0.1).squares)
    assert not torch.equal(inputs.varied(3).squares, inputs.varied(4).squares)


def test_what_a_session_keeps_has_the_shape_of_the_picture():
    assert kept_size(noise(300, 100), 64).size == (128, 43)
    small = noise(50, 40)
    kept = kept_size(small, 64)
    assert kept is not small and kept.tobytes() == small.tobytes()


def compressed(picture, quality):
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def noisy(picture, deviation):
    values = np.asarray(picture) + np.random.default_rng(3).normal(0, deviation, (picture.height, picture.width, 3))
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))


def sheet(seed):
    """An even surface with a fine texture of its own, under the same lamp as any other."""
    texture = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(256, 256, 1)), (1, 1, 0))
    return Image.fromarray((150 + 4 * texture / texture.std()).round().astype(np.uint8).repeat(3, axis=2))


@pytest.mark.parametrize("family", ["hex_nut", "washer", "wood", "sheet"])
def test_copies_are_told_from_other_pictures(family):
    good = [sheet(seed) for seed in range(4)] if family == "sheet" else normal_images(family, 4, seed=2)
    copies = [compressed(good[0], 75), noisy(good[1], 2.0), good[2].copy(), compressed(noisy(good[3], 2.0), 90)]
    inputs = Inputs.of([*good, *copies], 256, lambda height, width: None)
    assert inputs.alike() == [0, 1, 2, 3, 0, 1, 2, 3]


def test_even_pictures_of_one_level_are_one():
    inputs = Inputs.of([Image.new("RGB", (64, 64), (level,) * 3) for level in (255, 255, 250)], 64, own_shape)
    assert inputs.alike() == [0, 0, 2]
