"""Evaluations that take seconds: a small data set, options, and how they are run within the tests."""

from pathlib import Path

from anomalysd_pipeline import evaluate, synthetic

PARTS = ("hex_nut", "ring")
FLOOR = ("--peer", "color_patches", "--map_resolution", "32")
BRIEF = ("--num_inference_steps", "3", "--mask_scales", "1", "--map_resolution", "32")
"""Options with which a picture takes no time."""


def draw_parts(root: Path) -> Path:
    """Hex nuts with masks, rings without, 64 px, 3 normal pictures each."""
    synthetic.write_dataset(root, PARTS, train=3, good=2, defective=3, seed=3, size=64)
    for path in (root / "ring" / "ground_truth").rglob("*.png"):
        path.unlink()
    return root


def run(*arguments) -> int:
    """The exit status of an evaluation."""
    return evaluate.main([*map(str, arguments), "--cpu"])


def refused(capfd, *arguments) -> str:
    """The one sentence of an evaluation that is refused."""
    assert run(*arguments) == 2
    (sentence,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("anomalysd: error: ")]
    return sentence


def contents(folder: Path) -> dict[Path, bytes]:
    """Every file in a folder."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
