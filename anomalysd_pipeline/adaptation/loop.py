"""Fine-tune the denoiser, Eq. (8), and the VAE's decoder, Eq. (9), on a few pictures, in one loop for all callers.

`pipe.adapt` runs it in memory, `anomalysd_pipeline.train` under `accelerate launch`. It trains copies, and returns
their weights.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, send_to_device
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from ..common.devices import own_accelerate_state, resolve_precision
from .base import Base
from .checkpoints import check_checkpoint, checkpoint_step, find_checkpoints, save_checkpoint
from .samples import FewShotDataset, GlobalBatches
from .settings import AdaptationSettings
from .stages import DecoderStage, DenoiserStage, Stage, checkpoint_only_trained, frozen_copy, trained_state
from .training_state import TrainingState


@dataclass(frozen=True)
class AdaptationProgress:
    """Tells a fine-tuning's callback after every step how far it has come.

    stage: "denoiser" or "decoder".
    step, steps: steps done and all steps, in this stage.
    loss: mean of this step over all processes.
    share: share of the whole fine-tuning that is done, in [0, 1].
    seconds_left: estimate for the rest of this stage.
    """

    stage: str
    step: int
    steps: int
    loss: float
    share: float
    seconds_left: float


@dataclass(frozen=True)
class AdaptedWeights:
    """Holds the result of a fine-tuning.

    settings: its settings.
    denoiser, decoder: LoRA weights (method "lora"), or all weights of the UNet and of the VAE's decoder (method
        "full"), float32 on the CPU; None for a part that was not trained.
    losses: stage to the loss of each step of this run, in order.
    """

    settings: AdaptationSettings
    denoiser: dict[str, Tensor] | None
    decoder: dict[str, Tensor] | None
    losses: dict[str, list[float]]


def fine_tune(
    base: Base,
    shots: Mapping[str, Sequence[Image.Image]],
    settings: AdaptationSettings,
    accelerator: Accelerator,
    prompts: Mapping[str, object] | None = None,
    output_dir: Path | None = None,
    checkpointing_steps: int | None = None,
    checkpoints_total_limit: int | None = None,
    resume_from_checkpoint: str | None = None,
    dataloader_num_workers: int = 0,
    callback: Callable[[AdaptationProgress], None] | None = None,
    validate: Callable[[Stage, int], None] | None = None,
) -> AdaptedWeights:
    """Trains copies of the pipeline's denoiser and decoder on a few normal pictures of one category or several.

    Args:
        base: networks on the accelerator's device; they are left as they are.
        shots: category to its normal pictures, RGB.
        settings: see `AdaptationSettings`.
        accelerator: of all processes, with the precision and the `gradient_accumulation_steps` of `settings`.
        prompts: category to T_c, as `PromptBook.add` takes it; None keeps the part's own or the generic set.
        output_dir: folder of the checkpoints, in `<output_dir>/<stage>`; None: there are none.
        checkpointing_steps: steps between checkpoints; None: only where a stage ends.
        checkpoints_total_limit: number of checkpoints of a stage to keep; None: all.
        resume_from_checkpoint: "latest", or a checkpoint's name, which applies to the stages that have it while others
            go on from their latest; None: start anew.
        dataloader_num_workers: processes that make the samples ahead of time.
        callback: called after every step; an exception that it raises ends the fine-tuning.
        validate: called by every process with the stage and the step, after every step.

    Raises:
        ValueError: the settings do not fit the networks, the loss is not finite, or the disk cannot be written.
    """
    stages = make_stages(base, shots, settings, accelerator.device, prompts)
    totals = {stage.name: stage.steps(accelerator.num_processes) for stage in stages}
    if settings.lr_scheduler not in ("constant", "constant_with_warmup"):
        for stage in stages:  # a rate that falls towards the end depends on the number of steps
            stage.facts["steps" if stage.name == "denoiser" else "decoder_steps"] = totals[stage.name]
    if settings.decoder_latents == "repainted" and len(stages) == 2:
        stages[1].facts["steps"] = totals["denoiser"]  # the decoder depends on the trained denoiser
    weights: dict[str, dict[str, Tensor]] = {}
    losses: dict[str, list[float]] = {stage.name: [] for stage in stages}
    folders = [None if output_dir is None else Path(output_dir, stage.name) for stage in stages]
    # Before any step: a bad checkpoint of a later stage must not cost the training of the stages before.
    found = [None] * len(stages) if output_dir is None else find_checkpoints(folders, resume_from_checkpoint)
    per_step = settings.train_batch_size * settings.gradient_accumulation_steps * accelerator.num_processes
    facts = {stage.name: {**settings.course(), "total_batch_size": per_step, **stage.facts} for stage in stages}
    for stage, checkpoint in zip(stages, found, strict=True):
        if checkpoint is not None:
            check_checkpoint(checkpoint, facts[stage.name], totals[stage.name])
    done = 0
    for stage, folder, checkpoint in zip(stages, folders, found, strict=True):
        total, clock = totals[stage.name], _Clock(totals[stage.name])

        def on_step(step: int, loss: float, stage=stage, total=total, clock=clock, before=done) -> None:
            losses[stage.name].append(loss)
            left = clock.seconds_left(step)
            if callback is not None:
                share = (before + step) / sum(totals.values())
                callback(AdaptationProgress(stage.name, step, total, loss, share, left))
            if validate is not None:
                validate(stage, step)

        checkpointing = Checkpointing(
            folder, checkpointing_steps, checkpoints_total_limit, checkpoint, facts[stage.name]
        )
        devices = [accelerator.device] if accelerator.device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # the caller's own draws go on as if nothing had been trained
            weights[stage.name] = train_stage(
                stage, settings, accelerator, total, checkpointing, dataloader_num_workers, on_step
            )
        done += total
        accelerator.free_memory()
    return AdaptedWeights(settings, weights.get("denoiser"), weights.get("decoder"), losses)


@dataclass(frozen=True)
class Checkpointing:
    """Says where and how often a stage's checkpoints are written.

    folder: of the stage; None: there are no checkpoints.
    every: steps between them; None: only at the end.
    total_limit: number to keep; None: all.
    resume_from: the checkpoint to go on from; None: start anew.
    facts: settings written into each, see `check_checkpoint`.
    """

    folder: Path | None
    every: int | None = None
    total_limit: int | None = None
    resume_from: Path | None = None
    facts: Mapping = field(default_factory=dict)


class _Clock:
    """Estimates the time left from the steps since it was started."""

    def __init__(self, total: int):
        self.began, self.first, self.total = time.perf_counter(), None, total

    def seconds_left(self, step: int) -> float:
        if self.first is None:
            self.first = step - 1
        return (time.perf_counter() - self.began) / (step - self.first) * (self.total - step)


def make_stages(
    base: Base,
    shots: Mapping[str, Sequence[Image.Image]],
    settings: AdaptationSettings,
    device,
    prompts: Mapping[str, object] | None = None,
) -> list[Stage]:
    """Makes a stage of each part that `settings` asks to train, in the order of their training."""
    book = copy.deepcopy(base.prompts)
    for category in shots:
        book.add(category, (prompts or {}).get(category))
    texts = {category: book.prompts(category, settings.prompt_design) for category in shots}
    side, factor = base.resolution, base.vae_scale_factor
    dataset = FewShotDataset(
        shots,
        texts,
        side,
        (base.vae.config.latent_channels, side // factor, side // factor),
        base.scheduler.config.num_train_timesteps,
        settings.seed,
        settings.mask_design,
        settings.noise_range,
        settings.augmentation,
        settings.defect_share,
    )
    stages: list[Stage] = []
    unet = frozen_copy(base.unet)
    if settings.train_denoiser:
        stages.append(DenoiserStage(base, dataset, settings, device))
        unet = stages[0].module
    if settings.train_decoder:
        stages.append(DecoderStage(base, dataset, settings, device, unet))
    return stages


def train_stage(
    stage: Stage,
    settings: AdaptationSettings,
    accelerator: Accelerator,
    steps: int,
    checkpointing: Checkpointing,
    dataloader_num_workers: int,
    on_step: Callable[[int, float], None],
) -> dict[str, Tensor]:
    """Trains a stage; each step is one global batch of Eq. (8) or (9).

    Args:
        stage, settings, accelerator, dataloader_num_workers: as of `fine_tune`.
        steps: of this stage, those of the checkpoint to go on from included.
        checkpointing: of this stage.
        on_step: called with the number of steps done and the loss.

    Returns:
        The trained weights by name, averaged where `settings.use_ema` is set.

    Raises:
        ValueError: the loss is not finite, or the disk cannot be written.
    """
    accumulation = settings.gradient_accumulation_steps
    if accelerator.distributed_type == DistributedType.FSDP:
        stage.module.to(memory_format=torch.contiguous_format)  # FSDP divides no other order
    # All of this before `prepare`, while the parameters are plain ones under their own names.
    names = stage.trained_names()
    trained = [parameter for parameter in stage.module.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(trained, stage.learning_rate, settings.use_8bit_adam)
    schedule = get_scheduler(
        settings.lr_scheduler, optimizer, num_warmup_steps=settings.lr_warmup_steps, num_training_steps=steps
    )
    average = EMAModel(trained, decay=settings.ema_decay, use_ema_warmup=True) if settings.use_ema else None
    stage.keep_average(average)
    stage.module, optimizer = accelerator.prepare(stage.module, optimizer)
    # Sharding puts other parameters in their place.
    trained = [parameter for parameter in stage.module.parameters() if parameter.requires_grad]
    hooks = checkpoint_only_trained(stage, accelerator, names, TrainingState(schedule, average))
    first = 0
    if checkpointing.resume_from is not None:
        accelerator.load_state(str(checkpointing.resume_from))
        first = checkpoint_step(checkpointing.resume_from)
    if average is not None:
        average.to(accelerator.device)  # a loaded average is on the CPU
    stage.module.train()
    turns = GlobalBatches(
        settings.train_batch_size,
        accumulation,
        accelerator.process_index,
        accelerator.num_processes,
        first,
        steps,
    )
    step, parts = first, []
    for batch in DataLoader(stage.dataset, batch_sampler=turns, num_workers=dataloader_num_workers):
        if not parts:
            # Dropout, where a module has any, is the only draw outside the samples; so it depends on the step alone.
            torch.manual_seed(hash((settings.seed, step, accelerator.process_index)) % 2**63)
        with accelerator.accumulate(stage.module):
            with accelerator.autocast():
                loss = stage.loss(send_to_device(batch, accelerator.device))
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(trained, settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        parts.append(loss.detach())
        if len(parts) < accumulation:
            continue
        value = accelerator.reduce(torch.stack(parts).mean(), "mean").item()
        parts = []
        if not math.isfinite(value):
            raise ValueError(
                f"`learning_rate` {stage.learning_rate:g} led to a loss of {value} in step {step + 1} of the "
                f"{stage.name}; give a lower one, or another `mixed_precision`."
            )
        schedule.step()
        if average is not None:
            average.step(trained)
        step += 1
        # Before the checkpoint: a resumed run does not report this step again.
        on_step(step, value)
        if checkpointing.folder is not None and (
            step == steps or (checkpointing.every and step % checkpointing.every == 0)
        ):
            save_checkpoint(accelerator, checkpointing.folder, step, checkpointing.facts, checkpointing.total_limit)
    for hook in hooks:
        hook.remove()
    if average is not None:
        average.copy_to(trained)
    return trained_state(stage, accelerator, names)


def make_optimizer(parameters: list, learning_rate: float, use_8bit_adam: bool) -> torch.optim.Optimizer:
    """Makes Adam, as in the paper, or its 8-bit form.

    Raises:
        ValueError: the 8-bit form is asked for and not installed.
    """
    if not use_8bit_adam:
        return torch.optim.Adam(parameters, lr=learning_rate)
    try:
        from bitsandbytes.optim import Adam8bit
    except ImportError as error:
        raise ValueError("`use_8bit_adam` needs the package bitsandbytes; `pip install bitsandbytes`.") from error
    return Adam8bit(parameters, lr=learning_rate)


@contextlib.contextmanager
def in_memory_accelerator(device: torch.device, settings: AdaptationSettings) -> Iterator[Accelerator]:
    """Gives an accelerator for a fine-tuning inside a running program; accelerate's state there stays as it is.

    Args:
        device: of the pipeline.
        settings: of the fine-tuning.

    Raises:
        ValueError: accelerate chooses another kind of device.
    """
    with own_accelerate_state():
        accelerator = Accelerator(
            cpu=device.type == "cpu",
            mixed_precision=resolve_precision(settings.mixed_precision, device),
            gradient_accumulation_steps=settings.gradient_accumulation_steps,
        )
        if accelerator.device.type != device.type:
            raise ValueError(
                f"`pipe` must be on the device '{accelerator.device}' to be adapted, but it is on '{device}'."
            )
        yield accelerator
