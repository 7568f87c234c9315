"""Make peers and floors by name; SPADE, which anomalib lacks, is implemented here."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from ..data.tensors import resize, to_tensor
from ..method.scoring import smooth, smoothing_sigma
from ..models.extractor import PrototypeExtractor
from .backbones import load_backbone
from .detector import Detector, Prediction, TensorDetector, require_normals
from .floors import nearest_distances

PEERS = ("patchcore", "padim", "spade", "winclip", "draem", "color_patches", "plain_inpainting")
"""Names for `make_detector`; the last two are floors."""


def make_detector(
    name: str,
    *,
    backbone: str | PrototypeExtractor = "embedded",
    device: str | torch.device = "cpu",
    **options,
) -> Detector:
    """Makes a peer or a floor.

    Args:
        name: one of `PEERS`.
        backbone: features of PatchCore, PaDiM and SPADE, see `load_backbone`; other methods have none or their own.
        device: where it computes.
        **options: those of the class: `PatchCore`, `PaDiM`, `SPADE`, `WinCLIP`, `DRAEM`, `ColorPatchFloor` or
            `PlainInpaintingFloor`.

    Raises:
        ValueError: for an unknown name or option, or a package or weights that are missing.
    """
    if name not in PEERS:
        raise ValueError(f"`name` must be one of {', '.join(map(repr, PEERS))}, got {name!r}.")
    kind = _class_of(name)
    accepted = inspect.signature(kind).parameters
    unknown = sorted(set(options) - set(accepted))
    if unknown:
        raise ValueError(f"`{unknown[0]}` is no option of {name!r}; it has {', '.join(accepted)}.")
    if "backbone" in accepted:
        options["backbone"] = backbone
    return kind(device=device, **options)


def _class_of(name: str) -> type[Detector]:
    if name == "spade":
        return SPADE
    from . import anomalib_peers, draem, floors

    return {
        "patchcore": anomalib_peers.PatchCore,
        "padim": anomalib_peers.PaDiM,
        "winclip": anomalib_peers.WinCLIP,
        "draem": draem.DRAEM,
        "color_patches": floors.ColorPatchFloor,
        "plain_inpainting": floors.PlainInpaintingFloor,
    }[name]


class SPADE(TensorDetector):
    """Compares each position with the most similar normal pictures: SPADE (Cohen and Hoshen 2020).

    The score is the mean Euclidean distance of the picture's pooled features to those of its `neighbors` nearest
    normal pictures. The map is the Euclidean distance of each position's features, all levels concatenated, to the
    nearest of all positions in those pictures, scaled up bilinearly and smoothed as ours.

    The paper pools the last layer of a classifier. Our extractors have no such layer, so all levels are pooled.

    Args:
        backbone: see `load_backbone`.
        levels: feature levels of a backbone that has none of its own; strides 4, 8 and 16 as in the paper.
        neighbors: K, 50 in the paper; all pictures if there are fewer.
        resolution: side in pixels.
        device: where it computes; a given extractor stays where it is.

    Raises:
        ValueError: for an option out of its range, or a package or weights that are missing.
    """

    name = "spade"
    one_model_per_category = False

    def __init__(
        self,
        backbone: str | PrototypeExtractor = "embedded",
        levels: Sequence[int] = (1, 2, 3),
        neighbors: int = 50,
        resolution: int = 256,
        device: str | torch.device = "cpu",
    ):
        super().__init__()
        if neighbors < 1 or resolution < 32:
            raise ValueError(
                f"`neighbors` must be at least 1 and `resolution` at least 32, got {neighbors} and {resolution}."
            )
        self.backbone = load_backbone(backbone, levels, device)
        self.device, self.neighbors, self.resolution = self.backbone.device, neighbors, resolution

    def describe(self) -> dict:
        return {
            "detector": self.name,
            "implementation": "this package's",
            **self.backbone.facts,
            "neighbors": self.neighbors,
            "resolution": self.resolution,
            "smoothing_sigma": smoothing_sigma(self.resolution),
            "map": "Euclidean distance to the nearest feature in the nearest pictures",
            "score": "mean Euclidean distance of pooled features to the nearest pictures",
        }

    def _features(self, image: Image.Image) -> Tensor:
        return torch.cat(self.backbone(to_tensor(image, self.resolution)[None].to(self.device)), dim=1)  # [1, C, h, w]

    @torch.no_grad()
    def fit(self, category: str, normals: Sequence[Image.Image], seed: int) -> None:
        require_normals(self.name, normals)
        # One picture at a time, because a batch may be rounded differently.
        self.remember(category, {"features": torch.cat([self._features(image) for image in normals])})

    @torch.no_grad()
    def predict(self, category: str, image: Image.Image) -> Prediction:
        normal, asked = self.recall(category)["features"].to(self.device), self._features(image)
        distances = (normal.mean(dim=(2, 3)) - asked.mean(dim=(2, 3))).norm(dim=1)  # [K]
        nearest = distances.topk(min(self.neighbors, len(distances)), largest=False)
        gallery = normal[nearest.indices].permute(0, 2, 3, 1).flatten(end_dim=2)  # [M, C]
        maps = resize(nearest_distances(gallery, asked), (self.resolution,) * 2)  # [1, R, R]
        maps = smooth(maps, smoothing_sigma(self.resolution))
        return Prediction(nearest.values.mean().item(), maps[0].cpu().numpy())
