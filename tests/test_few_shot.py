import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from anomalysd_pipeline.adaptation.samples import REPAIRED_FROM, FewShotDataset, GlobalBatches
from anomalysd_pipeline.data.tensors import augment
from anomalysd_pipeline.method.masks import iou, multi_scale_masks
from anomalysd_pipeline.synthetic import normal_images

SIDE = 32
STILL = {"brightness": 0.0, "contrast": 0.0, "scale": 0.0, "degrees": 0.0}
PROMPTS = {"nut": ["a nut", "a good nut", "a perfect nut"], "lid": ["a lid", "a good lid"]}


def flat(level):
    return Image.new("RGB", (SIDE, SIDE), (level, level, level))


def with_square(top, left, side, size=SIDE):
    """A white square on black, which every rule takes for an object."""
    pixels = np.zeros((size, size, 3), np.uint8)
    pixels[top : top + side, left : left + side] = 255
    return Image.fromarray(pixels)


def dataset(shots=None, **options):
    shots = {"nut": normal_images("hex_nut", 3, seed=5, size=SIDE)} if shots is None else shots
    prompts = options.pop("prompts", {category: PROMPTS[category] for category in shots})
    return FewShotDataset(shots, prompts, SIDE, (4, 8, 8), 1000, **options)


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def masks_of(samples, count):
    return [samples[number]["mask"] for number in range(count)]


class TestSamples:
    def test_depend_on_seed_and_number_alone(self):
        one, two = dataset(), dataset()
        in_order = [one[number] for number in range(8)]
        torch.manual_seed(1)  # what other code draws must not matter
        for number in (7, 0, 3, 3, 5, 1, 6, 2, 4):
            assert same(two[number], in_order[number])
        different = [same(a, b) for a, b in itertools.combinations(in_order, 2)]
        assert not any(different)
        assert not any(same(a, b) for a, b in zip(in_order, map(dataset(seed=1).__getitem__, range(8)), strict=True))

    def test_shapes_and_ranges(self):
        sample = dataset()[2]
        assert sample["image"].shape == (3, SIDE, SIDE) and sample["image"].abs().max() <= 1
        assert sample["mask"].shape == (1, SIDE, SIDE) and sample["mask"].dtype == torch.float32
        assert sample["noise"].shape == (4, 8, 8)
        assert sample["prompt"].shape == sample["timestep"].shape == ()

    def test_defects_are_shown_on_their_share_of_the_samples_and_nothing_else_changes(self):
        options = {"noise_range": (REPAIRED_FROM, 1.0)}
        plain, half, all_of_them = (dataset(defect_share=share, **options) for share in (0.0, 0.5, 1.0))
        changed = []
        for number in range(24):
            before, some, after = plain[number], half[number], all_of_them[number]
            assert torch.equal(before["shown"], before["image"])
            assert same({**some, "shown": before["shown"]}, before)
            assert same({**after, "shown": before["shown"]}, before)
            changed.append(not torch.equal(some["shown"], some["image"]))
            different = (after["shown"] != after["image"]).any(0)
            assert 0 < different.float().mean() < 0.5 and after["shown"].abs().max() <= 1
            assert same(dataset(defect_share=1.0, **options)[number], after)
        assert 5 <= sum(changed) <= 19

    def test_defects_are_shown_where_the_step_to_the_normal_part_is_a_few_times_the_latents(self):
        """By NumPy, on Stable Diffusion's schedule: Eq. (7) solved for epsilon multiplies the latents by this."""
        kept = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
        factors = np.sqrt(kept / (1 - kept))
        samples = dataset(defect_share=1.0, noise_range=(0.0, 0.16))
        drawn = [samples[number] for number in range(60)]
        timesteps = np.array([int(sample["timestep"]) for sample in drawn])
        shown = np.array([not torch.equal(sample["shown"], sample["image"]) for sample in drawn])
        assert factors[timesteps].max() > 10 and factors[timesteps[shown]].max() < 3.5
        assert shown[timesteps >= 80].all() and 20 < shown.sum() < 40

    def test_noise_is_standard_normal(self):
        samples = dataset(mask_design="random")
        noise = torch.cat([samples[number]["noise"].flatten() for number in range(40)])
        assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05

    def test_an_epoch_visits_every_picture_once(self):
        levels = [10, 60, 110, 160, 210]
        samples = dataset({"nut": [flat(level) for level in levels]}, mask_design="random", augmentation=STILL)
        visited = [round((samples[n]["image"].mean().item() + 1) * 127.5) for n in range(6 * len(samples))]
        epochs = [visited[start : start + 5] for start in range(0, 30, 5)]
        assert all(sorted(epoch) == levels for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 3

    def test_prompts_are_drawn_from_the_pictures_own_category(self):
        shots = {"lid": [flat(20), flat(40)], "nut": [flat(200)]}
        # The book's order is another one than the pictures'.
        samples = dataset(shots, prompts=PROMPTS, mask_design="random", augmentation=STILL)
        drawn = {"lid": set(), "nut": set()}
        for number in range(60):
            sample = samples[number]
            drawn["nut" if sample["image"].mean() > 0 else "lid"].add(samples.prompts[sample["prompt"]])
        assert drawn == {category: set(texts) for category, texts in PROMPTS.items()}

    @pytest.mark.parametrize("noise_range, low, high", [((0, 1), 0, 1000), ((0.2, 0.6), 200, 600), ((0, 0.1), 0, 100)])
    def test_timesteps_fill_the_noise_range(self, noise_range, low, high):
        samples = dataset(mask_design="random", noise_range=noise_range)
        drawn = torch.stack([samples[number]["timestep"] for number in range(300)])
        margin = (high - low) / 20
        assert low <= drawn.min() < low + margin and high - margin < drawn.max() < high

    def test_the_narrowest_noise_range_has_one_timestep(self):
        samples = dataset(mask_design="random", noise_range=(0.4999, 0.5))
        assert {samples[number]["timestep"].item() for number in range(9)} == {499}

    def test_fingerprint_tells_pictures_order_and_prompts_apart(self):
        first, second = flat(10), flat(20)
        assert (
            dataset({"nut": [first, second]}).fingerprint() == dataset({"nut": [first, second]}, seed=3).fingerprint()
        )
        others = [
            dataset({"nut": [first, flat(21)]}),
            dataset({"nut": [second, first]}),
            dataset({"nut": [first, second]}, prompts={"nut": ["another"]}),
            dataset({"nut": [first], "lid": [second]}, prompts={"nut": PROMPTS["nut"], "lid": ["a lid"]}),
        ]
        prints = {each.fingerprint() for each in [dataset({"nut": [first, second]}), *others]}
        assert len(prints) == 5

    @pytest.mark.parametrize(
        "options, argument",
        [
            ({"mask_design": "triangle"}, "`mask_design`.*'triangle'"),
            ({"noise_range": (0.5, 0.5)}, "`noise_range`"),
            ({"noise_range": (0.5, 1.5)}, "`noise_range`"),
            ({"noise_range": (-0.1, 0.5)}, "`noise_range`"),
            ({"shots": {}}, "`shots`"),
            ({"shots": {"nut": []}}, "`shots`"),
        ],
    )
    def test_bad_arguments(self, options, argument):
        with pytest.raises(ValueError, match=argument):
            dataset(**options)


class TestMasks:
    @pytest.mark.parametrize("design", ["foreground", "random", "detection"])
    def test_are_binary_and_not_empty(self, design):
        for mask in masks_of(dataset(mask_design=design), 60):
            assert set(mask.unique().tolist()) <= {0.0, 1.0} and mask.any()

    def test_foreground_design_reaches_the_overlaps_of_the_paper(self):
        """Gamma is 0, 0.2 or 0.5 at equal odds, so P(IoU > t) is the mean of P(IoU > t | IoU > gamma)."""
        shots, count = {"nut": [with_square(6, 6, 20)]}, 900
        square = torch.zeros(1, SIDE, SIDE)
        square[:, 6:26, 6:26] = 1

        def overlaps(design):
            samples = dataset(shots, mask_design=design, augmentation=STILL)
            return np.array([iou(mask, square) for mask in masks_of(samples, count)])

        free, led = overlaps("random"), overlaps("foreground")
        above = {limit: (free > limit).mean() for limit in (0, 0.2, 0.5)}
        assert (led > 0).all()
        assert (led > 0.2).mean() == pytest.approx((above[0.2] / above[0] + 2) / 3, abs=0.05)
        expected = (above[0.5] / above[0] + above[0.5] / above[0.2] + 1) / 3
        assert (led > 0.5).mean() == pytest.approx(expected, abs=0.05)
        assert above[0.5] < 0.5 * expected

    def test_foreground_design_follows_the_turned_object(self):
        """An object off the center that is turned anywhere: masks drawn for where it was would miss it."""
        samples = dataset(
            {"nut": [with_square(4, 4, 9)]}, augmentation={**STILL, "degrees": 180.0}, mask_design="foreground"
        )
        moved = 0
        for number in range(80):
            sample = samples[number]
            where = sample["image"][:1] > 0
            assert iou(sample["mask"], where) > 0
            moved += not where[0, 4:13, 4:13].any()
        assert moved > 20

    def test_random_design_does_not_depend_on_the_object(self):
        left, right = ({"nut": [with_square(8, place, 10)]} for place in (1, 20))

        def drawn(shots, design):
            return torch.stack(masks_of(dataset(shots, mask_design=design, augmentation=STILL), 40))

        assert torch.equal(drawn(left, "random"), drawn(right, "random"))
        assert not torch.equal(drawn(left, "foreground"), drawn(right, "foreground"))

    def test_detection_design_is_half_the_cells_of_detection(self):
        masks = masks_of(dataset(mask_design="detection"), 400)
        cells = [mask for scale in multi_scale_masks(SIDE, SIDE, (2, 4, 8), "grouped") for mask in scale.masks]
        counts = [sum(torch.equal(mask, cell) for mask in masks) for cell in cells]
        assert len(cells) == 12 and min(counts) > 5
        assert 0.4 < sum(counts) / len(masks) < 0.6


class TestGlobalBatches:
    @pytest.mark.parametrize("size, accumulation, processes", [(4, 1, 1), (2, 2, 1), (2, 1, 2), (1, 2, 2), (3, 2, 4)])
    def test_all_processes_together_have_one_process_batch(self, size, accumulation, processes):
        steps, whole = 5, size * accumulation * processes
        shares = [list(GlobalBatches(size, accumulation, rank, processes, 0, steps)) for rank in range(processes)]
        assert all(len(batch) == size for share in shares for batch in share)
        (alone,) = [list(GlobalBatches(whole, 1, 0, 1, 0, steps))]
        for step in range(steps):
            turns = range(step * accumulation, (step + 1) * accumulation)
            together = [number for share in shares for turn in turns for number in share[turn]]
            assert sorted(together) == alone[step] == list(range(step * whole, (step + 1) * whole))

    def test_resumed_batches_are_the_rest(self):
        everything = list(GlobalBatches(2, 3, 1, 2, 0, 7))
        rest = GlobalBatches(2, 3, 1, 2, 4, 7)
        assert list(rest) == everything[4 * 3 :] and len(rest) == 9
        assert list(GlobalBatches(2, 3, 1, 2, 7, 7)) == []


class TestAugmentMask:
    limits = {"brightness": 0.1, "contrast": 0.1, "scale": 0.3, "degrees": 60.0}

    @pytest.mark.parametrize("height, width", [(96, 96), (80, 128)])
    def test_the_mask_follows_the_picture(self, height, width):
        mask = torch.zeros(height, width, dtype=torch.bool)
        mask[20:60, 30:75] = True
        image = torch.where(mask, torch.tensor([0.8, -0.6, -0.6])[:, None, None], -0.6)
        moved = []
        for seed in range(12):
            varied, turned = augment(image, torch.Generator().manual_seed(seed), **self.limits, mask=mask)
            assert turned.shape == mask.shape and turned.dtype == torch.bool
            # Brightness and contrast act on all channels alike, so the difference of two is the square's alone.
            assert iou(varied[0] - varied[1] > 0.7, turned) > 0.95
            moved.append(iou(turned, mask))
        assert min(moved) < 0.7

    def test_the_picture_is_the_same_with_and_without_a_mask(self):
        image = torch.rand(3, 24, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
        mask = image[0] > 0
        alone = augment(image, torch.Generator().manual_seed(1))
        assert torch.equal(augment(image, torch.Generator().manual_seed(1), mask=mask)[0], alone)
