"""Evaluate on a data set with labels, on one processor or many; see docs/evaluation.md.

    accelerate launch -m anomalysd_pipeline.evaluate --data mvtec --shots 1 2 4 --out results/mvtec

On all GPUs of a machine:

    accelerate launch --multi_gpu -m anomalysd_pipeline.evaluate --data mvtec --shots 1 2 4 --out results/mvtec

The folder holds `results.csv` (a row per picture), `summary.json`, `report.md` and `figures/`. The same command
completes an interrupted run, also with another number of processes.
"""

from __future__ import annotations

import argparse
import sys

from accelerate import PartialState

from .common.console import OptionParser, run_command
from .evaluation.options import add_arguments


def main(argv: list[str] | None = None) -> int:
    """Runs one evaluation.

    Args:
        argv: the arguments; None: those of the process.

    Returns:
        The exit status: 0 on success, 2 for unusable input (one sentence on stderr), 130 if interrupted.

    Raises:
        SystemExit: by argparse, with 0 for `--help` and 2 for arguments it cannot parse.
    """
    parser = OptionParser(
        prog="anomalysd_pipeline.evaluate", description="Evaluate on a data set with labels, with `accelerate launch`."
    )
    add_arguments(parser)
    args = parser.parse_args(argv)
    return run_command(run, args, "the same command goes on")


def run(args: argparse.Namespace) -> int:
    """Runs an evaluation with options of `evaluation.options.add_arguments`; on every process.

    Raises:
        ValueError: for unusable input; in one sentence, with the names of the options.
    """
    from .evaluation.run import evaluate

    evaluate(args, report=lambda sentence: print(sentence, flush=True))
    return 0


if __name__ == "__main__":
    status = main()
    if status == 0:  # after a failure, the others may not be there to agree
        PartialState().destroy_process_group()
    sys.exit(status)
