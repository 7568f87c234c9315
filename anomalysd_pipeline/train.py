"""Few-shot fine-tuning from the shell, on one processor or many. See docs/training.md.

One GPU, or a CPU with the embedded checkpoint:

    accelerate launch -m anomalysd_pipeline.train --normal shots/ --category "hex nut" --output_dir runs/nut

All GPUs of a machine, one model for all categories of a data set, 4 pictures each:

    accelerate launch --multi_gpu -m anomalysd_pipeline.train \
        --base stable-diffusion-v1-5/stable-diffusion-inpainting --data mvtec --shots 4 --output_dir runs/mvtec

Go on after an interruption:

    accelerate launch ... --output_dir runs/mvtec --resume_from_checkpoint latest

The folder of a run holds `checkpoints/`, `losses.jsonl`, `run.json`, `logs/`, `validation/` and, once it is complete,
`adaptation/` (method "lora") or `pipeline/` (method "full").
"""

from __future__ import annotations

import sys

from accelerate import PartialState

from .common.console import OptionParser, run_command
from .training.options import add_arguments
from .training.run import run


def main(argv: list[str] | None = None) -> int:
    """Runs one fine-tuning.

    Args:
        argv: the arguments; None: those of the process.

    Returns:
        The exit status: 0 on success, 2 for input that cannot be used (one sentence on stderr), 130 if interrupted.

    Raises:
        SystemExit: by argparse, with 0 for `--help` and 2 for arguments it cannot parse.
    """
    parser = OptionParser(
        prog="anomalysd_pipeline.train", description="Fine-tune on a few normal pictures with `accelerate launch`."
    )
    add_arguments(parser, report_to="tensorboard")
    args = parser.parse_args(argv)
    return run_command(run, args, "--resume_from_checkpoint latest goes on")


if __name__ == "__main__":
    status = main()
    if status == 0:  # after a failure, the others may not be there to agree
        PartialState().destroy_process_group()
    sys.exit(status)
