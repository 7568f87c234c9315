"""Count the normal pictures that a saved folder holds, and leave them out of what is published."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save

from ..data.shots import SHOT_NAMES

_CONFIG = "bank/config.json"


def count_exemplars(folder: Path) -> int:
    """Counts the normal pictures in a saved pipeline or adaptation.

    Raises:
        OSError, SafetensorError: if its weights cannot be read.
    """
    found = 0
    for path in _weights(folder):
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            found += sum(file.get_slice(name).get_shape()[0] for name in names if _kind(name) == "sizes")
    return found


def without_exemplars(folder: Path) -> dict[str, bytes]:
    """Writes anew, without normal pictures, the files of a saved pipeline or adaptation that hold some.

    Args:
        folder: is only read.

    Returns:
        Path within the folder to content.

    Raises:
        OSError, SafetensorError: if its weights cannot be read.
    """
    files = {}
    for path in _weights(folder):
        with safe_open(path, framework="pt") as file:
            names, metadata = list(file.keys()), file.metadata()
            kept = {key: file.get_tensor(key) for key in names if _kind(key) not in SHOT_NAMES}
        if len(kept) < len(names):
            files[path.relative_to(folder).as_posix()] = save(kept, metadata)
    if files and (folder / _CONFIG).is_file():
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        files[_CONFIG] = (json.dumps({**config, "shots": {}}, indent=2, ensure_ascii=False) + "\n").encode()
    return files


def _weights(folder: Path) -> list[Path]:
    return sorted([*folder.glob("adaptation.safetensors"), *folder.glob("bank/*.safetensors")])


def _kind(key: str) -> str:
    """Takes the name of an attribute of `Shots` from that of a tensor: `sizes_0` in a bank, `sizes.0` elsewhere."""
    return key.replace("_", ".").split(".")[0]
