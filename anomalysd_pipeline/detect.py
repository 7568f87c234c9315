"""Any number of pictures inspected, by one process or many, on one machine or many. See docs/detecting.md.

On one processor, `anomalysd detect` is the same:

    python -m anomalysd_pipeline.detect --normal good/ --test line/ --category "hex nut" --out results

On all GPUs of a machine, pictures from a data set in object storage:

    accelerate launch --multi_gpu -m anomalysd_pipeline.detect \
        --base stable-diffusion-v1-5/stable-diffusion-inpainting --normal good/ \
        --test "hf://user/line?split=test" --category "hex nut" --out results

Go on after an interruption:

    accelerate launch ... --out results --resume
"""

from __future__ import annotations

import sys

from accelerate import PartialState

from .common.console import OptionParser, run_command
from .inspection.options import add_arguments
from .inspection.run import run


def main(argv: list[str] | None = None) -> int:
    """Runs one inspection of many pictures.

    Args:
        argv: the arguments; None: those of the process.

    Returns:
        The exit status: 0 on success, 1 if a picture could be read and has no score, 2 for input that cannot be used
        (one sentence on stderr), 130 if interrupted.

    Raises:
        SystemExit: by argparse, with 0 for `--help` and 2 for arguments it cannot parse.
    """
    parser = OptionParser(
        prog="anomalysd_pipeline.detect", description="Inspect any number of pictures with `accelerate launch`."
    )
    add_arguments(parser)
    args = parser.parse_args(argv)
    return run_command(run, args, "--resume goes on")


if __name__ == "__main__":
    status = main()
    if status == 0:  # after a failure, the others may not be there to agree
        PartialState().destroy_process_group()
    sys.exit(status)
