"""Every option of every door, in both spellings, and the devices that they all know."""

import argparse

import pytest
import torch

from anomalysd_pipeline.cli import _parser
from anomalysd_pipeline.common.console import OptionParser, add_device, renamed, run_command
from anomalysd_pipeline.common.devices import choose_device

COMMANDS = ("demo", "detect", "adapt", "evaluate", "publish", "synth")
REQUIRED = {
    "detect": ["--test", "t", "--category", "nut", "--out", "o"],
    "adapt": ["--normal", "n", "--output_dir", "o"],
    "evaluate": ["--synthetic", "ring", "--out", "o"],
    "publish": ["folder", "user/name"],
    "synth": ["out"],
}


def parser_of(command):
    (commands,) = [a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction)]
    return commands.choices[command]


def value_of(action):
    """Text that an option takes, as often as it wants it."""
    if action.nargs == 0:
        return []
    if action.choices:
        return [str(next(iter(action.choices)))]
    text = {"augmentation": "scale=0.2", "families": "ring", "shard": "0/4"}.get(action.dest, "3")
    return [text] * (action.nargs if isinstance(action.nargs, int) else 1)


@pytest.mark.parametrize("command", COMMANDS)
def test_dashes_and_underscores_are_one(command):
    checked = 0
    for action in parser_of(command)._actions:
        for option in (name for name in action.option_strings if name.startswith("--") and action.dest != "help"):
            given = [command, *REQUIRED.get(command, [])]
            if option in ("--data", "--normal_dir") or (command == "adapt" and option == "--synthetic"):
                given = [text for text in given if text not in ("--normal", "n", "--synthetic", "ring")]
            spelled = [f"--{option[2:].replace(old, new)}" for old, new in (("-", "_"), ("_", "-"))]
            first, second = (_parser().parse_args([*given, name, *value_of(action)]) for name in spelled)
            first, second = ({**vars(own), "typed": None} for own in (first, second))  # how it was spelled
            assert first == second, option
            checked += 1
    assert checked >= {"publish": 2, "synth": 6, "demo": 7}.get(command, 15)


@pytest.fixture
def parser():
    parser = OptionParser()
    parser.add_argument("--noise-strength", type=float)
    parser.add_argument("--train_denoiser", action=argparse.BooleanOptionalAction)
    parser.add_argument("rest", nargs="*")
    add_device(parser)
    return parser


def test_values_and_what_follows_two_dashes_stay_as_they_are(parser):
    assert parser.parse_args(["--noise_strength=0.5"]).noise_strength == 0.5
    assert parser.parse_args(["a_b", "--", "--noise_strength"]).rest == ["a_b", "--noise_strength"]
    assert parser.parse_args(["--no-train-denoiser"]).train_denoiser is False
    assert parser.parse_args(["--noise_s", "0.25"]).noise_strength == 0.25  # abbreviated


def test_unknown_options_are_refused_as_they_were_given(parser, capsys):
    with pytest.raises(SystemExit):
        parser.parse_args(["--no_such-thing"])
    assert "--no_such-thing" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["demo", "detect", "adapt", "evaluate"])
def test_every_door_knows_both_names_of_the_processor(command):
    given = [command, *REQUIRED.get(command, [])]
    short, long, neither = (_parser().parse_args([*given, *more]) for more in (["--cpu"], ["--device", "cpu"], []))
    assert vars(short) == vars(long) and short.device == "cpu" and short.cpu
    assert neither.device == "auto" and not neither.cpu


@pytest.mark.parametrize("command", ["demo", "detect", "adapt", "evaluate"])
def test_every_door_knows_apple_s_processor(command):
    args = _parser().parse_args([command, *REQUIRED.get(command, []), "--device", "mps"])
    assert args.device == "mps" and not args.cpu


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="there is one")
def test_an_apple_processor_that_is_not_there():
    with pytest.raises(ValueError, match="`--device` is 'mps', but PyTorch finds no Apple GPU here; use 'cpu'"):
        choose_device("mps")


def test_an_operation_that_apple_s_processor_lacks_is_one_sentence(capsys):
    def run(args):
        raise NotImplementedError(
            "The operator 'aten::_linalg_svd.U' is not currently implemented for the MPS device. If you want this op "
            "to be considered for addition please comment on an issue."
        )

    assert run_command(run, argparse.Namespace()) == 2
    told = capsys.readouterr().err
    assert told.startswith(
        "anomalysd: error: `--device` 'mps' lacks an operation (The operator 'aten::_linalg_svd.U' "
    )
    assert told.endswith("give --device cpu, or set PYTORCH_ENABLE_MPS_FALLBACK=1 to have it done by the CPU.\n")

    def other(args):
        raise TypeError("a fault of ours")

    with pytest.raises(TypeError, match="a fault of ours"):
        run_command(other, argparse.Namespace())


def test_arguments_of_the_library_become_options():
    sentence = "`steps` must be at least 1, got 'steps'; see `rank`."
    assert renamed(sentence, {"steps": "--max_train_steps"}) == (
        "`--max_train_steps` must be at least 1, got 'steps'; see `rank`."
    )
