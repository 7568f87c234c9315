"""Ready examples: drawn pictures and their finished results, read without the model.

`python -m anomalysd_pipeline.app.gallery` makes them anew. Run it when the embedded checkpoint has changed.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from .. import EMBEDDED
from ..common.drawing import contour, overlay, verdict_text
from ..common.files import written_whole

FOLDER = Path(__file__).resolve().parent / "examples"
SHOTS, SEED = 4, 11
DRAWN = {
    "hex_nut": "missing_piece",
    "capsule": "contamination",
    "circuit_board": "stain",
    "weave": "scratch",
}
"""Maps a family to the defect of its second picture; the first is good."""
_FACTS = "examples.json"
_QUALITY = 92
_COMMAND = "python -m anomalysd_pipeline.app.gallery"


@dataclass(frozen=True)
class Example:
    """Holds a picture with its finished result: the attributes of an `Inspection`, and more.

    Attributes:
        name: file name of the picture without suffix, such as "hex_nut_defective".
        title: words for a person, such as "Hex nut, scratch".
        part: category as which it was inspected.
        defect: kind of the drawn defect, from `synthetic.DEFECTS`; None: a good part.
        path: file of the picture.
        image, inpainted: RGB, [S, S].
        anomaly_map: float32 [S, S], 0 or more; rounded to 256 levels.
        prototype_mask: bool [S, S], the region proposed by the prototypes.
        score, threshold, is_defective, seconds: as in `Inspection`.
        settings: settings of the inspection.
    """

    name: str
    title: str
    part: str
    defect: str | None
    path: Path
    image: Image.Image
    inpainted: Image.Image
    anomaly_map: np.ndarray
    prototype_mask: np.ndarray
    score: float
    threshold: float
    is_defective: bool
    seconds: float
    settings: dict = field(default_factory=dict)

    @property
    def sentence(self) -> str:
        """Puts the verdict in words."""
        return verdict_text(self.score, self.threshold)

    @property
    def predicted(self) -> np.ndarray:
        """Marks the defect, see `Inspection.predicted`: bool [S, S]."""
        return (self.anomaly_map > self.threshold) & self.is_defective

    def overlay(self, opacity: float = 0.5) -> Image.Image:
        """Draws the heatmap over the picture, and the outline of the region above the threshold."""
        heat = overlay(self.image, self.anomaly_map, self.threshold, opacity=opacity)
        return contour(heat, self.predicted)


def load_examples(folder: str | os.PathLike = FOLDER) -> list[Example]:
    """Reads the ready examples, in the order in which they are shown.

    Raises:
        ValueError: the folder is missing or damaged.
    """
    try:
        facts = json.loads(Path(folder, _FACTS).read_text(encoding="utf-8"))
        return [_read_example(Path(folder), dict(entry)) for entry in facts["examples"]]
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"`folder` '{folder}' must hold {_FACTS} and the pictures it names; make them anew with `{_COMMAND}`."
        ) from error


def made_with(folder: str | os.PathLike = FOLDER) -> str:
    """Returns the fingerprint of the checkpoint that the examples were made with."""
    return json.loads(Path(folder, _FACTS).read_text(encoding="utf-8"))["checkpoint"]


def checkpoint_fingerprint(folder: str | os.PathLike = EMBEDDED) -> str:
    """Digests a checkpoint's configs and weights into 16 hexadecimal digits; its texts do not count."""
    summary = hashlib.sha256()
    files = [path for path in Path(folder).rglob("*") if path.suffix in (".json", ".safetensors")]
    for path in sorted(files, key=lambda path: path.relative_to(folder).as_posix()):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        summary.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return summary.hexdigest()[:16]


def make_examples(folder: str | os.PathLike = FOLDER, base: str = EMBEDDED) -> list[Example]:
    """Draws the pictures, inspects them, and replaces the folder's examples once all are there.

    Args:
        folder: where they lie; made if missing.
        base: folder of the checkpoint that inspects them.

    Returns:
        The examples, read back.
    """
    from ..inspection.result import load_pipeline, register
    from ..synthetic import normal_images

    pipe = load_pipeline(base, "cpu")
    size = pipe.config.resolution
    with written_whole(Path(folder)) as partial:
        entries = []
        for family, defect in DRAWN.items():
            # Compressed like the pictures that are inspected: in dark, even regions that makes a difference.
            normals = [_compressed(image) for image in normal_images(family, SHOTS, SEED, size)]
            register(pipe, family, normals)
            entries += [_make_example(pipe, family, None, partial), _make_example(pipe, family, defect, partial)]
        facts = {"checkpoint": checkpoint_fingerprint(base), "examples": entries}
        (partial / _FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return load_examples(folder)


def _compressed(image: Image.Image) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=_QUALITY)
    with Image.open(file) as stored:
        return stored.convert("RGB")


def _make_example(pipe, family: str, defect: str | None, folder: Path) -> dict:
    """Writes the pictures of one example; returns its entry in `examples.json`."""
    import torch

    from ..synthetic import DEFECTS, test_samples

    samples = test_samples(family, 1, len(DEFECTS), SEED, pipe.config.resolution)
    sample = next(sample for sample in samples if sample.defect == defect)
    name = f"{family}_{'good' if defect is None else 'defective'}"
    Image.fromarray(sample.image).save(folder / f"{name}.jpg", quality=_QUALITY)
    # The stored picture, so that a visitor who inspects it anew gets the stored result.
    with Image.open(folder / f"{name}.jpg") as stored:
        image = stored.convert("RGB")
    start = time.perf_counter()
    out = pipe(image, category=family, generator=torch.Generator().manual_seed(0))
    seconds = time.perf_counter() - start
    score, scale = float(out.pred_scores[0]), float(out.anomaly_maps[0].max())
    out.inpainted[0].save(folder / f"{name}_inpainted.jpg", quality=92)
    levels = np.rint(out.anomaly_maps[0] * (255 / scale)).astype(np.uint8)
    Image.fromarray(levels).save(folder / f"{name}_map.png", optimize=True)
    Image.fromarray(out.prototype_masks[0]).save(folder / f"{name}_mask.png", optimize=True)
    part = family.replace("_", " ").capitalize()
    return {
        "name": name,
        "title": f"{part}, {'good part' if defect is None else defect.replace('_', ' ')}",
        "part": family,
        "defect": defect,
        "score": score,
        "threshold": out.thresholds[0],
        "seconds": round(seconds, 2),
        "scale": scale,
        "settings": pipe.settings(category=family).to_dict(),
    }


def _read_example(folder: Path, entry: dict) -> Example:
    scale, name = entry.pop("scale"), entry["name"]
    levels = np.asarray(_open(folder / f"{name}_map.png"), dtype=np.float32)
    return Example(
        **entry,
        path=folder / f"{name}.jpg",
        image=_open(folder / f"{name}.jpg"),
        inpainted=_open(folder / f"{name}_inpainted.jpg"),
        anomaly_map=levels * np.float32(scale / 255),
        prototype_mask=np.asarray(_open(folder / f"{name}_mask.png")),
        is_defective=entry["score"] > entry["threshold"],
    )


def _open(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
        return image


if __name__ == "__main__":
    begin = time.perf_counter()
    for example in make_examples():
        print(f"{example.name}: {example.sentence}")
    print(f"Made with {made_with()} in {time.perf_counter() - begin:.0f} s.")
