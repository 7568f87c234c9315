"""Fine-tunings of the tiny pipeline: settings that take a second, and an accelerator of their own for each run."""

import contextlib

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from anomalysd_pipeline.adaptation.loop import fine_tune
from anomalysd_pipeline.adaptation.settings import AdaptationSettings


def tiny_settings(**given) -> AdaptationSettings:
    short = {"method": "lora", "steps": 4, "decoder_steps": 4, "train_batch_size": 2, "rank": 4, "decoder_rank": 4}
    return AdaptationSettings.resolve([{**short, "mixed_precision": "no", **given}])


@contextlib.contextmanager
def own_accelerator(accumulation: int = 1):
    """A CPU accelerator that shares nothing with those before and after it; accelerate keeps its state globally."""
    reset_accelerate()
    try:
        yield Accelerator(cpu=True, mixed_precision="no", gradient_accumulation_steps=accumulation)
    finally:
        reset_accelerate()


def reset_accelerate() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def train(pipe, shots, settings: AdaptationSettings, **options):
    """`fine_tune` with an accelerator of its own."""
    with own_accelerator(settings.gradient_accumulation_steps) as accelerator:
        return fine_tune(pipe.base, shots, settings, accelerator, **options)


def assert_bit_equal(actual, expected) -> None:
    """Two `AdaptedWeights` hold the same names and the same bits."""
    for part in ("denoiser", "decoder"):
        first, second = getattr(actual, part), getattr(expected, part)
        assert (first is None) == (second is None), part
        if first is not None:
            assert first.keys() == second.keys(), part
            different = [name for name in first if not torch.equal(first[name], second[name])]
            assert not different, f"{len(different)} of {len(first)} weights of the {part} differ: {different[:3]}"


class Cancelled(Exception):
    pass


def cancel_after(stage, step):
    """A callback that cancels a fine-tuning after a step of a stage."""

    def callback(progress):
        if (progress.stage, progress.step) == (stage, step):
            raise Cancelled

    return callback
