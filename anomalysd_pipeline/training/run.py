"""Run the command `train`: check options, fine-tune, register and calibrate the parts, write the result."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedType,
    ProjectConfiguration,
    is_tensorboard_available,
    is_wandb_available,
    parse_flag_from_env,
)
from PIL import Image

from ..adaptation.checkpoints import list_checkpoints
from ..adaptation.loop import AdaptedWeights, fine_tune
from ..adaptation.registry import default_name
from ..adaptation.settings import AdaptationSettings
from ..common.console import base_errors, renaming
from ..common.devices import choose_device, on_cpu, own_accelerate_state, resolve_precision
from ..common.files import SoleWriter, disk_errors, remove, written_whole
from ..common.progress import Progress
from ..method.calibration import COPIES, check_rate
from ..method.prompts import check_category
from ..pipeline import AnomalySDPipeline
from .options import given_settings, option_names
from .pictures import Shots, read_prompts, read_shots
from .reports import FACTS, LOGS, LOSSES, VALIDATION, Reports

ADAPTATION, PIPELINE, CHECKPOINTS = "adaptation", "pipeline", "checkpoints"

# While one process downloads a base or calibrates, the others wait for longer than PyTorch's usual limit.
_PATIENCE = timedelta(hours=6)
_SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


def run(args: argparse.Namespace) -> int:
    """Runs a fine-tuning; called by every process.

    Args:
        args: parsed options, see `training.options.add_arguments`.

    Returns:
        The exit status, 0.

    Raises:
        ValueError: input that cannot be used, or a disk that cannot be written; one sentence that names the option.
        OSError: a base that cannot be loaded.
    """
    try:
        # A host program's own accelerator may compute in another precision.
        writer = SoleWriter("output_dir", args.output_dir)
        with renaming(option_names(args.settings)), own_accelerate_state(), writer:
            return _run(args, writer)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            "the GPU's memory does not suffice; give a smaller `--train_batch_size` with more "
            "`--gradient_accumulation_steps`, `--gradient_checkpointing`, or a lower `--resolution`."
        ) from error


def _run(args: argparse.Namespace, writer: SoleWriter) -> int:
    # 1. Check the options, the pictures and the prompts before a model is loaded
    check_options(args)
    if int(os.environ.get("RANK", 0)) == 0 and args.output_dir.is_dir():
        writer.keep()
    first_here = int(os.environ.get("LOCAL_RANK", 0)) == 0
    pictures = read_shots(args, report=_report if first_here else lambda sentence: None)
    shots = {category: [image for _, image in pairs] for category, pairs in pictures.items()}
    prompts = read_prompts(args.prompts, shots)

    # 2. Load the model onto the device that accelerate gives this process
    state = PartialState(cpu=on_cpu(args.cpu), timeout=_PATIENCE)
    with state.local_main_process_first():
        pipe = load_pipeline(args)
    pipe.to(state.device)
    settings = choose_settings(args, pipe, state.device)
    name = args.name or default_name(shots)
    pipe.check_adaptable(name, settings.method, shots)
    accelerator = make_accelerator(args, settings)

    # 3. Train
    if accelerator.is_main_process:
        writer.keep()
        if args.overwrite:
            discard(args.output_dir)
        counts = ", ".join(f"{category} ({len(images)})" for category, images in shots.items())
        print(f"Learning {counts} on {state.device}, number of processes: {accelerator.num_processes}", flush=True)
    accelerator.wait_for_everyone()
    facts = describe(args, pictures, settings, accelerator)
    reports = Reports(accelerator, pipe, shots, settings, prompts, args.output_dir, facts, args.validation_steps)
    try:
        weights = fine_tune(
            pipe.base,
            shots,
            settings,
            accelerator,
            prompts=prompts,
            output_dir=args.output_dir / CHECKPOINTS,
            checkpointing_steps=args.checkpointing_steps,
            checkpoints_total_limit=args.checkpoints_total_limit,
            resume_from_checkpoint=args.resume_from_checkpoint,
            dataloader_num_workers=args.dataloader_num_workers,
            callback=reports.step,
            validate=reports.validate,
        )
    finally:
        reports.close()

    # 4. Register and calibrate the parts and write the result, by one process
    if accelerator.is_main_process:
        with Progress("registering"):
            pipe.learn(shots, weights, name, prompts, calibrate=False)
        if not args.no_calibration:
            calibrate(pipe, shots, args.false_alarm_rate)
        print(summary(args, save(args, pipe, name, weights), list(shots)))
    accelerator.wait_for_everyone()
    return 0


def calibrate(pipe: AnomalySDPipeline, shots: Mapping[str, Sequence[Image.Image]], rate: float) -> None:
    """Calibrates each part from its own pictures, and counts these."""
    expected = {category: COPIES if len(images) == 1 else len(images) for category, images in shots.items()}
    with Progress("calibrating", sum(expected.values()), "picture") as bar:
        for category, images in shots.items():
            bar.say(f"calibrating {category}")
            pipe.calibrate(category, images, rate, callback=bar.part(expected[category]))


def check_options(args: argparse.Namespace) -> None:
    """Checks the options against each other, the installed packages and the disk.

    Raises:
        ValueError: for the first option that cannot be used.
    """
    AdaptationSettings.resolve([given_settings(args)])
    check_rate(args.false_alarm_rate)
    choose_device(args.device)
    if args.name is not None:
        try:
            check_category(args.name)
        except ValueError as error:
            raise ValueError(str(error).replace("`category`", "`--name`")) from error
    available = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available, "none": lambda: True}
    if not available[args.report_to]():
        raise ValueError(
            f"`--report_to` {args.report_to} needs a package that is not installed; run "
            f"`pip install 'anomalysd-pipeline[train]'`{' and `pip install wandb`' * (args.report_to == 'wandb')}, or "
            "give --report_to none."
        )
    _check_output_dir(args.output_dir, args.resume_from_checkpoint, args.overwrite)


def _check_output_dir(folder: Path, resume: str | None, overwrite: bool) -> None:
    existing = folder
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise ValueError(
            f"`--output_dir` '{folder}' cannot be a folder, because '{existing}' is a file; give another."
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"`--output_dir` '{folder}' may not be written by this user; give another folder.")
    checkpoints = [path for stage in (folder / CHECKPOINTS).glob("*") for path in list_checkpoints(stage)]
    if resume not in (None, "latest") and Path(resume).name not in [path.name for path in checkpoints]:
        there = ", ".join(sorted({path.name for path in checkpoints})) or "none"
        raise ValueError(
            f"`--resume_from_checkpoint` must be 'latest' or a checkpoint of '{folder}' ({there}), got {resume!r}."
        )
    if (
        resume is None
        and not overwrite
        and (checkpoints or any((folder / p).exists() for p in (ADAPTATION, PIPELINE)))
    ):
        raise ValueError(
            f"`--output_dir` '{folder}' holds an earlier run; give another folder, --resume_from_checkpoint latest to "
            "go on with it, or --overwrite to start anew."
        )


def load_pipeline(args: argparse.Namespace) -> AnomalySDPipeline:
    """Loads the base at the resolution of the options."""
    given = {"revision": args.revision, "variant": args.variant, "resolution": args.resolution}
    shown = int(os.environ.get("LOCAL_RANK", 0)) == 0
    with base_errors(args.base), Progress("loading the model", shown=shown):
        pipe = AnomalySDPipeline.from_pretrained(args.base, **{k: v for k, v in given.items() if v is not None})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def choose_settings(args: argparse.Namespace, pipe: AnomalySDPipeline, device: torch.device) -> AdaptationSettings:
    """Resolves the settings: the options', else the checkpoint's own, else the paper's.

    Returns:
        Settings whose `mixed_precision` is "no", "bf16" or "fp16", never "auto".
    """
    settings = pipe.adaptation_settings(**given_settings(args))
    # The launcher says "no" where nothing was chosen.
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if args.mixed_precision is None and launched != "no":
        precision = launched
    else:
        precision = resolve_precision(settings.mixed_precision, device)
    settings = dataclasses.replace(settings, mixed_precision=precision)
    settings.check()
    return settings


def make_accelerator(args: argparse.Namespace, settings: AdaptationSettings) -> Accelerator:
    """Makes the accelerator of this run, for processes that are there already.

    Raises:
        ValueError: `use_ema`, where the weights are divided among processes.
    """
    project = ProjectConfiguration(project_dir=str(args.output_dir), logging_dir=str(args.output_dir / LOGS))
    deepspeed = parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") and not on_cpu(args.cpu)
    accelerator = Accelerator(
        cpu=on_cpu(args.cpu),
        # DeepSpeed's own mixed precision would turn the weights into bf16; it gets autocast below instead.
        mixed_precision="no" if deepspeed else settings.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=project,
    )
    # Set here, because the value of a DeepSpeed launch would win.
    accelerator.gradient_accumulation_steps = settings.gradient_accumulation_steps
    if settings.use_ema and accelerator.distributed_type in _SHARDED:
        raise ValueError(
            f"`use_ema` keeps a whole copy of the weights, but {accelerator.distributed_type.value} divides them "
            "among processes; give --no-use_ema, or launch with --multi_gpu."
        )
    if deepspeed:
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config["train_micro_batch_size_per_gpu"] = settings.train_batch_size
        config["gradient_accumulation_steps"] = settings.gradient_accumulation_steps
        config["gradient_clipping"] = settings.max_grad_norm
        if settings.mixed_precision != "no":
            dtype = {"bf16": "bfloat16", "fp16": "float16"}[settings.mixed_precision]
            config["torch_autocast"] = {"enabled": True, "dtype": dtype}
    return accelerator


def discard(folder: Path) -> None:
    """Removes the checkpoints, logs and reports of an earlier run; its result stays until the new one replaces it."""
    with disk_errors("output_dir", folder):
        for name in (CHECKPOINTS, LOGS, VALIDATION):
            remove(folder / name)
        for name in (LOSSES, FACTS):
            (folder / name).unlink(missing_ok=True)


def describe(
    args: argparse.Namespace, pictures: Shots, settings: AdaptationSettings, accelerator: Accelerator
) -> dict:
    """Collects the facts that another person needs to repeat the run; JSON-serializable."""
    return {
        "base": args.base or "embedded",
        "revision": args.revision,
        "resolution": args.resolution,
        "processes": accelerator.num_processes,
        "shots": {category: [source for source, _ in pairs] for category, pairs in pictures.items()},
        "settings": settings.to_dict(),
    }


def save(args: argparse.Namespace, pipe: AnomalySDPipeline, name: str, weights: AdaptedWeights) -> Path:
    """Writes the result complete or not at all, and returns its folder.

    Raises:
        ValueError: a disk that cannot be written.
    """
    if weights.settings.method == "lora":
        folder, other = args.output_dir / ADAPTATION, args.output_dir / PIPELINE
        pipe.save_adaptation(folder, name)
    else:
        folder, other = args.output_dir / PIPELINE, args.output_dir / ADAPTATION
        remedy = "go on with `--resume_from_checkpoint latest`"
        with disk_errors("output_dir", args.output_dir, remedy), written_whole(folder) as partial:
            pipe.save_pretrained(partial)
    remove(other)  # of an earlier run with the other method
    return folder


def summary(args: argparse.Namespace, folder: Path, categories: list[str]) -> str:
    """Words where the result is, its size, and the command that inspects with it."""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
    given = [("--base", folder)] if folder.name == PIPELINE else [("--base", args.base), ("--adaptation", folder)]
    if folder.name == ADAPTATION:
        given.append(("--resolution", args.resolution))
    given.append(("--category", categories[0]))
    options = " ".join(f"{option} {shlex.quote(str(value))}" for option, value in given if value is not None)
    calibrated = "no thresholds" if args.no_calibration else f"{len(categories)} calibrated"
    return (
        f"Result in {folder} ({size:.1f} MB, {calibrated}). Inspect with:\n"
        f"anomalysd detect {options} --test PICTURES --out RESULTS"
    )


def _report(sentence: str) -> None:
    print(f"anomalysd: {sentence}", file=sys.stderr)
