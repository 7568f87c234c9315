"""Define the options of a fine-tuning, for `anomalysd_pipeline.train` and `anomalysd adapt`.

Nothing here needs torch, so that `--help` and mistyped options are answered at once.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..common.console import add_bit_depth, add_device, positive

DEFAULT_SHOTS = 4

# The settings whose option has the name that diffusers' training scripts use.
_OPTIONS = {
    "steps": "max_train_steps",
    "epochs": "num_train_epochs",
    "decoder_steps": "max_decoder_steps",
    "target_modules": "lora_target_modules",
    "decoder_target_modules": "decoder_lora_target_modules",
}
# Other arguments of the library that a person gives as an option.
_ARGUMENTS = {
    "false_alarm_rate": "false_alarm_rate",
    "family": "synthetic",
    "output_dir": "output_dir",
    "resolution": "resolution",
    "resume_from_checkpoint": "resume_from_checkpoint",
    "save_directory": "output_dir",
    "shots": "shots",
}
_LIMITS = ("brightness", "contrast", "scale", "degrees")


def add_arguments(parser: argparse.ArgumentParser, report_to: str) -> None:
    """Adds every option of a fine-tuning.

    Args:
        parser: of `train` or of `anomalysd adapt`.
        report_to: the default of `--report_to`.
    """
    _add_data(parser.add_argument_group("pictures"))
    _add_base(parser.add_argument_group("model"))
    _add_settings(
        parser.add_argument_group("what is learned, and how", "Default: the checkpoint's own, or the paper's")
    )
    _add_run(parser.add_argument_group("run"), report_to)


def given_settings(args: argparse.Namespace) -> dict:
    """Picks the settings among parsed options, by their names in `AdaptationSettings`; None where left out."""
    given = {name: getattr(args, name) for name in args.settings}
    if given["augmentation"] is not None:
        given["augmentation"] = dict(given["augmentation"])
    return given


def option_names(settings: list[str]) -> dict[str, str]:
    """Maps arguments of the library to the options that give them; `settings` is `args.settings`."""
    names = {**{name: _OPTIONS.get(name, name) for name in settings}, **_ARGUMENTS}
    return {argument: f"--{option}" for argument, option in names.items()}


def _add_data(group) -> None:
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path, metavar="ROOT", help="MVTec-AD, VisA or a data set in their layout")
    source.add_argument(
        "--normal", nargs="+", metavar="PATH", help="pictures or folders of good parts of one category"
    )
    source.add_argument("--synthetic", nargs="+", metavar="FAMILY", help="families of drawn parts")
    group.add_argument("--categories", nargs="+", metavar="NAME", help="with --data: which (default: all)")
    group.add_argument("--category", metavar="NAME", help="with --normal: what the part is called, such as 'hex nut'")
    group.add_argument(
        "--shots",
        type=int,
        metavar="K",
        help=f"pictures drawn of each category (default: {DEFAULT_SHOTS}; with --normal: all)",
    )
    add_bit_depth(group)
    group.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE.json",
        help='prompts by category: {"NAME": {"coarse": [...], "fine": [...]}}',
    )


def _add_base(group) -> None:
    group.add_argument("--base", metavar="ID|DIR", help="checkpoint: Hub id or folder (default: the embedded one)")
    group.add_argument("--revision", help="of a checkpoint on the Hub")
    group.add_argument("--variant", help="of the weight files, such as fp16")
    group.add_argument("--resolution", type=positive, metavar="R", help="side in pixels (default: the checkpoint's)")
    add_device(group)


def _add_settings(group) -> None:
    names = []

    def add(name: str, **options) -> None:
        names.append(name)
        group.add_argument(f"--{_OPTIONS.get(name, name)}", dest=name, default=None, **options)

    def add_switch(name: str, **options) -> None:
        add(name, action=argparse.BooleanOptionalAction, **options)

    add("method", choices=("lora", "full"), help="low-rank additions of a few MB, or all weights as in the paper")
    add_switch("train_denoiser", help="Eq. (8)")
    add_switch("train_decoder", help="Eq. (9)")
    add("steps", type=int, metavar="N", help="optimizer steps of the denoiser, instead of epochs")
    add("epochs", type=int, metavar="N", help="passes of the denoiser over all pictures (the paper: 4000)")
    add("decoder_steps", type=int, metavar="N", help="optimizer steps of the decoder, instead of epochs")
    add("decoder_epochs", type=int, metavar="N", help="passes of the decoder over all pictures (the paper: 200)")
    add("train_batch_size", type=int, metavar="N", help="pictures per process and forward pass")
    add("gradient_accumulation_steps", type=int, metavar="N", help="forward passes per optimizer step")
    add_switch("gradient_checkpointing", help="less memory, more time")
    add("learning_rate", type=float, metavar="X", help="of Adam")
    add("decoder_learning_rate", type=float, metavar="X", help="of the decoder, if another")
    add("lr_scheduler", metavar="NAME", help="constant, constant_with_warmup, linear, cosine or another of diffusers'")
    add("lr_warmup_steps", type=int, metavar="N")
    add("max_grad_norm", type=float, metavar="X", help="gradients are scaled down to this length")
    add_switch("use_8bit_adam", help="needs bitsandbytes and a GPU")
    add_switch("use_ema", help="keep the moving average of the weights")
    add("ema_decay", type=float, metavar="X")
    add(
        "mixed_precision", choices=("auto", "no", "bf16", "fp16"), help="auto: bf16 where the processor computes in it"
    )
    add(
        "mask_design", choices=("foreground", "random", "detection"), help="which part of a picture is to be repainted"
    )
    add("prompt_design", choices=("hierarchical", "simple", "none"))
    add("noise_range", type=float, nargs=2, metavar=("LOW", "HIGH"), help="share of the noise schedule, in [0, 1]")
    add(
        "augmentation",
        type=_limit,
        nargs="+",
        metavar="NAME=X",
        help=f"limits of {', '.join(_LIMITS)}; those left out: 0.1, 0.1, 0.1 and 15",
    )
    add("defect_share", type=float, metavar="X", help="of samples with a drawn defect to repair (the paper: 0)")
    add("repainting_weight", type=float, metavar="X", help="of the loss on repainted pictures (the paper: 0)")
    add("decoder_latents", choices=("encoded", "repainted"), help="what the decoder learns from")
    add("rank", type=int, metavar="N", help="of the denoiser's LoRA")
    add("target_modules", nargs="+", metavar="NAME", help="its modules, by the ends of their names")
    add("decoder_rank", type=int, metavar="N", help="of the decoder's LoRA")
    add("decoder_target_modules", nargs="+", metavar="NAME", help="its modules, by the ends of their names")
    names.append("seed")
    group.add_argument(
        "--seed", type=int, default=0, metavar="S", help="of the drawn pictures and of everything random (default: 0)"
    )
    group.set_defaults(settings=names)


def _add_run(group, report_to: str) -> None:
    group.add_argument("--output_dir", type=Path, required=True, metavar="DIR", help="folder of the run")
    start = group.add_mutually_exclusive_group()
    start.add_argument(
        "--resume_from_checkpoint", metavar="NAME", help="go on from 'latest' or a checkpoint of this folder"
    )
    start.add_argument("--overwrite", action="store_true", help="start anew where an earlier run has left something")
    group.add_argument("--checkpointing_steps", type=positive, default=500, metavar="N", help="default: %(default)s")
    group.add_argument(
        "--checkpoints_total_limit",
        type=positive,
        default=2,
        metavar="N",
        help="how many of each part to keep (default: %(default)s)",
    )
    group.add_argument("--validation_steps", type=positive, metavar="N", help="steps between pictures of the progress")
    group.add_argument("--dataloader_num_workers", type=_count, default=0, metavar="N", help="default: %(default)s")
    group.add_argument(
        "--report_to", choices=("tensorboard", "wandb", "none"), default=report_to, help="default: %(default)s"
    )
    group.add_argument("--name", help="of the adaptation (default: the categories' names)")
    group.add_argument("--no_calibration", action="store_true", help="set no thresholds")
    group.add_argument(
        "--false_alarm_rate",
        type=float,
        default=0.05,
        metavar="X",
        help="share of good parts that may exceed the threshold (default: %(default)s)",
    )


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 0, but '{text}' was given")
    return int(text)


def _limit(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    highest = 1.0 if name == "scale" else float("inf")
    if name not in _LIMITS or not 0 <= number < highest:
        raise argparse.ArgumentTypeError(
            f"must be {', '.join(_LIMITS[:-1])} or {_LIMITS[-1]}, '=' and a limit of at least 0 (scale: below 1), but "
            f"'{text}' was given"
        )
    return name, number
