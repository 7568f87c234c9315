"""What every entry point makes of an error: one sentence and an exit status."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable


def run_command(run: Callable[[argparse.Namespace], int], args: argparse.Namespace, remedy: str = "") -> int:
    """Runs a command with parsed options.

    Of several processes each says its sentence: the first that ends has the launcher end the others.

    Args:
        run: the command.
        args: its options.
        remedy: how to go on after an interruption.

    Returns:
        The exit status of `run`; 2 for input that cannot be used (one sentence on stderr), 130 if interrupted.
    """
    try:
        return run(args)
    except (ValueError, OSError) as error:
        print(f"anomalysd: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"anomalysd: interrupted{remedy and f'; {remedy}'}", file=sys.stderr)
        return 130


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, but '{text}' was given")
    return int(text)
