"""anomalysd_pipeline in one file, for diffusers to load where that package is not installed:

    DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)

Where it is installed, `AnomalySDPipeline.from_pretrained(folder)` does the same and runs no code from the folder.

These are modules of anomalysd-pipeline 0.1.0, joined by its module `bundle`: change them rather than this file.
Needs diffusers 0.42 or newer. Imports accelerate, diffusers, huggingface_hub, numpy, PIL, safetensors, scipy, timm, torch, torchvision.
License: Apache-2.0.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import hashlib
import importlib
import importlib.util
import inspect
import json
import math
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import TILELENGTH, TILEWIDTH
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput, logging
from diffusers.utils.accelerate_utils import apply_forward_hook
from diffusers.utils.torch_utils import randn_tensor
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from scipy import ndimage, stats
from torch import Tensor, nn


def _from_package(module):
    """A module of the package that this file does not hold."""
    try:
        return importlib.import_module(f"anomalysd_pipeline.{module}".rstrip("."))
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "anomalysd_pipeline":
            raise
        raise ImportError(
            "This needs more than the published pipeline.py holds: install the package anomalysd-pipeline and load "
            "with `AnomalySDPipeline.from_pretrained`."
        ) from error


# anomalysd_pipeline/__init__.py
# ------------------------------
# AnomalySD: find defects on industrial parts from zero to a handful of normal pictures (arXiv 2408.01960).

__version__ = "0.1.0"
EMBEDDED = str(Path(__file__).resolve().parent / "embedded")


# anomalysd_pipeline/adapters.py
# ------------------------------
# What adaptations have learned, kept beside one base: LoRA weights by name, and their switching in and out.

PARTS = ("denoiser", "decoder")
MAX_INJECTED = 4
"""Adapters a module holds at once; the longest unused ones are taken out, and put back when they are needed."""


class AdapterStore(ModelMixin, ConfigMixin):
    """The LoRA weights of any number of adaptations, savable as safetensors.

    Args:
        layouts: adaptation to part ("denoiser", "decoder") to the shape of each weight by its name in the part.
    """

    @register_to_config
    def __init__(self, layouts: dict[str, dict[str, dict[str, list[int]]]] | None = None):
        super().__init__()
        # Safetensors and `.to()` need a tensor even when there are no adaptations.
        self.register_buffer("placeholder", torch.zeros(1))
        self.register_to_config(layouts=layouts or {})
        for index, (_, _, _, shape) in enumerate(self._entries()):
            self.register_buffer(f"weight_{index}", torch.zeros(shape))

    def _entries(self) -> list[tuple[str, str, str, list[int]]]:
        """(adaptation, part, name, shape) of each buffer; sorted, because a saved config is."""
        return [
            (adaptation, part, name, list(shape))
            for adaptation, parts in sorted(self.config.layouts.items())
            for part, shapes in sorted(parts.items())
            for name, shape in sorted(shapes.items())
        ]

    @property
    def names(self) -> list[str]:
        """Names of the adaptations, alphabetically."""
        return sorted(self.config.layouts)

    def state(self, adaptation: str) -> dict[str, dict[str, Tensor]]:
        """Part to name to weight of an adaptation; parts that it does not change are missing."""
        state: dict[str, dict[str, Tensor]] = {}
        for index, (owner, part, name, _) in enumerate(self._entries()):
            if owner == adaptation:
                state.setdefault(part, {})[name] = getattr(self, f"weight_{index}")
        return state

    def add(self, adaptation: str, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Keeps the weights of an adaptation, in place of those of that name."""
        self._replace({**self._everything(), adaptation: state})

    def remove(self, adaptation: str) -> None:
        """Forgets an adaptation, if it is there."""
        self._replace({name: state for name, state in self._everything().items() if name != adaptation})

    def _everything(self) -> dict:
        return {name: self.state(name) for name in self.names}

    def _replace(self, everything: Mapping) -> None:
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


def switch_adapter(module: nn.Module, state: Mapping[str, Tensor] | None, pipe) -> None:
    """Makes a module compute with one adapter, or with none.

    Adapters are known to the module by a digest of their weights: modules may be shared between pipelines, and equal
    names in two of them must not be confused.

    Args:
        module: a diffusers model that takes peft adapters.
        state: LoRA weights by name, or None: the base as it was loaded.
        pipe: the pipeline that owns the module, whose offloading is suspended meanwhile.
    """
    held = getattr(module, "peft_config", {}) if getattr(module, "_hf_peft_config_loaded", False) else {}
    if not state:
        if held:
            module.disable_adapters()
        return
    key = digest(state)
    if key in held:
        held[key] = held.pop(key)  # the order in which they were used
    else:
        if len(held) >= MAX_INJECTED:
            module.delete_adapters(next(iter(held)))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several at once are meant
            module.load_lora_adapter(dict(state), prefix=None, adapter_name=key, _pipeline=pipe)
    module.enable_adapters()
    module.set_adapter(key)
    module.requires_grad_(False)


def take_out_adapters(module: nn.Module) -> None:
    """Restores a module to the base as it was loaded, layer for layer."""
    if getattr(module, "_hf_peft_config_loaded", False):
        module.unload_lora()


def check_fits(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Raises ValueError for anything but whole pairs of finite LoRA factors, each for a layer that the module has.

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
    if len(state) != 2 * len(targets):
        raise ValueError(f"weights besides those of LoRA for {type(module).__name__}")


def digest(state: Mapping[str, Tensor]) -> str:
    """A name for LoRA weights that differs when they do."""
    summary = hashlib.sha256()
    for name, weight in sorted(state.items()):
        summary.update(name.encode() + weight.detach().float().cpu().numpy().tobytes())
    return "a" + summary.hexdigest()[:16]


def fingerprint(components: Mapping[str, nn.Module]) -> dict[str, list[float]]:
    """A few weights of each component, to recognize the base that an adaptation belongs to in any precision."""
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
    """Whether two fingerprints are of one base, up to the rounding of half precision."""
    return ours.keys() == theirs.keys() and all(
        len(ours[name]) == len(theirs[name])
        and all(abs(a - b) <= 2e-6 + 0.005 * abs(b) for a, b in zip(ours[name], theirs[name], strict=True))
        for name in ours
    )


# anomalysd_pipeline/memory.py
# ----------------------------
# What is said to the system's allocator, so that memory that was used goes back to the system.

# From glibc's malloc.h.
_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8

_LARGE = 2**20
_LARGEST_THRESHOLD = 2**25
"""What glibc itself raises the threshold to, once blocks of that size were freed."""


def _glibc(function: str, *arguments: int) -> bool:
    """Calls one of its allocator's functions, which tell by 1 whether they did what was asked."""
    if sys.platform != "linux":
        return False
    found = getattr(ctypes.CDLL(None), function, None)  # musl does not have it
    return found is not None and found(*arguments) == 1


def share_arenas(count: int = 2) -> bool:
    """Bounds the number of heaps that glibc keeps, up to 8 for each core otherwise: each thread that works on a
    picture leaves one behind that stays as large as it ever was. To be called before there are threads.

    Args:
        count: heaps that all threads share.

    Returns:
        Whether the system's allocator is one that can be told.
    """
    return _glibc("mallopt", _M_ARENA_MAX, count)


@contextlib.contextmanager
def large_blocks_returned() -> Iterator[None]:
    """Before, what is free goes back to the system, and meanwhile blocks of a MiB and more as soon as they are freed.

    Otherwise glibc keeps blocks of up to 32 MiB in its heap, where what is stored between them stops them from ever
    being returned. For work that makes many of different sizes and stores little; where the same sizes come again and
    again, as in a network, it would cost time. On other systems nothing changes.
    """
    _glibc("malloc_trim", 0)
    _glibc("mallopt", _M_MMAP_THRESHOLD, _LARGE)
    try:
        yield
    finally:
        _glibc("mallopt", _M_MMAP_THRESHOLD, _LARGEST_THRESHOLD)


# anomalysd_pipeline/collection.py
# --------------------------------
# From normal pictures to the vectors of a prototype bank, Eq. (13) of AnomalySD (arXiv 2408.01960), and how much they
# differ between pictures.

COMPARED_PICTURES = 3
"""Normal pictures from which on they are compared, see `fill_bank`: of fewer, none can be held out for a threshold."""

_CHECKED = 2**12
_COMPARED = 2**14
_collection_ENTRIES = 2**22


@torch.no_grad()
def collect_prototypes(extractor: nn.Module, images: Tensor, rotations: int = 4) -> Tensor:
    """All feature vectors of rotated normal pictures, P_c of Eq. (13).

    Args:
        extractor: A [`PrototypeExtractor`], or any module from [N, 3, H, W] to [N, C, h, w].
        images: [K, 3, H, W] in [-1, 1], on the extractor's device.
        rotations: Number of angles, evenly spaced over the full turn and starting at 0; multiples of 90 degrees are
            exact, others are bilinear with the border mirrored.

    Returns:
        [M, C], M = K * rotations * h * w.

    Raises:
        ValueError: If `images` has another shape, `rotations` is less than 1, or features are not finite.
    """
    if images.ndim != 4 or images.shape[1] != 3 or len(images) == 0:
        raise ValueError(f"`images` must be [K, 3, H, W] with at least one picture, got {list(images.shape)}.")
    if rotations < 1:
        raise ValueError(f"`rotations` must be at least 1, got {rotations}.")
    features, done = None, 0
    for step in range(rotations):
        for image in images.split(1):  # one by one, which takes least memory
            psi = extractor(_rotate(image, 360 * step / rotations))
            rows = psi.permute(0, 2, 3, 1).flatten(end_dim=2)
            if features is None:  # in place: pieces and their whole at once would take twice the memory
                features = rows.new_empty(len(images) * rotations * len(rows), rows.shape[1])
            features[done : done + len(rows)] = rows
            done += len(rows)
    if not is_finite(features):
        raise ValueError(
            "`images` gave features that are not finite: use finite pictures in [-1, 1] or a wider dtype."
        )
    return features


def fill_bank(
    bank, category: str, extractor: nn.Module, images: Tensor, rotations: int = 4, compare: bool = False
) -> None:
    """Stores the prototypes of normal pictures in a [`PrototypeBank`], with what is known of where each is from.

    Args:
        compare: whether to know by the differences between the pictures what another one lacks, how its colors
            deviate by themselves, and how unlike it is as a whole. Turned copies of one picture do not tell that.
        Others, and errors: see [`collect_prototypes`] and `PrototypeBank.add`.
    """
    whole = len(images) if compare else 0
    colors = getattr(extractor, "color_channels", 0) if compare else 0
    features = collect_prototypes(extractor, images, rotations)
    sources = prototype_sources(len(features), len(images), rotations)
    with large_blocks_returned():
        bank.add(category, features, sources=sources, unturned=len(features) // rotations, whole=whole, colors=colors)


def is_finite(features: Tensor) -> bool:
    """Whether all of [M, C] are finite; looked at in pieces, as PyTorch's own check takes more memory than they do."""
    return all(bool(torch.isfinite(part).all()) for part in features.split(_CHECKED))


def prototype_sources(count: int, pictures: int, rotations: int) -> Tensor:
    """From which picture each of the `count` vectors of [`collect_prototypes`] is, int64 [count]; from which turned
    copy, where there is one picture alone."""
    positions = count // (pictures * rotations)
    if pictures == 1:
        return torch.arange(rotations).repeat_interleave(positions)
    return torch.arange(pictures).repeat_interleave(positions).repeat(rotations)


def spread_of(features: Tensor, sources: Tensor, kept: Tensor, seed: int) -> Tensor:
    """How far vectors are from the nearest of another source, as the square of the Euclidean distance.

    Args:
        features: [M, C].
        sources: whole numbers [M], at least two different ones.
        kept: indices [S] of the vectors that are asked for.
        seed: of the sample of at most 16384 vectors with which they are compared.

    Returns:
        float32 [S].
    """
    others = torch.arange(len(features), device=features.device)
    if len(others) > _COMPARED:
        chosen = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))[:_COMPARED]
        others = others[chosen.to(others.device)]
    center = features.float().mean(dim=0)
    compared = features[others].float()  # a copy
    compared -= center
    squares, found = compared.square().sum(dim=1), features.new_empty(len(kept), dtype=torch.float32)
    # Into one tensor, and in place: small results between large temporaries leave memory that is not given back.
    for part, result in zip(
        *(tensor.split(max(1, _collection_ENTRIES // len(compared))) for tensor in (kept, found)), strict=True
    ):
        query = features[part].float() - center
        distances = torch.addmm(squares, query, compared.T, alpha=-2)
        distances += query.square().sum(dim=1, keepdim=True)
        distances.masked_fill_(sources[part][:, None] == sources[others][None], torch.inf)
        torch.amin(distances, dim=1, out=result)
    return found.clamp_(min=0)


def _rotate(images: Tensor, degrees: float) -> Tensor:
    if degrees % 90 == 0:
        return torch.rot90(images, int(degrees // 90), dims=(2, 3))
    return _resample_rotated(images, degrees)


def _resample_rotated(images: Tensor, degrees: float) -> Tensor:
    height, width = images.shape[-2:]
    angle = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    cos, sin = angle.cos().item(), angle.sin().item()
    theta = images.new_tensor([[cos, -sin * height / width, 0], [sin * width / height, cos, 0]])
    grid = F.affine_grid(theta.expand(len(images), -1, -1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


# anomalysd_pipeline/data.py
# --------------------------
# Pictures in: safe loading, folders, and the tensors made from them.

MIN_SIDE = 8
MAX_PIXELS = 100_000_000
LARGEST_TILE = 4_000_000
"""Pixels of a TIFF's tile that a small picture may be stored in; a decoder makes room for a whole one."""
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
# Pillow knows dozens of formats, some of which start other programs (EPS); an upload may only reach these decoders.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
_RESAVE = "open it in an image viewer and save it again as an 8-bit PNG or JPEG"


def load_image(source) -> Image.Image:
    """Turns whatever a person calls a picture into an 8-bit RGB PIL image.

    Args:
        source: one of
            - a path to a BMP, GIF, JPEG, PNG, TIFF or WebP file, recognized by its content and not by its suffix;
            - a PIL image of any mode;
            - a NumPy array `[H, W]`, `[H, W, 1]`, `[H, W, 3]` or `[H, W, 4]`: uint8, uint16, or float in [0, 1];
            - a tensor `[C, H, W]` or `[1, C, H, W]` with 1, 3 or 4 channels, of the same types and ranges.

    The rotation noted in EXIF is applied, an animation gives its first frame, and transparency is laid over white.
    16-bit gray, whose real depth no file states, is divided by 65535 where any value exceeds 255 and otherwise read as
    8-bit; a PIL image of mode `F` is read as [0, 1] where no value exceeds 1, and as [0, 255] otherwise.

    Returns:
        A new image in mode RGB, at least 8 x 8 and at most 100 megapixels (`MAX_PIXELS`, checked before decoding, as
        are the tiles of a TIFF: none may exceed both its picture and `LARGEST_TILE`).

    Raises:
        ValueError: the source is missing, a folder, damaged, no picture, too small, too large, of a wrong shape or
            type, or holds values that are not finite or out of range; the sentence names the source and the remedy.
    """
    if isinstance(source, Image.Image):
        return flatten(_decode(source, "`source`, a PIL image,"), "`source`, a PIL image,", "white")
    if isinstance(source, (str, os.PathLike)):
        name = f"`source` '{os.fspath(source)}'"
        return flatten(open_image(source, name), name, "white")
    if isinstance(source, torch.Tensor):
        return _from_array(_channels_last(source), f"`source`, a tensor of shape {list(source.shape)},")
    if isinstance(source, np.ndarray):
        return _from_array(source, f"`source`, an array of shape {list(source.shape)},")
    raise ValueError(
        f"`source` is a {type(source).__name__}; give a path, a PIL image, a NumPy array or a torch tensor instead."
    )


def open_image(path: str | os.PathLike, name: str) -> Image.Image:
    """Decodes a file's first frame with the checks of `load_image`: upright, in the mode it has in the file.

    Args:
        path: a picture file.
        name: what an error calls it, such as "`path` 'mask.png'".

    Raises:
        ValueError: as `load_image`.
    """
    with _open(path, name) as image:
        return _decode(image, name)


def _open(path: str | os.PathLike, name: str) -> Image.Image:
    """Reads the header only."""
    if os.path.isdir(path):
        raise ValueError(f"{name} is a folder; give a picture file, or list the folder with `list_images`.")
    if not os.path.isfile(path):
        raise ValueError(f"{name} does not exist; check the path and its spelling.")
    with warnings.catch_warnings():
        # Pillow warns about large and odd headers on stderr; what matters of it is said in our own sentence.
        warnings.simplefilter("ignore")
        try:
            return Image.open(path, formats=FORMATS)
        except Image.DecompressionBombError as error:
            raise ValueError(_too_large(name)) from error
        except UnidentifiedImageError as error:
            raise ValueError(
                f"{name} is damaged or not a picture in a format we read (BMP, GIF, JPEG, PNG, TIFF, WebP); {_RESAVE}."
            ) from error
        except PermissionError as error:
            raise ValueError(f"{name} may not be read by this user; change its permissions.") from error
        # Decoders meet damaged bytes with nearly every exception there is: OSError, SyntaxError, struct.error, ...
        except Exception as error:
            raise ValueError(f"{name} is damaged and cannot be read ({error}); copy it anew, or {_RESAVE}.") from error


def _decode(image: Image.Image, name: str) -> Image.Image:
    """Checks the size before any pixel is decoded, then decodes the current frame and turns it upright."""
    width, height = image.size
    if min(width, height) < MIN_SIDE:
        raise ValueError(_too_small(name, width, height))
    if width * height > MAX_PIXELS:
        raise ValueError(_too_large(name, f" ({width} x {height})"))
    if _tile_pixels(image, name) > max(LARGEST_TILE, width * height):
        raise ValueError(f"{name} is stored in tiles far larger than itself; save it again as a PNG or JPEG.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ImageOps.exif_transpose(image)
        except Image.DecompressionBombError as error:
            raise ValueError(_too_large(name)) from error
        except Exception as error:
            raise ValueError(
                f"{name} is cut short or damaged and cannot be decoded ({error}); copy it anew, or {_RESAVE}."
            ) from error


def _tile_pixels(image: Image.Image, name: str) -> int:
    """Of each tile of a TIFF, as its header claims; 0 for what has none."""
    tags = getattr(image, "tag_v2", {})
    try:
        return int(tags.get(TILEWIDTH, 0)) * int(tags.get(TILELENGTH, 0))
    except (TypeError, ValueError) as error:  # several numbers, or none
        raise ValueError(f"{name} is damaged: its tiles have no size; copy it anew, or {_RESAVE}.") from error


def _too_small(name: str, width: int, height: int) -> str:
    return (
        f"{name} has {width} x {height} pixels (width x height); a picture needs at least {MIN_SIDE} x {MIN_SIDE}, "
        "so give a larger one."
    )


def _too_large(name: str, size: str = "") -> str:
    return f"{name} has more than {MAX_PIXELS // 1_000_000} megapixels{size}; scale it down or cut out the part."


def flatten(image: Image.Image, name: str, background: str) -> Image.Image:
    """Any mode to RGB, gray of any depth as `load_image` reads it; transparent pixels show the `background` color.

    Raises:
        ValueError: gray values are not finite or out of range; the sentence starts with `name`.
    """
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _from_gray(np.asarray(image).astype(np.float64), name, 65535)
    if image.mode == "F":
        return _from_gray(np.asarray(image).astype(np.float64), name, 1)
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    canvas = Image.new("RGBA", image.size, background)
    canvas.alpha_composite(image)
    return canvas.convert("RGB")


def _from_gray(values: np.ndarray, name: str, full: int) -> Image.Image:
    """Gray of uncertain depth: values up to `full` (1 or 65535) or up to 255, told apart by the largest."""
    if not np.isfinite(values).all():
        raise ValueError(f"{name} holds NaN or infinite values; replace them before loading.")
    highest = values.max()
    if values.min() < 0 or highest > max(full, 255):
        raise ValueError(
            f"{name} has gray values from {values.min():g} to {highest:g}; scale them to [0, {max(full, 255)}]."
        )
    # The larger of the two readings applies only where the smaller cannot: a dark 8-bit picture stays dark.
    low, high = sorted((full, 255))
    gray = np.rint(values * (255 / (low if highest <= low else high))).astype(np.uint8)
    return Image.fromarray(gray).convert("RGB")


def _channels_last(tensor: torch.Tensor) -> np.ndarray:
    """Tensor `[C, H, W]` or `[1, C, H, W]` to an array `[H, W, C]`."""
    plane = tensor.detach().cpu()
    if plane.ndim == 4 and plane.shape[0] == 1:
        plane = plane[0]
    if plane.ndim != 3 or plane.shape[0] not in (1, 3, 4):
        raise ValueError(
            f"`source` is a tensor of shape {list(tensor.shape)}; give [3, H, W] or [1, 3, H, W] in [0, 1]."
        )
    if plane.is_floating_point():
        plane = plane.float()  # NumPy has no bfloat16
    return plane.permute(1, 2, 0).numpy()


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise ValueError(f"{name} is no picture; give [H, W], [H, W, 3] or [H, W, 4] (a tensor: [3, H, W]).")
    height, width = array.shape[:2]
    if min(width, height) < MIN_SIDE:
        raise ValueError(_too_small(name, width, height))
    if width * height > MAX_PIXELS:
        raise ValueError(_too_large(name))
    if np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all():
            raise ValueError(f"{name} holds NaN or infinite values; replace them before loading.")
        low, high = float(array.min()), float(array.max())
        # Resizing and float rounding overshoot a little; a picture in [-1, 1] or [0, 255] overshoots by far.
        if low < -0.01 or high > 1.01:
            raise ValueError(f"{name} has float values from {low:g} to {high:g}; scale them to [0, 1], or give uint8.")
        array = np.rint(array.clip(0, 1) * 255).astype(np.uint8)
    elif array.dtype == np.uint16:
        array = np.rint(array / 257).astype(np.uint8) if array.max() > 255 else array.astype(np.uint8)
    elif array.dtype != np.uint8:
        raise ValueError(f"{name} has type {array.dtype}; give uint8, uint16, or float in [0, 1].")
    return flatten(Image.fromarray(np.ascontiguousarray(array)), name, "white")


def list_images(source) -> list[Path]:
    """Lists the pictures of a folder, a file, or several of either.

    Args:
        source: a folder (searched with its subfolders, links to folders not followed), a picture file, or an iterable
            of those. In folders, files count that end in one of `SUFFIXES`, in upper or lower case, and hidden files
            and folders are skipped; a file given by name is taken as it is.

    Returns:
        Paths, those of each folder sorted by their relative path as text; a path reached twice is listed once.

    Raises:
        ValueError: a path does not exist, or there is no picture at all.
    """
    sources = [source] if isinstance(source, (str, os.PathLike)) else list(source)
    found: dict[Path, None] = {}
    for entry in map(Path, sources):
        if os.path.isdir(entry):
            found.update(dict.fromkeys(_walk(entry)))
        elif os.path.isfile(entry):
            found[entry] = None
        else:
            raise ValueError(f"`source` '{entry}' does not exist; give a folder of pictures or a picture file.")
    if not found:
        where = ", ".join(f"'{entry}'" for entry in sources) or "an empty list"
        raise ValueError(f"`source` {where} holds no pictures; put files in it that end in {', '.join(SUFFIXES)}.")
    return list(found)


def _walk(folder: Path) -> list[Path]:
    paths = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [Path(root, name) for name in files if not name.startswith(".") and name.lower().endswith(SUFFIXES)]
    return sorted(paths, key=lambda path: path.relative_to(folder).as_posix())


def load_images(
    paths: Iterable[str | os.PathLike], on_error: Callable[[Path, str], None] | None = None
) -> list[tuple[Path, Image.Image]]:
    """Loads pictures with `load_image`, in order.

    Args:
        paths: picture files.
        on_error: called with the path and the sentence of each picture that cannot be loaded, which is then skipped.
            Without it the first such picture raises.

    Returns:
        Pairs of path and RGB image.

    Raises:
        ValueError: a picture cannot be loaded and there is no `on_error`.
    """
    loaded = []
    for path in map(Path, paths):
        try:
            loaded.append((path, load_image(path)))
        except ValueError as error:
            if on_error is None:
                raise
            on_error(path, str(error))
    return loaded


def to_tensor(image: Image.Image, size: int | tuple[int, int]) -> torch.Tensor:
    """An RGB image as float32 `[3, H, W]` in [-1, 1].

    Resized with Lanczos, which antialiases when it shrinks; the aspect ratio is not kept. `size` is a square's side or
    `(H, W)`, in pixels.

    Raises:
        ValueError: `image` is not in mode RGB.
    """
    if image.mode != "RGB":
        raise ValueError(f"`image` has mode {image.mode}; pass it through `load_image`, which gives RGB.")
    height, width = (size, size) if isinstance(size, int) else size
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    pixels = np.asarray(image, dtype=np.float32) / 127.5 - 1
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def augment(
    image: torch.Tensor,
    generator: torch.Generator,
    brightness: float = 0.1,
    contrast: float = 0.1,
    scale: float = 0.1,
    degrees: float = 15.0,
    mask: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Varies a normal picture: contrast, brightness, scaling and rotation, as the paper does with the few shots.

    Args:
        image: float `[3, H, W]` in [-1, 1].
        generator: the source of the four draws, each uniform between minus and plus its limit.
        brightness: limit of the shift, as a share of the full range from black to white.
        contrast: limit of the relative change of each pixel's difference to the picture's mean.
        scale: limit of the relative change in size, below 1.
        degrees: limit of the rotation about the center. What comes in at the edges is the picture reflected.
        mask: bool `[H, W]`, scaled and turned along with the picture (nearest neighbor), or None.

    Returns:
        float `[3, H, W]` in [-1, 1]; with `mask`, the pair of it and the mask, bool `[H, W]`.

    Raises:
        ValueError: `image` has another shape, or `scale` is not in [0, 1).
    """
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"`image` has shape {list(image.shape)}; give one picture as [3, H, W] in [-1, 1].")
    if not 0 <= scale < 1:
        raise ValueError(f"`scale` is {scale}; give a value in [0, 1).")
    draws = torch.rand(4, generator=generator, device=generator.device).mul(2).sub(1).tolist()
    shift, gain, zoom = 2 * brightness * draws[0], 1 + contrast * draws[1], 1 + scale * draws[2]
    angle = torch.deg2rad(torch.tensor(degrees * draws[3]))
    cos, sin = angle.cos().item() / zoom, angle.sin().item() / zoom
    height, width = image.shape[-2:]
    # Grid coordinates run from -1 to 1 along both axes, so a rotation of pixels carries the aspect ratio.
    affine = torch.tensor([[[cos, -sin * height / width, 0.0], [sin * width / height, cos, 0.0]]]).to(image)
    grid = torch.nn.functional.affine_grid(affine, [1, 3, height, width], align_corners=False)
    turned = torch.nn.functional.grid_sample(image[None], grid, padding_mode="reflection", align_corners=False)[0]
    mean = turned.mean()
    varied = ((turned - mean) * gain + mean + shift).clamp(-1, 1)
    if mask is None:
        return varied
    options = {"mode": "nearest", "padding_mode": "reflection", "align_corners": False}
    return varied, torch.nn.functional.grid_sample(mask[None, None].to(image), grid, **options)[0, 0] > 0.5


# anomalysd_pipeline/images.py
# ----------------------------
# Pictures between people and tensors: lists of anything in, maps and PIL images at their own size out.

def load_pictures(images, name: str) -> list[Image.Image]:
    """A picture, or a list of pictures, of any kind that `load_image` takes.

    Args:
        images: one or several; an array or tensor with a leading batch dimension counts as several.
        name: the argument's name, for the error.

    Raises:
        ValueError: for none, or one that cannot be read.
    """
    if isinstance(images, (np.ndarray, Tensor)):
        images = [images] if images.ndim < 4 else list(images)
    elif not isinstance(images, (list, tuple)):
        images = [] if images is None else [images]
    if not images:
        raise ValueError(f"`{name}` must be a picture or a list with at least one.")
    return [load_image(image) for image in images]


def resize(maps: Tensor, size: tuple[int, int], mode: str = "bilinear") -> Tensor:
    """Maps `[N, h, w]` to `[N, H, W]`, `mode` "bilinear" or "nearest"."""
    corners = {"align_corners": False} if mode == "bilinear" else {}
    return torch.nn.functional.interpolate(maps[:, None], size=size, mode=mode, **corners)[:, 0]


def stack(maps: list[Tensor], output_type: str):
    """One array or tensor `[N, H, W]` where all maps have one size, else a list; `output_type` "np" or "pt"."""
    if output_type == "np":
        maps = [m.cpu().numpy() for m in maps]
    if len({tuple(m.shape) for m in maps}) > 1:
        return maps
    return np.stack(maps) if output_type == "np" else torch.stack(maps)


def to_pil(image: Tensor, size: tuple[int, int]) -> Image.Image:
    """`[3, h, w]` in [-1, 1] to an RGB image of `size` (H, W)."""
    array = ((image.permute(1, 2, 0).cpu().numpy() + 1) * 127.5).round().clip(0, 255).astype(np.uint8)
    return Image.fromarray(array).resize((size[1], size[0]), Image.Resampling.BICUBIC)


# anomalysd_pipeline/masks.py
# ---------------------------
# Which pixels to repaint: multi-scale and prototype-guided masks to detect, foreground and random masks to train.

MASK_DESIGNS = ("foreground", "random", "detection")
"""How training masks are drawn; see `few_shot.FewShotDataset`."""


@dataclass(frozen=True)
class ScalePasses:
    """The inpainting passes of one scale.

    scale: k, the picture being cut into k x k cells.
    masks: float32 `[P, 1, H, W]` in {0, 1}, 1 where the pass repaints; disjoint, and their sum is all ones.
    """

    scale: int
    masks: Tensor


def multi_scale_masks(
    height: int, width: int, scales: Sequence[int] = (1, 2, 4, 8), grouping: str = "none"
) -> list[ScalePasses]:
    """Cuts a picture into k x k cells for each scale k (the paper's multi-scale masks).

    Args:
        height, width: the picture's size in pixels; any size works, cell borders are rounded to whole pixels.
        scales: the k, each in [1, min(height, width)] and given once.
        grouping: "none" gives each cell its own pass, 85 in all for the paper's scales; "grouped" lets cells of one
            scale share a pass where they do not touch, not even at a corner: 1 + 4 + 4 + 4 passes.

    Returns:
        One entry per scale, in the order of `scales`.

    Raises:
        ValueError: the grouping is unknown, or the scales are none, repeated, or out of range.
    """
    if grouping not in ("none", "grouped"):
        raise ValueError(f'`grouping` is {grouping!r}; give "none" or "grouped".')
    if not scales or len(set(scales)) != len(scales):
        raise ValueError(f"`scales` is {tuple(scales)}; give one or more scales, each once, such as (1, 2, 4, 8).")
    for scale in scales:
        if not 1 <= scale <= min(height, width):
            raise ValueError(
                f"`scales` holds {scale}; for {height} x {width} pixels give scales from 1 to {min(height, width)}."
            )
    # Cells of equal row parity and equal column parity always have a whole cell between them.
    period = {scale: scale if grouping == "none" else min(scale, 2) for scale in scales}
    passes = []
    for scale in scales:
        rows, columns = (_cell_index(length, scale) % period[scale] for length in (height, width))
        kinds = torch.arange(period[scale])
        in_rows = (rows == kinds[:, None]).float()  # [period, H]
        in_columns = (columns == kinds[:, None]).float()  # [period, W]
        masks = in_rows[:, None, :, None] * in_columns[None, :, None, :]  # [period, period, H, W]
        passes.append(ScalePasses(scale, masks.reshape(-1, 1, height, width)))
    return passes


def _cell_index(length: int, cells: int) -> Tensor:
    """The cell each pixel of a row falls in, `[length]`, borders rounded to the nearest pixel."""
    borders = (torch.arange(1, cells) * 2 * length + cells) // (2 * cells)
    return torch.bucketize(torch.arange(length), borders, right=True)


def variance_threshold(values: Tensor | np.ndarray) -> float:
    """The threshold r = argmin_r Var({E >= r}) + Var({E < r}) of Eq. 15.

    This is the plain sum of the two population variances, not Otsu's sum weighted by size. The minimum is exact over
    all splits of the sorted values, in O(n log n). The paper splits by `E >= r` but marks `E > r`; the two agree for
    any r strictly between the two sides, and we return the largest value of the lower side, so that `values > r` is
    the upper side. Of splits that tie (to 1e-10 of the sum) the highest r is taken, so that less is marked.

    Args:
        values: any shape, any float type; computed in float64.

    Returns:
        r, one of the values. Where all values are equal it is that value, and nothing lies above it.

    Raises:
        ValueError: there are no values, or some are not finite.
    """
    ordered = torch.as_tensor(values).detach().double().cpu().flatten().sort().values.numpy()
    if not ordered.size or not np.isfinite(ordered).all():
        raise ValueError("`values` is empty or holds NaN or infinite values; give at least one value, all finite.")
    splits = np.flatnonzero(ordered[1:] > ordered[:-1])  # the last index of each possible lower side
    if not splits.size:
        return float(ordered[0])
    cost = _running_variance(ordered)[splits] + _running_variance(ordered[::-1])[::-1][splits + 1]
    return float(ordered[splits[np.flatnonzero(cost <= cost.min() * (1 + 1e-10))[-1]]])


def _running_variance(values: np.ndarray) -> np.ndarray:
    """Population variance of the first 1, 2, ..., n values.

    Welford's update written as cumulative sums: each term is nonnegative, so nothing cancels as it does in
    E[x^2] - E[x]^2.
    """
    centered = values - values[0]
    count = np.arange(1, len(values) + 1)
    mean = np.cumsum(centered) / count
    previous = np.concatenate(([0.0], mean[:-1]))
    return np.cumsum((centered - previous) * (centered - mean)) / count


def prototype_mask(distances: Tensor, size: int | tuple[int, int]) -> Tensor:
    """The prototype-guided mask M^(p) = upsample(1[E > r]) (Eq. 15), with r found for each picture on its own.

    Args:
        distances: E, float `[N, h, w]`, squared distances to the nearest prototype (Eq. 14).
        size: of the result, a square's side or `(H, W)`, in pixels; nearest-neighbor upsampling.

    Returns:
        bool `[N, 1, H, W]`, True where the picture is to be repainted; empty where all distances are equal.

    Raises:
        ValueError: `distances` has another shape or holds values that are not finite.
    """
    if distances.ndim != 3:
        raise ValueError(f"`distances` has shape {list(distances.shape)}; give [N, h, w].")
    above = torch.stack([image > variance_threshold(image) for image in distances])
    return torch.nn.functional.interpolate(above[:, None].float(), size=size) > 0


# The rules by which an object is believed; see `foreground_mask`.
MIN_AREA, MAX_AREA = 0.03, 0.9
MIN_CONTRAST = 0.08
MIN_NOISE_RATIO = 3.0
MIN_SEPARATION = 0.65
MIN_EDGE = 0.4
MAX_BORDER_CONTACT = 0.7
MAX_PARTS = 6
MIN_KEPT = 0.8
MIN_SOLIDITY = 0.4


def foreground_mask(image: Tensor) -> Tensor:
    """Finds the object m_f on its background, for `training_mask`.

    The background is modeled from a frame along the borders, as a color that changes linearly over the picture, fitted
    with outliers left out. Pixels are split by Otsu's threshold on their color distance to it; small components are
    dropped and holes filled. The result is believed only if all of this holds, each by the constant of its name:

    - it covers 3% to 90% of the picture (`MIN_AREA`, `MAX_AREA`);
    - its mean color distance exceeds the background's by 0.08 of the full range (`MIN_CONTRAST`) and by 3 standard
      deviations of the background (`MIN_NOISE_RATIO`);
    - the split explains 65% of the variance of the distance (`MIN_SEPARATION`);
    - at its outline the distance changes by 0.4 of that difference within 1/32 of the picture's side (`MIN_EDGE`): a
      vignette or a soft stain has no outline;
    - along the borders it takes at most 0.7 of the share it takes in the whole picture (`MAX_BORDER_CONTACT`): a
      texture looks the same at the border as inside;
    - the components kept are at most 6 (`MAX_PARTS`), hold 80% of the pixels above the threshold (`MIN_KEPT`) and are
      not mostly filled holes (`MIN_SOLIDITY`): an object is compact, a texture's bright spots are many and scattered.

    Args:
        image: float `[3, H, W]` in [-1, 1], each side at least 8 pixels.

    Returns:
        bool `[H, W]`, True on the object; all True for textures and where no plausible object stands out.

    Raises:
        ValueError: `image` has another shape.
    """
    if image.ndim != 3 or image.shape[0] != 3 or min(image.shape[1:]) < 8:
        raise ValueError(f"`image` has shape {list(image.shape)}; give one picture as [3, H, W], 8 x 8 or larger.")
    distance, border = _background_distance(image.detach().float().cpu().numpy())
    everything = torch.ones(image.shape[1:], dtype=torch.bool, device=image.device)
    if distance.max() < MIN_CONTRAST:  # one flat color has no two classes to split
        return everything
    raw = distance > _otsu_threshold(distance)
    mask = _main_components(raw)
    return torch.from_numpy(mask).to(image.device) if _is_plausible(mask, raw, distance, border) else everything


def _background_distance(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Color distance to the background, `[H, W]` in [0, 1], and the frame of border pixels it was fitted on."""
    height, width = image.shape[1:]
    # A little smoothing: sensor noise and JPEG blocks are no objects.
    smooth = ndimage.gaussian_filter(image, (0, max(height, width) / 200, max(height, width) / 200))
    edge = max(2, min(height, width) // 32)
    border = np.ones((height, width), dtype=bool)
    border[edge:-edge, edge:-edge] = False
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    basis = np.stack([np.ones_like(x), y, x], axis=-1)  # [H, W, 3]
    colors = smooth.transpose(1, 2, 0).astype(np.float64)  # [H, W, 3]
    points, samples = basis[border], colors[border]
    # The start must already hold where an object reaches the border, so a median; least squares then refines it.
    residual = np.linalg.norm(samples - np.median(samples, axis=0), axis=1)
    for _ in range(3):
        inliers = residual <= max(2.5 * np.median(residual), 0.02)
        plane = np.linalg.lstsq(points[inliers], samples[inliers], rcond=None)[0]
        residual = np.linalg.norm(samples - points @ plane, axis=1)
    return np.linalg.norm(colors - basis @ plane, axis=-1) / np.sqrt(12), border


def _otsu_threshold(values: np.ndarray) -> float:
    """The upper edge of the lower class in the split with the greatest variance between classes."""
    counts, edges = np.histogram(values, bins=256)
    centers = (edges[1:] + edges[:-1]) / 2
    below = np.cumsum(counts)[:-1]
    above = values.size - below
    sums = np.cumsum(counts * centers)
    mean_below, mean_above = sums[:-1] / below, (sums[-1] - sums[:-1]) / above
    return float(edges[1 + np.argmax(below * above * (mean_above - mean_below) ** 2)])


def _main_components(raw: np.ndarray) -> np.ndarray:
    """Components of at least a tenth of the largest one's area, holes filled."""
    labels, count = ndimage.label(raw)
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    areas[0] = 0
    return ndimage.binary_fill_holes((areas >= max(1, 0.1 * areas.max()))[labels])


def _is_plausible(mask: np.ndarray, raw: np.ndarray, distance: np.ndarray, border: np.ndarray) -> bool:
    area = mask.mean()
    if not MIN_AREA <= area <= MAX_AREA:
        return False
    background, kept = distance[~mask], raw & mask
    contrast = distance[kept].mean() - background.mean()
    between = raw.mean() * (1 - raw.mean()) * (distance[raw].mean() - distance[~raw].mean()) ** 2
    window = max(3, min(mask.shape) // 32)
    step = ndimage.maximum_filter(distance, window) - ndimage.minimum_filter(distance, window)
    outline = mask & ~ndimage.binary_erosion(mask, border_value=1)
    return bool(
        contrast >= MIN_CONTRAST
        and contrast >= MIN_NOISE_RATIO * background.std()
        and between >= MIN_SEPARATION * distance.var()
        and np.median(step[outline]) >= MIN_EDGE * contrast
        and mask[border].mean() <= MAX_BORDER_CONTACT * area
        and ndimage.label(mask)[1] <= MAX_PARTS
        and kept.sum() >= MIN_KEPT * raw.sum()
        and kept.sum() >= MIN_SOLIDITY * mask.sum()
    )


def random_rectangle_mask(
    height: int, width: int, generator: torch.Generator, min_fraction: float = 0.125, max_fraction: float = 1.0
) -> Tensor:
    """A random rectangle m_r, float32 `[1, H, W]` in {0, 1}, 1 inside.

    Each side is uniform between `min_fraction` and `max_fraction` of the picture's side, at least one pixel, and the
    place is uniform inside the picture. The default smallest side is a cell of the finest detection scale, the largest
    the whole picture.

    Raises:
        ValueError: not 0 < min_fraction <= max_fraction <= 1.
    """
    if not 0 < min_fraction <= max_fraction <= 1:
        raise ValueError(
            f"`min_fraction` is {min_fraction} and `max_fraction` {max_fraction}; give 0 < min_fraction <= "
            "max_fraction <= 1."
        )
    mask = torch.zeros(1, height, width)
    draws = torch.rand(4, generator=generator, device=generator.device).tolist()
    (top, bottom), (left, right) = (
        _interval(length, min_fraction + (max_fraction - min_fraction) * extent, place)
        for length, extent, place in ((height, *draws[:2]), (width, *draws[2:]))
    )
    mask[:, top:bottom, left:right] = 1
    return mask


def _interval(length: int, fraction: float, place: float) -> tuple[int, int]:
    extent = max(1, round(length * fraction))
    start = int(place * (length - extent + 1))
    return start, start + extent


def training_mask(
    foreground: Tensor,
    generator: torch.Generator,
    gammas: Sequence[float] = (0.0, 0.2, 0.5),
    max_draws: int = 50,
) -> Tensor:
    """Draws a training mask by the paper's foreground mask mechanism.

    Random rectangles m_r are drawn until IoU(m_r, m_f) > gamma, with gamma drawn from `gammas` at equal odds. No
    rectangle may reach a high gamma on a thin object, so after `max_draws` the best rectangle seen is taken.

    Args:
        foreground: m_f, bool or {0, 1}, `[H, W]` or `[1, H, W]`.
        generator: the source of all draws.

    Returns:
        float32 `[1, H, W]` in {0, 1} on the CPU, 1 where the picture is to be repainted.

    Raises:
        ValueError: `foreground` is empty, `gammas` is empty or not in [0, 1), or `max_draws` is below 1.
    """
    if not foreground.any():
        raise ValueError("`foreground` marks no pixel; give all ones where there is no object, as for a texture.")
    if not gammas or not all(0 <= gamma < 1 for gamma in gammas):
        raise ValueError(f"`gammas` is {tuple(gammas)}; give one or more values in [0, 1).")
    if max_draws < 1:
        raise ValueError(f"`max_draws` is {max_draws}; give 1 or more.")
    height, width = foreground.shape[-2:]
    foreground = foreground.reshape(1, height, width).bool().cpu()
    choice = torch.randint(len(gammas), (), generator=generator, device=generator.device)
    best, best_iou = None, -1.0
    for _ in range(max_draws):
        mask = random_rectangle_mask(height, width, generator)
        overlap = iou(mask, foreground)
        if overlap > best_iou:
            best, best_iou = mask, overlap
        if overlap > gammas[choice]:
            break
    return best


def iou(a: Tensor, b: Tensor) -> float:
    """Intersection over union of two masks of one shape, bool or {0, 1}, in [0, 1]; two empty masks give 0.

    Raises:
        ValueError: the shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"`a` has shape {list(a.shape)} and `b` {list(b.shape)}; give masks of one shape.")
    a, b = a.bool(), b.bool()
    return (a & b).sum().item() / max((a | b).sum().item(), 1)


def latent_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """The mask m~ on the latent grid, by nearest-neighbor interpolation as in diffusers' inpainting pipeline.

    Args:
        mask: `[N, 1, H, W]`, bool or {0, 1}.
        height, width: of the latent grid: the picture's size divided by the VAE's scale factor.

    Returns:
        `[N, 1, height, width]`, of the mask's float type (float32 for bool).
    """
    mask = mask if mask.is_floating_point() else mask.float()
    return torch.nn.functional.interpolate(mask, size=(height, width))


# anomalysd_pipeline/inpainting.py
# --------------------------------
# Repainting in the latent space of a Stable Diffusion inpainting model.
#
# The computation is that of diffusers' `StableDiffusionInpaintPipeline` for 9-channel UNets, with the VAE's posterior
# mean as E(x), and cut into parts so that one picture's latent and noise serve all of its masks.

def encode(vae, images: Tensor) -> Tensor:
    """E(x) in the denoiser's scale: `[N, 3, H, W]` in [-1, 1] to `[N, 4, h, w]`. For AutoencoderKL and
    AutoencoderTiny."""
    encoded = vae.encode(images.to(vae.dtype))
    latents = encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latents
    return latents * vae.config.scaling_factor


def decode(vae, latents: Tensor) -> Tensor:
    """Latents `[N, 4, h, w]` to float32 pictures `[N, 3, H, W]` in [-1, 1]."""
    return vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0].float().clamp(-1, 1)


def draw_noise(shape, generator, device, dtype) -> Tensor:
    """One noise sample per picture, `[N, 4, h, w]`, shared by all its masks.

    Args:
        shape: `[N, 4, h, w]`.
        generator: one for all pictures, or a list of N; None: every picture gets the same numbers, on every device.

    Raises:
        ValueError: for a list of another length.
    """
    one = (1, *shape[1:])
    if generator is None:
        fixed = torch.Generator().manual_seed(0)
        return randn_tensor(one, generator=fixed, device=device, dtype=dtype).expand(shape)
    generators = generator if isinstance(generator, list) else [generator] * shape[0]
    if len(generators) != shape[0]:
        raise ValueError(f"`generator` must be one generator or a list of {shape[0]}, got {len(generators)}.")
    # One draw per picture: how many pictures a call holds does not change the first one's noise.
    return torch.cat([randn_tensor(one, generator=g, device=device, dtype=dtype) for g in generators])


def start_schedule(scheduler, num_inference_steps: int, noise_strength: float, device) -> Tensor:
    """Sets the scheduler to the last `noise_strength` of its steps and returns their timesteps `[T]`, T >= 1.

    The start is T~ = lambda T of the method, rounded as diffusers rounds it.

    Raises:
        ValueError: if no step is left.
    """
    scheduler.set_timesteps(num_inference_steps, device=device)
    begin = max(num_inference_steps - min(int(num_inference_steps * noise_strength), num_inference_steps), 0)
    timesteps = scheduler.timesteps[begin * scheduler.order :]
    if len(timesteps) == 0:
        raise ValueError(
            f"`num_inference_steps` ({num_inference_steps}) times `noise_strength` ({noise_strength}) leaves no step "
            "to run; raise either."
        )
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin * scheduler.order)
    return timesteps


def repaint(
    unet,
    vae,
    scheduler,
    images: Tensor,
    latents: Tensor,
    masks: Tensor,
    noise: Tensor,
    prompt_embeds: Tensor,
    negative_prompt_embeds: Tensor | None = None,
    *,
    noise_strength: float,
    num_inference_steps: int,
    guidance_scale: float = 1.0,
    on_step: Callable[[int, Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Repaints the masked part of each picture, Eq. (11) and the denoising after it.

    Args:
        images: `[N, 3, H, W]` in [-1, 1].
        latents: `[N, 4, h, w]`, `encode(vae, images)`.
        masks: `[N, 1, H, W]` in {0, 1}, 1 = repaint.
        noise: `[N, 4, h, w]`.
        prompt_embeds: `[N, L, d]`.
        negative_prompt_embeds: `[N, L, d]`, used where `guidance_scale` exceeds 1.
        on_step: called after each step with its index, timestep and latents; returns the latents to go on with.

    Returns:
        float32 `[N, 3, H, W]` in [-1, 1].
    """
    dtype = unet.dtype
    timesteps = start_schedule(scheduler, num_inference_steps, noise_strength, images.device)
    small_masks = latent_mask(masks.to(dtype), *latents.shape[-2:])  # [N, 1, h, w]
    masked_latents = encode(vae, images * (masks < 0.5)).to(dtype)  # [N, 4, h, w]
    if noise_strength >= 1.0:
        latents = noise.to(dtype) * scheduler.init_noise_sigma
    else:
        latents = scheduler.add_noise(latents.to(dtype), noise.to(dtype), timesteps[:1].repeat(len(images)))
    guided = guidance_scale > 1.0
    prompt_embeds = prompt_embeds.to(dtype)
    if guided:
        prompt_embeds = torch.cat([negative_prompt_embeds.to(dtype), prompt_embeds])
    # Our own noise is drawn once per picture; what a stochastic scheduler draws besides must be reproducible too.
    extra = {}
    if "generator" in inspect.signature(scheduler.step).parameters:
        extra["generator"] = torch.Generator(device="cpu").manual_seed(0)
    for index, timestep in enumerate(timesteps):
        sample = torch.cat([latents] * 2) if guided else latents
        sample = scheduler.scale_model_input(sample, timestep)
        copies = 2 if guided else 1
        sample = torch.cat(
            [sample, small_masks.repeat(copies, 1, 1, 1), masked_latents.repeat(copies, 1, 1, 1)], dim=1
        )
        predicted = unet(sample, timestep, encoder_hidden_states=prompt_embeds, return_dict=False)[0]
        if guided:
            without, with_prompt = predicted.chunk(2)
            predicted = without + guidance_scale * (with_prompt - without)
        latents = scheduler.step(predicted, timestep, latents, **extra, return_dict=False)[0]
        if on_step is not None:
            latents = on_step(index, timestep, latents)
    return decode(vae, latents)


# anomalysd_pipeline/prompts.py
# -----------------------------
# Hierarchical prompts T_c of each category, and their averaged text embedding.
#
# T_c is the union of coarse prompts ("A perfect [c].") and fine ones, which describe the normal look in detail.
# The denoiser is trained with one prompt drawn from T_c, and run with the average of τ(y) over T_c.

PROMPT_DESIGNS = ("none", "simple", "hierarchical")
MAX_PROMPT_LENGTH = 300
MAX_CATEGORY_LENGTH = 64
_LEVELS = ("coarse", "fine")


def check_category(category: str) -> str:
    """Returns `category` if it can serve as a category name, which also names folders and files.

    Raises:
        ValueError: if it is not a string of 1 to 64 printable characters, is blank, holds a path separator, or is
            "." or "..".
    """
    if not isinstance(category, str) or not category.strip():
        raise ValueError(f"`category` must be a non-empty name such as 'metal_nut', but {category!r} was given.")
    if len(category) > MAX_CATEGORY_LENGTH:
        raise ValueError(
            f"`category` must have at most {MAX_CATEGORY_LENGTH} characters, but a name of {len(category)} was given."
        )
    if "/" in category or "\\" in category or category in (".", "..") or not category.isprintable():
        raise ValueError(
            "`category` must be a plain name of printable characters without '/' or '\\', and not '.' or '..', "
            f"but {category!r} was given."
        )
    return category


def readable_name(category: str) -> str:
    """Words for a category name: "metal_plate" becomes "metal plate"."""
    return " ".join(check_category(category).replace("_", " ").split()) or category


def _check_texts(texts: str | Iterable[str], argument: str) -> list[str]:
    if isinstance(texts, str):
        texts = [texts]
    if not isinstance(texts, (list, tuple)):
        raise ValueError(f"`{argument}` must be a string or a list of strings, but {type(texts).__name__} was given.")
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"`{argument}` must hold non-empty strings, but {text!r} was given.")
        if len(text) > MAX_PROMPT_LENGTH:
            raise ValueError(
                f"`{argument}` must hold strings of at most {MAX_PROMPT_LENGTH} characters, but one of {len(text)} "
                "was given."
            )
    return list(texts)


def _check_prompts(prompts, argument: str) -> dict[str, list[str]]:
    if not isinstance(prompts, Mapping):
        levels = {"coarse": [], "fine": _check_texts(prompts, argument)}
    else:
        unknown = sorted(set(prompts) - set(_LEVELS), key=str)
        if unknown:
            raise ValueError(
                f"`{argument}` must have the keys 'coarse' and 'fine' only, but {unknown[0]!r} was given."
            )
        levels = {level: _check_texts(prompts.get(level, []), argument) for level in _LEVELS}
    if not levels["coarse"] + levels["fine"]:
        raise ValueError(f"`{argument}` must hold at least one prompt, but none was given.")
    return levels


class PromptBook:
    """The prompts of all known categories, and a generic set for every other one.

    Args:
        categories: category name to {"coarse": [...], "fine": [...]}.
        generic: the same two lists; "{name}" in them stands for the readable category name.

    Raises:
        ValueError: for names or prompts that `check_category` or `add` would refuse.
    """

    def __init__(self, categories: Mapping[str, Mapping[str, list[str]]], generic: Mapping[str, list[str]]):
        self._generic = _check_prompts(generic, "generic")
        self._categories: dict[str, dict[str, list[str]]] = {}
        for category, prompts in categories.items():
            self.add(category, prompts)

    @classmethod
    def default(cls) -> PromptBook:
        """The book of `prompts.json`: the MVTec-AD, VisA and synthetic categories, and the generic set."""
        here = Path(__file__).resolve().parent
        # A wheel ships the file inside the package; in a checkout it lies at the repository root.
        path = here / "prompts.json"
        if not path.is_file():
            path = here.parent / "prompts.json"
        return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))

    @property
    def categories(self) -> tuple[str, ...]:
        """Names of the categories with prompts of their own, in the order they were added."""
        return tuple(self._categories)

    def add(self, category: str, prompts: str | list[str] | Mapping[str, list[str]] | None = None) -> None:
        """Sets the prompts of a category, replacing those it had.

        Args:
            category: see `check_category`.
            prompts: T_c itself, nothing is added to it: a string, a list of strings, or
                {"coarse": [...], "fine": [...]} (either key may be absent). `None` keeps what the category has; a new
                one then gets the generic set, filled with its readable name.

        Raises:
            ValueError: for a bad name, no prompt at all, an unknown key, or a prompt that is blank, not a string or
                longer than 300 characters.
        """
        check_category(category)
        if prompts is None:
            prompts = self._levels(category)
        self._categories[category] = _check_prompts(prompts, "prompts")

    def prompts(self, category: str, design: str = "hierarchical") -> list[str]:
        """The prompt set T_c of a category, known or not.

        Args:
            category: see `check_category`. One without prompts of its own gets the generic set.
            design: "hierarchical" gives coarse + fine prompts (the paper's choice), "simple" only "A photo of [c].",
                "none" only the empty prompt (the ablation's two other rows).

        Raises:
            ValueError: for a bad name or an unknown design.
        """
        name = readable_name(category)
        if design == "none":
            return [""]
        if design == "simple":
            return [f"A photo of {name}."]
        if design == "hierarchical":
            levels = self._levels(category)
            return levels["coarse"] + levels["fine"]
        raise ValueError(f"`design` must be one of {', '.join(PROMPT_DESIGNS)}, but {design!r} was given.")

    def to_dict(self) -> dict:
        """A JSON-serializable copy, in the format of `prompts.json`."""
        return copy.deepcopy({"generic": self._generic, "categories": self._categories})

    @classmethod
    def from_dict(cls, data: Mapping) -> PromptBook:
        """The inverse of `to_dict`.

        Raises:
            ValueError: if a key is missing or a name or prompt is refused.
        """
        if not (isinstance(data, Mapping) and {"generic", "categories"} <= set(data)):
            raise ValueError("`data` must be a dictionary with the keys 'generic' and 'categories'.")
        if not isinstance(data["categories"], Mapping):
            raise ValueError("`data['categories']` must be a dictionary from category names to prompts.")
        return cls(categories=data["categories"], generic=data["generic"])

    def _levels(self, category: str) -> dict[str, list[str]]:
        if category in self._categories:
            return self._categories[category]
        name = readable_name(category)
        # `replace` and not `format`: any other brace in a template is plain text.
        return {level: [text.replace("{name}", name) for text in self._generic[level]] for level in _LEVELS}


@torch.no_grad()  # the text encoder is frozen in every stage; callers reuse the result over many training steps
def encode_prompts(prompts: list[str], tokenizer, text_encoder) -> torch.Tensor:
    """Text embeddings τ(y) of each prompt, as `StableDiffusionInpaintPipeline.encode_prompt` computes them.

    Args:
        prompts: P texts; the empty string is the unconditional prompt. Tokens past the tokenizer's limit are cut.
        tokenizer: a CLIP tokenizer.
        text_encoder: a CLIP text model; the result has its device and dtype.

    Returns:
        [P, L, d], L the tokenizer's `model_max_length`, d the encoder's width; without gradient.

    Raises:
        ValueError: if `prompts` is empty or not a list of strings.
    """
    if not isinstance(prompts, (list, tuple)) or not prompts or not all(isinstance(text, str) for text in prompts):
        raise ValueError(f"`prompts` must be a non-empty list of strings, but {prompts!r} was given.")
    tokens = tokenizer(
        list(prompts),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    attention_mask = None
    if getattr(text_encoder.config, "use_attention_mask", False):
        attention_mask = tokens.attention_mask.to(text_encoder.device)
    return text_encoder(tokens.input_ids.to(text_encoder.device), attention_mask=attention_mask)[0]  # [P, L, d]


def average_embedding(prompts: list[str], tokenizer, text_encoder) -> torch.Tensor:
    """The condition at inference: the average of τ(y) over the prompts of T_c.

    Arguments and errors are those of `encode_prompts`. Returns [1, L, d].
    """
    return encode_prompts(prompts, tokenizer, text_encoder).mean(dim=0, keepdim=True)


# anomalysd_pipeline/backbones.py
# -------------------------------
# Backbones for the prototypes, by timm: what kind of network a name stands for, the network, and its weights.

@dataclass(frozen=True)
class BackboneKind:
    """What timm knows of a network before it is made.

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
        """The side nearest to `length` that fits the patches of a plain network."""
        return max(1, round(length / self.stride)) * self.stride if self.is_plain else length

    def size_arguments(self, image_size: int | None) -> dict:
        """Arguments of `timm.create_model` with which the network takes pictures of that size."""
        if self.is_dynamic:
            return {"dynamic_img_size": True}
        if self.any_size or image_size is None or not self.is_resizable:
            return {}
        return {"img_size": self.side(image_size)}


def backbone_kind(model_name: str, model_kwargs: dict) -> BackboneKind:
    """What kind of network a timm model name stands for; makes no weights.

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


def _takes(model: nn.Module, argument: str) -> bool:
    return any(argument in inspect.signature(kind.__init__).parameters for kind in type(model).__mro__)


def create_backbone(
    model_name: str, out_indices: tuple[int, ...], final_norm: bool, model_kwargs: dict, **weights
) -> nn.Module:
    """A timm network from pictures to feature levels; levels after the last one asked for are left out.

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
    """A network made by `create`, with weights from a local file.

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
    """Names of the matrices that still are as their random start; such as start constant cannot tell."""
    start = dict(initial.named_parameters())
    return [
        name
        for name, weight in loaded.named_parameters()
        if weight.ndim > 1 and torch.equal(weight, start[name]) and (weight != weight.flatten()[0]).any()
    ]


# anomalysd_pipeline/coreset.py
# -----------------------------
# A few vectors that stand for many.

_PROJECTED_DIM = 32


@torch.no_grad()
def greedy_coreset(features: Tensor, size: int, seed: int = 0) -> Tensor:
    """Indices of a k-center coreset: start anywhere, then again and again take the vector farthest from those taken.

    Its largest gap is at most twice the smallest possible (Gonzalez 1985). Vectors of more than 32 channels are
    compared by a random projection to 32. Takes O(M * size) time and O(M) memory.

    Args:
        features: [M, C].
        size: Vectors to keep, >= 1.
        seed: Of the first vector and of the projection.

    Returns:
        int64 [K] of distinct indices, K = min(size, M), less where vectors are duplicates of those taken.

    Raises:
        ValueError: If `size` is less than 1.
    """
    if size < 1:
        raise ValueError(f"`size` must be at least 1, got {size}.")
    generator = torch.Generator().manual_seed(seed)
    features = features.float()
    current = torch.randint(len(features), (1,), generator=generator).to(features.device)
    if features.shape[1] > _PROJECTED_DIM:
        features = features @ torch.randn(features.shape[1], _PROJECTED_DIM, generator=generator).to(features.device)
    size = min(size, len(features))
    chosen = torch.empty(size, dtype=torch.int64, device=features.device)
    gaps = torch.empty(size, device=features.device)
    gap = torch.full((len(features),), torch.inf, device=features.device)
    for step in range(size):
        chosen[step] = current[0]
        gaps[step] = gap[current[0]]
        # Differences rather than products: a duplicate of a taken vector must come out at exactly zero.
        distance = torch.cdist(features, features[current], compute_mode="donot_use_mm_for_euclid_dist")[:, 0]
        gap = torch.minimum(gap, distance)
        current = gap.argmax().unsqueeze(0)
    return chosen[gaps > 0]


# anomalysd_pipeline/missing.py
# -----------------------------
# What good parts have and a picture lacks: the distance of Eq. (14) of AnomalySD (arXiv 2408.01960) the other way
# round, from normal pictures to the tested one. Not in the paper: where a piece has broken off, all that is left may
# look as it does on a good part.

_ENTRIES = 2**22


@torch.no_grad()
def gaps_of(grids: Tensor) -> Tensor:
    """How far vectors of a normal picture are from the nearest one of another, on average over the others.

    Args:
        grids: [K, P, C], K >= 2 pictures of P positions.

    Returns:
        float32 [K, P], squares of Euclidean distances.
    """
    others = [
        torch.stack([_nearest_squares(one, two) for j, two in enumerate(grids) if j != i]).mean(dim=0)
        for i, one in enumerate(grids)
    ]
    return torch.stack(others)


@torch.no_grad()
def missing_distances(grids: Tensor, gaps: Tensor, psi: Tensor) -> Tensor:
    """How far the nearest vector of a picture is from what a normal one has at each position.

    In units of what normal parts differ by: d / (2 m + g), where g is the gap of that vector and m the mean of all
    gaps. Of the normal pictures the one with the smallest maximum counts, which is the most alike.

    Args:
        grids: [K, P, C], normal pictures of P = h * w positions, row by row.
        gaps: [K, P], see [`gaps_of`].
        psi: [N, C, h, w].

    Returns:
        float32 [N, h, w], >= 0. The positions are those of the normal picture: where parts lie as they did there, this
        is where something is missing.
    """
    scale = (2 * gaps.float().mean() + gaps.float()).clamp(min=torch.finfo(torch.float32).tiny)
    maps = []
    for picture in psi.float().flatten(start_dim=2).transpose(1, 2):  # [P, C]
        relative = _nearest_squares(grids.flatten(end_dim=1), picture).view_as(scale) / scale
        maps.append(relative[relative.amax(dim=1).argmin()])
    return torch.stack(maps).view(len(psi), *psi.shape[2:])


def _nearest_squares(queries: Tensor, vectors: Tensor) -> Tensor:
    """Of each of [Q, C], the square of the distance to the nearest of [V, C]; float32 [Q]."""
    center = vectors.float().mean(dim=0)
    vectors = vectors.float() - center
    squares, found = vectors.square().sum(dim=1), queries.new_empty(len(queries), dtype=torch.float32)
    chunk = max(1, _ENTRIES // len(vectors))
    for part, result in zip(queries.split(chunk), found.split(chunk), strict=True):
        part = part.float() - center
        torch.amin(torch.addmm(squares, part, vectors.T, alpha=-2), dim=1, out=result)
        result += part.square().sum(dim=1)
    return found.clamp_(min=0)


# anomalysd_pipeline/repaired.py
# ------------------------------
# What the repainting says of distances to the prototypes. Not in AnomalySD (arXiv 2408.01960), which compares the
# repainted picture with the original by a perceptual network alone.
#
# What a model repaints as a normal part would look is closer to the prototypes where it was defective, and as far from
# them as before where normal parts vary.

REPAIRED_WEIGHT = 0.6
"""Of the share of a distance that the repainting takes away. Chosen on drawn parts and metal plates."""
REMAINING_WEIGHT, REMAINING_LIMIT = 0.7, 0.35
"""Of the distance of the repainted picture, and up to which it counts: beyond what normal parts differ by, it is the
repainting that is odd, and says nothing. Chosen on drawn parts and metal plates."""


def repaired_share(before: Tensor, after: Tensor) -> Tensor:
    """The share of the distance around each position that is gone: max(1 - a / b, 0), averages over a window.

    The window is 2 r + 1 positions wide, r = w / 10 rounded, at least 1: 7 of 32, as one position says too little.

    Args:
        before: [N, h, w], >= 0.
        after: [N, h, w], >= 0.

    Returns:
        [N, h, w] in [0, 1]; 0 where nothing was there before.
    """
    reach = max(1, round(before.shape[-1] / 10))
    before, after = (
        F.avg_pool2d(map_[:, None], 2 * reach + 1, stride=1, padding=reach)[:, 0] for map_ in (before, after)
    )
    return torch.where(before > 0, 1 - after / before, torch.zeros_like(before)).clamp(min=0)


def weigh(deviations: Tensor, original: Tensor, repainted: Tensor, restored: Tensor) -> Tensor:
    """What deviates counts more where the repainting repairs it, and less where as much remains on a normal part.

    max((1 + `REPAIRED_WEIGHT` q) D - `REMAINING_WEIGHT` min(R, `REMAINING_LIMIT`), 0), q see [`repaired_share`].

    Args:
        deviations: D, [N, h, w], >= 0, see `PrototypeBank.deviations`.
        original: relative distances of the picture, [N, h, w].
        repainted: R, those of the repainted picture, [N, h, w].
        restored: those of the repainted picture with what the autoencoder loses of the original put back, [N, h, w].

    Returns:
        [N, h, w], >= 0.
    """
    raised = deviations * (1 + REPAIRED_WEIGHT * repaired_share(original, restored))
    return (raised - REMAINING_WEIGHT * repainted.clamp(max=REMAINING_LIMIT)).clamp(min=0)


# anomalysd_pipeline/whole.py
# ---------------------------
# How a picture differs from normal ones as a whole: the nearest-neighbor distance between averaged features, as SPADE
# (Cohen and Hoshen 2020) takes it between pictures. Not in AnomalySD (arXiv 2408.01960): parts that are put together
# wrongly have no region that looks wrong by itself.

TOLERANCE = 2.0
"""A picture this many times as far from the normal ones, in squared distance, as the farthest of these is from the
others, is still as normal as they are. Chosen on drawn parts and metal plates, where less cost accuracy."""


@torch.no_grad()
def views_of(features: Tensor, pictures: int, unturned: int) -> Tensor:
    """The average of each turned copy of each normal picture, and how far one picture may be from the others.

    Args:
        features: [M, C] of `collection.collect_prototypes`.
        pictures: K >= 2, how many these are of.
        unturned: how many of the M vectors are of pictures that were not turned, a multiple of K that divides M.

    Returns:
        float32 [M K / unturned, C + 1]. The last column is the same in all rows: the largest squared distance between
        a copy and the nearest one of another picture.
    """
    copies = features.unflatten(0, (-1, pictures, unturned // pictures))  # [turns, K, P, C]
    views = torch.stack([turn.float().mean(dim=1) for turn in copies])  # [turns, K, C]
    sources = torch.arange(pictures, device=views.device).repeat(len(views))
    views = views.flatten(end_dim=1)
    squares = _squares(views, views).masked_fill_(sources[:, None] == sources, torch.inf)
    return torch.cat([views, squares.amin(dim=1).amax().expand(len(views), 1)], dim=1)


@torch.no_grad()
def unlikeness(views: Tensor, psi: Tensor) -> Tensor:
    """How many times as far a picture is from the normal ones as it may be, at least 1.

    max(1, sqrt(d / (TOLERANCE m))), d the squared distance between the average of psi and the nearest view, and m the
    largest between normal pictures; 1 where m is 0, because these are all equal and tell nothing.

    Args:
        views: [V, C + 1], see [`views_of`].
        psi: [N, C, h, w].

    Returns:
        float32 [N].
    """
    nearest = _squares(psi.float().mean(dim=(2, 3)), views[:, :-1].float()).amin(dim=1)
    allowed = TOLERANCE * views[0, -1].float()
    return torch.where(allowed > 0, nearest / allowed, torch.ones_like(nearest)).clamp(min=1).sqrt()


def stress(maps: Tensor, factors: Tensor) -> Tensor:
    """Let what stands out in a map stand out by a factor: D becomes D f^(D / max D).

    The highest value is multiplied by f, and those near zero are left as they are, for what looks normal is no more
    suspicious in a picture that is unlike: multiplied as a whole, maps marked regions of plates less well.

    Args:
        maps: [N, h, w], >= 0.
        factors: [N], >= 1.

    Returns:
        [N, h, w], in each map in the same order of size.
    """
    highest = maps.amax(dim=(1, 2), keepdim=True)
    share = torch.where(highest > 0, maps / highest, torch.zeros_like(maps))
    return maps * factors[:, None, None] ** share


def _squares(one: Tensor, other: Tensor) -> Tensor:
    # Differences rather than products: averages lie close together, and far from zero.
    return torch.cdist(one, other, compute_mode="donot_use_mm_for_euclid_dist").square()


# anomalysd_pipeline/prototypes.py
# --------------------------------
# What normal looks like, remembered: ImageNet features of the normal pictures and the distance to the nearest of
# them.
#
# Equation numbers are those of AnomalySD (arXiv 2408.01960).

NORMALIZATIONS = ("none", "layer")
_DISTANCE_ENTRIES = 2**22
_ROUNDING = 1e-10
_NEIGHBORS = 9
_UNBOUNDED = 2**62
_COLORS = 4096
PACKED_BESIDE = 2
"""Columns of `PrototypeBank.packed` beside the prototype."""
MISSING_WEIGHT = 0.4
"""Of what a picture lacks, beside what it has too much. Chosen on drawn parts, whole and with pieces broken off."""
COLOR_WEIGHT = 0.75
"""Of the colors by themselves, beside all channels together. Chosen on drawn parts and metal plates."""


class PrototypeExtractor(ModelMixin, ConfigMixin):
    """Frozen timm backbone that turns a picture into one feature vector per position, psi of Eq. (12).

    For EfficientNets the paper's second and third feature levels are timm's `out_indices` 1 and 2, at strides 4 and 8:
    psi has stride 4, and 40 + 72 = 112 channels for B6. Other CNNs and hierarchical transformers get the same two.

    Plain vision transformers (ViT, DeiT, DINOv2, DINOv3, EVA, BEiT; not in the paper) give the patch tokens of their
    last block after the final normalization, at unit length, so that E of Eq. (14) is 2 - 2 cos, in [0, 4]. Class and
    register tokens are left out, and pictures are resized to the nearest multiples of the patch.

    A new object has random weights and is in eval mode, so that `forward` leaves BatchNorm's statistics alone; use
    [`from_timm`] or `from_pretrained` for trained weights.

    Args:
        model_name: timm model name, with or without a pretrained tag.
        out_indices: timm feature levels, the one with the finest grid first; None: (1, 2), or the last of a plain
            transformer.
        image_size: Side in px to which pictures are resized first; None keeps theirs, or takes the model's own where
            it is made for one size only.
        normalize: "none" (the paper), or "layer": every level's channel vectors are scaled to unit length; None:
            "none", or "layer" for a plain transformer.
        model_kwargs: Further arguments of `timm.create_model`.
        mean: Per-channel mean of pictures in [0, 1]; None: the model's own.
        std: Per-channel standard deviation of pictures in [0, 1]; None: the model's own.
        color_weight: Where above 0, the colors of the 3 x 3 grid cells around each position, times this, are 27 more
            channels of psi (not in the paper): small backbones see less of a color than the eye does.
        context_size: Odd side, in grid cells, of the window over which `context_weight` averages the last level.
        context_weight: Where above 0, the average of the last level around each position, at unit length and times
            this, is further channels of psi (not in the paper): what is normal depends on what is around it.
        final_norm: Whether a plain transformer's last normalization is applied to each level; None: where
            `out_indices` is None too.

    Raises:
        ValueError: If timm does not know `model_name`, the model has no such `out_indices`, `normalize` is another
            word, `image_size` is not positive, `context_size` is even, or `final_norm` is asked of another network.
    """

    @register_to_config
    def __init__(
        self,
        model_name: str = "tf_efficientnet_b6",
        out_indices: tuple[int, ...] | None = None,
        image_size: int | None = None,
        normalize: str | None = None,
        model_kwargs: dict | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        color_weight: float = 0.0,
        context_size: int = 9,
        context_weight: float = 0.0,
        final_norm: bool | None = None,
    ):
        super().__init__()
        if normalize not in (None, *NORMALIZATIONS):
            raise ValueError(f"`normalize` must be one of {', '.join(NORMALIZATIONS)}, got {normalize!r}.")
        if context_size < 1 or context_size % 2 == 0:
            raise ValueError(f"`context_size` must be an odd number of at least 1, got {context_size}.")
        if image_size is not None and image_size < 1:
            raise ValueError(
                f"`image_size` must be at least 1 pixel, or None for the pictures' own, got {image_size}."
            )
        self.kind = backbone_kind(model_name, dict(model_kwargs or {}))
        if final_norm and not self.kind.is_plain:
            raise ValueError(f"`final_norm` must be left out for {model_name}, which is no plain vision transformer.")
        if final_norm is None:
            final_norm = self.kind.is_plain and out_indices is None
        if out_indices is None:
            out_indices = (-1,) if self.kind.is_plain else (1, 2)
        depth = self.kind.depth
        if not out_indices or not all(-depth <= index < depth for index in out_indices):
            raise ValueError(
                f"`out_indices` must name levels of {model_name}, which are 0 to {depth - 1}, got {list(out_indices)}."
            )
        if image_size is None and not self.kind.any_size:
            image_size = self.kind.own_size
        # In the config, so that a reload does not depend on the pretrained configurations of the installed timm.
        self.register_to_config(
            out_indices=[index % depth for index in out_indices],
            image_size=image_size,
            normalize=normalize or ("layer" if self.kind.is_plain else "none"),
            final_norm=final_norm,
        )
        self.model = self._create(pretrained=False)
        mean = list(mean or self.model.pretrained_cfg["mean"])
        std = list(std or self.model.pretrained_cfg["std"])
        self.register_to_config(mean=mean, std=std)
        self.register_buffer("pixel_mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)
        self.eval()

    @property
    def channels(self) -> list[int]:
        """Channels of each part of psi: the levels, and where they are asked for the context and the colors."""
        levels, c = list(self.model.feature_info.channels()), self.config
        return levels + [levels[-1]] * (c.context_weight > 0) + [self.color_channels] * (c.color_weight > 0)

    @property
    def color_channels(self) -> int:
        """How many of psi's last channels are colors."""
        return 27 * (self.config.color_weight > 0)

    def _create(self, **weights) -> nn.Module:
        c = self.config
        arguments = {**(c.model_kwargs or {}), **self.kind.size_arguments(c.image_size)}
        return create_backbone(c.model_name, tuple(c.out_indices), c.final_norm, arguments, **weights)

    @classmethod
    def from_timm(
        cls,
        model_name: str = "tf_efficientnet_b6",
        pretrained: bool = True,
        checkpoint_path: str | Path | None = None,
        out_indices: tuple[int, ...] | None = None,
        image_size: int | None = None,
        normalize: str | None = None,
        model_kwargs: dict | None = None,
        final_norm: bool | None = None,
    ) -> "PrototypeExtractor":
        """Create an extractor with trained weights.

        Args:
            pretrained: Let timm download the weights; ignored with `checkpoint_path`.
            checkpoint_path: Local weights of the whole classifier, .safetensors or .pth (read with weights_only=True).

        See the class for the others.

        Raises:
            ValueError: If `checkpoint_path` does not exist or does not hold all weights of `model_name`.
        """
        extractor = cls(model_name, out_indices, image_size, normalize, model_kwargs, final_norm=final_norm)
        if checkpoint_path is not None:
            extractor.model = load_weights(checkpoint_path, model_name, extractor._create)
        elif pretrained:
            extractor.model = extractor._create(pretrained=True)
        return extractor.eval()

    def forward(self, x: Tensor) -> Tensor:
        """psi(x) of Eq. (12): the levels, upsampled to the first one's grid and concatenated.

        Args:
            x: [N, 3, H, W] in [-1, 1].

        Returns:
            [N, C, h, w] in the module's dtype, C the sum of the levels' channels.

        Raises:
            ValueError: If `x` has another shape.
        """
        if x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(f"`x` must be [N, 3, H, W], got {list(x.shape)}.")
        wanted = x.shape[-2:] if self.config.image_size is None else (self.config.image_size,) * 2
        size = tuple(self.kind.side(length) for length in wanted)
        if x.shape[-2:] != size:
            # In float32: CPUs cannot resize in half precision.
            x = F.interpolate(x.float(), size=size, mode="bilinear", antialias=True)
        x = x.to(self.pixel_mean.dtype)
        levels = []
        for level in self.model(((x + 1) / 2 - self.pixel_mean) / self.pixel_std):
            if getattr(self.model, "output_fmt", "NCHW") == "NHWC":
                level = level.permute(0, 3, 1, 2)  # hierarchical transformers
            if self.config.normalize == "layer":
                level = F.normalize(level.float(), dim=1).to(level.dtype)
            if levels and level.shape[-2:] != levels[0].shape[-2:]:
                level = F.interpolate(level, size=levels[0].shape[-2:], mode="bilinear", align_corners=False)
            levels.append(level)
        if self.config.context_weight > 0:
            side = self.config.context_size
            around = F.avg_pool2d(levels[-1], side, stride=1, padding=side // 2, count_include_pad=False)
            unit = F.normalize(around.float(), dim=1).to(around.dtype)
            levels.append(self.config.context_weight * unit)
        if self.config.color_weight > 0:
            cells = F.adaptive_avg_pool2d(x, levels[0].shape[-2:])  # [N, 3, h, w]
            around = F.unfold(F.pad(cells, (1, 1, 1, 1), mode="replicate"), 3).view(len(x), -1, *cells.shape[-2:])
            levels.append(self.config.color_weight * around)  # [N, 27, h, w]
        return torch.cat(levels, dim=1)


class PrototypeBank(ModelMixin, ConfigMixin):
    """One bank of normal feature vectors P_c per category, Eq. (13), savable as safetensors.

    Banks are buffers [size, dim] named `bank_0`, `bank_1`, … in the alphabetical order of their categories (the order
    in which a saved config lists them), so that a category may have any name. Dtype and device follow `.to()`. Beside
    each is a buffer `spread_0`, … [size]: how far a prototype is from the nearest in another normal picture, which is
    how much normal parts differ there. A third, `gap_0`, … [whole], belongs to the first prototypes, where these are
    all positions of the normal pictures, one picture after another: see `missing.gaps_of`. A fourth, `view_0`, …, is
    what is known of the pictures as wholes, see `whole.views_of`.

    Args:
        sizes: Number of prototypes per category.
        whole: How many of these, the first, are all positions of the normal pictures; 0: not known.
        dim: Length of a prototype; 0 while there are no categories.
        max_size: A category with more vectors than this is thinned to a coreset.
        max_unturned: In a category that is thinned, as many vectors of the pictures as they were given, not turned,
            are kept beside the coreset: all where they fit, else evenly spaced ones. A coreset keeps what is rare, and
            few of the many that look alike, among which small defects hide.
        color_channels: How many of the last channels are colors that are also looked at by themselves, see `add`.
        color_sizes: Number of color prototypes per category.
        views: Number of rows of `whole.views_of` per category.
    """

    @register_to_config
    def __init__(
        self,
        sizes: dict[str, int] | None = None,
        dim: int = 0,
        max_size: int = 10000,
        max_unturned: int = 0,
        whole: dict[str, int] | None = None,
        color_channels: int = 0,
        color_sizes: dict[str, int] | None = None,
        views: dict[str, int] | None = None,
    ):
        super().__init__()
        # Safetensors and `.to()` need a tensor even when there are no banks: it also holds the dtype and device.
        self.register_buffer("placeholder", torch.zeros(1))
        sizes = dict(sorted((sizes or {}).items()))
        counts = {
            name: {category: (given or {}).get(category, 0) for category in sizes}
            for name, given in (("whole", whole), ("views", views))
        }
        self.register_to_config(sizes=sizes, **counts)
        for index, (category, size) in enumerate(sizes.items()):
            self.register_buffer(f"bank_{index}", torch.zeros(size, dim))
            self.register_buffer(f"spread_{index}", torch.zeros(size))
            self.register_buffer(f"gap_{index}", torch.zeros(self.config.whole[category]))
            self.register_buffer(f"view_{index}", torch.zeros(self.config.views[category], dim + 1))
        self.colors = PrototypeBank(color_sizes, color_channels, _COLORS, _UNBOUNDED) if color_channels else None

    @property
    def categories(self) -> list[str]:
        """Names of the categories, in alphabetical order."""
        return list(self.config.sizes)

    def __contains__(self, category: str) -> bool:
        return category in self.config.sizes

    def __getitem__(self, category: str) -> Tensor:
        """Prototypes of `category`, [size, dim]. Raises ValueError if it has none."""
        if category not in self:
            known = ", ".join(json.dumps(c, ensure_ascii=False) for c in self.categories) or "none"
            raise ValueError(f"`category` must be one that has a prototype bank ({known}), got {category!r}.")
        return getattr(self, f"bank_{self.categories.index(category)}")

    def spread(self, category: str) -> Tensor:
        """Spread of each prototype of `category`, [size], >= 0. Raises ValueError if it has none."""
        self[category]
        return getattr(self, f"spread_{self.categories.index(category)}")

    def gaps(self, category: str) -> Tensor:
        """Gap of each of the first prototypes of `category`, [whole], >= 0. Raises ValueError if it has none."""
        self[category]
        return getattr(self, f"gap_{self.categories.index(category)}")

    def views(self, category: str) -> Tensor:
        """The normal pictures as wholes, [V, dim + 1], see `whole.views_of`. Raises ValueError if there is no bank."""
        self[category]
        return getattr(self, f"view_{self.categories.index(category)}")

    def take_reach(self, category: str, other: "PrototypeBank") -> None:
        """Let pictures be as unlike the normal ones as `other` lets them, which knows more pictures of the category.
        Raises ValueError if one of them has no bank."""
        own, known = self.views(category), other.views(category)
        if len(own) and len(known):
            own[:, -1] = known[0, -1]

    def packed(self, category: str) -> dict[str, Tensor]:
        """All that is known of a category, for `add_packed`: "bank", prototypes and, in the last columns, spread and
        gap (-1: none), [size, dim + 2]; "colors", the same of the colors, and "views", where there are such."""
        bank, gaps, views = self[category], self.gaps(category), self.views(category)
        column = F.pad(gaps, (0, len(bank) - len(gaps)), value=-1.0)
        packed = {"bank": torch.cat([bank, self.spread(category)[:, None], column[:, None]], dim=1)}
        if self._has_colors(category):
            packed["colors"] = self.colors.packed(category)["bank"]
        return packed | {"views": views} if len(views) else packed

    def add_packed(self, category: str, packed: dict[str, Tensor]) -> None:
        """Store what `packed` gave. Raises ValueError as `add` does."""
        bank, colors = packed["bank"], packed.get("colors")
        self._check(category, bank[:, :-PACKED_BESIDE])
        gaps = bank[:, -1]
        views = packed.get("views", bank.new_zeros(0, bank.shape[1] - PACKED_BESIDE + 1))
        stored = self._stored(bank[:, :-PACKED_BESIDE], bank[:, -2], gaps[gaps >= 0], views)
        if colors is not None:
            self._color_bank().add_packed(category, {"bank": colors})
        else:
            self._forget_colors(category)
        self._replace({**self._held(), category: stored})

    def add(
        self,
        category: str,
        features: Tensor,
        seed: int = 0,
        sources: Tensor | None = None,
        unturned: int = 0,
        whole: int = 0,
        colors: int = 0,
    ) -> None:
        """Store the prototypes of a category, in place of those it had; more than `max_size` become a coreset.

        Args:
            category: Any non-empty name.
            features: [M, dim], M >= 1, finite; `dim` as in the other categories.
            seed: Of the coreset, see [`greedy_coreset`].
            sources: Whole numbers [M], from which picture each vector is, see `collection.prototype_sources`; None, or
                one number alone: nothing is known of how normal parts differ, and every spread is 1.
            unturned: How many vectors, from the first on, are of pictures that were not turned.
            whole: How many pictures these are, all of them equally large, to know how another picture differs as a
                whole and, where all that was not turned is kept, what it lacks. Less than 2: neither.
            colors: How many of the last channels are colors, which `deviations` also looks at by themselves: among
                hundreds of other channels a wrong color hardly counts. The same wherever there are any; 0: none.

        Raises:
            ValueError: If `category` is empty, or `features` has another shape, is not finite, or overflows the dtype.
        """
        self._check(category, features)
        kept = torch.arange(len(features), device=features.device)
        if len(features) > self.config.max_size:
            kept = greedy_coreset(features, self.config.max_size, seed).to(features.device)
            count = min(unturned, self.config.max_unturned)
            straight = torch.linspace(0, unturned - 1, count, dtype=torch.float64).round().long()
            kept = torch.cat([kept, straight.to(kept.device)]).unique() if count else kept
        if sources is None or len(sources.unique()) < 2:
            spread = features.new_ones(len(kept))
        else:
            spread = spread_of(features, sources.to(features.device), kept, seed)
        gaps, views = features.new_zeros(0), features.new_zeros(0, features.shape[1] + 1)
        if whole > 1 and unturned and unturned % whole == 0:
            if len(features) % unturned == 0:
                views = views_of(features, whole, unturned)
            if torch.equal(kept[:unturned], torch.arange(unturned, device=kept.device)):
                gaps = gaps_of(features[:unturned].unflatten(0, (whole, -1))).flatten()
        stored = self._stored(features[kept], spread, gaps, views)
        if colors:
            self._color_bank().add(category, features[:, -colors:].contiguous(), seed, sources, unturned)
        else:
            self._forget_colors(category)
        self._replace({**self._held(), category: stored})

    def _check(self, category: str, features: Tensor) -> None:
        if not category:
            raise ValueError("`category` must be a non-empty name, got ''.")
        if features.ndim != 2 or 0 in features.shape:
            raise ValueError(f"`features` must be [M, dim] with at least one vector, got {list(features.shape)}.")
        if any(other != category for other in self.categories) and features.shape[1] != self.config.dim:
            raise ValueError(
                f"`features` must have {self.config.dim} channels like the other categories, got {features.shape[1]}."
            )
        if not is_finite(features):
            raise ValueError("`features` must be finite, got NaN or infinity.")

    def _has_colors(self, category: str) -> bool:
        return self.colors is not None and category in self.colors

    def _forget_colors(self, category: str) -> None:
        if self._has_colors(category):
            self.colors.remove(category)

    def _color_bank(self) -> "PrototypeBank":
        if self.colors is None:
            self.colors = PrototypeBank(max_size=_COLORS, max_unturned=_UNBOUNDED).to(self.placeholder)
        return self.colors

    def _stored(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        like = {"dtype": self.placeholder.dtype, "device": self.placeholder.device}
        stored = tuple(tensor.detach().to(**like, copy=True) for tensor in tensors)
        if not all(torch.isfinite(tensor).all() for tensor in stored):
            raise ValueError(
                f"`features` must fit in the bank's {stored[0].dtype}, got up to {tensors[0].abs().max():g}."
            )
        return stored

    def empty(self) -> "PrototypeBank":
        """A bank of the same limits, dtype and device without categories."""
        limits = {name: self.config[name] for name in ("max_size", "max_unturned")}
        return PrototypeBank(**limits).to(self.placeholder)

    def remove(self, category: str) -> None:
        """Forget a category. Raises ValueError if it has no bank."""
        self[category]
        self._forget_colors(category)
        self._replace({other: held for other, held in self._held().items() if other != category})

    def _held(self) -> dict[str, tuple[Tensor, ...]]:
        kinds = (self.__getitem__, self.spread, self.gaps, self.views)
        return {category: tuple(kind(category) for kind in kinds) for category in self.categories}

    def _replace(self, banks: dict[str, tuple[Tensor, ...]]) -> None:
        names = ("bank", "spread", "gap", "view")
        for index in range(len(self.categories)):
            for name in names:
                delattr(self, f"{name}_{index}")
        banks = dict(sorted(banks.items()))
        for index, tensors in enumerate(banks.values()):
            for name, tensor in zip(names, tensors, strict=True):
                self.register_buffer(f"{name}_{index}", tensor)
        self.register_to_config(
            sizes={category: len(bank) for category, (bank, *_) in banks.items()},
            dim=next((bank.shape[1] for bank, *_ in banks.values()), 0),
            whole={category: len(gaps) for category, (_, _, gaps, _) in banks.items()},
            views={category: len(views) for category, (*_, views) in banks.items()},
            color_channels=0 if self.colors is None else self.colors.config.dim,
            color_sizes=None if self.colors is None else dict(self.colors.config.sizes),
        )

    @torch.no_grad()
    def distances(self, category: str, psi: Tensor, chunk: int | None = None) -> Tensor:
        """Squared Euclidean distance E of every position to its nearest prototype, Eq. (14).

        Matrix products find the nearest prototype; the distance to it is then computed by differences, so that small
        distances are not lost to cancellation.

        Args:
            category: A category with a bank.
            psi: [N, C, h, w], C = dim.
            chunk: Positions compared at once, which takes `chunk * size` float32 values of memory besides float32
                copies of `psi` and of the bank; None: as many as fit in 2^22 values (16 MiB).

        Returns:
            float32 [N, h, w], >= 0; exactly 0 where the distance is below 1e-10 of the squared length of psi.

        Raises:
            ValueError: If `category` has no bank or `psi` has another shape.
        """
        return self._nearest(category, psi, chunk, 1)[0]

    def relative_distances(self, category: str, psi: Tensor, chunk: int | None = None) -> Tensor:
        """E in units of what normal parts differ by there: E / (2 m + s), not in the paper.

        s is the mean spread of the 9 nearest prototypes and m that of the whole category. Where normal parts vary, a
        distance means little; this also makes the numbers of different features and parts comparable, some tenths
        for a normal position.

        Args and errors: see [`distances`].

        Returns:
            float32 [N, h, w], >= 0.
        """
        spread = self.spread(category).float()
        distances, index = self._nearest(category, psi, chunk, min(_NEIGHBORS, len(spread)))
        local = spread[index].mean(dim=-1)
        return distances / (2 * spread.mean() + local).clamp(min=torch.finfo(torch.float32).tiny)

    def missing_distances(self, category: str, psi: Tensor) -> Tensor | None:
        """What normal parts have and a picture lacks, see `missing.missing_distances`; not in the paper.

        Args and errors: see [`distances`].

        Returns:
            float32 [N, h, w], >= 0; None where nothing is known, because the normal pictures are fewer than two, too
            many to be kept whole, or of another size than `psi`.
        """
        gaps, bank = self.gaps(category), self[category]
        positions = psi.shape[-2] * psi.shape[-1]
        if len(gaps) == 0 or len(gaps) % positions:
            return None
        grids = bank[: len(gaps)].unflatten(0, (-1, positions))
        return missing_distances(grids, gaps.unflatten(0, (-1, positions)), psi)

    def deviations(self, category: str, psi: Tensor, repainted: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """What a picture has and no normal part has, or the other way round: the largest of [`relative_distances`],
        `MISSING_WEIGHT` times [`missing_distances`], and `COLOR_WEIGHT` times the relative distances of the colors.
        Where a picture as a whole is unlike the normal ones, what stands out counts more, see `whole`.

        Args:
            repainted: psi of the repainted pictures, and of these with what the autoencoder loses of the originals put
                back, both [N, C, h, w]: what they are at the same positions is weighed in, see `repaired`. None: not.

        Other args, and errors: see [`distances`].

        Returns:
            float32 [N, h, w], >= 0.
        """
        original, missing = self.relative_distances(category, psi), self.missing_distances(category, psi)
        found = original
        if missing is not None:
            found = torch.maximum(found, MISSING_WEIGHT * missing)
        if self._has_colors(category):
            colors = self.colors.relative_distances(category, psi[:, -self.colors.config.dim :])
            found = torch.maximum(found, COLOR_WEIGHT * colors)
        views = self.views(category)
        if len(views):
            found = stress(found, unlikeness(views, psi))
        if repainted is None:
            return found
        return weigh(found, original, *(self.relative_distances(category, features) for features in repainted))

    def _nearest(self, category: str, psi: Tensor, chunk: int | None, count: int) -> tuple[Tensor, Tensor]:
        """E, [N, h, w], and the `count` nearest prototypes, [N, h, w, count]."""
        bank = self[category].float()  # [M, C]
        if psi.ndim != 4 or psi.shape[1] != bank.shape[1]:
            raise ValueError(f"`psi` must be [N, {bank.shape[1]}, h, w] as in the bank, got {list(psi.shape)}.")
        n, _, h, w = psi.shape
        center = bank.mean(dim=0)
        bank = bank - center
        squares = bank.square().sum(dim=1)  # [M]
        queries = psi.float().permute(0, 2, 3, 1).flatten(end_dim=2) - center  # [N h w, C]
        chunk = chunk or max(1, _DISTANCE_ENTRIES // len(bank))
        nearest, indices = [], []
        for part in queries.split(chunk):
            index = torch.addmm(squares, part, bank.T, alpha=-2).topk(count, dim=1, largest=False).indices
            indices.append(index)
            distance = (part - bank[index[:, 0]]).square().sum(dim=1)
            # A picture in its own bank differs from it by rounding alone, which must not look like a pattern.
            rounding = _ROUNDING * (part + center).square().sum(dim=1)
            nearest.append(torch.where(distance > rounding, distance, torch.zeros_like(distance)))
        return torch.cat(nearest).view(n, h, w), torch.cat(indices).view(n, h, w, count)


# anomalysd_pipeline/scoring.py
# -----------------------------
# From a picture and its repaired versions to an anomaly map: perceptual distance, scale fusion, smoothing.
#
# Equation numbers are those of AnomalySD (arXiv 2408.01960).

# (kernel, stride, padding) of the five convolutions, and where their `features.<i>` sit in torchvision's AlexNet.
_CONVOLUTIONS = ((11, 4, 2), (5, 1, 2), (3, 1, 1), (3, 1, 1), (3, 1, 1))
_TORCHVISION_INDICES = (0, 3, 6, 8, 10)
_POOLED_INPUTS = (1, 2)
_SMALLEST_SIDE = 31
_EPS = 1e-10


class PerceptualDistance(ModelMixin, ConfigMixin):
    """AlexNet LPIPS (Zhang et al. 2018), both as a map per picture and as one number for training.

    Parameters hold torchvision's AlexNet convolutions (`convs`) and LPIPS' non-negative layer weights (`lins`, each
    [1, C_l, 1, 1]), which are the squares of the w^(l) in Eq. (16). A new object is randomly initialized and frozen;
    use [`from_files`], [`from_lpips`] or `from_pretrained` for trained weights.

    Convolutions run in the module's dtype. Normalization, differences and maps are float32, because eps = 1e-10
    vanishes in half precision and the distance of two nearly equal pictures would drown in rounding.

    Args:
        channels: Output channels of the five convolutions.
    """

    @register_to_config
    def __init__(self, channels: tuple[int, ...] = (64, 192, 384, 256, 256)):
        super().__init__()
        if len(channels) != len(_CONVOLUTIONS):
            raise ValueError(f"`channels` must have {len(_CONVOLUTIONS)} entries, got {tuple(channels)}.")
        inputs = (3, *channels[:-1])
        self.convs = nn.ModuleList(
            nn.Conv2d(c_in, c_out, kernel, stride, padding)
            for c_in, c_out, (kernel, stride, padding) in zip(inputs, channels, _CONVOLUTIONS, strict=True)
        )
        self.lins = nn.ParameterList(nn.Parameter(torch.full((1, c, 1, 1), 1.0 / c)) for c in channels)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def from_lpips(cls, lpips_module: nn.Module) -> "PerceptualDistance":
        """Copy the weights of an `lpips.LPIPS(net="alex")` object.

        Raises:
            ValueError: If `lpips_module` is not an AlexNet LPIPS with layer weights.
        """
        state = lpips_module.state_dict()
        slices = zip(range(1, 6), _TORCHVISION_INDICES, strict=True)
        convs = {
            f"features.{i}.{p}": state.get(f"net.slice{s}.{i}.{p}") for s, i in slices for p in ("weight", "bias")
        }
        return cls._from_states(convs, state, "`lpips_module`", "`lpips_module`")

    @classmethod
    def from_files(
        cls, alexnet_path: str | Path | None = None, lin_path: str | Path | None = None
    ) -> "PerceptualDistance":
        """Load torchvision's AlexNet and LPIPS' layer weights.

        Args:
            alexnet_path: State dict of torchvision's `alexnet` (`alexnet-owt-7be5be79.pth`), .pth or .safetensors;
                None: downloaded once through `torch.hub`.
            lin_path: LPIPS' `alex.pth` (v0.1), .pth or .safetensors; default: the one in the installed `lpips`
                package.

        Raises:
            ValueError: If a file does not exist, does not hold the expected weights, or `lin_path` is left out and
                `lpips` is not installed.
        """
        if lin_path is None:
            spec = importlib.util.find_spec("lpips")
            if spec is None:
                raise ValueError("`lin_path` is needed because the package `lpips`, which ships it, is not installed.")
            lin_path = Path(spec.origin).parent / "weights" / "v0.1" / "alex.pth"
        if alexnet_path is None:
            from torchvision.models import AlexNet_Weights

            alexnet = AlexNet_Weights.IMAGENET1K_V1.get_state_dict(check_hash=True, weights_only=True)
        else:
            alexnet = _load_state(alexnet_path, "alexnet_path")
        lins = _load_state(lin_path, "lin_path")
        return cls._from_states(alexnet, lins, "`alexnet_path`", "`lin_path`")

    @classmethod
    def _from_states(cls, alexnet: dict, lins: dict, alexnet_source: str, lin_source: str) -> "PerceptualDistance":
        state = {}
        for layer, index in enumerate(_TORCHVISION_INDICES):
            for part in ("weight", "bias"):
                tensor = alexnet.get(f"features.{index}.{part}")
                if tensor is None:
                    raise ValueError(
                        f"{alexnet_source} must hold AlexNet's weights; `features.{index}.{part}` is missing."
                    )
                state[f"convs.{layer}.{part}"] = tensor
            lin = lins.get(f"lin{layer}.model.1.weight")
            if lin is None:
                raise ValueError(
                    f"{lin_source} must hold LPIPS' layer weights; `lin{layer}.model.1.weight` is missing."
                )
            if (lin < 0).any():
                raise ValueError(
                    f"{lin_source} must hold non-negative layer weights, but layer {layer} has negative ones."
                )
            state[f"lins.{layer}"] = lin
        model = cls(channels=tuple(state[f"convs.{layer}.bias"].numel() for layer in range(len(_CONVOLUTIONS))))
        try:
            model.load_state_dict(state | {"shift": model.shift, "scale": model.scale})
        except RuntimeError as error:
            raise ValueError(f"{alexnet_source} and {lin_source} do not fit AlexNet's shapes: {error}") from error
        return model

    @apply_forward_hook  # offloading moves a module when it is used, and this is a use besides `forward`
    def features(self, x: Tensor) -> list[Tensor]:
        """Activations after each ReLU, each position's channel vector scaled to unit length.

        Args:
            x: [N, 3, H, W] in [-1, 1], sides of at least 31 px.

        Returns:
            Five float32 tensors [N, C_l, h_l, w_l]; a position where every channel is zero stays zero.

        Raises:
            ValueError: If `x` has another shape.
        """
        if x.ndim != 4 or x.shape[1] != 3 or min(x.shape[2:]) < _SMALLEST_SIDE:
            raise ValueError(
                f"`x` must be [N, 3, H, W] with sides of at least {_SMALLEST_SIDE} px, got {list(x.shape)}."
            )
        x = (x.to(self.shift.dtype) - self.shift) / self.scale
        levels = []
        for layer, conv in enumerate(self.convs):
            if layer in _POOLED_INPUTS:
                x = F.max_pool2d(x, kernel_size=3, stride=2)
            x = F.relu(conv(x))
            level = x.float()
            # vector_norm has gradient 0 at the zero vector, where sqrt(sum of squares) has NaN.
            levels.append(level / (torch.linalg.vector_norm(level, dim=1, keepdim=True) + _EPS))
        return levels

    def _layer_maps(self, features_x: list[Tensor], features_y: list[Tensor]) -> list[Tensor]:
        return [
            ((fx - fy).square() * lin.float()).sum(dim=1)  # [N, h_l, w_l], Eq. (16)
            for fx, fy, lin in zip(features_x, features_y, self.lins, strict=True)
        ]

    @apply_forward_hook
    def distance_map(self, features_x: list[Tensor], features_y: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Perceptual distance at every pixel, Eq. (16) and (17); `lpips`' `spatial=True`.

        Args:
            features_x: [`features`] of one picture (batch 1, compared with every y) or of N pictures.
            features_y: [`features`] of N pictures.
            size: (H, W) of the map.

        Returns:
            float32 [N, H, W], >= 0, summed over the five layers.
        """
        maps = (
            F.interpolate(d.unsqueeze(1), size=size, mode="bilinear", align_corners=False)
            for d in self._layer_maps(features_x, features_y)
        )
        return sum(maps).squeeze(1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """LPIPS of pairs of pictures, Eq. (10); differentiable in both.

        Args:
            x: [N, 3, H, W] in [-1, 1].
            y: As `x`.

        Returns:
            float32 [N], >= 0.
        """
        return sum(d.mean(dim=(1, 2)) for d in self._layer_maps(self.features(x), self.features(y)))


def _load_state(path: str | Path, argument: str) -> dict[str, Tensor]:
    if not Path(path).is_file():
        raise ValueError(f"`{argument}` must be an existing weights file, got {str(path)!r}.")
    if Path(path).suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def scale_map(masks: Tensor, distances: Tensor) -> Tensor:
    """S^(k) of Eq. (18): at every pixel the distance of the pass that repainted it.

    Args:
        masks: [P, 1, H, W] in {0, 1}, the masks of one scale; together they cover each pixel once.
        distances: [P, H, W] or [N, P, H, W], one distance map per mask.

    Returns:
        [H, W] or [N, H, W].
    """
    return (masks[:, 0].to(distances.dtype) * distances).sum(dim=-3)


def harmonic_mean(maps: Tensor) -> Tensor:
    """S_ms of Eq. (19): the harmonic mean over the first dimension.

    Args:
        maps: [K, ...], >= 0.

    Returns:
        float32 [...]; exactly 0 wherever any of the K values is 0.
    """
    maps = maps.float()
    smallest = maps.amin(dim=0)
    positive = smallest > 0
    # Ratios to the smallest value lie in (0, 1], whereas 1 / S overflows for denormal S.
    ratios = smallest / torch.where(positive, maps, torch.ones_like(maps))
    total = torch.where(positive, ratios.sum(dim=0), torch.ones_like(smallest))
    return torch.where(positive, smallest * (maps.shape[0] / total), torch.zeros_like(smallest))


def fuse(
    multi_scale: Tensor,
    prototype: Tensor | None = None,
    feature: Tensor | None = None,
    prototype_weight: float = 0.1,
    feature_weight: float = 0.0,
) -> Tensor:
    """Final map S = (1 - a) S_ms + a S_pg, Eq. (21), plus an optional feature term b E.

    The term b E is this project's extension: E is the distance to the nearest prototype, Eq. (14), in units of how
    much normal parts differ, or what the picture lacks (`PrototypeBank.deviations`); the paper uses the distance only
    to place a mask. With b = 0 the map is the paper's.

    Args:
        multi_scale: S_ms [N, H, W].
        prototype: S_pg [N, H, W], or None without normal pictures (K = 0): S_ms then keeps its full weight.
        feature: E [N, H, W], or None: no feature term.
        prototype_weight: a in [0, 1].
        feature_weight: b >= 0.

    Returns:
        [N, H, W].

    Raises:
        ValueError: If a weight is out of its range or a map has another shape than `multi_scale`.
    """
    if not 0 <= prototype_weight <= 1:
        raise ValueError(f"`prototype_weight` must be in [0, 1], got {prototype_weight}.")
    if not 0 <= feature_weight < math.inf:
        raise ValueError(f"`feature_weight` must be a finite number >= 0, got {feature_weight}.")
    for name, other in (("prototype", prototype), ("feature", feature)):
        if other is not None and other.shape != multi_scale.shape:
            raise ValueError(
                f"`{name}` must have the shape {list(multi_scale.shape)} of `multi_scale`, got {list(other.shape)}."
            )
    fused = multi_scale
    if prototype is not None:
        fused = (1 - prototype_weight) * fused + prototype_weight * prototype
    if feature is not None and feature_weight > 0:
        fused = fused + feature_weight * feature
    return fused


def smooth(maps: Tensor, sigma: float) -> Tensor:
    """Gaussian blur, cut off at 4 sigma, the border mirrored including its edge pixel (d c b a | a b c d | d c b a).

    Equal to `scipy.ndimage.gaussian_filter(mode="reflect")`, on any device and for maps of any size, also smaller than
    the kernel.

    Args:
        maps: [N, H, W], floating point.
        sigma: Standard deviation in pixels; 0 returns `maps` unchanged.

    Returns:
        [N, H, W], of the dtype of `maps`.

    Raises:
        ValueError: If `sigma` is negative or not finite.
    """
    if not 0 <= sigma < math.inf:
        raise ValueError(f"`sigma` must be a finite number >= 0, got {sigma}.")
    radius = int(4.0 * sigma + 0.5)
    if radius == 0:
        return maps
    weights = [math.exp(-0.5 * (offset / sigma) ** 2) for offset in range(-radius, radius + 1)]
    total = sum(weights)
    for dim in (-2, -1):
        length = maps.shape[dim]
        index = torch.arange(-radius, length + radius, device=maps.device) % (2 * length)
        index = torch.where(index < length, index, 2 * length - 1 - index)
        padded = maps.index_select(dim, index)
        # A sum of shifted copies rather than a convolution: cuDNN may run float32 convolutions in TF32.
        blurred = padded.narrow(dim, 0, length) * (weights[0] / total)
        for offset, weight in enumerate(weights[1:], start=1):
            blurred = blurred.add_(padded.narrow(dim, offset, length), alpha=weight / total)
        maps = blurred
    return maps


def smoothing_sigma(resolution: int, sigma_at_512: float = 4.0) -> float:
    """Standard deviation in pixels that covers the same part of the picture as the paper's 4 px at 512 px."""
    return sigma_at_512 * resolution / 512


def image_score(maps: Tensor) -> Tensor:
    """Image score [N]: the maximum of each map of [N, H, W]."""
    return maps.flatten(start_dim=1).amax(dim=1)


# anomalysd_pipeline/settings.py
# ------------------------------
# The knobs of one inspection: presets, what a checkpoint or category overrides, and their rules.

_FAST = {"num_inference_steps": 20, "mask_scales": (1, 2, 4, 8), "mask_grouping": "grouped"}

PRESETS = {
    "paper": {
        "num_inference_steps": 50,
        "mask_scales": (1, 2, 4, 8),
        "mask_grouping": "none",
        "feature_weight": 0.0,
    },
    "fast": {**_FAST, "feature_weight": 0.0},
    # See docs/features.md: the relative distance then outweighs the perceptual one.
    "sota": {**_FAST, "feature_weight": 1.0},
}
"""What a preset sets where the checkpoint's own config does not say otherwise."""


def checkpoint_settings(config: Mapping) -> dict:
    """The settings that a checkpoint's config stores for all presets, as a layer of `InspectionSettings.resolve`.

    Its `feature_weight` of 0, the default, stands for none of its own, so that a preset can bring one.
    """
    own = {key: config[key] for key in ("noise_strength", "prototype_weight", "feature_weight")}
    return {**own, "feature_weight": own["feature_weight"] or None}


@dataclass(frozen=True)
class InspectionSettings:
    """Everything besides the picture and the noise that a score depends on.

    noise_strength: lambda, in (0, 1]: the share of the noise schedule that is added and removed again.
    num_inference_steps: length of the whole schedule; about `noise_strength` of it is run.
    mask_scales: the k of the multi-scale masks.
    mask_grouping: "none" (a pass per cell) or "grouped" (cells that do not touch share a pass).
    prototype_weight: alpha of Eq. (21), in [0, 1].
    feature_weight: weight of the prototypes' own finding in the score, see `PrototypeBank.deviations`; 0 in the paper.
    guidance_scale: classifier-free guidance, 1 for none.
    """

    noise_strength: float
    num_inference_steps: int
    mask_scales: tuple[int, ...]
    mask_grouping: str
    prototype_weight: float
    feature_weight: float
    guidance_scale: float

    @classmethod
    def resolve(cls, preset: str, layers: Sequence[Mapping]) -> InspectionSettings:
        """The preset's values overridden by each layer in turn; `None` in a layer means "not given".

        Raises:
            ValueError: for an unknown preset or a value out of its range.
        """
        if preset not in PRESETS:
            raise ValueError(f"`preset` must be one of {', '.join(map(repr, PRESETS))}, got {preset!r}.")
        values = dict(PRESETS[preset])
        for layer in layers:
            values.update({f.name: layer[f.name] for f in fields(cls) if layer.get(f.name) is not None})
        scales = values["mask_scales"]
        if isinstance(scales, (str, bytes)) or not isinstance(scales, Sequence):
            raise ValueError(f"`mask_scales` must be a list of whole numbers such as (1, 2, 4, 8), got {scales!r}.")
        settings = cls(**{**values, "mask_scales": tuple(scales)})
        settings.check()
        return settings

    def check(self) -> None:
        """Raises ValueError, naming the argument, for a value out of its range."""
        _require_number("noise_strength", self.noise_strength, 0, 1, above=True)
        if not isinstance(self.num_inference_steps, int) or self.num_inference_steps < 1:
            raise ValueError(
                f"`num_inference_steps` must be a whole number of at least 1, got {self.num_inference_steps!r}."
            )
        if int(self.num_inference_steps * self.noise_strength) < 1:
            raise ValueError(
                f"`num_inference_steps` ({self.num_inference_steps}) times `noise_strength` ({self.noise_strength}) "
                f"leaves no step; give at least {math.ceil(1 / self.noise_strength)} steps or a higher strength."
            )
        if not all(isinstance(scale, int) and scale >= 1 for scale in self.mask_scales) or not self.mask_scales:
            raise ValueError(
                f"`mask_scales` must hold whole numbers of at least 1 such as (1, 2, 4, 8), got {self.mask_scales}."
            )
        if self.mask_grouping not in ("none", "grouped"):
            raise ValueError(f"`mask_grouping` must be 'none' or 'grouped', got {self.mask_grouping!r}.")
        _require_number("prototype_weight", self.prototype_weight, 0, 1)
        _require_number("feature_weight", self.feature_weight, 0, math.inf)
        _require_number("guidance_scale", self.guidance_scale, 1, math.inf)

    def to_dict(self) -> dict:
        """JSON-serializable values, for a category's calibration record."""
        return {**asdict(self), "mask_scales": list(self.mask_scales)}


def _require_number(name: str, value, low: float, high: float, above: bool = False) -> None:
    fits = isinstance(value, (int, float)) and math.isfinite(value) and low <= value <= high
    if not fits or (above and value == low):
        span = f"{'above' if above else 'at least'} {low}" + (f" and at most {high}" if math.isfinite(high) else "")
        raise ValueError(f"`{name}` must be a number {span}, got {value!r}.")


# anomalysd_pipeline/workload.py
# ------------------------------
# The passes of an inspection as one list of jobs, and running a list in batches that shrink when memory runs out.

_workload_logger = logging.get_logger(__name__)


class Workload:
    """Every picture with every one of its masks, numbered 0 ... len - 1, all passes of a picture in a row.

    A pass belongs to a row: the index of its scale, or K (the number of scales) for the prototype-guided mask.
    Pictures whose prototype mask is empty have no pass for it.

    Args:
        pictures: their number N.
        scales: the masks shared by all pictures.
        prototype_masks: bool `[N, 1, H, W]`, one of its own for each picture, or None.
    """

    def __init__(self, pictures: int, scales: Sequence[ScalePasses], prototype_masks: Tensor | None):
        self._masks = torch.cat([scale.masks for scale in scales])  # [P, 1, H, W]
        rows = [row for row, scale in enumerate(scales) for _ in range(len(scale.masks))]
        self._prototype_masks, self._prototype_row = prototype_masks, len(scales)
        self._jobs = []  # (picture, row, index of a shared mask or None)
        for picture in range(pictures):
            self._jobs += [(picture, row, index) for index, row in enumerate(rows)]
            if prototype_masks is not None and prototype_masks[picture].any():
                self._jobs.append((picture, self._prototype_row, None))

    def __len__(self) -> int:
        return len(self._jobs)

    def select(self, jobs: range, device) -> tuple[Tensor, Tensor, Tensor]:
        """Picture indices int64 `[B]`, masks float32 `[B, 1, H, W]` and rows int64 `[B]` of some jobs, on `device`."""
        chosen = [self._jobs[job] for job in jobs]
        masks = [
            self._prototype_masks[picture].to(device, torch.float32)
            if index is None
            else self._masks[index].to(device)
            for picture, _, index in chosen
        ]
        pictures, rows = (torch.tensor([job[part] for job in chosen], device=device) for part in (0, 1))
        return pictures, torch.stack(masks), rows


def in_batches(run: Callable[[range], None], total: int, batch_size: int) -> int:
    """Calls `run` with consecutive ranges that cover 0 ... total - 1, halving the batch each time memory runs out.

    A range that failed is run again in halves, so `run` must change nothing before it succeeds. Out of memory at a
    batch of one is raised.

    Returns:
        The batch size in use at the end.
    """
    start = 0
    while start < total:
        try:
            run(range(start, min(start + batch_size, total)))
        except (RuntimeError, MemoryError) as error:
            if batch_size == 1 or not (isinstance(error, MemoryError) or should_reduce_batch_size(error)):
                raise
            batch_size //= 2
            _workload_logger.warning(f"Out of memory: going on with `batch_size` {batch_size}.")
        else:
            start += batch_size
            continue
        # Outside the handler, where the traceback no longer holds the tensors that filled the memory.
        clear_device_cache(garbage_collection=True)
    return batch_size


# anomalysd_pipeline/detection.py
# -------------------------------
# From pictures to score maps: the stages that inspection and calibration share.

UNNAMED_CATEGORY = "part"
"""Name used in the generic prompts where no category is given."""

AT_ONCE = 4
"""Pictures whose features and latents are computed together: fixed, so that no batch size can change their
rounding."""


def autocast(device: torch.device, mixed_precision: str) -> contextlib.AbstractContextManager:
    """Computes in `mixed_precision`, "bf16" or "fp16", what can be; "no" leaves everything as it is."""
    if mixed_precision == "no":
        return contextlib.nullcontext()
    return torch.autocast(device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}[mixed_precision])


@dataclass(frozen=True)
class Findings:
    """What pictures are scored by, at the pipeline's resolution R.

    Attributes:
        multi_scale: S_ms, Eq. (19), float32 `[N, R, R]`.
        guided: S_pg, Eq. (20), float32 `[N, R, R]`; None without normal pictures.
        deviations: see `PrototypeBank.deviations`, float32 `[N, R, R]`; None where they are not asked for.
        repainted: what is shown to people, `[N, 3, R, R]` in [-1, 1].
        prototype_masks: bool `[N, 1, R, R]`; None without normal pictures.
    """

    multi_scale: Tensor
    guided: Tensor | None
    deviations: Tensor | None
    repainted: Tensor
    prototype_masks: Tensor | None

    def maps(self, prototype_weight: float, feature_weight: float) -> Tensor:
        """The smoothed score maps, Eq. (21), float32 `[N, R, R]`."""
        fused = fuse(self.multi_scale, self.guided, self.deviations, prototype_weight, feature_weight)
        return smooth(fused, smoothing_sigma(fused.shape[-1]))


def examine(
    pipe: AnomalySDPipeline,
    pictures: Tensor,
    category: str | None,
    settings: InspectionSettings,
    bank: PrototypeBank | None,
    batch_size: int | None = None,
    generator=None,
    callback: Callable | None = None,
    weigh_repainting: bool = True,
) -> Findings:
    """The stages between pictures and what they are scored by, for inspection and calibration alike.

    Args:
        pictures: `[N, 3, R, R]` in [-1, 1], R the pipeline's resolution.
        bank: holds `category`, or None for zero-shot.
        weigh_repainting: whether what the repainting does to deviations counts, in parts that the model was fine-tuned
            to; see `repaired`.
        Others: see `__call__`.
    """
    pipe.use_adaptation_of(category)
    facts = pipe.config.categories.get(category, {})
    device, side = pipe._execution_device, pipe.config.resolution
    pictures = pictures.to(device)

    # 1. The averaged prompt embedding
    design = facts.get("prompt_design", "hierarchical")
    prompts = pipe.prompt_book.prompts(category or UNNAMED_CATEGORY, design)
    text = (pipe.tokenizer, pipe.text_encoder)
    prompt_embeds = average_embedding(prompts, *text)  # [1, L, d]
    negative_embeds = average_embedding([""], *text) if settings.guidance_scale > 1 else None  # [1, L, d]

    # 2. How far each position is from the normal pictures, and the mask that follows from it
    distances, prototype_masks = None, None
    if bank is not None:
        psi = torch.cat([pipe.extractor(part) for part in pictures.split(AT_ONCE)])  # [N, C, h, w]
        distances = bank.to(device).distances(category, psi)  # [N, h, w]
        prototype_masks = prototype_mask(distances, (side, side))  # [N, 1, R, R]

    # 3. All passes: every picture with every mask
    passes = multi_scale_masks(side, side, settings.mask_scales, settings.mask_grouping)
    work = Workload(len(pictures), passes, prototype_masks)

    # 4. What is computed once per picture: latents and noise; and features, in the loop: too large to keep for all
    latents = torch.cat([encode(pipe.vae, part) for part in pictures.split(AT_ONCE)])  # [N, 4, h, w]
    noise = draw_noise(latents.shape, generator, device, pipe.unet.dtype)  # [N, 4, h, w]
    references: dict[int, list[Tensor]] = {}

    # 5. Repaint, measure and add up, in batches
    totals = torch.zeros(len(pictures), len(passes) + 1, side, side, device=device)  # [N, K + 1, R, R]
    # Shown to people: the coarse scales leave no seams, and the prototype mask knows where to look.
    shown = torch.zeros_like(pictures)  # [N, 3, R, R]
    # Each of the scales covers every pixel once.
    average = torch.zeros_like(pictures)  # [N, 3, R, R]
    shown_scale = len(passes) // 2
    steps = len(start_schedule(pipe.scheduler, settings.num_inference_steps, settings.noise_strength, device))
    done = 0
    with pipe.progress_bar(total=len(work) * steps) as progress:

        def run(jobs: range) -> None:
            nonlocal done
            indices, masks, rows = work.select(jobs, device)  # [B], [B, 1, R, R], [B]

            def on_step(step: int, timestep: Tensor, current: Tensor) -> Tensor:
                progress.update(len(jobs))
                if callback is not None:
                    changed = callback(pipe, done + step, int(timestep), {"latents": current})
                    current = (changed or {}).get("latents", current)
                return current

            with autocast(device, pipe.mixed_precision):
                repainted = repaint(
                    pipe.unet,
                    pipe.vae,
                    pipe.scheduler,
                    pictures[indices],
                    latents[indices],
                    masks,
                    noise[indices],
                    prompt_embeds.expand(len(jobs), -1, -1),
                    None if negative_embeds is None else negative_embeds.expand(len(jobs), -1, -1),
                    noise_strength=settings.noise_strength,
                    num_inference_steps=settings.num_inference_steps,
                    guidance_scale=settings.guidance_scale,
                    on_step=on_step,
                )  # [B, 3, R, R]
                features = pipe.perceptual.features(repainted)
            done += steps
            for finished in [picture for picture in references if picture < indices.min()]:
                del references[finished]
            differences = torch.empty(len(jobs), side, side, device=device)  # [B, R, R]
            for picture in indices.unique().tolist():
                if picture not in references:
                    with autocast(device, pipe.mixed_precision):
                        references[picture] = pipe.perceptual.features(pictures[picture, None])
                own = indices == picture
                differences[own] = pipe.perceptual.distance_map(
                    references[picture], [level[own] for level in features], (side, side)
                )
            # Sums change last: what failed for lack of memory is run again.
            for index, picture in enumerate(indices.tolist()):
                mask, result, row = masks[index], repainted[index], int(rows[index])
                totals[picture, row] += scale_map(mask[None], differences[index, None])  # Eqs. (18), (20)
                if row < len(passes):
                    average[picture] += mask * result / len(passes)
                if row in (shown_scale, len(passes)):
                    shown[picture] = torch.where(mask > 0.5, result, shown[picture])

        in_batches(run, len(work), batch_size or (16 if device.type == "cuda" else 4))

    # 6. Fuse the scales, and compare with the normal pictures what was there before and after
    multi_scale = harmonic_mean(totals[:, :-1].transpose(0, 1))  # [N, R, R], Eq. (19)
    guided = None if prototype_masks is None else totals[:, -1]
    far = None
    if bank is not None and settings.feature_weight > 0:
        far = []
        # Elsewhere the model does not know the part; see docs/features.md.
        known = weigh_repainting and facts.get("adapted")
        for rows in torch.arange(len(pictures)).split(AT_ONCE):
            after = _repainted_features(pipe, pictures[rows], latents[rows], average[rows]) if known else None
            far.append(bank.deviations(category, psi[rows], after))  # [n, h, w]
        far = resize(torch.cat(far), (side, side))
    return Findings(multi_scale, guided, far, shown, prototype_masks)


def _repainted_features(
    pipe: AnomalySDPipeline, pictures: Tensor, latents: Tensor, repainted: Tensor
) -> tuple[Tensor, Tensor]:
    """psi of repainted pictures, and of these with what the autoencoder loses of the originals put back, both
    [n, C, h, w]."""
    with autocast(pictures.device, pipe.mixed_precision):
        lost = pictures - decode(pipe.vae, latents)  # [n, 3, R, R]
    return pipe.extractor(repainted), pipe.extractor((repainted + lost).clamp(-1, 1))


# anomalysd_pipeline/calibration.py
# ---------------------------------
# The threshold of a part, from its normal pictures alone.

MIN_SCORES = 8
"""Augmented copies fill up a handful of pictures to this many scores: fewer say little about a spread."""

VARIATION = {"brightness": 0.03, "contrast": 0.03, "scale": 0.02, "degrees": 3.0}
"""How far the copies differ: as two photographs of one part under one lamp. More would lift the threshold too far."""

MANY_SCORES = 20
"""Scores from which on their own order tells the threshold."""

TYPICAL_SPREAD = 0.35
TYPICAL_WEIGHT = 8
"""By how much the logarithms of the scores of normal pictures typically differ (standard deviation), and as how many
scores this counts. So chosen that neither drawn parts nor metal plates, 4 pictures each, have more false alarms than
are asked for, and otherwise the fewest misses."""

SINGLE_PICTURE_MARGIN = 2.0
"""Factor on the threshold from one picture: its copies do not show how good parts differ from each other. On drawn
parts and metal plates, with the features of the embedded checkpoint, 55 % of the good ones were above the bound of the
copies, and 3 % above twice that."""


@dataclass(frozen=True)
class Calibration:
    """A threshold and what it rests on.

    threshold: image and pixel scores above it are called defective.
    scores: the scores of normal pictures it was computed from.
    false_alarm_rate: the share of good parts that is expected above it.
    settings: the inspection settings it holds for.
    pictures: how many pictures were given.
    held_out: whether each was scored against a bank made without it (two pictures or more).
    """

    threshold: float
    scores: list[float]
    false_alarm_rate: float
    settings: dict
    pictures: int
    held_out: bool

    def to_dict(self) -> dict:
        """JSON-serializable, as stored in the pipeline's config."""
        return asdict(self)


def prediction_threshold(scores: Sequence[float], false_alarm_rate: float) -> float:
    """The value that one further normal score exceeds with probability `false_alarm_rate`.

    From `MANY_SCORES` on, where the rate allows, it is one of the scores: the ceil((1 - p)(n + 1))-th smallest, which
    a further one of the same distribution, whatever that is, exceeds with a probability of at most p (Vovk et al.
    2005, split conformal prediction). Of fewer, the bound of a normal distribution on the logarithm of the scores,
    which are positive and skewed: exp(c + t_{1-p, v} s sqrt(1 + 1/n)), with v = w + n - 1 and
    s^2 = (w s_0^2 + (n - 1) d^2) / v.
    The center c is the median and the spread d 1.4826 times the median distance from it, because a picture that is
    unlike the few others says little about the next one, which will be compared with it too. As few scores know
    little of their spread, it is joined by what is typical, s_0 = `TYPICAL_SPREAD`, as if by w = `TYPICAL_WEIGHT`
    further scores.

    Args:
        scores: n >= 2 positive scores of normal pictures.
        false_alarm_rate: p, in (0, 0.5).

    Raises:
        ValueError: for fewer than 2 scores, scores that are not positive and finite, or a rate out of range.
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or len(values) < 2 or not np.isfinite(values).all() or (values <= 0).any():
        raise ValueError(f"`scores` must be 2 or more positive finite numbers, got {list(scores)}.")
    if not 0 < false_alarm_rate < 0.5:
        raise ValueError(f"`false_alarm_rate` must be above 0 and below 0.5, got {false_alarm_rate!r}.")
    count = len(values)
    rank = math.ceil((1 - false_alarm_rate) * (count + 1))
    if count >= MANY_SCORES and rank <= count:
        return float(np.sort(values)[rank - 1])
    logs = np.log(values)
    center = np.median(logs)
    spread = stats.median_abs_deviation(logs, scale="normal")
    freedom = TYPICAL_WEIGHT + count - 1
    pooled = math.sqrt((TYPICAL_WEIGHT * TYPICAL_SPREAD**2 + (count - 1) * spread**2) / freedom)
    margin = stats.t.ppf(1 - false_alarm_rate, freedom) * pooled * math.sqrt(1 + 1 / count)
    return math.exp(center + margin)


def calibrate_threshold(
    pipe: AnomalySDPipeline,
    category: str,
    pictures: Sequence[Image.Image],
    settings: InspectionSettings,
    false_alarm_rate: float,
    seed: int,
) -> Calibration:
    """Scores normal pictures as if they were new and sets the threshold by that; the pipeline is left unchanged.

    With two pictures or more, each is scored against a bank of the others; only how unlike the others it may be as a
    whole is known from all. Up to `MIN_SCORES`, lightly augmented copies (light, contrast, a small turn and scale) are
    scored as well; a single picture has only those, against its own bank, and its threshold is raised by
    `SINGLE_PICTURE_MARGIN`.

    What the repainting does to distances (`repaired`) is left out: a model that was fine-tuned to these very pictures
    repaints them better than new ones, whose scores it raises. On metal plates good parts score less with it.

    Args:
        pipe: a pipeline in which `category` is registered.
        pictures: K >= 1 normal pictures.
        settings: those that inspections will use.
        false_alarm_rate: see `prediction_threshold`.
        seed: of the augmentation and of the noise; 0 gives the noise of an inspection without a generator.

    Raises:
        ValueError: see `prediction_threshold`.
    """
    prediction_threshold([1.0, 2.0], false_alarm_rate)  # a bad rate is refused before minutes of work
    side = pipe.config.resolution
    tensors = torch.stack([to_tensor(picture, side) for picture in pictures])  # [K, 3, R, R]
    copies = max(1, math.ceil(MIN_SCORES / len(tensors))) if len(tensors) < MIN_SCORES else 1
    held_out = len(tensors) > 1
    rotations = pipe.config.categories[category]["rotations"]
    generator = torch.Generator().manual_seed(seed)
    scores: list[float] = []
    for index, tensor in enumerate(tensors):
        bank = pipe.bank
        if held_out:
            others = torch.cat([tensors[:index], tensors[index + 1 :]]).to(pipe._execution_device)
            bank = pipe.bank.empty()
            fill_bank(bank, category, pipe.extractor, others, rotations, len(tensors) >= COMPARED_PICTURES)
            # A picture unlike the others is why all of them are allowed more, not one that three others would reject.
            if category in pipe.bank:
                bank.take_reach(category, pipe.bank)
        augmented = [augment(tensor, generator, **VARIATION) for _ in range(copies - 1)]
        batch = torch.stack(
            [tensor, *augmented] if held_out else [*augmented, augment(tensor, generator, **VARIATION)]
        )
        noise = [torch.Generator().manual_seed(seed) for _ in batch]
        found = examine(pipe, batch, category, settings, bank, generator=noise, weigh_repainting=False)
        scores += image_score(found.maps(settings.prototype_weight, settings.feature_weight)).tolist()
    pipe.maybe_free_model_hooks()
    floor = np.finfo(np.float32).tiny  # a map that is zero everywhere has no logarithm
    return Calibration(
        threshold=prediction_threshold([max(score, floor) for score in scores], false_alarm_rate)
        * (1.0 if held_out else SINGLE_PICTURE_MARGIN),
        scores=scores,
        false_alarm_rate=false_alarm_rate,
        settings=settings.to_dict(),
        pictures=len(tensors),
        held_out=held_out,
    )


# anomalysd_pipeline/checkpoints.py
# ---------------------------------
# Training checkpoints that are complete or not there: killed at any moment, a run finds the last complete one.

_PREFIX = "checkpoint-"
_FACTS = "training.json"


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a folder, oldest first; none if the folder is missing."""
    found = [path for path in folder.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdecimal()]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(path: Path) -> int:
    """The number of steps after which a checkpoint was written, from its name."""
    return int(path.name.removeprefix(_PREFIX))


def save_checkpoint(accelerator, folder: Path, step: int, facts: Mapping, total_limit: int | None = None) -> None:
    """Writes `folder/checkpoint-<step>`; called by every process. It appears under its name when all of it is on disk.

    Args:
        accelerator: its `save_state` writes weights, optimizer, schedule and averages.
        facts: JSON-serializable settings that a run must share to go on from here; see `check_checkpoint`.
        total_limit: how many checkpoints to keep, this one included; None: all.

    Raises:
        ValueError: if the disk is full or may not be written. The checkpoints that were there stay.
    """
    partial, final = folder / f".{_PREFIX}{step}.partial", folder / f"{_PREFIX}{step}"
    with disk_errors("output_dir", folder, "go on with `--resume_from_checkpoint latest`"):
        if accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob(f".{_PREFIX}*"):  # of a run that was killed while writing or deleting
                shutil.rmtree(leftover, ignore_errors=True)
        accelerator.wait_for_everyone()
        try:
            accelerator.save_state(str(partial))
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                (partial / _FACTS).write_text(json.dumps(dict(facts), indent=2) + "\n", encoding="utf-8")
                flush(partial)
                remove(final)
                os.replace(partial, final)
                flush_folder(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    if accelerator.is_main_process and total_limit is not None:
        for old in list_checkpoints(folder)[:-total_limit]:
            remove(old)
    accelerator.wait_for_everyone()


def find_checkpoints(folders: Sequence[Path], resume_from: str | None) -> list[Path | None]:
    """The checkpoint of each stage's folder to go on from.

    Args:
        folders: one for each stage.
        resume_from: None for none; "latest" for the last complete one of each folder (None where there is none yet);
            or a name such as "checkpoint-500" for that one. A folder without that name gives its last one: all lead to
            the same weights, because a run with other settings is refused.

    Raises:
        ValueError: a name that is in no folder; or none, while there are checkpoints that a new run would mix with.
    """
    found = [list_checkpoints(folder) for folder in folders]
    if resume_from is None:
        if any(found):
            raise ValueError(
                f"`output_dir` '{folders[0].parent}' holds checkpoints of an earlier run; go on with "
                "`resume_from_checkpoint` 'latest', or give another folder."
            )
        return [None] * len(folders)
    name = Path(resume_from).name
    names = sorted({path.name for paths in found for path in paths})
    if resume_from != "latest" and name not in names:
        raise ValueError(
            f"`resume_from_checkpoint` must be 'latest' or a checkpoint of '{folders[0].parent}' "
            f"({', '.join(names) or 'none'}), got {resume_from!r}."
        )
    return [next((path for path in reversed(paths) if path.name == name), (paths or [None])[-1]) for paths in found]


def check_checkpoint(path: Path, facts: Mapping, steps: int) -> None:
    """Checks that a run of `steps` steps may go on from a checkpoint.

    Raises:
        ValueError: if it was written by a run with other `facts`, since going on would give neither run's result; or
            after more steps than that.
    """
    written = json.loads((path / _FACTS).read_text(encoding="utf-8"))
    ours = json.loads(json.dumps(dict(facts)))
    # In the order of our own, which has what a person chose before what follows from it.
    for key in [*ours, *(key for key in written if key not in ours)]:
        if written.get(key) != ours.get(key):
            raise ValueError(
                f"`{key}` is {ours.get(key)!r}, but '{path}' was written with {written.get(key)!r}; give the same "
                "value, or start anew in another `output_dir`."
            )
    if checkpoint_step(path) > steps:
        raise ValueError(
            f"`steps` leads to {steps} steps, but '{path}' was written after more; give at least "
            f"{checkpoint_step(path)}, or start anew in another `output_dir`."
        )


class disk_errors:
    """Turns the many exceptions of a full or forbidden disk into one sentence: `with disk_errors("output_dir", at)`.

    Args:
        argument: name of the argument that named the folder.
        folder: where was written.
        remedy: what to do after freeing space.
    """

    def __init__(self, argument: str, folder: Path, remedy: str = "try again"):
        self.argument, self.folder, self.remedy = argument, folder, remedy

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, traceback) -> None:
        # torch.save reports a failed write, and what then fails in closing the file, in words about its own source.
        words = ("write", "Write", "iostream", "unexpected pos")
        cut_short = isinstance(error, RuntimeError) and any(word in str(error) for word in words)
        if isinstance(error, (OSError, SafetensorError)) or cut_short:
            reason = "a file was cut short" if cut_short else str(getattr(error, "strerror", None) or error)
            cause = " ".join(reason.split())
            raise ValueError(
                f"`{self.argument}` '{self.folder}' could not be written ({cause}); free some space or choose "
                f"another folder, and {self.remedy}."
            ) from error


@contextlib.contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A new empty folder to write into, which takes the place of `folder` when all of it is on disk.

    After an error, or if the block is left by an exception, what was in `folder` is there as before.
    """
    partial, old = folder.with_name(f".{folder.name}.partial"), folder.with_name(f".{folder.name}.old")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        flush(partial)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(folder, old)
        os.replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists() and not folder.exists():
            os.rename(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def remove(folder: Path) -> None:
    """Deletes a folder so that no half of it is ever seen under its name."""
    if folder.exists():
        doomed = folder.with_name(f".{folder.name}.deleted")
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(folder, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def flush(folder: Path) -> None:
    """Forces a folder's files onto the disk: a rename must not outrun the bytes it promises."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    flush_folder(folder)


def flush_folder(folder: Path) -> None:
    """Forces a folder's list of names onto the disk, where the system can do that."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# anomalysd_pipeline/adaptation_folder.py
# ---------------------------------------
# An adaptation as a folder: `adaptation.json` and `adaptation.safetensors`, without the base it belongs to.

FACTS, WEIGHTS = "adaptation.json", "adaptation.safetensors"
EMBEDDED_NAME = "embedded"
_FORMAT = 2
_BANKS = ("bank", "colors", "views")
_KEYS = {
    "format",
    "version",
    "name",
    "base_model",
    "base_fingerprint",
    "resolution",
    "record",
    "categories",
    "prompts",
}
_RECORD_KEYS = {
    "shots",
    "rotations",
    "noise_strength",
    "adaptation",
    "prompt_design",
    "adapted",
    "calibration",
}
_OURS = {FACTS, WEIGHTS, "README.md"}
"""What a folder may hold that is replaced as a whole; the last is added where it is published."""


@dataclass(frozen=True)
class StoredAdaptation:
    """What a folder holds.

    name: of the adaptation.
    base_model: the Hub id of its base, "embedded", or the name of a folder.
    record: settings of its fine-tuning.
    categories: category to its settings and calibration.
    prompts: category to its prompts.
    banks: category to what `PrototypeBank.packed` gives of it.
    state: part to LoRA weights by name.
    """

    name: str
    base_model: str
    record: dict
    categories: dict[str, dict]
    prompts: dict[str, dict]
    banks: dict[str, dict[str, Tensor]]
    state: dict[str, dict[str, Tensor]]


def base_name(pipe) -> str:
    """How an adaptation names its base: a Hub id, "embedded", or the bare name of a folder."""
    name = str(pipe.name_or_path or "")
    if name == EMBEDDED:
        return EMBEDDED_NAME
    return Path(name).name if os.path.isdir(name) else name


def is_adaptation_folder(path) -> bool:
    """Whether a path is a folder that holds an adaptation and no pipeline."""
    return Path(path, FACTS).is_file() and not Path(path, "model_index.json").is_file()


def adaptation_base_of(folder) -> tuple[str, int]:
    """The base of an adaptation's folder, a path or a Hub id, and the resolution that it was made at.

    Raises:
        ValueError: if the folder is damaged, or was made on a base of which only the name is known.
    """
    try:
        facts = json.loads(Path(folder, FACTS).read_text(encoding="utf-8"))
        name, resolution = str(facts["base_model"]), int(facts["resolution"])
    except (OSError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"`pretrained_model_name_or_path` '{folder}' must hold a complete {FACTS} ({type(error).__name__})."
        ) from error
    if name == EMBEDDED_NAME:
        return EMBEDDED, resolution
    if "/" not in name:
        raise ValueError(
            f"`pretrained_model_name_or_path` '{folder}' is an adaptation of the local base {name!r}; load that base, "
            "and then the adaptation with `load_adaptation`."
        )
    return name, resolution


def write_adaptation(pipe, name: str, categories: list[str], folder: Path) -> None:
    """Writes a pipeline's adaptation; what was in the folder before is replaced when the new one is complete.

    Raises:
        ValueError: if the folder holds something else than an adaptation, or cannot be written.
    """
    folder = Path(os.path.abspath(folder))
    held = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if folder.is_file() or (held and not (FACTS in held and held <= _OURS)):
        raise ValueError(f"`save_directory` '{folder}' holds other things; give a new or empty folder.")
    facts = {
        "format": _FORMAT,
        "version": __version__,
        "name": name,
        "base_model": base_name(pipe),
        "base_fingerprint": pipe.adaptation_base(),
        "resolution": pipe.config.resolution,
        "record": pipe.config.adaptations[name],
        "categories": {category: pipe.config.categories[category] for category in categories},
        "prompts": {category: pipe.config.prompts["categories"][category] for category in categories},
    }
    tensors = {
        f"{part}.{key}": value.half().contiguous()
        for part, own in pipe.adapters.state(name).items()
        for key, value in own.items()
    }
    # By number: a category may have any name.
    tensors |= {
        f"{kind}.{index}": tensor.contiguous()
        for index, category in enumerate(categories)
        for kind, tensor in pipe.bank.packed(category).items()
    }
    with disk_errors("save_directory", folder), written_whole(folder) as partial:
        (partial / FACTS).write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        save_file({key: value.cpu() for key, value in tensors.items()}, partial / WEIGHTS)


def read_adaptation(source, pipe, **hub) -> StoredAdaptation:
    """Reads an adaptation from a folder or from the Hub, trusting nothing in it, and checks that it fits a pipeline.

    Raises:
        ValueError: if it is missing, damaged, of a later format, or made for another base.
    """
    folder = Path(source) if os.path.isdir(source) else _download(str(source), hub)
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        later = facts["format"] > _FORMAT
        if not later:
            stored = _parse(facts, load_file(folder / WEIGHTS))
            fits = same_fingerprint(pipe.adaptation_base(), facts["base_fingerprint"])
            if fits:
                _check_fits(stored, pipe)
    # All that wrong types and values lead to; a deep nesting ends in RecursionError.
    except (OSError, SafetensorError, AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"`pretrained_adaptation_name_or_path` '{source}' must hold a complete {FACTS} and {WEIGHTS}, as "
            f"`save_adaptation` writes them ({type(error).__name__}: {' '.join(str(error).split())[:200]})."
        ) from error
    if later:
        raise ValueError(
            f"`pretrained_adaptation_name_or_path` '{source}' was written by a later version "
            f"({str(facts.get('version'))[:20]}); update the package anomalysd-pipeline."
        )
    if facts["resolution"] != pipe.config.resolution:
        raise ValueError(
            f"`pretrained_adaptation_name_or_path` '{source}' was made for pictures of {facts['resolution']} pixels, "
            f"and this pipeline inspects at {pipe.config.resolution}; load its base with "
            f"`resolution={facts['resolution']}`."
        )
    if not fits:
        raise ValueError(
            f"`pretrained_adaptation_name_or_path` '{source}' was made for the base {stored.base_model!r}, and this "
            "pipeline has other weights; load it into a pipeline of that base."
        )
    return stored


def _parse(facts: dict, tensors: dict[str, Tensor]) -> StoredAdaptation:
    if facts.keys() != _KEYS or facts["record"].keys() != {"settings"}:
        raise ValueError(f"{FACTS} has other keys than an adaptation")
    if type(facts["resolution"]) is not int or len(str(facts["base_model"])) > 200:
        raise ValueError("its resolution is no whole number, or its base has no name")
    categories = facts["categories"]
    stored = StoredAdaptation(
        name=check_category(facts["name"]),
        base_model=str(facts["base_model"]),
        record={"settings": dict(facts["record"]["settings"])},
        categories={check_category(category): _check_record(record) for category, record in categories.items()},
        prompts={category: dict(facts["prompts"][category]) for category in categories},
        banks={
            category: {kind: tensors[f"{kind}.{index}"] for kind in _BANKS if f"{kind}.{index}" in tensors}
            for index, category in enumerate(categories)
        },
        state={
            part: own
            for part in PARTS
            if (own := {k.removeprefix(f"{part}."): v for k, v in tensors.items() if k.startswith(f"{part}.")})
        },
    )
    if not (stored.categories and stored.state) or facts["prompts"].keys() != categories.keys():
        raise ValueError("it names no category, or no weights, or has prompts of others")
    if len(tensors) != sum(map(len, [*stored.banks.values(), *stored.state.values()])):
        raise ValueError(f"{WEIGHTS} has other weights than an adaptation")
    return stored


def _check_record(record: dict) -> dict:
    """The record of a category as it was given, if inspections can rely on it."""
    # Scores, and so thresholds, did not depend on it when it was not written.
    record = {"adapted": False, **record}
    counts = (record["shots"], record["rotations"])
    if record.keys() != _RECORD_KEYS or not all(type(count) is int and count >= 1 for count in counts):
        raise ValueError("a category's record has other keys or counts")
    if record["prompt_design"] not in PROMPT_DESIGNS:
        raise ValueError(f"a category has the prompt_design {record['prompt_design']!r}")
    if type(record["adapted"]) is not bool:
        raise ValueError("a category's `adapted` is neither true nor false")
    if record["calibration"] is not None:
        calibration = Calibration(**record["calibration"])
        scales = tuple(calibration.settings["mask_scales"])
        InspectionSettings(**{**calibration.settings, "mask_scales": scales}).check()
        prediction_threshold([1.0, 2.0], calibration.false_alarm_rate)
        if not all(type(score) is float and math.isfinite(score) for score in calibration.scores):
            raise ValueError("a calibration has scores that are not finite")
        if type(calibration.threshold) is not float or not 0 < calibration.threshold < math.inf:
            raise ValueError(f"a calibration has the threshold {calibration.threshold!r}")
        if type(calibration.pictures) is not int or type(calibration.held_out) is not bool:
            raise ValueError("a calibration has another number of pictures")
    return record


def _check_fits(stored: StoredAdaptation, pipe) -> None:
    for part, own in stored.state.items():
        check_fits({"denoiser": pipe.unet, "decoder": pipe.vae}[part], own)
    book = pipe.prompt_book
    channels = sum(pipe.extractor.channels)
    columns = {"bank": channels + PACKED_BESIDE, "views": channels + 1}
    if pipe.extractor.color_channels:
        columns["colors"] = pipe.extractor.color_channels + PACKED_BESIDE
    for category, banks in stored.banks.items():
        book.add(category, stored.prompts[category])
        if stored.categories[category]["noise_strength"] is not None:
            pipe.settings(noise_strength=stored.categories[category]["noise_strength"])
        if "bank" not in banks or banks.keys() - columns.keys():
            raise ValueError(f"banks of {', '.join(banks) or 'nothing'}, where the pipeline has {', '.join(columns)}")
        for kind, bank in banks.items():
            fits = bank.ndim == 2 and len(bank) and bank.shape[1] == columns[kind]
            if not fits or not bank.is_floating_point():
                raise ValueError(f"a bank of the shape {list(bank.shape)} and type {bank.dtype}")
            if not bank.isfinite().all():
                raise ValueError("a bank that is not finite")


def _download(repo_id: str, hub: dict) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(repo_id, allow_patterns=[FACTS, WEIGHTS], **hub))
    except (HFValidationError, OSError) as error:  # all that the client raises for a missing or unreachable repository
        raise ValueError(
            f"`pretrained_adaptation_name_or_path` must be a folder or a Hub id that can be reached, got {repo_id!r} "
            f"({' '.join(str(error).split())[:200]})."
        ) from error


# anomalysd_pipeline/adaptation_settings.py
# -----------------------------------------
# The knobs of a fine-tuning: the paper's values, what a checkpoint changes, and their rules.

METHODS = ("lora", "full")
SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class AdaptationSettings:
    """Everything a fine-tuning depends on besides the pictures; the defaults are the paper's where it names a value.

    method: "full" trains all weights of a part, as the paper does; "lora" trains low-rank additions to them, a few MB.
    train_denoiser, train_decoder: which parts (the rows of the paper's Table 3).
    steps, decoder_steps: optimizer steps of each part; None: as many as `epochs` and `decoder_epochs` take.
    epochs, decoder_epochs: passes over all pictures.
    train_batch_size: pictures per process and forward pass.
    gradient_accumulation_steps: forward passes per optimizer step.
    learning_rate, decoder_learning_rate: of Adam; the decoder's None: the same.
    lr_scheduler, lr_warmup_steps: as `diffusers.optimization.get_scheduler` knows them.
    max_grad_norm: gradients are scaled down to this length.
    use_8bit_adam: optimizer states in 8 bits; needs the package `bitsandbytes` and a GPU.
    mask_design: "foreground" (the paper's), "random", or "detection", see `FewShotDataset`.
    prompt_design: "hierarchical" (the paper's), "simple" or "none".
    noise_range: share of the noise schedule that is trained, (low, high); the paper trains all of it.
    augmentation: limits of `data.augment`.
    defect_share: share of the samples that are shown with a drawn defect, which the denoiser learns to repaint as the
        normal part; 0 in the paper.
    repainting_weight: weight of a loss on repainted pictures in the denoiser's, see `losses.repainting_loss`; 0 in the
        paper.
    decoder_latents: what the decoder learns to decode: "encoded" pictures (the paper's), or latents as the denoiser
        gives them, "repainted" in a single step.
    rank, target_modules: of the denoiser's LoRA; the modules by the ends of their names.
    decoder_rank, decoder_target_modules: of the decoder's.
    use_ema, ema_decay: whether the moving average of the weights is what is kept.
    gradient_checkpointing: less memory, more time.
    mixed_precision: "no", "bf16", "fp16", or "auto": bf16 where the processor computes in it.
    seed: of initial LoRA weights, order, augmentation, masks, prompts and noise.
    """

    method: str = "lora"
    train_denoiser: bool = True
    train_decoder: bool = True
    steps: int | None = None
    decoder_steps: int | None = None
    epochs: int = 4000
    decoder_epochs: int = 200
    train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-4
    decoder_learning_rate: float | None = None
    lr_scheduler: str = "constant"
    lr_warmup_steps: int = 0
    max_grad_norm: float = 1.0
    use_8bit_adam: bool = False
    mask_design: str = "foreground"
    prompt_design: str = "hierarchical"
    noise_range: tuple[float, float] = (0.0, 1.0)
    augmentation: dict = field(
        default_factory=lambda: {"brightness": 0.1, "contrast": 0.1, "scale": 0.1, "degrees": 15.0}
    )
    defect_share: float = 0.0
    repainting_weight: float = 0.0
    decoder_latents: str = "encoded"
    rank: int = 16
    target_modules: tuple[str, ...] = _ATTENTION
    decoder_rank: int = 16
    decoder_target_modules: tuple[str, ...] = (*_ATTENTION, "conv1", "conv2", "conv_shortcut")
    use_ema: bool = False
    ema_decay: float = 0.9999
    gradient_checkpointing: bool = False
    mixed_precision: str = "auto"
    seed: int = 0

    @classmethod
    def resolve(cls, layers: Sequence[Mapping]) -> AdaptationSettings:
        """The defaults overridden by each layer in turn; `None` in a layer means "not given".

        Raises:
            TypeError: for a name that is no setting.
            ValueError: for a value out of its range.
        """
        known = {f.name for f in fields(cls)}
        values = {}
        for layer in layers:
            unknown = sorted(set(layer) - known)
            if unknown:
                raise TypeError(f"`{unknown[0]}` is not a setting of a fine-tuning.")
            values.update({name: value for name, value in layer.items() if value is not None})
        for name in ("noise_range", "target_modules", "decoder_target_modules"):
            if isinstance(values.get(name), list):
                values[name] = tuple(values[name])
        settings = cls(**values)
        settings.check()
        return settings

    def check(self) -> None:
        """Raises ValueError, naming the argument, for a value out of its range."""
        choices = {"method": METHODS, "mask_design": MASK_DESIGNS, "prompt_design": PROMPT_DESIGNS}
        choices["lr_scheduler"] = SCHEDULERS
        choices["decoder_latents"] = ("encoded", "repainted")
        choices["mixed_precision"] = ("auto", "no", "bf16", "fp16")
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"`{name}` must be one of {', '.join(map(repr, allowed))}, got {getattr(self, name)!r}."
                )
        for name in ("steps", "decoder_steps"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(
                    f"`{name}` must be a whole number of at least 1, got {value!r}; to leave a part as it is, give "
                    "`train_denoiser=False` or `train_decoder=False`."
                )
        counts = (
            "epochs",
            "decoder_epochs",
            "train_batch_size",
            "gradient_accumulation_steps",
            "rank",
            "decoder_rank",
        )
        for name in counts:
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be a whole number of at least 1, got {getattr(self, name)!r}.")
        for name in ("learning_rate", "decoder_learning_rate", "max_grad_norm"):
            value = getattr(self, name)
            if value is None and name == "decoder_learning_rate":
                continue
            if not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ValueError(f"`{name}` must be a number above 0, got {value!r}.")
        if not isinstance(self.lr_warmup_steps, int) or self.lr_warmup_steps < 0:
            raise ValueError(f"`lr_warmup_steps` must be a whole number of at least 0, got {self.lr_warmup_steps!r}.")
        if self.lr_warmup_steps and self.lr_scheduler == "constant":
            raise ValueError(
                f"`lr_warmup_steps` is {self.lr_warmup_steps}, but the `lr_scheduler` 'constant' has no warmup; give "
                "'constant_with_warmup'."
            )
        if len(self.noise_range) != 2 or not 0 <= self.noise_range[0] < self.noise_range[1] <= 1:
            raise ValueError(f"`noise_range` must be two rising numbers in [0, 1], got {tuple(self.noise_range)}.")
        if not isinstance(self.defect_share, (int, float)) or not 0 <= self.defect_share <= 1:
            raise ValueError(f"`defect_share` must be a number in [0, 1], got {self.defect_share!r}.")
        if not isinstance(self.repainting_weight, (int, float)) or not 0 <= self.repainting_weight < math.inf:
            raise ValueError(f"`repainting_weight` must be a number of at least 0, got {self.repainting_weight!r}.")
        if not isinstance(self.ema_decay, (int, float)) or not 0 < self.ema_decay < 1:
            raise ValueError(f"`ema_decay` must be a number above 0 and below 1, got {self.ema_decay!r}.")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"`seed` must be a whole number of at least 0, got {self.seed!r}.")
        if not (self.train_denoiser or self.train_decoder):
            raise ValueError("`train_denoiser` and `train_decoder` are both off; leave at least one on.")

    def course(self) -> dict:
        """What a run that is resumed must share with the one that wrote the checkpoint: all but the lengths, which may
        be extended."""
        lengths = ("steps", "decoder_steps", "epochs", "decoder_epochs", "gradient_checkpointing")
        return {name: value for name, value in self.to_dict().items() if name not in lengths}

    def to_dict(self) -> dict:
        """JSON-serializable values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


# anomalysd_pipeline/adaptations.py
# ---------------------------------
# The part of the pipeline that learns: fine-tuning in memory, several adaptations on one base, saving and loading
# them.

class AdaptationMixin:
    """Fine-tuning of an `AnomalySDPipeline`."""

    _chosen_adaptation: str | None = None

    @property
    def adaptations(self) -> list[str]:
        """Names of the adaptations kept beside the base, alphabetically."""
        return sorted(self.config.adaptations)

    def adaptation_settings(self, **given) -> AdaptationSettings:
        """The settings that `adapt` would use with these arguments: call, then checkpoint, then the paper's.

        Raises:
            TypeError: for a name that is no setting.
            ValueError: for a value out of its range.
        """
        return AdaptationSettings.resolve([self.config.adaptation, given])

    def adapt(
        self,
        normal_images: Mapping[str, object],
        steps: int | None = None,
        method: str | None = None,
        decoder_steps: int | None = None,
        name: str | None = None,
        prompts: Mapping[str, object] | None = None,
        calibrate: bool = True,
        false_alarm_rate: float = 0.05,
        callback: Callable[[AdaptationProgress], None] | None = None,
        **settings,
    ) -> AdaptedWeights:
        """Fine-tunes the denoiser and the decoder on a few normal pictures, then registers and calibrates the parts.

        All or nothing: until it has succeeded, and after an error or a cancellation, the pipeline is as it was.

        Args:
            normal_images: category to 1 or more pictures of good parts, anything `load_image` takes.
            steps, decoder_steps: optimizer steps of the denoiser and of the decoder; None: the checkpoint's own.
            method: "lora": the learned weights are kept beside the base, and inspections of these categories use them,
                so that many adaptations share one base. "full": the base itself is replaced in this pipeline.
            name: of the adaptation; None: the categories' names. One of that name is replaced, if no other categories
                rest on it.
            prompts: category to T_c, as `PromptBook.add` takes it; None keeps the part's own or the generic set.
            calibrate: whether thresholds are set from the same pictures.
            false_alarm_rate: see `calibrate`.
            callback: called with an `AdaptationProgress` after every step; an exception that it raises cancels.
            **settings: others of `AdaptationSettings`, such as `learning_rate`, `train_decoder`, `rank`, `seed`.

        Returns:
            The learned weights, with the loss of every step.

        Raises:
            ValueError: for bad names, pictures, prompts or settings.
        """
        fine_tune = _from_package("adaptation").fine_tune
        in_memory_accelerator = _from_package("adaptation").in_memory_accelerator

        shots = check_shots(normal_images, prompts)
        chosen = self.adaptation_settings(steps=steps, method=method, decoder_steps=decoder_steps, **settings)
        self.check_adaptable(name or default_name(shots), chosen.method, shots)
        prediction_threshold([1.0, 2.0], false_alarm_rate)  # a bad rate is refused before minutes of work
        if getattr(self, "_all_hooks", None):
            raise ValueError(
                "`adapt` needs the pipeline on one device, but parts of it are offloaded; call "
                "`pipe.remove_all_hooks()` and `pipe.to(...)` first."
            )
        accelerator = in_memory_accelerator(self.device, chosen)
        weights = fine_tune(self, shots, chosen, accelerator, prompts=prompts, callback=callback)
        self.learn(shots, weights, name, prompts, calibrate, false_alarm_rate)
        return weights

    def learn(
        self,
        normal_images: Mapping[str, object],
        weights: AdaptedWeights,
        name: str | None = None,
        prompts: Mapping[str, object] | None = None,
        calibrate: bool = True,
        false_alarm_rate: float = 0.05,
    ) -> None:
        """Takes in what `adaptation.fine_tune` returned, and registers and calibrates its categories; all or nothing.

        Arguments and errors are those of `adapt`.
        """
        shots = check_shots(normal_images, prompts)
        name = name or default_name(shots)
        full = weights.settings.method == "full"
        self.check_adaptable(name, weights.settings.method, shots)
        with self._undone_on_error():
            if full:
                self._replace_weights(weights)
            for category, images in shots.items():
                self.add_category(category, images, (prompts or {}).get(category))
                # Inspected with the prompts that it was trained with.
                design = weights.settings.prompt_design
                self._store_category(category, adaptation=None if full else name, prompt_design=design, adapted=True)
            if not full:
                # In half precision, as it will be saved: what is measured now is what a reload will give.
                state = {
                    part: {key: value.half() for key, value in own.items()}
                    for part, own in (("denoiser", weights.denoiser), ("decoder", weights.decoder))
                    if own is not None
                }
                # After the categories: they drop the adaptation that this one replaces.
                self.adapters.add(name, state)
                self._store_adaptation(name, {"settings": weights.settings.to_dict()})
            if calibrate:
                for category, images in shots.items():
                    self.calibrate(category, images, false_alarm_rate)

    def check_adaptable(self, name: str, method: str, categories: Collection[str] | None = None) -> None:
        """Checks what can be told to be wrong with an adaptation before it is trained.

        Args:
            name: of the adaptation.
            method: "lora" or "full".
            categories: those it is for.

        Raises:
            ValueError: for a bad name, one on which other categories rest, or a method that would change the base of
                other adaptations.
        """
        try:
            check_category(name)
        except ValueError as error:
            raise ValueError(str(error).replace("`category`", "`name`")) from error
        if method == "full" and self.adaptations:
            raise ValueError(
                f"`method` 'full' would change the base that {', '.join(map(repr, self.adaptations))} rest on; remove "
                "them with `remove_adaptation`, or use a pipeline that is loaded anew."
            )
        others = [c for c in self._categories_of(name) if categories is not None and c not in categories]
        if others:
            raise ValueError(
                f"`name` {name!r} is that of an adaptation on which {', '.join(map(repr, others))} rest; give another "
                "name, or remove it with `remove_adaptation` first."
            )

    def remove_adaptation(self, name: str) -> None:
        """Forgets an adaptation and the categories that rest on it.

        Raises:
            ValueError: if there is none of that name.
        """
        self._check_adaptation(name)
        for category in self._categories_of(name):
            self.remove_category(category)
        self._drop_unused_adaptations()

    def set_adaptation(self, name: str | None) -> None:
        """Chooses the adaptation that direct calls of `inpaint` use; None, as at first: the base. An inspection
        switches by itself, to the adaptation of its category.

        Raises:
            ValueError: if there is none of that name.
        """
        if name is not None:
            self._check_adaptation(name)
        self._chosen_adaptation = name

    def use_adaptation(self, name: str | None) -> None:
        """Switches the denoiser and the decoder to an adaptation or to the base. Called before every run: another
        pipeline may share them and have switched them since."""
        state = {} if name is None else self.adapters.state(name)
        switch_adapter(self.unet, state.get("denoiser"), self)
        switch_adapter(self.vae, state.get("decoder"), self)

    def use_adaptation_of(self, category: str | None) -> None:
        """Switches to the adaptation of a category; to the base for one that has none."""
        self.use_adaptation(self.config.categories.get(category, {}).get("adaptation"))

    def save_adaptation(self, save_directory, adaptation: str | None = None) -> None:
        """Writes an adaptation without the base: LoRA weights, banks, prompts and thresholds, a few MB
        to some 20.

        Args:
            save_directory: made if missing; replaced as a whole if it holds an adaptation.
            adaptation: its name; None: the only one there is.

        Raises:
            ValueError: if there is none of that name, or several and none is named, or the folder cannot be written.
        """
        if adaptation is None:
            if len(self.adaptations) != 1:
                raise ValueError(
                    f"`adaptation` must name one of {', '.join(self.adaptations) or 'none: call `adapt` first'}."
                )
            adaptation = self.adaptations[0]
        self._check_adaptation(adaptation)
        write_adaptation(self, adaptation, self._categories_of(adaptation), Path(save_directory))

    def load_adaptation(self, pretrained_adaptation_name_or_path, overwrite: bool = False, **hub) -> list[str]:
        """Takes in an adaptation that `save_adaptation` wrote, from a folder or from the Hub; all or nothing.

        Args:
            pretrained_adaptation_name_or_path: folder or Hub id.
            overwrite: whether categories of the same names may be replaced.
            **hub: `revision`, `token`, `cache_dir`, `local_files_only`, as of `huggingface_hub.snapshot_download`.

        Returns:
            The categories it brought.

        Raises:
            ValueError: if it is missing, damaged or made for another base, or its categories are registered already,
                or others rest on an adaptation of its name.
        """
        found = read_adaptation(pretrained_adaptation_name_or_path, self, **hub)
        registered = [category for category in found.categories if category in self.config.categories]
        if registered and not overwrite:
            raise ValueError(
                f"`pretrained_adaptation_name_or_path` brings {', '.join(map(repr, registered))}, which this pipeline "
                "knows already; give `overwrite=True`, or remove them with `remove_category` first."
            )
        others = [category for category in self._categories_of(found.name) if category not in found.categories]
        if others:
            raise ValueError(
                f"`pretrained_adaptation_name_or_path` brings an adaptation {found.name!r}, and on one of that name "
                f"{', '.join(map(repr, others))} rest here; remove it with `remove_adaptation` first."
            )
        with self._undone_on_error():
            book = self.prompt_book
            for category in found.categories:
                book.add(category, found.prompts[category])
                packed = {name: tensor.to(self.bank.device) for name, tensor in found.banks[category].items()}
                self.bank.add_packed(category, packed)
            self.register_to_config(prompts=book.to_dict())
            self.adapters.add(found.name, found.state)
            for category, record in found.categories.items():
                self._store_category(category, **{**record, "adaptation": found.name})
            self._store_adaptation(found.name, found.record)
            self._drop_unused_adaptations()
        return list(found.categories)

    def adaptation_base(self) -> dict:
        """What an adaptation must find again: a few weights of each network that it rests on."""
        names = ("unet", "vae", "extractor", "perceptual")
        return fingerprint({name: self.components[name] for name in names})

    def save_pretrained(self, save_directory, *args, **kwargs) -> None:
        """As `DiffusionPipeline.save_pretrained`; adaptations, banks, prompts and thresholds included."""
        # Their weights are in the store, so the modules can be written as they were loaded.
        take_out_adapters(self.unet)
        take_out_adapters(self.vae)
        super().save_pretrained(save_directory, *args, **kwargs)

    # Parts of the above

    def _categories_of(self, adaptation: str) -> list[str]:
        records = self.config.categories.items()
        return sorted(category for category, record in records if record.get("adaptation") == adaptation)

    def _check_adaptation(self, name: str) -> None:
        if name not in self.config.adaptations:
            raise ValueError(f"`adaptation` must be one of {', '.join(self.adaptations) or 'none yet'}, got {name!r}.")

    def _store_adaptation(self, name: str, record: dict) -> None:
        self.register_to_config(adaptations={**copy.deepcopy(dict(self.config.adaptations)), name: record})

    def _drop_unused_adaptations(self) -> None:
        used = {record.get("adaptation") for record in self.config.categories.values()}
        for name in self.adaptations:
            if name not in used:
                self.adapters.remove(name)
        kept = {name: record for name, record in self.config.adaptations.items() if name in used}
        self.register_to_config(adaptations=kept)
        if self._chosen_adaptation not in kept:
            self._chosen_adaptation = None

    def _replace_weights(self, weights: AdaptedWeights) -> None:
        """Puts fully trained weights in new modules: the old ones may be another pipeline's too."""
        if weights.denoiser is not None:
            unet = copy.deepcopy(self.unet)
            take_out_adapters(unet)  # of adaptations that are gone, or of another pipeline
            unet.load_state_dict(weights.denoiser)
            self.register_modules(unet=unet)
        if weights.decoder is not None:
            vae = copy.deepcopy(self.vae)
            take_out_adapters(vae)
            vae.load_state_dict(weights.decoder, strict=False)
            self.register_modules(vae=vae)
        for category in self.categories:
            self._store_category(category, calibration=None, adapted=False)  # both of the old weights

    @contextlib.contextmanager
    def _undone_on_error(self):
        keys = ("categories", "prompts", "adaptations")
        before = {key: copy.deepcopy(self.config[key]) for key in keys}
        modules = {"unet": self.unet, "vae": self.vae, "bank": self.bank, "adapters": self.adapters}
        chosen = self._chosen_adaptation
        # Work on copies, so that the originals can simply be put back.
        self.register_modules(bank=copy.deepcopy(self.bank), adapters=copy.deepcopy(self.adapters))
        try:
            yield
        except BaseException:
            self.register_modules(**modules)
            self.register_to_config(**before)
            self._chosen_adaptation = chosen
            raise


def check_shots(normal_images: Mapping[str, object], prompts: Mapping[str, object] | None = None) -> dict[str, list]:
    """Category to RGB pictures.

    Raises:
        ValueError: if it is no mapping or empty, a name or a picture is bad, or `prompts` are of other categories.
    """
    if not isinstance(normal_images, Mapping) or not normal_images:
        raise ValueError(
            "`normal_images` must map at least one category to its pictures, such as {'hex nut': [...]}, got "
            f"{'an empty one' if isinstance(normal_images, Mapping) else type(normal_images).__name__}."
        )
    if prompts is not None and (not isinstance(prompts, Mapping) or not set(prompts) <= set(normal_images)):
        given = list(prompts) if isinstance(prompts, Mapping) else type(prompts).__name__
        raise ValueError(f"`prompts` must map categories of `normal_images` to their prompts, got {given}.")
    return {
        check_category(category): load_pictures(images, f"normal_images[{category!r}]")
        for category, images in normal_images.items()
    }


def default_name(shots: Mapping[str, object]) -> str:
    """The name of an adaptation that was given none."""
    names = ", ".join(shots)
    return names if len(names) <= 64 else f"{next(iter(shots))[:40]} and {len(shots) - 1} more"


# anomalysd_pipeline/categories.py
# --------------------------------
# The part of the pipeline that knows parts: registering them, their prompts, and their thresholds.

class CategoryMixin:
    """Registered parts of an `AnomalySDPipeline`."""

    @property
    def categories(self) -> list[str]:
        """Names of the registered categories, alphabetically."""
        return sorted(self.config.categories)

    @property
    def prompt_book(self) -> PromptBook:
        """A copy of the prompts in use; `add_category` changes them."""
        return PromptBook.from_dict(self.config.prompts)

    def _store_category(self, category: str, **facts) -> None:
        categories = copy.deepcopy(dict(self.config.categories))
        categories[category] = {**categories.get(category, {}), **facts}
        self.register_to_config(categories=categories)

    @torch.no_grad()
    def add_category(
        self,
        category: str,
        normal_images,
        prompts=None,
        noise_strength: float | None = None,
        rotations: int | None = None,
    ) -> None:
        """Registers a part from its normal pictures, without a gradient step: prompts and the prototype bank of Eq.
        (13).

        A category of that name is replaced, and its calibration and adaptation forgotten. On an error nothing is
        changed.

        Args:
            category: name of the part; it fills the generic prompts where the part has none of its own.
            normal_images: 1 or more pictures of good parts, anything `load_image` takes.
            prompts: T_c as `PromptBook.add` takes it; None keeps the part's own or the generic set.
            noise_strength: lambda for this part; None: the checkpoint's.
            rotations: number of rotated copies of each picture in the bank, evenly spaced; None: the checkpoint's.

        Raises:
            ValueError: for a bad name, no or unreadable pictures, bad prompts or a strength outside (0, 1].
        """
        check_category(category)
        book = self.prompt_book
        book.add(category, prompts)
        if noise_strength is not None:
            self.settings(noise_strength=noise_strength)
        loaded = load_pictures(normal_images, "normal_images")
        pictures = torch.stack([to_tensor(picture, self.config.resolution) for picture in loaded])  # [K, 3, R, R]
        device = self._execution_device
        rotations = self.config.rotations if rotations is None else rotations
        compare = len(pictures) >= COMPARED_PICTURES
        fill_bank(self.bank.to(device), category, self.extractor, pictures.to(device), rotations, compare)
        self.register_to_config(prompts=book.to_dict())
        self._store_category(
            category,
            shots=len(pictures),
            rotations=rotations,
            noise_strength=noise_strength,
            adaptation=None,
            prompt_design="hierarchical",
            adapted=False,
            calibration=None,
        )
        self._drop_unused_adaptations()

    def remove_category(self, category: str) -> None:
        """Forgets a registered part: its bank, settings and calibration.

        Raises:
            ValueError: if it is not registered.
        """
        if category not in self.config.categories:
            raise ValueError(
                f"`category` must be a registered part ({', '.join(self.categories) or 'none yet'}), got {category!r}."
            )
        self.bank.remove(category)
        self.register_to_config(categories={k: v for k, v in self.config.categories.items() if k != category})
        self._drop_unused_adaptations()

    @torch.no_grad()
    def calibrate(
        self, category: str, normal_images, false_alarm_rate: float = 0.05, seed: int = 0, **settings
    ) -> Calibration:
        """Sets a part's threshold from normal pictures alone; see `calibration.calibrate_threshold`.

        Args:
            category: a part registered by `add_category`.
            normal_images: 1 or more pictures of good parts; those given to `add_category` will do, because each is
                scored against a bank that was made without it.
            false_alarm_rate: share of good parts that may exceed the threshold.
            **settings: the settings of `__call__` (`preset`, `noise_strength`, ...) at which the part will be
                inspected. The threshold applies to inspections with the same settings.

        Returns:
            The stored record: threshold, the scores it rests on, the settings.

        Raises:
            ValueError: for a part that is not registered, unreadable pictures or bad settings.
        """
        if category not in self.config.categories:
            raise ValueError(
                f"`category` must be registered by `add_category` before it is calibrated, got {category!r}."
            )
        pictures = load_pictures(normal_images, "normal_images")
        chosen = self.settings(category=category, **settings)
        calibration = calibrate_threshold(self, category, pictures, chosen, false_alarm_rate, seed)
        self._store_category(category, calibration=calibration.to_dict())
        return calibration


# anomalysd_pipeline/components.py
# --------------------------------
# Loading the components of a published checkpoint with the installed classes instead of the code beside them.

_PACKAGE = "anomalysd_pipeline"


def own_components(folder: str | os.PathLike, given: Mapping) -> dict[str, ModelMixin]:
    """The components whose code a published folder holds for those who lack this package, loaded without that code.

    diffusers would otherwise take the code, and ask for `trust_remote_code`.

    Args:
        folder: a checkpoint on disk.
        given: the keyword arguments of `from_pretrained`; components among them are not loaded again, and `dtype` and
            `variant` hold for the others.

    Returns:
        Component to model, to be passed to `DiffusionPipeline.from_pretrained`; empty for a folder without such code.
    """
    index = json.loads(Path(folder, "model_index.json").read_text(encoding="utf-8"))
    dtype, variant = given.get("dtype", given.get("torch_dtype")), given.get("variant")
    loaded = {}
    for name, entry in index.items():
        if name in given or not (isinstance(entry, list) and str(entry[0]).startswith(f"{_PACKAGE}.")):
            continue
        part, (library, class_name) = Path(folder, name), entry
        kind = getattr(sys.modules.get(library), class_name, None)
        if kind is None or not issubclass(kind, ModelMixin) or not (part / f"{library}.py").is_file():
            continue
        loaded[name] = kind.from_pretrained(
            part,
            dtype=dtype.get(name, dtype.get("default", torch.float32)) if isinstance(dtype, dict) else dtype,
            variant=variant if variant and any(part.glob(f"*.{variant}[.-]*")) else None,
        )
    return loaded


# anomalysd_pipeline/loading.py
# -----------------------------
# The part of the pipeline that comes from a folder or the Hub, and goes there.

_TIMM_MODEL = "tf_efficientnet_b6"


class LoadingMixin:
    """Loading and publishing of an `AnomalySDPipeline`."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path=None,
        *,
        timm_model: str | None = None,
        timm_checkpoint: str | None = None,
        alexnet_checkpoint: str | None = None,
        lpips_checkpoint: str | None = None,
        **kwargs,
    ):
        """Loads a saved pipeline, or any Stable Diffusion inpainting checkpoint, from the Hub or from disk; or an
        adaptation's folder, along with its base.

        A bare inpainting checkpoint lacks the networks that look for defects; they are made: an ImageNet model by timm
        for the prototypes, and AlexNet LPIPS for the distance.

        Args:
            pretrained_model_name_or_path: Hub id or folder; None: the embedded checkpoint (`EMBEDDED`).
            timm_model: the extractor, also in place of the checkpoint's own: a timm name such as
                "vit_small_patch14_dinov2.lvd142m". None: the checkpoint's own, or "tf_efficientnet_b6" where it has
                none.
            timm_checkpoint: its weights as a local file; None: timm downloads them, unless the checkpoint's own
                extractor is a `timm_model` already.
            alexnet_checkpoint, lpips_checkpoint: torchvision's AlexNet and LPIPS' layer weights as local files (None:
                torchvision downloads the first, the second lies in the `lpips` package).
            **kwargs: those of `DiffusionPipeline.from_pretrained`, such as `dtype`, `variant`, `cache_dir`,
                `local_files_only`, and components to use in place of the stored ones.

        Raises:
            ValueError: for a UNet without 9 input channels, a weights file that does not fit, or a `timm_model` other
                than that of the prototypes which the checkpoint holds.
        """
        if kwargs.get("torch_dtype") is None:
            # Said aloud, because transformers would otherwise keep a text encoder in the precision it is stored in.
            kwargs["dtype"] = kwargs.get("dtype") or torch.float32
        path = pretrained_model_name_or_path or EMBEDDED
        if is_adaptation_folder(path):
            base, resolution = adaptation_base_of(path)
            pipe = cls.from_pretrained(
                base,
                timm_model=timm_model,
                timm_checkpoint=timm_checkpoint,
                alexnet_checkpoint=alexnet_checkpoint,
                lpips_checkpoint=lpips_checkpoint,
                **{"resolution": resolution, **kwargs},
            )
            pipe.load_adaptation(path)
            return pipe
        folder = path if os.path.isdir(path) else cls.download(path, **kwargs)
        pipe = super().from_pretrained(path, **kwargs, **own_components(folder, kwargs))
        made = {}
        if kwargs.get("extractor") is None and _wants_extractor(pipe, timm_model, timm_checkpoint):
            made["extractor"] = _make_extractor(timm_model or _TIMM_MODEL, timm_checkpoint, pipe.config.resolution)
        if pipe.perceptual is None:
            made["perceptual"] = PerceptualDistance.from_files(alexnet_checkpoint, lpips_checkpoint)
        # Assignment would leave those unregistered that were registered as missing.
        made = {name: module.to(pipe.unet.dtype, memory_format=torch.channels_last) for name, module in made.items()}
        pipe.register_modules(**made)
        return pipe

    def push_to_hub(self, repo_id: str, **kwargs) -> str:
        """Publishes the pipeline, or one of its adaptations, on the Hub, with a model card.

        Args:
            repo_id: "user/name"; made if it does not exist.
            **kwargs: those of `publishing.push_to_hub`: `adaptation` (a name; None: the whole pipeline), `private`,
                `create_pr`, `token`, `figures` (measured ones, for the card), `license`, `commit_message`, `revision`.

        Returns:
            The address of the commit or of the pull request.

        Raises:
            ValueError: for a bad name, or if the Hub cannot be reached or refuses.
        """
        push_to_hub = _from_package("publishing").push_to_hub

        return push_to_hub(self, repo_id, **kwargs)


def _wants_extractor(pipe, timm_model: str | None, timm_checkpoint: str | os.PathLike | None) -> bool:
    """Whether another extractor than the pipeline's own is asked for.

    Raises:
        ValueError: if prototypes were made with its own, or weights are given without saying of which model.
    """
    if pipe.extractor is None:
        return True
    own = pipe.extractor.config.model_name
    if timm_model is None and timm_checkpoint is not None:
        raise ValueError(
            f"`timm_checkpoint` must come with a `timm_model`, because this checkpoint has an extractor ({own}); give "
            "both to replace it, or neither."
        )
    if timm_model is None or (timm_model == own and timm_checkpoint is None):
        return False
    if pipe.bank.categories:
        raise ValueError(
            f"`timm_model` {timm_model!r} would replace the extractor {own}, which made the prototypes of "
            f"{', '.join(map(repr, pipe.bank.categories))}; leave `timm_model` out, or first remove these parts by "
            "`remove_category` and save the pipeline."
        )
    return True


def _make_extractor(timm_model: str, timm_checkpoint: str | os.PathLike | None, resolution: int) -> PrototypeExtractor:
    names = {"`model_name`": "`timm_model`", "`checkpoint_path`": "`timm_checkpoint`"}
    try:
        # A network that takes pictures of one size only is made for those that it will get.
        image_size = None if backbone_kind(timm_model, {}).any_size else resolution
        return PrototypeExtractor.from_timm(timm_model, checkpoint_path=timm_checkpoint, image_size=image_size)
    except ValueError as error:
        message = str(error)
        for theirs, ours in names.items():
            message = message.replace(theirs, ours)
        raise ValueError(message) from error


# anomalysd_pipeline/output.py
# ----------------------------
# What an inspection returns.

@dataclass
class AnomalySDPipelineOutput(BaseOutput):
    """Result of `AnomalySDPipeline` for N pictures. Scores keep one absolute scale; nothing is normalized over a
    batch.

    Pictures of different sizes have maps of different sizes: the stacked arrays below are then lists of N arrays.

    Args:
        pred_scores (`np.ndarray` `[N]`, float32, >= 0):
            Image scores, the maximum of each smoothed score map at the model's resolution.
        pred_labels (`list[bool | None]`):
            True where the score exceeds the threshold; None where the category is not calibrated for these settings.
        anomaly_maps (`np.ndarray` `[N, H, W]`, float32, >= 0, or a tensor with `output_type="pt"`):
            Score of every pixel, S_map of Eq. (21) smoothed, at the input picture's own size.
        pred_masks (`np.ndarray` `[N, H, W]` bool or `None`):
            Pixels above the threshold; None without a threshold.
        inpainted (`list[PIL.Image.Image]`):
            The parts as the model thinks they should look, at the input picture's own size.
        prototype_masks (`np.ndarray` `[N, H, W]` bool or `None`):
            M^(p) of Eq. (15) at the input picture's own size; None for a category without normal pictures.
        thresholds (`list[float | None]`):
            The image threshold that applied to each picture.
    """

    pred_scores: np.ndarray
    pred_labels: list
    anomaly_maps: np.ndarray | list
    pred_masks: np.ndarray | list | None
    inpainted: list[Image.Image]
    prototype_masks: np.ndarray | list | None
    thresholds: list


# anomalysd_pipeline/pipeline.py
# ------------------------------
# AnomalySDPipeline: find defects by repainting a part as a normal one and measuring the difference (arXiv
# 2408.01960).

logger = logging.get_logger(__name__)


class AnomalySDPipeline(LoadingMixin, CategoryMixin, AdaptationMixin, DiffusionPipeline):
    """Few-shot, multi-class anomaly detection with a Stable Diffusion inpainting model.

    Args:
        vae: AutoencoderKL or AutoencoderTiny.
        text_encoder, tokenizer: the CLIP text model of the checkpoint.
        unet: UNet2DConditionModel with 9 input channels (noisy latents 4, mask 1, masked-image latents 4).
        scheduler: any diffusers scheduler with `add_noise`.
        extractor: `PrototypeExtractor`, the features of Eq. (12).
        perceptual: `PerceptualDistance`, the distance of Eqs. (16) and (17).
        bank: `PrototypeBank`, the normal features of every registered category, Eq. (13).
        adapters: `AdapterStore`, what adaptations have learned.
        resolution: side in pixels at which pictures are inspected.
        default_preset: "paper", "fast" or "sota", used where a call names none.
        preset_overrides: what this checkpoint changes in a preset, such as `{"fast": {"num_inference_steps": 8}}`.
        noise_strength, prototype_weight, feature_weight: this checkpoint's defaults of the settings of the same name;
            a `feature_weight` of 0 leaves it to the preset.
        rotations: this checkpoint's number of rotated copies of each normal picture in a bank.
        prompts: `PromptBook.to_dict()`; None: the book of `prompts.json`.
        categories: settings of each registered category: `shots`, `noise_strength`, `adaptation`,
            `prompt_design`, `adapted` (whether the weights that it is inspected with were fine-tuned to it),
            `calibration`.
        adaptation: this checkpoint's defaults of a fine-tuning, see `AdaptationSettings`.
        adaptations: settings with which each adaptation in `adapters` was made.
        safety_checker, feature_extractor, image_encoder, requires_safety_checker: accepted because Stable Diffusion
            repositories list them; never loaded or used.

    Raises:
        ValueError: if the UNet does not take 9 input channels.
    """

    model_cpu_offload_seq = "text_encoder->extractor->unet->vae->perceptual"
    _optional_components = [
        "safety_checker",
        "feature_extractor",
        "image_encoder",
        "extractor",
        "perceptual",
        "bank",
        "adapters",
    ]
    _exclude_from_cpu_offload = ["bank", "adapters"]
    _callback_tensor_inputs = ["latents"]

    mixed_precision: str = "no"
    """What repainting and the perceptual distance are computed in: "no" (the weights' own type), "bf16" or "fp16".
    With "bf16" a CPU that has such instructions is two to three times faster; scores change by about a hundredth."""

    def __init__(
        self,
        vae,
        text_encoder,
        tokenizer,
        unet,
        scheduler,
        extractor: PrototypeExtractor | None = None,
        perceptual: PerceptualDistance | None = None,
        bank: PrototypeBank | None = None,
        adapters: AdapterStore | None = None,
        resolution: int = 512,
        default_preset: str = "paper",
        preset_overrides: dict | None = None,
        noise_strength: float = 0.4,
        prototype_weight: float = 0.1,
        feature_weight: float = 0.0,
        rotations: int = 4,
        prompts: dict | None = None,
        categories: dict | None = None,
        adaptation: dict | None = None,
        adaptations: dict | None = None,
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker: bool = False,
    ):
        super().__init__()
        channels = unet.config.in_channels
        if channels != 9:
            raise ValueError(
                f"`unet` must be an inpainting UNet with 9 input channels, but it has {channels}; use an inpainting "
                "checkpoint such as 'stable-diffusion-v1-5/stable-diffusion-inpainting'."
            )
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            extractor=extractor,
            perceptual=perceptual,
            bank=PrototypeBank() if bank is None else bank,
            adapters=AdapterStore() if adapters is None else adapters,
            safety_checker=None,
            feature_extractor=None,
            image_encoder=None,
        )
        for module in (unet, vae, perceptual):
            if module is not None:
                # The order in which convolutions compute; otherwise they reorder their inputs on every call.
                module.to(memory_format=torch.channels_last)
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        if resolution % self.vae_scale_factor:
            raise ValueError(
                f"`resolution` must be a multiple of the VAE's factor {self.vae_scale_factor}, got {resolution}."
            )
        book = PromptBook.default() if prompts is None else PromptBook.from_dict(prompts)
        self.register_to_config(
            resolution=resolution,
            default_preset=default_preset,
            preset_overrides=copy.deepcopy(dict(preset_overrides or {})),
            noise_strength=noise_strength,
            prototype_weight=prototype_weight,
            feature_weight=feature_weight,
            rotations=rotations,
            prompts=book.to_dict(),
            categories=copy.deepcopy(dict(categories or {})),
            adaptation=copy.deepcopy(dict(adaptation or {})),
            adaptations=copy.deepcopy(dict(adaptations or {})),
            requires_safety_checker=False,
        )
        for preset in PRESETS:
            self.settings(preset=preset)
        self.adaptation_settings()

    # Settings

    def settings(self, preset: str | None = None, category: str | None = None, **given) -> InspectionSettings:
        """The settings that a call with these arguments would use: call, then category, then checkpoint, then preset.

        Raises:
            TypeError: for a name that is no setting.
            ValueError: for a value out of its range.
        """
        unknown = set(given) - {field.name for field in fields(InspectionSettings)}
        if unknown:
            raise TypeError(f"`{sorted(unknown)[0]}` is not a setting of an inspection.")
        preset = self.config.default_preset if preset is None else preset
        of_category = {"noise_strength": self.config.categories.get(category, {}).get("noise_strength")}
        layers = [
            {"guidance_scale": 1.0},
            checkpoint_settings(self.config),
            self.config.preset_overrides.get(preset, {}),
            of_category,
            given,
        ]
        return InspectionSettings.resolve(preset, layers)

    # Inspection

    @torch.no_grad()
    def __call__(
        self,
        image=None,
        category: str | None = None,
        preset: str | None = None,
        noise_strength: float | None = None,
        num_inference_steps: int | None = None,
        mask_scales: Sequence[int] | None = None,
        mask_grouping: str | None = None,
        prototype_weight: float | None = None,
        feature_weight: float | None = None,
        guidance_scale: float | None = None,
        batch_size: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "np",
        callback_on_step_end: Callable[[AnomalySDPipeline, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        return_dict: bool = True,
    ) -> AnomalySDPipelineOutput | tuple:
        """Inspects one picture or several of one category.

        Args:
            image: a picture or a list of them: path, PIL, numpy or tensor, see `load_image`; a tensor or array with a
                leading batch dimension counts as a list.
            category: name of the part. One that was never added is inspected zero-shot: its prompts or the generic
                ones, multi-scale masks only. None: an unnamed part.
            preset: "paper", "fast" or "sota"; None: the checkpoint's default.
            noise_strength, num_inference_steps, mask_scales, mask_grouping, prototype_weight, feature_weight,
                guidance_scale: see `InspectionSettings`; None: the category's, the checkpoint's or the preset's value.
            batch_size: passes (picture and mask) at once; halved by itself when memory runs out. It does not change
                the result. None: 16 on a GPU, 4 on a CPU.
            generator: source of the noise, one for all or one per picture. None: every picture gets the same noise, so
                that its score depends on nothing but the picture.
            output_type: "np", or "pt" for maps as tensors.
            callback_on_step_end: called as `callback(pipe, step, timestep, {"latents": ...})` after each denoising
                step, `step` counting over all passes; it may return changed latents, and an exception ends the call.
            return_dict: False returns the output's fields as a tuple.

        Returns:
            `AnomalySDPipelineOutput`.

        Raises:
            ValueError: for a picture that cannot be read or an argument out of its range.
        """
        # 1. Check inputs and settle what was left open
        settings = self.settings(
            preset=preset,
            category=category,
            noise_strength=noise_strength,
            num_inference_steps=num_inference_steps,
            mask_scales=mask_scales,
            mask_grouping=mask_grouping,
            prototype_weight=prototype_weight,
            feature_weight=feature_weight,
            guidance_scale=guidance_scale,
        )
        self.check_inputs(category, batch_size, output_type, callback_on_step_end_tensor_inputs)
        loaded = load_pictures(image, "image")
        sizes = [(picture.height, picture.width) for picture in loaded]
        pictures = torch.stack([to_tensor(picture, self.config.resolution) for picture in loaded])  # [N, 3, R, R]

        # 2. Score maps at the model's resolution
        bank = self.bank if category in self.bank else None
        try:
            found = examine(self, pictures, category, settings, bank, batch_size, generator, callback_on_step_end)
        finally:
            self.maybe_free_model_hooks()
        maps = found.maps(settings.prototype_weight, settings.feature_weight)  # [N, R, R]
        prototype_masks = found.prototype_masks

        # 3. Image scores before resizing, so that a score does not depend on the size of the file
        scores = image_score(maps)  # [N]

        # 4. Compare with the threshold, if the category has one for these settings
        threshold = self._threshold(category, settings)
        labels = [None if threshold is None else bool(score > threshold) for score in scores.tolist()]

        # 5. Everything back to the pictures' own sizes
        maps = [resize(m[None], size)[0] for m, size in zip(maps, sizes, strict=True)]  # [H, W] each
        if prototype_masks is not None:
            prototype_masks = [
                resize(m.float(), size, "nearest")[0] > 0.5 for m, size in zip(prototype_masks, sizes, strict=True)
            ]
        output = AnomalySDPipelineOutput(
            pred_scores=scores.cpu().numpy(),
            pred_labels=labels,
            anomaly_maps=stack(maps, output_type),
            pred_masks=None if threshold is None else stack([m > threshold for m in maps], output_type),
            inpainted=[to_pil(x, size) for x, size in zip(found.repainted, sizes, strict=True)],
            prototype_masks=None if prototype_masks is None else stack(prototype_masks, output_type),
            thresholds=[threshold] * len(labels),
        )
        return output if return_dict else output.to_tuple()

    def check_inputs(self, category, batch_size, output_type, callback_on_step_end_tensor_inputs) -> None:
        """Raises ValueError for the arguments of `__call__` that are no settings and no pictures."""
        if category is not None:
            check_category(category)
        if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
            raise ValueError(f"`batch_size` must be a whole number of at least 1, or None, got {batch_size!r}.")
        if output_type not in ("np", "pt"):
            raise ValueError(f"`output_type` must be 'np' or 'pt', got {output_type!r}.")
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` may hold {self._callback_tensor_inputs}, got {unknown}."
            )

    @torch.no_grad()
    def inpaint(
        self,
        images: Tensor,
        masks: Tensor,
        prompt_embeds: Tensor,
        noise_strength: float = 0.4,
        num_inference_steps: int = 50,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        guidance_scale: float = 1.0,
        negative_prompt_embeds: Tensor | None = None,
    ) -> Tensor:
        """Repaints the masked part of pictures; one batch, by the base or what `set_adaptation` has chosen.

        Equal to diffusers' own inpainting pipeline with the same weights, noise and strength, the VAE's posterior mean
        standing for E(x).

        Args:
            images: `[N, 3, H, W]` in [-1, 1], sides multiples of the VAE's factor.
            masks: `[N, 1, H, W]` or `[1, 1, H, W]` in {0, 1}, 1 = repaint.
            prompt_embeds: `[1 or N, L, d]`.
            noise_strength, num_inference_steps, guidance_scale: see `InspectionSettings`.
            noise: `[1 or N, 4, h, w]`, or None: drawn from `generator` (None: the same for every picture).
            negative_prompt_embeds: `[1 or N, L, d]`, needed where `guidance_scale` exceeds 1.

        Returns:
            float32 `[N, 3, H, W]` in [-1, 1].

        Raises:
            ValueError: for a shape or a value out of its range.
        """
        self.settings(
            noise_strength=noise_strength, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale
        )
        count, factor = len(images), self.vae_scale_factor
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % factor or images.shape[3] % factor:
            raise ValueError(
                f"`images` must be [N, 3, H, W] with sides that are multiples of {factor}, got {list(images.shape)}."
            )
        if masks.ndim != 4 or masks.shape[0] not in (1, count) or masks.shape[1:] != (1, *images.shape[2:]):
            raise ValueError(
                f"`masks` must be [{count}, 1, {images.shape[2]}, {images.shape[3]}], got {list(masks.shape)}."
            )
        if guidance_scale > 1 and negative_prompt_embeds is None:
            raise ValueError("`negative_prompt_embeds` is needed where `guidance_scale` exceeds 1.")
        self.use_adaptation(self._chosen_adaptation)
        device = self._execution_device
        images, masks = images.to(device), masks.to(device).expand(count, -1, -1, -1)
        latents = encode(self.vae, images)  # [N, 4, h, w]
        if noise is None:
            noise = draw_noise(latents.shape, generator, device, self.unet.dtype)
        if noise.shape[0] not in (1, count) or noise.shape[1:] != latents.shape[1:]:
            raise ValueError(f"`noise` must be {[count, *latents.shape[1:]]}, got {list(noise.shape)}.")
        embeds = [
            None if e is None else e.to(device).expand(count, -1, -1) for e in (prompt_embeds, negative_prompt_embeds)
        ]
        result = repaint(
            self.unet,
            self.vae,
            self.scheduler,
            images,
            latents,
            masks.to(images.dtype),
            noise.to(device).expand(count, -1, -1, -1),
            *embeds,
            noise_strength=noise_strength,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
        )
        self.maybe_free_model_hooks()
        return result

    # Parts of the above

    def _threshold(self, category: str | None, settings: InspectionSettings) -> float | None:
        record = self.config.categories.get(category, {}).get("calibration")
        if record is None:
            return None
        if record["settings"] != settings.to_dict():
            changed = [key for key, value in settings.to_dict().items() if record["settings"].get(key) != value]
            logger.warning(
                f"{category!r} is calibrated for other settings ({', '.join(changed)} differ), so its threshold does "
                "not apply; call `calibrate` with these settings."
            )
            return None
        return record["threshold"]


# model_index.json lists these components under the modules of the package. Where it is not installed, this file stands
# for those modules; where it is, the components are its own, so that there is one class of each.
_COMPONENTS = {
    "anomalysd_pipeline.adapters": (AdapterStore,),
    "anomalysd_pipeline.prototypes": (PrototypeExtractor, PrototypeBank,),
    "anomalysd_pipeline.scoring": (PerceptualDistance,),
}
for _name, _classes in _COMPONENTS.items():
    try:
        _module = importlib.import_module(_name)
    except ModuleNotFoundError:
        _module = None
    if _module is None or _module.__name__ != _name:
        sys.modules[_name] = sys.modules[__name__]
        for _class in _classes:
            _class.__module__ = _name
    else:
        globals().update({_class.__name__: getattr(_module, _class.__name__) for _class in _classes})
