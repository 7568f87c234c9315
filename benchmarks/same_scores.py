"""Compare scores, maps and thresholds of two versions of this package, bit by bit.

Run it with each version in turn (the second one reads what the first one wrote):

    python benchmarks/same_scores.py --photos data/cookies --out before.json
    python benchmarks/same_scores.py --photos data/cookies --against before.json

`--photos` is a category in the layout of MVTec-AD. The parts are one drawn and one photographed, from 1 and 4 normal
pictures, as the embedded checkpoint is and fine-tuned for a few steps. Only the public API is used, on one thread.
"""

import argparse
import hashlib
import json
import time
from pathlib import Path

import torch
from PIL import Image

from anomalysd_pipeline import AnomalySDPipeline
from anomalysd_pipeline.synthetic import normal_images, test_samples

STEPS = {"steps": 2, "decoder_steps": 2, "train_batch_size": 2}


def parts(photos: Path | None) -> dict[str, tuple[list, list]]:
    """Name to four normal pictures and two to inspect, of which the second is defective."""
    tested = [Image.fromarray(sample.image) for sample in test_samples("hex_nut", 1, 1, seed=3)]
    found = {"hex_nut": (normal_images("hex_nut", 4, seed=3), tested)}
    if photos is not None:
        normals = sorted(photos.glob("train/good/*"))[:4]
        test = sorted(photos.glob("test/*/*"))
        good = next(path for path in test if path.parent.name == "good")
        bad = next(path for path in test if path.parent.name != "good")
        found[photos.name] = (
            [Image.open(path).convert("RGB") for path in normals],
            [Image.open(path).convert("RGB") for path in (good, bad)],
        )
    return found


def digest(data) -> str:
    """A mark of the bytes of an array or a picture."""
    return hashlib.sha256(data.tobytes()).hexdigest()[:16]


def examine(pipe, category: str, tested: list) -> dict:
    """Everything that must not change."""
    out = pipe(tested, category=category)
    record = pipe.config.categories[category]["calibration"]
    return {
        "scores": [float(score) for score in out.pred_scores],
        "maps": [digest(map_) for map_ in out.anomaly_maps],
        "repainted": [digest(image) for image in out.inpainted],
        "threshold": record["threshold"],
        "calibration scores": record["scores"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="folder of a photographed category")
    parser.add_argument("--out", type=Path, help="file to write")
    parser.add_argument("--against", type=Path, help="file of another version to compare with")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for name, (normals, tested) in parts(arguments.photos).items():
        for shots in (1, 4):
            for adapted in (False, True):
                began = time.perf_counter()
                pipe = AnomalySDPipeline.from_pretrained()
                pipe.set_progress_bar_config(disable=True)
                if adapted:
                    pipe.adapt({name: normals[:shots]}, **STEPS)
                else:
                    pipe.add_category(name, normals[:shots])
                    pipe.calibrate(name, normals[:shots])
                case = f"{name}, {shots} {'pictures' if shots > 1 else 'picture'}{', adapted' if adapted else ''}"
                found[case] = examine(pipe, name, tested)
                print(f"{case}: {time.perf_counter() - began:.0f} s", flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=2) + "\n")
    if arguments.against:
        before = json.loads(arguments.against.read_text())
        for case, now in found.items():
            for what, value in now.items():
                same = before[case][what] == value
                print(f"{case}: {what} {'equal' if same else f'DIFFER: {before[case][what]} -> {value}'}")


if __name__ == "__main__":
    main()
