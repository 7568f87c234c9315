"""Define the options of an inspection, for `anomalysd_pipeline.detect` and `anomalysd detect`.

Nothing here needs torch, so that `--help` and mistyped options are answered at once.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from ..common.console import add_bit_depth, add_device, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds every option of `detect`."""
    dataset = "or Hugging Face datasets"
    parser.add_argument(
        "--normal", nargs="+", default=[], metavar="PATH", help=f"pictures or folders of good parts, {dataset}"
    )
    parser.add_argument(
        "--test", nargs="+", required=True, metavar="PATH", help=f"pictures or folders to inspect, {dataset}"
    )
    parser.add_argument("--category", required=True, metavar="NAME", help="what the part is called, such as 'hex nut'")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    earlier = parser.add_mutually_exclusive_group()
    earlier.add_argument("--resume", action="store_true", help="go on with the results of an earlier run in --out")
    earlier.add_argument("--overwrite", action="store_true", help="replace the results of an earlier run in --out")
    parser.add_argument(
        "--shard",
        type=_shard,
        default=(0, 1),
        metavar="I/N",
        help="inspect the I-th of N parts of --test, I from 0 on: a part for each machine, see `anomalysd merge`",
    )
    parser.add_argument("--maps", action="store_true", help="also save every map as maps/<name>.npy")
    add_bit_depth(parser)
    verdict = parser.add_mutually_exclusive_group()
    verdict.add_argument(
        "--threshold", type=_above_zero, metavar="X", help="scores above it are defective (default: the part's own)"
    )
    verdict.add_argument(
        "--false-alarm-rate",
        type=float,
        metavar="P",
        help="share of good parts that may be called defective (default: 0.05)",
    )
    parser.add_argument(
        "--defective",
        nargs="+",
        default=[],
        metavar="PATH",
        help=f"with --normal: a few pictures of defective parts, for a better threshold, {dataset}",
    )
    parser.add_argument(
        "--roi", metavar="PATH", help="with --normal: picture that is bright where the part counts, dark elsewhere"
    )
    parser.add_argument(
        "--tile-size",
        type=positive,
        metavar="PX",
        help="inspect large pictures in tiles of this side (default: whole)",
    )
    parser.add_argument(
        "--tile-overlap", type=positive, metavar="PX", help="pixels by which tiles overlap (default: 0)"
    )
    parser.add_argument("--noise-strength", type=float, metavar="X", help="how much is repainted, in (0, 1]")
    parser.add_argument("--feature-weight", type=float, metavar="X", help="weight of the prototype distance")
    parser.add_argument("--adaptation", metavar="ID|DIR", help="what was learned: folder, file or Hub id")
    parser.add_argument("--resolution", type=positive, metavar="R", help="side in pixels (default: the checkpoint's)")
    add_model_options(parser)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds `--base`, `--preset`, `--device`, `--cpu`, `--mixed-precision` and `--seed`."""
    add_base(parser)
    add_device(parser)
    parser.add_argument(
        "--mixed-precision",
        choices=("auto", "no", "bf16", "fp16"),
        default="auto",
        help="auto: bf16, which is faster, where the processor computes in it; scores differ by about a hundredth "
        "(default: %(default)s)",
    )
    add_seed(parser)


def add_base(parser: argparse.ArgumentParser) -> None:
    """Adds `--base` and `--preset`."""
    parser.add_argument("--base", metavar="ID|DIR", help="checkpoint: Hub id or folder (default: the embedded one)")
    parser.add_argument("--preset", choices=("paper", "fast", "sota"), help="default: the checkpoint's own")


def add_seed(parser: argparse.ArgumentParser) -> None:
    """Adds `--seed`."""
    parser.add_argument("--seed", type=_seed, default=0, metavar="S", help="same seed, same result (default: 0)")


def _above_zero(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, but '{text}' was given")
    return number


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"must be I/N with I from 0 to N - 1, such as 0/4, but '{text}' was given")
    return int(index), int(count)


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 0, but '{text}' was given")
    return int(text)
