"""Load the components of a published checkpoint by installed classes, not by the code beside them."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import ModelMixin

_PACKAGE = "anomalysd_pipeline"


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
    index = json.loads(Path(folder, "model_index.json").read_text(encoding="utf-8"))
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
            dtype=dtype.get(name, dtype.get("default", torch.float32)) if isinstance(dtype, dict) else dtype,
            variant=variant if variant and any(part.glob(f"*.{variant}[.-]*")) else None,
        )
    return loaded
