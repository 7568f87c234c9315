"""Write and read what was learned of parts, without the base: as a folder (`adaptation.json` and
`adaptation.safetensors`), or as a single safetensors file with the former in its header."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from .. import EMBEDDED, __version__
from ..common.checks import parse_json, read_json, require_file, require_kind, require_whole, shown
from ..common.files import disk_errors, recover, written_whole
from ..data.shots import SHOT_NAMES
from ..method.prompts import check_category
from ..models.adapters import PARTS, check_fits, same_fingerprint
from ..models.bank import unpacked, unpacked_shots
from ..models.collection import is_in_range
from .base import EMBEDDED_NAME, Base
from .records import MOST, check_adaptation, check_part

FACTS, WEIGHTS = "adaptation.json", "adaptation.safetensors"
_FORMAT = 4
_BANKS = ("bank", "sources", *SHOT_NAMES)
_OLD_BANKS = ("colors", "views")
"""Of earlier formats; nothing looks at them now."""
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
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Types that PyTorch can compute in everywhere, unlike those of 8 bits."""
_HEADER = "adaptation"
_OURS = {FACTS, WEIGHTS, "README.md"}
"""Files of a folder that may be replaced as a whole; publishing adds the last."""


@dataclass(frozen=True)
class StoredAdaptation:
    """Holds what was learned of parts: an adaptation, or one part without a fine-tuning.

    name: of the adaptation, or of the part.
    record: settings of the fine-tuning.
    categories: category to its settings and calibration.
    prompts: category to its prompts.
    banks: category to its bank, as `PrototypeBank.packed` gives it.
    state: part of the network to LoRA weights by name; empty without a fine-tuning.
    """

    name: str
    record: dict
    categories: dict[str, dict]
    prompts: dict[str, dict]
    banks: dict[str, dict[str, Tensor]]
    state: dict[str, dict[str, Tensor]]


def is_adaptation_folder(path) -> bool:
    """Tells whether a path is a folder that holds an adaptation and no pipeline."""
    return Path(path, FACTS).is_file() and not Path(path, "model_index.json").is_file()


def adaptation_base_of(folder) -> tuple[str, int]:
    """Reads the base of an adaptation's folder, a path or a Hub id, and the resolution that it was made at.

    Raises:
        ValueError: the folder is damaged, or only the name of its base is known.
    """
    try:
        facts = read_json(Path(folder, FACTS))
        name, resolution = str(facts["base_model"]), int(facts["resolution"])
    except (OSError, LookupError, TypeError, ValueError) as error:
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


def write_adaptation(stored: StoredAdaptation, base: Base, folder: Path) -> None:
    """Writes an adaptation, which replaces an earlier one in the folder when it is complete.

    Raises:
        ValueError: the folder holds something else than an adaptation, or cannot be written.
    """
    folder = Path(os.path.abspath(folder))
    held = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if folder.is_file() or (held and not (FACTS in held and held <= _OURS)):
        raise ValueError(f"`save_directory` '{folder}' holds other things; give a new or empty folder.")
    facts, tensors = _contents(stored, base)
    with disk_errors("save_directory", folder), written_whole(folder) as partial:
        (partial / FACTS).write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        save_file(tensors, partial / WEIGHTS)


def write_part(stored: StoredAdaptation, base: Base, path: Path) -> None:
    """Writes the same as `write_adaptation` into a single file.

    Raises:
        OSError, SafetensorError: it cannot be written.
    """
    facts, tensors = _contents(stored, base)
    save_file(tensors, path, metadata={_HEADER: json.dumps(facts, ensure_ascii=False)})


def _contents(stored: StoredAdaptation, base: Base) -> tuple[dict, dict[str, Tensor]]:
    facts = {
        "format": _FORMAT,
        "version": __version__,
        "name": stored.name,
        "base_model": base.name,
        "base_fingerprint": base.fingerprint(),
        "resolution": base.resolution,
        "record": stored.record,
        "categories": stored.categories,
        "prompts": stored.prompts,
    }
    tensors = {
        f"{part}.{key}": value.half().contiguous() for part, own in stored.state.items() for key, value in own.items()
    }
    # By number: a category may have any name.
    tensors |= {
        f"{kind}.{index}": tensor.contiguous()
        for index, category in enumerate(stored.categories)
        for kind, tensor in stored.banks[category].items()
    }
    return facts, {key: value.cpu() for key, value in tensors.items()}


def _read_files(source: Path) -> tuple[dict, dict[str, Tensor]]:
    """Reads what `_contents` gave."""
    if source.is_dir():
        require_file(source / WEIGHTS)
        return read_json(source / FACTS), load_file(source / WEIGHTS)
    with safe_open(source, framework="pt") as file:
        facts = parse_json(file.metadata()[_HEADER], source.name)
    return facts, load_file(source)


def read_adaptation(source, base: Base, settings: Callable[..., object], **hub) -> StoredAdaptation:
    """Reads an adaptation from a folder, a file or the Hub, trusting nothing in it, and checks that it fits a base.

    Args:
        source: a folder, or that of a fine-tuning which holds it as "adaptation", a file of `write_part` or a Hub id.
        base: the networks that the adaptation must fit.
        settings: called with the `noise_strength` of a part; raises ValueError if inspections cannot use it.
        **hub: as of `huggingface_hub.snapshot_download`.

    Raises:
        ValueError: the adaptation is missing, damaged, of a later format, or made for another base.
    """
    recover(source)
    is_file = os.path.isfile(source)
    holding = "hold what was learned of a part" if is_file else f"hold a complete {FACTS} and {WEIGHTS}"
    folder = Path(source) if is_file or os.path.isdir(source) else _download(str(source), hub)
    recover(folder / "adaptation")
    if not is_file and not (folder / FACTS).is_file() and (folder / "adaptation" / FACTS).is_file():
        folder = folder / "adaptation"
    try:
        facts, tensors = _read_files(folder)
        require_whole("format", facts["format"], 1, 10**6)
        later = facts["format"] > _FORMAT
        if not later:
            stored = _parse(facts, tensors)
            fits = same_fingerprint(base.fingerprint(), facts["base_fingerprint"])
            if fits:
                _check_fits(stored, base, settings)
    except Exception as error:  # whatever a stranger's values lead to
        raise ValueError(
            f"`pretrained_adaptation_name_or_path` '{source}' must {holding}, as `save_adaptation` writes it "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]})."
        ) from error
    if later:
        raise ValueError(
            f"`pretrained_adaptation_name_or_path` '{source}' was written by a later version "
            f"({str(facts.get('version'))[:20]}); update the package anomalysd-pipeline."
        )
    if facts["resolution"] != base.resolution:
        raise ValueError(
            f"`pretrained_adaptation_name_or_path` '{source}' was made for pictures of {facts['resolution']} pixels, "
            f"and this pipeline inspects at {base.resolution}; load its base with "
            f"`resolution={facts['resolution']}`."
        )
    if not fits:
        raise ValueError(
            f"`pretrained_adaptation_name_or_path` '{source}' was made for the base {str(facts['base_model'])!r}, and "
            "this pipeline has other weights; load it into a pipeline of that base."
        )
    return stored


def _parse(facts: dict, tensors: dict[str, Tensor]) -> StoredAdaptation:
    if facts.keys() != _KEYS:
        raise ValueError(f"{FACTS} has other keys than an adaptation")
    require_whole("resolution", facts["resolution"], 1, 10**6)
    for name in ("version", "base_model"):
        if not isinstance(facts[name], str) or len(facts[name]) > 200:
            raise ValueError(f"`{name}` must be a text of at most 200 characters, got {shown(facts[name])}.")
    categories = facts["categories"]
    require_kind("categories", categories, dict, "a dictionary")
    require_whole("len(categories)", len(categories), 1, MOST)
    bad = [name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.dtype not in _FLOATS]
    if bad:
        raise ValueError(f"{bad[0][:80]} is of {tensors[bad[0]].dtype}")
    stored = StoredAdaptation(
        name=check_category(facts["name"]),
        record=check_adaptation(facts["record"]),
        categories={check_category(category): check_part(record) for category, record in categories.items()},
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
    bare = not stored.record["settings"]  # a part without a fine-tuning
    if not stored.categories or bare is bool(stored.state) or facts["prompts"].keys() != categories.keys():
        raise ValueError("it names no category, or no weights, or has prompts of others")
    old = {f"{kind}.{index}" for kind in _OLD_BANKS for index in range(len(categories))}
    if len(tensors.keys() - old) != sum(map(len, [*stored.banks.values(), *stored.state.values()])):
        raise ValueError(f"{WEIGHTS} has other weights than an adaptation")
    return stored


def _check_fits(stored: StoredAdaptation, base: Base, settings: Callable[..., object]) -> None:
    for part, own in stored.state.items():
        check_fits({"denoiser": base.unet, "decoder": base.vae}[part], own)
    book = copy.deepcopy(base.prompts)
    channels = sum(base.extractor.channels) * base.extractor.parts
    for category, banks in stored.banks.items():
        book.add(category, stored.prompts[category])
        if stored.categories[category]["noise_strength"] is not None:
            settings(noise_strength=stored.categories[category]["noise_strength"])
        if "bank" not in banks:
            raise ValueError(f"{category!r} has no bank")
        bank, sources = unpacked(banks)
        if bank.ndim != 2 or not len(bank) or bank.shape[1] != channels or not bank.is_floating_point():
            raise ValueError(
                f"a bank of the shape {list(bank.shape)} and type {bank.dtype}, where the pipeline has {channels} "
                "channels"
            )
        if not is_in_range(bank):
            raise ValueError("a bank that is not finite, or beyond half precision")
        if sources.shape != bank.shape[:1] or sources.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"`sources` of the shape {list(sources.shape)} and type {sources.dtype}")
        unpacked_shots(banks)


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
