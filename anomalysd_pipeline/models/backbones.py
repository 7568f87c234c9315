"""Make backbones by timm: find the kind of network that a name stands for, create it, load its weights."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from torch import nn


@dataclass(frozen=True)
class BackboneKind:
    """Holds facts that timm knows of a network before it is made.

    depth: number of feature levels.
    is_plain: whether all levels share one grid, as in ViT, DeiT, DINO, EVA and BEiT; else they shrink, as in CNNs and
        Swin.
    stride: of the finest level in px; for plain networks the side of a patch.
    any_size: whether pictures of any size are taken (plain ones: whose sides are multiples of `stride`).
    own_size: side in px that the weights were trained at.
    is_resizable: whether the network is made for another side by the argument `img_size`.
    is_dynamic: whether it takes any size only with the argument `dynamic_img_size`.
    """

    depth: int
    is_plain: bool
    stride: int
    any_size: bool
    own_size: int
    is_resizable: bool
    is_dynamic: bool

    def side(self, length: int) -> int:
        """Finds the side nearest to `length` that fits the patches of a plain network."""
        return max(1, round(length / self.stride)) * self.stride if self.is_plain else length

    def size_arguments(self, image_size: int | None) -> dict:
        """Gives arguments of `timm.create_model` with which the network takes pictures of that size."""
        if self.is_dynamic:
            return {"dynamic_img_size": True}
        if self.any_size or image_size is None or not self.is_resizable:
            return {}
        return {"img_size": self.side(image_size)}


def backbone_kind(model_name: str, model_kwargs: dict) -> BackboneKind:
    """Finds the kind of network that a timm model name stands for; makes no weights.

    Raises:
        ValueError: if timm does not know `model_name`, or does not give its features.
    """
    import timm

    if not timm.is_model(model_name):
        raise ValueError(f"`model_name` must be a model that timm knows, got {model_name!r}.")
    # On the meta device nothing is computed or drawn.
    with torch.device("meta"):
        model = timm.create_model(model_name, **model_kwargs)
    strides = [level["reduction"] for level in getattr(model, "feature_info", None) or []]
    if not strides:
        raise ValueError(f"`model_name` must be a model whose feature levels timm gives, got {model_name!r}.")
    is_plain = len(set(strides)) == 1 and hasattr(model, "forward_intermediates")
    # In others the windows of the attention set the size, and timm takes any only where they happen to fit.
    is_dynamic = is_plain and _takes(model, "dynamic_img_size")
    own = model_kwargs.get("img_size", model.pretrained_cfg["input_size"][-1])
    return BackboneKind(
        depth=len(strides),
        is_plain=is_plain,
        stride=min(strides),
        any_size=is_dynamic or not model.pretrained_cfg["fixed_input_size"],
        own_size=own if isinstance(own, int) else own[-1],
        is_resizable=_takes(model, "img_size"),
        is_dynamic=is_dynamic,
    )


def hub_id(model_name: str) -> str | None:
    """Gives the repository on the Hub from which timm downloads a model's weights; None: from elsewhere."""
    from timm.models import get_pretrained_cfg

    return getattr(get_pretrained_cfg(model_name), "hf_hub_id", None)


def _takes(model: nn.Module, argument: str) -> bool:
    return any(argument in inspect.signature(kind.__init__).parameters for kind in type(model).__mro__)


def create_backbone(
    model_name: str, out_indices: tuple[int, ...], final_norm: bool, model_kwargs: dict, **weights
) -> nn.Module:
    """Creates a timm network from pictures to feature levels, without levels after the last that is asked for.

    Args:
        final_norm: whether a plain network's last normalization is applied to each level, if it has one.
        weights: further arguments of `timm.create_model`.
    """
    import timm
    from timm.models._features import FeatureGetterNet

    if final_norm:
        weights["feature_cls"] = partial(FeatureGetterNet, norm=True)
    model = timm.create_model(model_name, features_only=True, out_indices=out_indices, **weights, **model_kwargs)
    if hasattr(model, "_stage_out_idx"):
        # timm's EfficientNets run every stage whatever `out_indices` asks for; the later ones are most of the cost.
        model.blocks = model.blocks[: max(model._stage_out_idx)]
    return model


def load_weights(path: str | Path, model_name: str, create) -> nn.Module:
    """Makes a network by `create`, with weights from a local file.

    Args:
        path: weights of the whole classifier, .safetensors or .pth (read with weights_only=True).
        create: makes the network, given further arguments of `timm.create_model`.

    Raises:
        ValueError: if there is no such file, or it does not hold every weight of the network.
    """
    from timm.models import load_state_dict

    if not Path(path).is_file():
        raise ValueError(f"`checkpoint_path` must be an existing weights file, got {str(path)!r}.")
    mismatch = f"`checkpoint_path` must hold weights of {model_name}, got {str(path)!r}"
    try:
        state = load_state_dict(str(path), device="cpu", weights_only=True)
        overlay = {"state_dict": state, "custom_load": False}
        loaded = _seeded(lambda: create(pretrained=True, pretrained_cfg_overlay=overlay))
    # All that other files lead to, in timm's reader or in its conversions for one kind of network.
    except (
        RuntimeError,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        AssertionError,
        EOFError,
        UnpicklingError,
        SafetensorError,
    ) as error:
        raise ValueError(f"{mismatch} ({' '.join(str(error).split())[:200]}).") from error
    # timm loads feature extractors non-strictly: a file of another model, or half of one, could pass.
    missing = _unfilled(_seeded(lambda: create(pretrained=False)), loaded)
    if missing:
        raise ValueError(f"{mismatch}, which leaves {len(missing)} of them out, such as {missing[0]!r}.")
    return loaded


def _seeded(create) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        # No usual seed: untrained weights saved after `manual_seed(0)` must not look like missing ones.
        torch.manual_seed(8_408_254_237)
        return create()


def _unfilled(initial: nn.Module, loaded: nn.Module) -> list[str]:
    """Lists matrices that still are as their random start; such as start constant cannot tell."""
    start = dict(initial.named_parameters())
    return [
        name
        for name, weight in loaded.named_parameters()
        if weight.ndim > 1 and torch.equal(weight, start[name]) and (weight != weight.flatten()[0]).any()
    ]
