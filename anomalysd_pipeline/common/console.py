"""Parse options, turn errors into one sentence, and name arguments as a person at the command line knows them."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from .files import recover
from .progress import quiet_loading


class OptionParser(argparse.ArgumentParser):
    """An argument parser that takes every long option with dashes and with underscores; so do its subparsers.

    The namespace it returns tells in `typed` how each argument was typed, or else is spelled, by its name.
    """

    def parse_known_args(self, args: Sequence[str] | None = None, namespace=None):
        args = list(sys.argv[1:] if args is None else args)
        end = args.index("--") if "--" in args else len(args)
        namespace, rest = super().parse_known_args([*map(self._spelled, args[:end]), *args[end:]], namespace)
        namespace.typed = {**self._typed(args[:end]), **getattr(namespace, "typed", {})}  # a subparser's own first
        return namespace, rest

    def _typed(self, args: Sequence[str]) -> dict[str, str]:
        typed = {}
        given = {text.partition("=")[0].replace("_", "-"): text.partition("=")[0] for text in args}
        for action in self._actions:
            name = action.option_strings[0] if action.option_strings else str(action.metavar or action.dest)
            names = [action.dest, *action.option_strings]
            typed |= dict.fromkeys(names, given.get(name.replace("_", "-"), name))
        return typed

    def _spelled(self, text: str) -> str:
        """An option as it was added; other texts, and values, as they are."""
        if not text.startswith("--"):
            return text
        name, equals, value = text.partition("=")
        wanted = name.replace("_", "-")
        known = {option.replace("_", "-"): option for option in self._option_string_actions}
        if wanted not in known:  # an abbreviation, as argparse allows them, or an option of a subparser
            known = {own[: len(wanted)]: option[: len(wanted)] for own, option in known.items()}
        return known.get(wanted, name) + equals + value


def add_device(group) -> None:
    """Adds `--device auto|cpu|cuda|mps` and its short form `--cpu`; they set `device` and `cpu`."""
    group.add_argument(
        "--device",
        action=_Device,
        choices=("auto", "cpu", "cuda", "mps"),
        default="auto",
        help="auto: a CUDA GPU if there is one; mps: the GPU of an Apple computer (default: %(default)s)",
    )
    group.add_argument(
        "--cpu", action=_Device, nargs=0, const="cpu", help="leave GPUs alone: the same as --device cpu"
    )
    group.set_defaults(device="auto", cpu=False)


def add_bit_depth(group) -> None:
    """Adds `--bit-depth`; it sets `bit_depth`."""
    group.add_argument(
        "--bit-depth",
        type=int,
        choices=range(8, 17),
        metavar="BITS",
        help="bits in use in 16-bit gray: 8 to 16 (default: what the files tell, else the normal pictures)",
    )


class _Device(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        namespace.device = self.const or values
        namespace.cpu = namespace.device == "cpu"


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
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # not every program's own stream can
            stream.reconfigure(errors="surrogateescape")  # a file's name that is no text keeps its bytes
    try:
        return run(args)
    except (ValueError, OSError) as error:
        text = renamed(error, getattr(args, "typed", {}))
        if isinstance(error, OSError) and error.strerror and error.filename:
            text = f"'{os.fsdecode(error.filename)}' cannot be read or written ({error.strerror})"
        print(f"anomalysd: error: {' '.join(text.split())}", file=sys.stderr)
        return 2
    except (NotImplementedError, TypeError) as error:
        if "MPS" not in str(error):
            raise
        cause = str(error).split(". ")[0]
        print(
            f"anomalysd: error: `--device` 'mps' lacks an operation ({cause}); give --device cpu, or set "
            "PYTORCH_ENABLE_MPS_FALLBACK=1 to have it done by the CPU.",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print(f"anomalysd: interrupted{remedy and f'; {remedy}'}", file=sys.stderr)
        return 130


def renamed(sentence: object, names: Mapping[str, str]) -> str:
    """Replaces arguments of the library, in backticks, by options.

    Args:
        sentence: such as "`steps` must be ...".
        names: argument to option, both as they are written, such as {"steps": "--max_train_steps"}.
    """
    return re.sub(r"`([\w-]+)`", lambda m: f"`{names[m[1]]}`" if m[1] in names else m[0], str(sentence))


@contextlib.contextmanager
def renaming(names: Mapping[str, str]) -> Iterator[None]:
    """Renames arguments in each ValueError of a block, see `renamed`."""
    try:
        yield
    except ValueError as error:
        raise ValueError(renamed(error, names)) from error


@contextlib.contextmanager
def base_errors(base: str | Path | None) -> Iterator[None]:
    """Words in one sentence that the checkpoint of `--base` cannot be loaded in a block, which draws no bars.

    Args:
        base: folder or Hub id; None: the embedded checkpoint, of which nothing is checked.
    """
    if base is None:
        with quiet_loading():
            yield
        return
    folder, base = Path(base), str(base)
    recover(folder)
    if folder.is_dir():
        if not any((folder / name).is_file() for name in ("model_index.json", "adaptation.json")):
            results = [own for own in ("pipeline", "adaptation") if (folder / own).is_dir()]  # of a fine-tuning
            remedy = f"'{folder / results[0]}'" if results else "the folder of a saved pipeline or adaptation"
            raise ValueError(f"`--base` '{base}' holds no model_index.json; give {remedy}.")
        remedy = "a bare inpainting checkpoint needs a connection once, for the networks that it lacks"
    elif folder.exists() or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", base):
        kind = "is a file" if folder.exists() else "is no folder here, and no Hub id of the form 'user/name'"
        raise ValueError(f"`--base` '{base}' {kind}; give a checkpoint's folder or its id on the Hub.")
    else:
        remedy = "check its spelling and the connection, or give a checkpoint's folder"
    try:
        with quiet_loading(), renaming({"pretrained_model_name_or_path": "--base"}):
            yield
    except OSError as error:  # raised by the libraries below for what is missing or incomplete
        cause = textwrap.shorten(str(error), 200, placeholder=" …")
        raise ValueError(f"`--base` '{base}' cannot be loaded ({cause}); {remedy}.") from error


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, but '{text}' was given")
    return int(text)
