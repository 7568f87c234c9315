"""Export the prototype distance of a part, Eqs. (12) to (14) of AnomalySD (arXiv 2408.01960), as one ONNX model that
needs no Stable Diffusion."""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import warnings
from pathlib import Path

import numpy as np
import torch
from diffusers.utils import logging
from PIL import Image
from torch import Tensor, nn

from .. import __version__
from ..common.checks import require_whole, shown
from ..common.console import renaming
from ..common.files import disk_errors, write_whole
from ..data.images import MIN_SIDE
from ..data.inputs import Inputs
from ..data.tensors import fit, resize
from ..method.calibration import Calibration, calibrate_threshold, check_rate
from ..method.neighbors import NeighborSearch
from ..method.scoring import check_finite, image_score, smooth, smoothing_sigma

logger = logging.get_logger(__name__)

LONGEST_SIDE = 8192
"""Of a camera's pictures: a side's weights of resizing are made from as many values squared."""

OUTPUTS = ("score", "label", "anomaly_map", "distances")

_NOTES = {
    "input": "image: uint8 [1, H, W, 3], RGB, upright, of the size in `size`; gray is repeated three times. The model "
    "resizes by Pillow's Lanczos.",
    "outputs": "score: float32 [1], compared with `threshold`. label: bool [1], defective. anomaly_map: float32 "
    "[1, R, R] over the whole picture, smoothed D. distances: float32 [1, h, w], E of Eq. (14); D is E / `unit`.",
}


class DistanceModel(nn.Module):
    """Scores a camera's picture by D alone, see `PrototypeBank.relative`.

    Args:
        extractor: `PrototypeExtractor`, float32.
        bank: `PrototypeBank` with `category`.
        size: height and width of the camera's pictures.
        resolution: R, of the map.
        top_share: see `image_score`.
        threshold: of the score.
    """

    def __init__(
        self,
        extractor,
        bank,
        category: str,
        size: tuple[int, int],
        resolution: int,
        top_share: float,
        threshold: float,
    ):
        super().__init__()
        self.extractor = extractor
        self.resolution, self.top_share, self.threshold = resolution, top_share, threshold
        self.unit = 1 / bank.relative(category, torch.ones(()), extractor.parts).item()
        self.searches = [NeighborSearch(part) for part in bank[category].chunk(extractor.parts, dim=1)]
        target = extractor.picture_size(*size) or (resolution, resolution)
        pairs = zip(size, target, strict=True)
        self.rows, self.columns = (None if old == new else lanczos_weights(old, new) for old, new in pairs)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gives what `OUTPUTS` names, see `_NOTES`, of uint8 [1, H, W, 3]."""
        x = image.permute(0, 3, 1, 2).float()  # [1, 3, H, W]
        if self.columns is not None:
            x = _levels(x @ self.columns.T)  # [1, 3, H, w]
        if self.rows is not None:
            x = _levels(self.rows @ x)  # [1, 3, h, w]
        psi = self.extractor(x / 127.5 - 1)  # [1, C, h, w]
        queries = psi.permute(0, 2, 3, 1).flatten(end_dim=2).chunk(len(self.searches), dim=1)
        found = [search.nearest(part)[0] for search, part in zip(self.searches, queries, strict=True)]
        far = found[0] if len(found) == 1 else torch.stack(found).log().mean(dim=0).exp()
        far = far.view(1, *psi.shape[2:])  # [1, h, w]
        maps = deviation_map(far / self.unit, self.resolution)  # [1, R, R]
        score = image_score(maps, self.top_share)  # [1]
        return score, ~(score <= self.threshold), maps, far  # a score that is NaN is no normal one


def lanczos_weights(length: int, target: int) -> Tensor:
    """Gives the weights [target, length] by which Pillow resizes a side of 8-bit pictures: of 22 binary places."""
    rows = Image.fromarray(np.eye(length, dtype=np.float32)).resize((target, length), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.round(np.asarray(rows).T * 2**22) / 2**22)


def _levels(x: Tensor) -> Tensor:
    return (x + 0.5).floor().clamp(0, 255)


def deviation_map(relative: Tensor, resolution: int) -> Tensor:
    """Brings D [N, h, w] to the pipeline's resolution [N, R, R] and smooths it, as an inspection does."""
    return smooth(resize(relative, (resolution, resolution)), smoothing_sigma(resolution))


@torch.no_grad()
def calibrate_distance(
    extractor, bank, category: str, resolution: int, settings, false_alarm_rate: float = 0.05, seed: int = 0
) -> Calibration:
    """Sets a threshold for D alone from the normal pictures that a bank keeps, each compared with the others.

    Args:
        settings: `InspectionSettings` with the `top_share` of the score and a `feature_weight` above 0.
        Others: see `DistanceModel` and `calibration.calibrate_threshold`.

    Raises:
        ValueError: the bank keeps no pictures of `category`; or as `calibrate_threshold`.
    """
    shots = bank.shots(category)
    if shots is None:
        raise ValueError(
            f"`category` {category!r} was saved without its normal pictures, by which the threshold is set; register "
            "it anew, and save it with them."
        )
    shaped = [shots.copy(number) for number in range(len(shots.sizes))]
    pictures = Inputs(torch.stack([fit(picture, (resolution, resolution)) for picture in shaped]), shaped)

    def score(picture: Inputs, left_out: int | None) -> float:
        far = bank.distances(category, extractor(picture.shaped[0][None]), extractor.parts, left_out)
        check_finite("comparison with the normal pictures", [far])
        maps = deviation_map(bank.relative(category, far, extractor.parts), resolution)
        return image_score(maps, settings.top_share).item()

    digests, marks = pictures.digests(), pictures.fingerprints()
    return calibrate_threshold(
        score, pictures, digests, settings, false_alarm_rate, seed, before=None, fingerprints=marks
    )


def export_onnx(
    pipe,
    category: str,
    path: str | Path,
    size: tuple[int, int] | None = None,
    preset: str | None = None,
    false_alarm_rate: float = 0.05,
    seed: int = 0,
) -> Calibration:
    """Writes the extractor, the bank and a threshold of a part as one ONNX model.

    Its score is that of D alone, without repainting, and so is its threshold, see `calibrate_distance`. Inputs,
    outputs and the figures it rests on are in the model's metadata.

    Args:
        pipe: an `AnomalySDPipeline`.
        category: a part with a bank and kept normal pictures.
        path: the file; an earlier one is replaced when the new one is complete.
        size: height and width of the camera's pictures; None: at which the normal pictures were described.
        preset: whose `top_share` the image score takes; None: the checkpoint's own.
        false_alarm_rate: share of good parts that may be called defective.
        seed: of the copies where there is one normal picture.

    Returns:
        The threshold and the scores it rests on.

    Raises:
        ValueError: a package is missing, an argument is out of its range, the part lacks what is needed, the network
            cannot be exported, or the file cannot be written.
    """
    check_packages()
    check_rate(false_alarm_rate)
    settings = pipe.settings(preset, category, feature_weight=1.0)
    bank, extractor = copy.deepcopy(pipe.bank).cpu(), copy.deepcopy(pipe.extractor).cpu().float().eval()
    resolution = pipe.config.resolution
    bank[category]  # says which parts there are
    calibration = calibrate_distance(extractor, bank, category, resolution, settings, false_alarm_rate, seed)
    size = _checked_size(size, extractor, resolution, bank.shots(category).sizes.tolist())
    model = DistanceModel(
        extractor, bank, category, size, resolution, settings.top_share, calibration.threshold
    ).eval()
    program = _exported(model, size)
    program.model.producer_name, program.model.producer_version = "anomalysd_pipeline", __version__
    program.model.metadata_props.update(_NOTES)
    facts = {
        "category": category,
        "size": list(size),
        "threshold": calibration.threshold,
        "top_share": settings.top_share,
        "unit": model.unit,
        "extractor": extractor.config.model_name,
        **{name: getattr(calibration, name) for name in ("false_alarm_rate", "pictures", "held_out", "scores")},
    }
    for name, value in facts.items():
        program.model.metadata_props[name] = value if isinstance(value, str) else json.dumps(value)
    with disk_errors("path", path):
        write_whole(Path(path), lambda unfinished: program.save(unfinished, external_data=False))
    if not calibration.held_out:
        logger.warning(
            f"The threshold of {category!r} is a guess, because one picture does not show how good parts differ; "
            "register it from one more picture of a good part, better four."
        )
    return calibration


def check_packages() -> None:
    """Raises ValueError if a package that the export needs is missing."""
    for name in ("onnx", "onnxscript"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ValueError(f"The export needs {name}; run `pip install 'anomalysd-pipeline[onnx]'`.") from error


def _checked_size(size, extractor, resolution: int, described: list[list[int]]) -> tuple[int, int]:
    if size is None:
        if len(set(map(tuple, described))) > 1:
            raise ValueError(
                "`size` must be given for a part whose normal pictures differ in shape: height and width."
            )
        return tuple(described[0])
    if not isinstance(size, (list, tuple)) or len(size) != 2:
        raise ValueError(f"`size` must be height and width in pixels, got {shown(size)}.")
    for side in size:
        require_whole("size", side, MIN_SIDE, LONGEST_SIDE)
    target = list(extractor.picture_size(*size) or (resolution, resolution))
    if target not in described:
        logger.warning(
            f"Pictures of `size` {size[0]} x {size[1]} have another shape than the part's normal pictures; check that "
            "the height comes first."
        )
    return tuple(size)


def _exported(model: DistanceModel, size: tuple[int, int]):
    """Traces a model; a network that ONNX cannot express is named."""
    image = torch.zeros(1, *size, 3, dtype=torch.uint8)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter, about its own workings
            return torch.onnx.export(
                model, (image,), input_names=["image"], output_names=list(OUTPUTS), dynamo=True, verbose=False
            )
    except (torch.onnx.OnnxExporterError, RuntimeError) as error:
        cause = " ".join(str(error.__cause__ or error).split())[:200]
        raise ValueError(
            f"`extractor` {model.extractor.config.model_name} cannot be written as ONNX ({cause}); export a part that "
            "was registered with another one."
        ) from error


def run(args: argparse.Namespace) -> int:
    """Runs `anomalysd export` with parsed options; returns the exit status.

    Raises:
        ValueError: as `export_onnx`; with the names of the options.
    """
    from ..inspection.result import load_pipeline

    check_packages()
    part = Path(args.part)
    inner = [part / name for name in ("adaptation", "part.safetensors") if (part / name).exists()]
    pipe = load_pipeline(args.base, "cpu")
    with renaming({"pretrained_adaptation_name_or_path": "PART"}):
        brought = pipe.load_adaptation(str(inner[0]) if inner else args.part, overwrite=True)
    if args.category is None and len(brought) > 1:
        raise ValueError(f"`--category` must be given, because PART holds several: {', '.join(map(repr, brought))}.")
    category = args.category or brought[0]
    size = None if args.size is None else tuple(args.size)
    options = {name: f"--{name.replace('_', '-')}" for name in ("category", "size", "path", "false_alarm_rate")}
    with renaming({**options, "path": "--out"}):
        found = export_onnx(pipe, category, args.out, size, args.preset, args.false_alarm_rate)
    guess = "" if found.held_out else ", a guess"
    print(f"{category} in {args.out}; threshold {found.threshold:.6g} from {found.pictures} normal picture(s){guess}")
    return 0
