"""What the denoiser of the embedded checkpoint is made of, each choice against others: short trainings from nothing.

    python -m scripts.denoiser_choices --steps 400 --threads 1

Every row is a training of `scripts.train_denoiser` of the same length, on the same pictures, with one thing changed;
two commands with different `--variants` and one `--work` share the work. An interrupted row goes on from its last
checkpoint, and what is done is not done again. Printed is what the last evaluation of each says, of the averaged
weights and of those without averaging:

kept: PSNR inside the masks of drawn normal parts, repainted in one step from the strength of inference.
left: share of a drawn defect's squared difference from the normal part that is still there when it is repainted.
round trip: PSNR of the latents alone, encoded and decoded, which bounds what can be kept.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from anomalysd_pipeline.evaluation.markdown import table
from anomalysd_pipeline.inpainting import decode, encode
from scripts.block_transform import BlockTransform
from scripts.pictures import Pool
from scripts.recipe import RESOLUTION
from scripts.train_denoiser import to_pictures

EMBEDDED = Path(__file__).parent.parent / "anomalysd_pipeline" / "embedded"
VARIANTS = {
    "as it is": [],
    "half the width": ["--width", "0.5"],
    "one and a half times the width": ["--width", "1.5"],
    "predicts the velocity": ["--prediction_type", "v_prediction"],
    "predicts the clean latents": ["--prediction_type", "sample"],
    "all noise levels alike": ["--timesteps", "all"],
    "no defects to repair": ["--defect_share", "0"],
    "block transform, 4 coefficients": ["--blocks", "4"],
    "block transform, 12 coefficients": ["--blocks", "12"],
}
"""Row to what it changes in `scripts.train_denoiser`."""


def folder_of(work: Path, name: str) -> Path:
    """A row's own work folder, which shares the pictures and the autoencoder of all rows."""
    folder = work / name.replace(",", "").replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    shared = {"pool": work / "pool", "pool-eval": work / "pool-eval", "vae": EMBEDDED / "vae"}
    for link, target in shared.items():
        if not (folder / link).is_symlink():
            (folder / link).symlink_to(target.resolve(), target_is_directory=True)
    return folder


def last_evaluation(folder: Path, steps: int) -> dict | None:
    """What the log says of the last step; None where it has not come to that."""
    log = folder / "denoiser-training" / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    found = {}
    for line in lines:
        if line["step"] == steps:
            found |= line
    return found if "eval_kept" in found else None


@torch.no_grad()
def round_trip(blocks: int, pictures: torch.Tensor) -> float:
    """PSNR in dB of pictures that are encoded and decoded."""
    vae = BlockTransform(blocks, pictures) if blocks else AutoencoderKL.from_pretrained(EMBEDDED / "vae").eval()
    errors = [(decode(vae, encode(vae, part)) - part).square().mean() for part in pictures[:32].split(8)]
    return 10 * torch.log10(4 / torch.stack(errors).mean()).item()


def rows_of(work: Path, steps: int, pictures: torch.Tensor) -> list[list[str]]:
    """The table's rows, of the variants that are done."""
    rows = []
    for name, options in VARIANTS.items():
        found = last_evaluation(folder_of(work, name), steps)
        if found is None:
            continue
        blocks = int(options[1]) if "--blocks" in options else 0
        rows.append(
            [
                name,
                f"{found['eval_kept']:.2f} dB",
                f"{100 * found['eval_left']:.1f} %",
                f"{found['raw_kept']:.2f} dB",
                f"{100 * found['raw_left']:.1f} %",
                f"{round_trip(blocks, pictures):.1f} dB",
            ]
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Other options are those of scripts.train_denoiser.",
    )
    parser.add_argument("--work", type=Path, default=Path("denoiser-choices"))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--pool", type=int, default=1000)
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS), metavar="ROW")
    arguments, common = parser.parse_known_args()
    Pool(arguments.work / "pool", arguments.pool, 0, RESOLUTION)
    held_back = Pool(arguments.work / "pool-eval", 250, 10_000, RESOLUTION)
    common += ["--steps", str(arguments.steps), "--pool", str(arguments.pool), "--evaluate_every", "200"]
    for name in arguments.variants:
        folder = folder_of(arguments.work, name)
        if last_evaluation(folder, arguments.steps) is None:
            command = [sys.executable, "-m", "scripts.train_denoiser", "--work", str(folder)]
            subprocess.run([*command, *common, *VARIANTS[name]], check=True)
    heads = ["Denoiser", "kept", "left", "kept, not averaged", "left, not averaged", "round trip"]
    print(f"{arguments.steps} steps from nothing\n")
    print(table(rows_of(arguments.work, arguments.steps, to_pictures(held_back.images)), heads))


if __name__ == "__main__":
    main()
