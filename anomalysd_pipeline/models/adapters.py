"""Keep the LoRA weights of adaptations beside one base, and switch them in and out."""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Mapping

import torch
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from torch import Tensor, nn

PARTS = ("denoiser", "decoder")
MAX_INJECTED = 4
"""Adapters a module holds at once; the longest unused ones are taken out, and put back when they are needed."""


class Adapter:
    """Holds LoRA weights by name, and their digest as a key.

    Args:
        state: name in the module to weight.
    """

    def __init__(self, state: Mapping[str, Tensor]):
        self.state, self.key = state, digest(state)


class AdapterStore(ModelMixin, ConfigMixin):
    """Stores the LoRA weights of any number of adaptations, savable as safetensors.

    Args:
        layouts: adaptation to part ("denoiser", "decoder") to the shape of each weight by its name in the part.
    """

    @register_to_config
    def __init__(self, layouts: dict[str, dict[str, dict[str, list[int]]]] | None = None):
        super().__init__()
        self._ready: dict[tuple[str, str], Adapter | None] = {}
        # Safetensors and `.to()` need a tensor even when there are no adaptations.
        self.register_buffer("placeholder", torch.zeros(1))
        self.register_to_config(layouts=layouts or {})
        for index, (_, _, _, shape) in enumerate(self._entries()):
            self.register_buffer(f"weight_{index}", torch.zeros(shape))

    def _apply(self, fn, recurse: bool = True):
        self._ready.clear()  # these tensors are about to be replaced by others
        return super()._apply(fn, recurse)

    def _entries(self) -> list[tuple[str, str, str, list[int]]]:
        """Lists (adaptation, part, name, shape) of each buffer; sorted, because a saved config is."""
        return [
            (adaptation, part, name, list(shape))
            for adaptation, parts in sorted(self.config.layouts.items())
            for part, shapes in sorted(parts.items())
            for name, shape in sorted(shapes.items())
        ]

    @property
    def names(self) -> list[str]:
        """Lists the adaptations alphabetically."""
        return sorted(self.config.layouts)

    def state(self, adaptation: str) -> dict[str, dict[str, Tensor]]:
        """Maps part to name to weight of an adaptation; parts that it does not change are missing."""
        state: dict[str, dict[str, Tensor]] = {}
        for index, (owner, part, name, _) in enumerate(self._entries()):
            if owner == adaptation:
                state.setdefault(part, {})[name] = getattr(self, f"weight_{index}")
        return state

    def adapter(self, adaptation: str, part: str) -> Adapter | None:
        """Gives a part of an adaptation, ready to be switched in; None for a part that it does not change."""
        # Kept, because every inspection asks, and hashing megabytes of weights takes longer than switching.
        if (adaptation, part) not in self._ready:
            state = self.state(adaptation).get(part)
            self._ready[adaptation, part] = None if state is None else Adapter(state)
        return self._ready[adaptation, part]

    def add(self, adaptation: str, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Keeps the weights of an adaptation, in place of those of that name."""
        self._replace({**self._everything(), adaptation: state})

    def remove(self, adaptation: str) -> None:
        """Forgets an adaptation, if it is there."""
        self._replace({name: state for name, state in self._everything().items() if name != adaptation})

    def _everything(self) -> dict:
        return {name: self.state(name) for name in self.names}

    def _replace(self, everything: Mapping) -> None:
        self._ready.clear()
        for index in range(len(self._entries())):
            delattr(self, f"weight_{index}")
        layouts = {
            adaptation: {
                part: {name: list(weight.shape) for name, weight in own.items()} for part, own in parts.items()
            }
            for adaptation, parts in everything.items()
        }
        self.register_to_config(layouts=layouts)
        for index, (adaptation, part, name, _) in enumerate(self._entries()):
            self.register_buffer(f"weight_{index}", everything[adaptation][part][name].detach().to(self.placeholder))


def switch_adapter(module: nn.Module, adapter: Adapter | None, owner) -> None:
    """Makes a module compute with an adapter, or with none.

    Adapters are known to the module by a digest of their weights: modules may be shared between pipelines, and equal
    names in two of them must not be confused.

    Args:
        module: a diffusers model that takes peft adapters.
        adapter: None: the base as it was loaded.
        owner: the `DiffusionPipeline` that holds the module; diffusers suspends its offloading meanwhile.
    """
    held = getattr(module, "peft_config", {}) if getattr(module, "_hf_peft_config_loaded", False) else {}
    if adapter is None:
        if held:
            module.disable_adapters()
        return
    if adapter.key in held:
        held[adapter.key] = held.pop(adapter.key)  # the order in which they were used
    else:
        if len(held) >= MAX_INJECTED:
            module.delete_adapters(next(iter(held)))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several at once are meant
            state = dict(adapter.state)
            module.load_lora_adapter(state, prefix=None, adapter_name=adapter.key, _pipeline=owner)
    module.enable_adapters()
    module.set_adapter(adapter.key)
    module.requires_grad_(False)


def take_out_adapters(module: nn.Module) -> None:
    """Restores a module to the base as it was loaded, layer for layer."""
    if getattr(module, "_hf_peft_config_loaded", False):
        module.unload_lora()


class _LoraLoader(DiffusionPipeline, StableDiffusionLoraLoaderMixin):
    """Holds the two networks into which diffusers loads LoRA weights for Stable Diffusion."""

    def __init__(self, unet: nn.Module, text_encoder: nn.Module):
        super().__init__()
        self.register_modules(unet=unet, text_encoder=text_encoder)


def merge_lora(unet: nn.Module, text_encoder: nn.Module, source, scale: float, **kwargs) -> dict[str, nn.Module]:
    """Copies the denoiser, without its adapters, and the text encoder, and merges LoRA weights into the copies.

    Args:
        source, kwargs: as of diffusers' `load_lora_weights`.
        scale: factor of what the weights add.

    Raises:
        ValueError: as of diffusers, for weights that are no LoRA's.
    """
    merged = {"unet": copy.deepcopy(unet), "text_encoder": copy.deepcopy(text_encoder)}
    take_out_adapters(merged["unet"])
    loader = _LoraLoader(**merged)
    loader.load_lora_weights(source, **kwargs)
    loader.fuse_lora(lora_scale=scale)
    loader.unload_lora_weights()
    return merged


def check_fits(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Raises ValueError for anything but whole pairs of LoRA factors, each for a layer that the module has, and whose
    product is within half precision, in which they are stored: what they add would drown the layer beyond that.

    Other names must not pass: peft would put their weights in place of the base's.
    """
    layers = dict(module.named_modules())
    targets = sorted({name.rpartition(".lora_")[0] for name in state})
    for target in targets:
        layer = layers.get(target)
        layer = getattr(layer, "base_layer", layer)
        down, up = state.get(f"{target}.lora_A.weight"), state.get(f"{target}.lora_B.weight")
        if not isinstance(layer, (nn.Linear, nn.Conv2d)) or down is None or up is None:
            raise ValueError(f"no pair of weights for a layer of {type(module).__name__} at '{target[:80]}'")
        outputs, *inputs = layer.weight.shape
        expected = [[len(down), *inputs], [outputs, len(down), *(1 for _ in inputs[1:])]]
        if not len(down) or [list(down.shape), list(up.shape)] != expected:
            raise ValueError(f"weights of the shapes {list(down.shape)} and {list(up.shape)} at '{target}'")
        if not all(weight.is_floating_point() and weight.isfinite().all() for weight in (down, up)):
            raise ValueError(f"weights that are not finite at '{target}'")
        up, down = (weight.flatten(start_dim=1).double().abs() for weight in (up, down))
        most = torch.finfo(torch.float16).max
        # The first product is a bound that costs next to nothing.
        if up.max() * down.max() * len(down) > most and not (added := (up @ down).max()) <= most:
            raise ValueError(f"weights that overflow at '{target}', where they add up to {added:.3g}")
    if len(state) != 2 * len(targets):
        raise ValueError(f"weights besides those of LoRA for {type(module).__name__}")


def digest(state: Mapping[str, Tensor]) -> str:
    """Names LoRA weights by a mark that differs when they do."""
    summary = hashlib.sha256()
    for name, weight in sorted(state.items()):
        summary.update(name.encode() + weight.detach().float().cpu().numpy().tobytes())
    return "a" + summary.hexdigest()[:16]


def fingerprint(components: Mapping[str, nn.Module]) -> dict[str, list[float]]:
    """Takes a few weights of each component, to recognize the base that an adaptation belongs to in any precision."""
    marks = {}
    for name, module in components.items():
        # Names as in a module without adapters.
        weights = {
            key.replace(".base_layer.", "."): value for key, value in module.named_parameters() if ".lora_" not in key
        }
        # Matrices first: vectors such as those of normalizations may be alike in all networks.
        ordered = sorted(weights, key=lambda key: (weights[key].ndim < 2, key))
        chosen = ordered[:: max(1, len(ordered) // 4)][:4]
        marks[name] = [round(float(v), 6) for key in chosen for v in weights[key].detach().flatten()[:4]]
    return marks


def same_fingerprint(ours: Mapping, theirs: Mapping) -> bool:
    """Tells whether two fingerprints are of one base, up to the rounding of half precision."""
    return ours.keys() == theirs.keys() and all(
        len(ours[name]) == len(theirs[name])
        and all(abs(a - b) <= 2e-6 + 0.005 * abs(b) for a, b in zip(ours[name], theirs[name], strict=True))
        for name in ours
    )
