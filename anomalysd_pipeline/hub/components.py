"""Look through a checkpoint's folder before it is loaded, and load its components by installed classes."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from diffusers import ModelMixin

from ..common.checks import read_json, require_whole

_PACKAGE = "anomalysd_pipeline"
_INDEX = "model_index.json"
_MOST = {"layers": 100, "blocks": 100, "timesteps": 100_000}
"""Words in the names of settings whose values decide how long a network takes to build, and their highest values."""
_MOST_OTHERS, _MOST_ENTRIES = 10**7, 1000


@contextlib.contextmanager
def readable(path: str | os.PathLike, folder: str | os.PathLike) -> Iterator[None]:
    """Loads a checkpoint in a block, once its settings are such that this takes neither long nor much memory.

    Args:
        path: the checkpoint's name, for the error.
        folder: where it lies on disk.

    Raises:
        ValueError: for whatever the block raises, and for settings out of their range; our own sentences as they are.
    """
    try:
        read_json(Path(folder, _INDEX))
        # Some schedulers' own settings are infinite.
        for name, finite in (("config.json", True), ("scheduler_config.json", False)):
            for config in Path(folder).glob(f"*/{name}"):
                _check_sizes(f"{config.parent.name}/{name}", "", read_json(config, finite))
        yield
    # Damaged files and strange values make other libraries raise nearly everything.
    except Exception as error:
        if isinstance(error, ImportError) or (isinstance(error, ValueError) and str(error).startswith("`")):
            raise
        raise ValueError(
            f"`pretrained_model_name_or_path` '{path}' cannot be loaded; it must hold a complete checkpoint, as "
            f"`save_pretrained` writes it ({type(error).__name__}: {' '.join(str(error).split())[:300]})."
        ) from error


def _check_sizes(file: str, name: str, value: object) -> None:
    if isinstance(value, Mapping):
        for key, own in value.items():
            _check_sizes(file, str(key), own)
    elif isinstance(value, list):
        require_whole(f"{file}: len({name[:80]})", len(value), 0, _MOST_ENTRIES)
        for own in value:
            _check_sizes(file, name, own)
    elif isinstance(value, int) and not isinstance(value, bool):
        most = min((most for word, most in _MOST.items() if word in name), default=_MOST_OTHERS)
        require_whole(f"{file}: {name[:80]}", value, -_MOST_OTHERS, most)


def class_of(folder: str | os.PathLike, name: str) -> str | None:
    """Reads the name of the class of a folder's component; None where it has none."""
    entry = read_json(Path(folder, _INDEX)).get(name)
    return entry[1] if isinstance(entry, list) and len(entry) == 2 else None


def own_components(folder: str | os.PathLike, given: Mapping) -> dict[str, ModelMixin]:
    """Loads components without running the code that their folders hold for people who lack this package.

    diffusers would take that code, and ask for `trust_remote_code`.

    Args:
        folder: a checkpoint on disk.
        given: the keyword arguments of `from_pretrained`. Its components are not loaded again; its `dtype` and
            `variant` hold for the others.

    Returns:
        Component to model, for `DiffusionPipeline.from_pretrained`; empty for a folder without such code.
    """
    index = read_json(Path(folder, _INDEX))
    dtype, variant = given.get("dtype", given.get("torch_dtype")), given.get("variant")
    loaded = {}
    for name, entry in index.items():
        if name in given or not (isinstance(entry, list) and str(entry[0]).startswith(f"{_PACKAGE}.")):
            continue
        part, (library, class_name) = Path(folder, name), entry
        try:
            # An earlier version's folder names modules that nothing else imports.
            kind = getattr(importlib.import_module(library), class_name, None)
        except ModuleNotFoundError:
            continue
        if kind is None or not issubclass(kind, ModelMixin) or not (part / f"{library}.py").is_file():
            continue
        loaded[name] = kind.from_pretrained(
            part,
            use_safetensors=given.get("use_safetensors"),
            dtype=dtype.get(name, dtype.get("default", torch.float32)) if isinstance(dtype, dict) else dtype,
            variant=variant if variant and any(part.glob(f"*.{variant}[.-]*")) else None,
        )
    return loaded
