"""Adaptations of the tiny pipeline: learned in a second, and what must stay as it was while they come and go."""

import dataclasses
import functools

import torch
from PIL import Image

from anomalysd_pipeline.adaptation.loop import AdaptedWeights
from anomalysd_pipeline.synthetic import normal_images, test_samples

from .conftest import make_tiny_pipeline
from .tiny import tiny_components

SHORT = {
    "steps": 2,
    "decoder_steps": 2,
    "train_batch_size": 1,
    "rank": 2,
    "decoder_rank": 2,
    "learning_rate": 0.02,
    "mixed_precision": "no",
}
FAMILIES = {"nut": "hex_nut", "ring": "ring", "gear": "gear"}


@functools.cache
def pictures(part: str) -> tuple:
    """Two normal pictures of a part, 64 px."""
    return tuple(normal_images(FAMILIES[part], 2, seed=5, size=64))


@functools.cache
def defective(part: str) -> Image.Image:
    """A defective picture of a part, 64 px: normal ones that a pipeline has learned differ from nothing."""
    (sample,) = test_samples(FAMILIES[part], 0, 1, seed=5, size=64)
    return Image.fromarray(sample.image)


def quick_pipeline(seed: int = 0, **components):
    """A tiny pipeline that inspects at once and adapts in a second."""
    return make_tiny_pipeline(
        **{**tiny_components(seed), **components},
        preset_overrides={"fast": {"num_inference_steps": 3, "mask_scales": [1]}},
        adaptation=SHORT,
        rotations=1,
    )


@functools.cache
def learned(*parts: str, method: str = "lora", seed: int = 0) -> AdaptedWeights:
    """What `adapt` learns of some parts on a base of its own."""
    shots = {part: pictures(part) for part in parts}
    return quick_pipeline().adapt(shots, method=method, calibrate=False, seed=seed)


def drawn(seed: int) -> AdaptedWeights:
    """Weights of the learned shapes that no training has seen; different for each seed."""
    weights, generator = learned("nut"), torch.Generator().manual_seed(seed)

    def part(state):
        return {name: torch.randn(weight.shape, generator=generator) / 4 for name, weight in state.items()}

    return dataclasses.replace(weights, denoiser=part(weights.denoiser), decoder=part(weights.decoder))


def adapted_to(*parts: str, pipe=None):
    """A pipeline with an adaptation for each part, not calibrated."""
    pipe = quick_pipeline() if pipe is None else pipe
    for part in parts:
        pipe.learn({part: pictures(part)}, learned(part), calibrate=False)
    return pipe


def inspected(pipe, category, part: str = "nut", **settings) -> torch.Tensor:
    """The anomaly map `[1, 64, 64]` of a defective picture of a part, inspected as a category."""
    return pipe(defective(part), category=category, output_type="pt", **settings).anomaly_maps


def weights_of(module) -> dict[str, torch.Tensor]:
    """Copies of a module's own weights, by their names without adapters."""
    return {
        name.replace(".base_layer.", "."): value.clone()
        for name, value in module.state_dict().items()
        if ".lora_" not in name
    }


def same_tensors(first: dict, second: dict) -> bool:
    """Whether two dictionaries hold the same names and bits."""
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


class Standing:
    """A pipeline as it stands: settings, objects, weights, and, unless `runs` is off, what it computes."""

    def __init__(self, pipe, runs: bool = True):
        self.pipe, self.runs = pipe, runs
        self.config = repr(sorted((key, repr(value)) for key, value in pipe.config.items()))
        self.modules = {name: id(component) for name, component in pipe.components.items()}
        self.weights = {name: weights_of(part) for name, part in self._parts()}
        categories = [*pipe.categories, "unknown"] if runs else []
        self.outputs = {category: inspected(pipe, category) for category in categories}
        if runs:
            self.outputs["inpaint"] = inpainted(pipe)

    def _parts(self):
        return [(name, part) for name, part in self.pipe.components.items() if isinstance(part, torch.nn.Module)]

    def assert_unchanged(self) -> None:
        now = Standing(self.pipe, self.runs)
        assert now.config == self.config
        assert now.modules == self.modules
        assert all(same_tensors(now.weights[name], weights) for name, weights in self.weights.items())
        assert same_tensors(now.outputs, self.outputs)


def inpainted(pipe) -> torch.Tensor:
    """A direct call of `inpaint` `[1, 3, 64, 64]`: it takes the adaptation that `set_adaptation` has chosen."""
    image = torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64)
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 16:48, 16:48] = 1
    return pipe.inpaint(image, mask, torch.zeros(1, 77, 32), num_inference_steps=3)
