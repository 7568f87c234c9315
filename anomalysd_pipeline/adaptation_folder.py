"""An adaptation as a folder: `adaptation.json` and `adaptation.safetensors`, without the base it belongs to."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import EMBEDDED, __version__
from .adapters import PARTS, same_fingerprint
from .checkpoints import disk_errors, flush, remove

FACTS, WEIGHTS = "adaptation.json", "adaptation.safetensors"
EMBEDDED_NAME = "embedded"
_FORMAT = 1


@dataclass(frozen=True)
class StoredAdaptation:
    """What a folder holds.

    name: of the adaptation.
    base_model: the Hub id of its base, "embedded", or the name of a folder.
    record: settings of its fine-tuning.
    categories: category to its settings and calibration.
    prompts: category to its prompts.
    banks: category to its prototypes, `[size, dim]`.
    state: part to LoRA weights by name.
    """

    name: str
    base_model: str
    record: dict
    categories: dict[str, dict]
    prompts: dict[str, dict]
    banks: dict[str, Tensor]
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


def adaptation_base_of(folder) -> str:
    """The base of an adaptation's folder: a path or a Hub id.

    Raises:
        ValueError: if it was made on a folder of another machine, of which only the name is known.
    """
    name = json.loads(Path(folder, FACTS).read_text(encoding="utf-8")).get("base_model", "")
    if name == EMBEDDED_NAME:
        return EMBEDDED
    if "/" not in name:
        raise ValueError(
            f"`pretrained_model_name_or_path` '{folder}' is an adaptation of the local base {name!r}; load that base, "
            "and then the adaptation with `load_adaptation`."
        )
    return name


def write_adaptation(pipe, name: str, categories: list[str], folder: Path) -> None:
    """Writes a pipeline's adaptation; what was in the folder before is replaced when the new one is complete.

    Raises:
        ValueError: if the folder holds something else than an adaptation, or cannot be written.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / FACTS).is_file()):
        raise ValueError(f"`save_directory` '{folder}' holds other things; give a new or empty folder.")
    facts = {
        "format": _FORMAT,
        "version": __version__,
        "name": name,
        "base_model": base_name(pipe),
        "base_fingerprint": pipe.adaptation_base(),
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
    tensors |= {f"bank.{index}": pipe.bank[category].contiguous() for index, category in enumerate(categories)}
    partial = folder.with_name(f".{folder.name}.partial")
    with disk_errors("save_directory", folder):
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            (partial / FACTS).write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            save_file({key: value.cpu() for key, value in tensors.items()}, partial / WEIGHTS)
            flush(partial)
            remove(folder)
            os.replace(partial, folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def read_adaptation(source, base: dict, **hub) -> StoredAdaptation:
    """Reads an adaptation from a folder or from the Hub and checks that it belongs to `base` (its fingerprint).

    Raises:
        ValueError: if it is missing, damaged, of a later format, or made for another base.
    """
    folder = Path(source) if os.path.isdir(source) else _download(str(source), hub)
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
        if facts["format"] > _FORMAT:
            raise ValueError(
                f"`pretrained_adaptation_name_or_path` '{source}' was written by a later version "
                f"({facts['version']}); update the package anomalysd-pipeline."
            )
        categories = facts["categories"]
        stored = StoredAdaptation(
            name=facts["name"],
            base_model=facts["base_model"],
            record=facts["record"],
            categories=categories,
            prompts={category: facts["prompts"][category] for category in categories},
            banks={category: tensors[f"bank.{index}"] for index, category in enumerate(categories)},
            state={
                part: own
                for part in PARTS
                if (own := {k.removeprefix(f"{part}."): v for k, v in tensors.items() if k.startswith(f"{part}.")})
            },
        )
        fits = same_fingerprint(base, facts["base_fingerprint"])
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, SafetensorError, KeyError, TypeError) as error:
        raise ValueError(
            f"`pretrained_adaptation_name_or_path` '{source}' must hold a complete {FACTS} and {WEIGHTS}, as "
            f"`save_adaptation` writes them ({type(error).__name__}: {' '.join(str(error).split())})."
        ) from error
    if not fits:
        raise ValueError(
            f"`pretrained_adaptation_name_or_path` '{source}' was made for the base {stored.base_model!r}, and this "
            "pipeline has other weights; load it into a pipeline of that base."
        )
    return stored


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
