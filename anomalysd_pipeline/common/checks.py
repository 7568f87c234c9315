"""Check numbers and files that others may have written, in one sentence each."""

from __future__ import annotations

import json
import stat
from pathlib import Path

MOST_JSON = 2**25
"""Bytes of the largest file of settings that is read; thousands of parts take as many."""


def require_number(name: str, value: object, low: float, high: float, above: bool = False) -> None:
    """Raises ValueError unless a value is a number, `low` <= value <= `high` (`above`: `low` < value); both finite."""
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
    if not fits or (above and value == low):
        raise ValueError(
            f"`{name}` must be a number {'above' if above else 'at least'} {low} and at most {high:g}, "
            f"got {shown(value)}."
        )


def require_whole(name: str, value: object, low: int, high: int, remedy: str = "") -> None:
    """Raises ValueError unless a value is a whole number, `low` <= value <= `high`; `remedy` ends the sentence."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"`{name}` must be a whole number of at least {low}, got {shown(value)}{remedy}.")
    if value > high:
        raise ValueError(f"`{name}` must be at most {high}, got {shown(value)}.")


def require_kind(name: str, value: object, kind: type, words: str) -> None:
    """Raises ValueError unless a value is of a kind, such as `bool`; `words` describe it."""
    if not isinstance(value, kind):
        raise ValueError(f"`{name}` must be {words}, got {shown(value)}.")


def shown(value: object) -> str:
    """Shows a value in a sentence; cut, because it may be huge."""
    if isinstance(value, int) and abs(value) >= 10**20:
        return "a number of more than 20 digits"
    text = repr(value[:80] if isinstance(value, (str, bytes, list, tuple)) else value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def require_file(path: Path) -> None:
    """Raises OSError unless something can be read, and ValueError for pipes and devices, whose reading may not end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path.name} is no regular file")


def read_json(path: Path, finite: bool = True) -> dict:
    """Reads a JSON object.

    Args:
        path: at most `MOST_JSON` bytes.
        finite: whether NaN and infinity are refused.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no regular file, too large, nested too deeply, or no JSON object.
    """
    require_file(path)
    if path.stat().st_size > MOST_JSON:
        raise ValueError(f"{path.name} has more than {MOST_JSON >> 20} MiB")
    return parse_json(path.read_text(encoding="utf-8"), path.name, finite)


def parse_json(text: str, name: str, finite: bool = True) -> dict:
    """Parses a JSON object; errors are those of `read_json`, and name the file it is from."""
    try:
        found = json.loads(text, parse_constant=_refuse if finite else None)
    except RecursionError as error:
        raise ValueError(f"{name} is nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError(f"{name} holds no JSON object")
    return found


def _refuse(constant: str):
    raise ValueError(f"it holds the number {constant}")
