"""Draw the training samples of a few-shot fine-tuning, each from the seed and its number alone.

Nothing depends on how many processes draw the samples or on where an earlier run stopped: any process can make sample
n at any time. So a resumed run equals an uninterrupted one, and several processes equal one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, Sampler

from ..data.tensors import augment, to_tensor
from ..method.foreground import foreground_mask
from ..method.masks import MASK_DESIGNS, multi_scale_masks, random_rectangle_mask, training_mask
from ..synthetic import apply_defect

REPAIRED_FROM = 0.08
"""Share of the noise schedule below which no defect is shown, as in the training of the embedded denoiser: noise that
hides no defect cannot be mistaken for one, and the step back to the normal part would be many times the noise."""


class FewShotDataset(Dataset):
    """Draws endless samples from normal pictures of one category or several; an epoch is one pass over the pictures.

    Args:
        shots: category to its normal pictures, RGB.
        prompts: category to its prompt set T_c.
        resolution: side R in pixels.
        latent_shape: `(C, h, w)` of one picture's latents.
        timesteps: number T of steps of the noise schedule.
        seed: of the order and of every draw.
        mask_design: "foreground" (the paper's mechanism), "random" (rectangles anywhere), or "detection": half
            foreground rectangles, half the grouped cells that detection will ask for.
        noise_range: (low, high) in [0, 1]: the share of the schedule from which timesteps are drawn.
        defect_share: share of the samples, in [0, 1], shown with a defect drawn onto the part; none of those with a
            timestep below `REPAIRED_FROM * timesteps`.
        augmentation: limits of contrast, brightness, scaling and rotation, the keyword arguments of `data.augment`.

    Raises:
        ValueError: `shots` holds no picture, or `mask_design` or `noise_range` is another.
    """

    def __init__(
        self,
        shots: Mapping[str, Sequence[Image.Image]],
        prompts: Mapping[str, Sequence[str]],
        resolution: int,
        latent_shape: tuple[int, int, int],
        timesteps: int,
        seed: int = 0,
        mask_design: str = "foreground",
        noise_range: tuple[float, float] = (0.0, 1.0),
        augmentation: Mapping[str, float] | None = None,
        defect_share: float = 0.0,
    ):
        if mask_design not in MASK_DESIGNS:
            raise ValueError(
                f"`mask_design` must be one of {', '.join(map(repr, MASK_DESIGNS))}, got {mask_design!r}."
            )
        low, high = noise_range
        if not 0 <= low < high <= 1:
            raise ValueError(f"`noise_range` must be two rising numbers in [0, 1], got {tuple(noise_range)}.")
        pairs = [(category, image) for category, images in shots.items() for image in images]
        if not pairs:
            raise ValueError("`shots` holds no picture; give at least one normal picture.")
        self.images = [to_tensor(image, resolution) for _, image in pairs]  # [3, R, R] each
        self.foregrounds = [foreground_mask(image) for image in self.images]  # [R, R] each
        self.prompts = [text for texts in prompts.values() for text in texts]
        first = dict(zip(prompts, np.cumsum([0, *map(len, prompts.values())]).tolist(), strict=False))
        self.prompt_ranges = [(first[category], len(prompts[category])) for category, _ in pairs]
        self.latent_shape, self.seed, self.mask_design = tuple(latent_shape), seed, mask_design
        # At least one step, however narrow the range.
        self.timesteps = (int(low * timesteps), max(int(low * timesteps) + 1, round(high * timesteps)))
        self.repaired_from = REPAIRED_FROM * timesteps
        self.augmentation = dict(augmentation or {})
        self.defect_share = defect_share
        self.cells = multi_scale_masks(resolution, resolution, (2, 4, 8), "grouped")

    def __len__(self) -> int:
        """Counts the pictures, so the samples of an epoch."""
        return len(self.images)

    def fingerprint(self) -> str:
        """Returns a short text that differs when the pictures, their order or the prompts do."""
        digest = hashlib.sha256("\n".join(self.prompts).encode())
        for image, start in zip(self.images, self.prompt_ranges, strict=True):
            digest.update(repr(start).encode() + image.numpy().tobytes())
        return digest.hexdigest()[:16]

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        """Draws sample `number`, 0 or more, without an upper end.

        Returns:
            `image` `[3, R, R]` in [-1, 1]; `shown`, the same or with a defect; `mask` `[1, R, R]` in {0, 1};
            `prompt`, index into `prompts`, a random one of the picture's category; `noise` `[C, h, w]`; `timestep`.
            All on the CPU.
        """
        epoch, place = divmod(number, len(self.images))
        index = int(np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.images))[place])
        drawn = np.random.SeedSequence([self.seed, 1, number]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(drawn) >> 1)
        image, foreground = augment(self.images[index], generator, mask=self.foregrounds[index], **self.augmentation)
        first, count = self.prompt_ranges[index]
        sample = {
            "image": image,
            "mask": self._draw_mask(foreground, generator),
            "prompt": first + torch.randint(count, (), generator=generator),
            "noise": torch.randn(self.latent_shape, generator=generator),
            "timestep": torch.randint(*self.timesteps, (), generator=generator),
        }
        hidden = sample["timestep"] >= self.repaired_from
        return {**sample, "shown": self._show(image, foreground, int(drawn)) if hidden else image}

    def _show(self, image: torch.Tensor, foreground: torch.Tensor, seed: int) -> torch.Tensor:
        rng = np.random.default_rng([seed, 1])
        height, width = foreground.shape
        if height != width or rng.random() >= self.defect_share:
            return image
        pixels = ((image.permute(1, 2, 0).numpy() + 1) * 127.5).round().clip(0, 255).astype(np.uint8)
        damaged, where, _ = apply_defect(pixels, (foreground if foreground.any() else ~foreground).numpy(), rng)
        damaged = torch.from_numpy(damaged.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)
        # Elsewhere the picture itself, without the rounding to bytes.
        return torch.where(torch.from_numpy(where), damaged, image)

    def _draw_mask(self, foreground: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        height, width = foreground.shape
        if self.mask_design == "random":
            return random_rectangle_mask(height, width, generator)
        if self.mask_design == "detection" and torch.rand((), generator=generator) < 0.5:
            scale = self.cells[torch.randint(len(self.cells), (), generator=generator)].masks
            return scale[torch.randint(len(scale), (), generator=generator)].float()
        # Turning and scaling can push a small object out of the picture.
        return training_mask(foreground if foreground.any() else ~foreground, generator)


class GlobalBatches(Sampler):
    """Yields the sample numbers of one process, batch by batch, from any step on.

    The global batch of step s is the samples s B ... (s + 1) B - 1 with B = batch_size x accumulation x processes,
    dealt out so that every process has `batch_size` of them at a time.

    Args:
        batch_size: per process and forward pass.
        accumulation: forward passes of a step.
        process, processes: index of this process, and number of processes.
        first_step, last_step: steps to yield, `last_step` not included.
    """

    def __init__(
        self, batch_size: int, accumulation: int, process: int, processes: int, first_step: int, last_step: int
    ):
        self.batch_size, self.accumulation = batch_size, accumulation
        self.process, self.processes = process, processes
        self.first_step, self.last_step = first_step, last_step

    def __len__(self) -> int:
        return (self.last_step - self.first_step) * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        for turn in range(self.first_step * self.accumulation, self.last_step * self.accumulation):
            start = (turn * self.processes + self.process) * self.batch_size
            yield list(range(start, start + self.batch_size))
