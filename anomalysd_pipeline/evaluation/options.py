"""Define the options of an evaluation, for `anomalysd_pipeline.evaluate` and `anomalysd evaluate`.

Nothing here needs torch, so that `--help` and mistyped options are answered at once.
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

from ..common.console import add_bit_depth, add_device, positive, renaming

DEFAULT_SHOTS = (1,)
DEFAULT_SEEDS = (0, 1, 2, 3, 4)
PEERS = ("color_patches", "plain_inpainting", "patchcore", "padim", "spade", "winclip", "draem")
INSPECTION = (
    "preset",
    "noise_strength",
    "num_inference_steps",
    "mask_scales",
    "mask_grouping",
    "prototype_weight",
    "feature_weight",
    "guidance_scale",
    "top_share",
    "start",
)
"""Settings of an inspection, see `InspectionSettings`."""

# Argument of the library to the option that gives it.
_ARGUMENTS = {
    **{name: name for name in INSPECTION},
    **{name: name for name in ("backbone", "false_alarm_rate", "fpr_limit", "peer", "resolution", "revision")},
    **{name: name for name in ("shots", "timm_checkpoint", "timm_model", "variant")},
    "decoder_steps": "adapt_decoder_steps",
    "normals": "shots",
    "pretrained_adaptation_name_or_path": "adaptation",
    "pretrained_model_name_or_path": "base",
    "steps": "adapt_steps",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds every option of an evaluation."""
    _add_data(parser.add_argument_group("pictures"))
    _add_protocol(parser.add_argument_group("protocol"))
    _add_model(parser.add_argument_group("model"))
    _add_peer(parser.add_argument_group("another method on the same pictures"))
    _add_run(parser.add_argument_group("run"))


def named(**names: str) -> contextlib.AbstractContextManager[None]:
    """Renames the arguments in the library's errors to the options of the command line.

    Args:
        **names: argument to option, without the dashes; if empty, all that have an option.
    """
    return renaming({argument: f"--{option}" for argument, option in (names or _ARGUMENTS).items()})


def _add_data(group) -> None:
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path, metavar="ROOT", help="MVTec-AD, VisA or a data set in their layout")
    source.add_argument("--normal_dir", type=Path, metavar="DIR", help="normal pictures of one part")
    source.add_argument("--synthetic", nargs="+", metavar="FAMILY", help="families of drawn parts")
    group.add_argument("--categories", nargs="+", metavar="NAME", help="with --data: which (default: all)")
    group.add_argument("--category", metavar="NAME", help="with --normal_dir: what the part is called")
    group.add_argument("--abnormal_dir", type=Path, metavar="DIR", help="with --normal_dir: defective pictures")
    group.add_argument("--mask_dir", type=Path, metavar="DIR", help="with --abnormal_dir: masks by the same names")
    group.add_argument(
        "--normal_test_dir",
        type=Path,
        metavar="DIR",
        help="with --normal_dir: normal pictures to test with (default: half of --normal_dir)",
    )
    add_bit_depth(group)
    group.add_argument("--limit", type=positive, metavar="N", help="at most N normal and N defective test pictures")


def _add_protocol(group) -> None:
    group.add_argument(
        "--shots", type=_count, nargs="+", default=DEFAULT_SHOTS, metavar="K", help="normal pictures (default: 1)"
    )
    group.add_argument(
        "--seeds", type=_count, nargs="+", default=DEFAULT_SEEDS, metavar="S", help="of the draws (default: 0 to 4)"
    )
    group.add_argument("--shots_file", type=Path, metavar="FILE", help="draws as an earlier shots.json has them")
    group.add_argument(
        "--map_resolution",
        type=_map_resolution,
        default=256,
        metavar="R",
        help="side at which maps and masks are compared, or 'original' (default: %(default)s)",
    )
    group.add_argument("--fpr_limit", type=float, default=0.3, metavar="X", help="of PRO (default: %(default)s)")
    group.add_argument(
        "--connectivity", type=int, choices=(4, 8), default=8, help="of the regions of PRO (default: %(default)s)"
    )


def _add_model(group) -> None:
    group.add_argument(
        "--base",
        metavar="ID|DIR",
        help="checkpoint (default: the embedded one); {shots} and {seed} stand for those of the draw",
    )
    group.add_argument("--revision", help="of a checkpoint on the Hub")
    group.add_argument("--variant", help="of the weight files, such as fp16")
    group.add_argument("--resolution", type=positive, metavar="R", help="side in pixels (default: the checkpoint's)")
    group.add_argument("--timm_model", metavar="NAME", help="features of the prototypes: a model of timm, or imagenet")
    group.add_argument(
        "--timm_checkpoint", type=Path, metavar="FILE", help="its weights (default: downloaded by timm)"
    )
    group.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    group.add_argument(
        "--mixed_precision",
        choices=("auto", "no", "bf16", "fp16"),
        default="auto",
        help="of repainting, and of DRAEM; auto: bf16 where the processor computes in it (default: %(default)s)",
    )
    add_device(group)
    group.add_argument(
        "--adaptation", metavar="ID|DIR", help="what `adapt` has learned; {shots} and {seed} as in --base"
    )
    group.add_argument("--adapt", action="store_true", help="fine-tune to the shots of each draw first")
    group.add_argument("--adapt_steps", type=positive, metavar="N", help="of the denoiser")
    group.add_argument("--adapt_decoder_steps", type=positive, metavar="N", help="of the decoder")
    group.add_argument("--preset", choices=("paper", "fast", "sota"), help="default: the checkpoint's own")
    group.add_argument("--noise_strength", type=float, metavar="X", help="lambda, in (0, 1]")
    group.add_argument("--num_inference_steps", type=positive, metavar="N", help="length of the whole schedule")
    group.add_argument("--mask_scales", type=positive, nargs="+", metavar="K", help="1 alone: one full mask")
    group.add_argument("--mask_grouping", choices=("none", "grouped", "joined"))
    group.add_argument("--prototype_weight", type=float, metavar="X", help="alpha, in [0, 1]; 0: no prototype mask")
    group.add_argument("--feature_weight", type=float, metavar="X", help="weight of the prototype distance")
    group.add_argument("--guidance_scale", type=float, metavar="X")
    group.add_argument(
        "--top_share", type=float, metavar="X", help="share of the map whose mean is the score; 0: its maximum"
    )
    group.add_argument(
        "--start", choices=("image", "exemplar"), help="from where masks are repainted: the paper's, or good parts"
    )
    group.add_argument("--prompt_design", choices=("hierarchical", "simple", "none"), default="hierarchical")
    group.add_argument("--no_calibration", action="store_true", help="set no thresholds")
    group.add_argument(
        "--false_alarm_rate",
        type=float,
        default=0.05,
        metavar="X",
        help="share of good parts that may exceed the threshold (default: %(default)s)",
    )


def _add_peer(group) -> None:
    group.add_argument("--peer", choices=PEERS, help="evaluate this instead of AnomalySD")
    group.add_argument(
        "--backbone",
        default="embedded",
        metavar="NAME",
        help="features of a peer: embedded, imagenet, random or a model of timm (default: %(default)s)",
    )
    group.add_argument(
        "--draem_steps", type=positive, metavar="N", help="training steps of DRAEM for each category (default: 1000)"
    )
    group.add_argument("--draem_batch_size", type=positive, metavar="N", help="its pictures per step (default: 8)")
    group.add_argument(
        "--draem_resolution", type=positive, metavar="R", help="its side in pixels, a multiple of 32 (default: 256)"
    )


def _add_run(group) -> None:
    group.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    group.add_argument("--overwrite", action="store_true", help="start anew where an earlier evaluation is")
    group.add_argument(
        "--keep_maps", action="store_true", help="leave the maps of what is yet to be done in the folder"
    )


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 0, but '{text}' was given")
    return int(text)


def _map_resolution(text: str) -> int | str:
    return text if text == "original" else positive(text)
