"""What the denoiser of the embedded checkpoint is made of, each choice against others: short trainings from nothing.

    python -m scripts.denoiser_choices --steps 400 --threads 1

Every row is a training of `scripts.train_denoiser` of the same length, on the same pictures, with one thing changed;
two commands with different `--variants` and one `--work` share the work, save the first two rows of an autoencoder,
which are for one command, as both use the same. An interrupted row goes on from its last checkpoint, and what is done
is not done again. Rows of another autoencoder train that first (`scripts.train_vae`,
`--autoencoder_steps`); the one of factor 4 with 4 channels, trained as briefly, is what they are to be compared with.

Printed is what the last evaluation of each says, of the averaged weights and of those without averaging, and for
comparison that of the embedded checkpoint, which was trained for far longer:

kept: PSNR inside the masks of drawn normal parts, repainted in one step from the strength of inference.
left: share of a drawn defect's squared difference from the normal part that is still there when it is repainted.
round trip: PSNR of the latents alone, encoded and decoded, which bounds what can be kept.
"""

import argparse
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from anomalysd_pipeline.evaluation.markdown import table
from anomalysd_pipeline.method.inpainting import decode, encode
from scripts.block_transform import BlockTransform
from scripts.pictures import Pool
from scripts.recipe import RESOLUTION
from scripts.train_denoiser import to_pictures

EMBEDDED = Path(__file__).parent.parent / "anomalysd_pipeline" / "embedded"


@dataclass(frozen=True)
class Autoencoder:
    """One that is trained for its row, by options of `scripts.train_vae`."""

    factor: int = 4
    channels: int = 4
    latents: str = "whitened"

    @property
    def options(self) -> list[str]:
        """For the command line."""
        return [
            *("--factor", str(self.factor)),
            *("--latent_channels", str(self.channels)),
            *("--latents", self.latents),
        ]

    @property
    def trained_in(self) -> str:
        """Name of the folder of its training, which rows share that only scale its latents in another way."""
        return f"factor-{self.factor}-channels-{self.channels}"


REFERENCE = "the embedded checkpoint itself"
VARIANTS: dict[str, list[str] | Autoencoder] = {
    REFERENCE: ["--start_from", str(EMBEDDED), "--learning_rate", "0"],
    "as it is": [],
    "half the width": ["--width", "0.5"],
    "one and a half times the width": ["--width", "1.5"],
    "predicts the velocity": ["--prediction_type", "v_prediction"],
    "predicts the clean latents": ["--prediction_type", "sample"],
    "all noise levels alike": ["--timesteps", "all"],
    "no defects to repair": ["--defect_share", "0"],
    "block transform, 4 coefficients": ["--blocks", "4"],
    "block transform, 12 coefficients": ["--blocks", "12"],
    "autoencoder trained briefly, factor 4, 4 channels": Autoencoder(),
    "- latents of one scale, not whitened": Autoencoder(latents="scaled"),
    "- 8 channels": Autoencoder(channels=8),
    "- factor 8, 4 channels": Autoencoder(factor=8),
    "- factor 8, 16 channels": Autoencoder(factor=8, channels=16),
}
"""Row to what it changes in `scripts.train_denoiser`, or to the autoencoder it trains for itself."""


def folder_of(work: Path, name: str) -> Path:
    """A row's own work folder, which shares the pictures and the autoencoder with other rows."""
    folder = work / re.sub("[^a-z0-9]+", "-", name).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    choice = VARIANTS[name]
    shared = {"pool": work / "pool", "pool-eval": work / "pool-eval"}
    if isinstance(choice, Autoencoder):
        shared["vae-training"] = work / "autoencoders" / choice.trained_in
        shared["vae-training"].mkdir(parents=True, exist_ok=True)
    else:
        shared["vae"] = EMBEDDED / "vae"
    for link, target in shared.items():
        if not (folder / link).is_symlink():
            (folder / link).symlink_to(target.resolve(), target_is_directory=True)
    return folder


def steps_of(name: str, steps: int) -> int:
    """A row's steps; the reference only needs one, which changes nothing, to be evaluated."""
    return 1 if name == REFERENCE else steps


def last_evaluation(work: Path, name: str, steps: int) -> dict | None:
    """What a row's log says of its last step; None where it has not come to that."""
    steps = steps_of(name, steps)
    log = folder_of(work, name) / "denoiser-training" / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    found = {}
    for line in lines:
        if line["step"] == steps:
            found |= line
    return found if "eval_kept" in found else None


@torch.no_grad()
def round_trip(vae, pictures: torch.Tensor) -> float:
    """PSNR in dB of pictures `[N, 3, H, W]` in [-1, 1] that are encoded and decoded."""
    errors = [(decode(vae, encode(vae, part)) - part).square().mean() for part in pictures[:32].split(8)]
    return 10 * torch.log10(4 / torch.stack(errors).mean()).item()


def rows_of(work: Path, steps: int, pictures: torch.Tensor) -> list[list[str]]:
    """The table's rows, of the variants that are done."""
    rows = []
    for name, choice in VARIANTS.items():
        folder, found = folder_of(work, name), last_evaluation(work, name, steps)
        if found is None:
            continue
        if isinstance(choice, list) and "--blocks" in choice:
            vae = BlockTransform(int(choice[1]), pictures)
        else:
            vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
        rows.append(
            [
                name,
                f"{found['eval_kept']:.2f} dB",
                f"{100 * found['eval_left']:.1f} %",
                f"{found['raw_kept']:.2f} dB",
                f"{100 * found['raw_left']:.1f} %",
                f"{round_trip(vae, pictures):.1f} dB",
            ]
        )
    return rows


def train_row(work: Path, name: str, steps: int, autoencoder_steps: int, common: list[str]) -> None:
    """What of a row is not done yet: its autoencoder, if it has one of its own, and its denoiser."""
    folder, choice = folder_of(work, name), VARIANTS[name]
    stages = []
    if isinstance(choice, Autoencoder):
        stages.append(("train_vae", [*choice.options, "--steps", str(autoencoder_steps)]))
        choice = []
    stages.append(("train_denoiser", [*choice, "--steps", str(steps_of(name, steps))]))
    for stage, options in stages:
        command = [sys.executable, "-m", f"scripts.{stage}", "--work", str(folder)]
        subprocess.run([*command, *common, *options], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Other options are those of every stage, as --threads.",
    )
    parser.add_argument("--work", type=Path, default=Path("denoiser-choices"))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--autoencoder_steps", type=int, default=400)
    parser.add_argument("--pool", type=int, default=1000)
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS), metavar="ROW")
    arguments, common = parser.parse_known_args()
    Pool(arguments.work / "pool", arguments.pool, 0, RESOLUTION)
    held_back = Pool(arguments.work / "pool-eval", 250, 10_000, RESOLUTION)
    common += ["--pool", str(arguments.pool), "--evaluate_every", "200"]
    for name in arguments.variants:
        if last_evaluation(arguments.work, name, arguments.steps) is None:
            train_row(arguments.work, name, arguments.steps, arguments.autoencoder_steps, common)
    heads = ["Denoiser", "kept", "left", "kept, not averaged", "left, not averaged", "round trip"]
    print(f"{arguments.steps} steps from nothing\n")
    print(table(rows_of(arguments.work, arguments.steps, to_pictures(held_back.images)), heads))


if __name__ == "__main__":
    main()
