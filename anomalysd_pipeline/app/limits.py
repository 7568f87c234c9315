"""Every bound of the app in one place, each changeable by an environment variable."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields

_PREFIX = "ANOMALYSD_MAX_"
_HIGHEST = {"pixels": 100_000_000, "name_length": 64, "prompt_length": 300}
"""Bounds of the package itself; repeated here, because importing them would import torch."""


@dataclass(frozen=True)
class Limits:
    """Bounds the use of the app by its visitors.

    The environment variable `ANOMALYSD_MAX_X_Y` sets the field `x_y`.

    Attributes:
        upload_bytes: bytes of one uploaded file, and of one picture in a zip.
        unpacked_bytes: bytes of all pictures in the zips of one batch, unpacked.
        adaptation_bytes: bytes of an adaptation in a zip, unpacked.
        visitor_bytes: bytes that a visitor may upload in two hours, after which uploads are deleted.
        upload_seconds: time that an upload may take.
        zip_entries: entries of one zip, folders and hidden files included.
        pictures: pictures of one batch.
        pixels: pixels of one picture in its file; at most the bound of `data.load_image`.
        side: longest side of a picture after reading, in pixels. Larger ones are scaled down to it: the model looks at
            far smaller ones, and heatmaps of that size are drawn in memory.
        parts: parts of one session.
        part_pictures: normal pictures of one part.
        sessions: sessions at a time.
        idle_seconds: time to live of a session, counted from its last use.
        disk_bytes: bytes of one session's folder.
        name_length: characters of a part's name; at most the bound of `prompts.check_category`.
        prompt_length: characters of one prompt; at most the bound of `prompts.PromptBook`.
        prompts: prompts of one part and level (coarse or fine).
    """

    upload_bytes: int = 20_000_000
    unpacked_bytes: int = 400_000_000
    adaptation_bytes: int = 100_000_000
    visitor_bytes: int = 2_000_000_000
    upload_seconds: int = 600
    zip_entries: int = 500
    pictures: int = 200
    pixels: int = 100_000_000
    side: int = 2048
    parts: int = 8
    part_pictures: int = 8
    sessions: int = 64
    idle_seconds: int = 3600
    disk_bytes: int = 600_000_000
    name_length: int = 64
    prompt_length: int = 300
    prompts: int = 8

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            highest = _HIGHEST.get(field.name)
            if type(value) is not int or value < 1 or (highest is not None and value > highest):
                span = "of at least 1" if highest is None else f"from 1 to {highest}"
                raise ValueError(f"`{field.name}` must be a whole number {span}, got {value!r}.")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Limits:
        """Reads the bounds from the variables `ANOMALYSD_MAX_...`, such as `ANOMALYSD_MAX_SESSIONS=16`.

        Raises:
            ValueError: a variable of that prefix names no bound, or its value is no whole number in range.
        """
        names = {_PREFIX + field.name.upper(): field.name for field in fields(cls)}
        values = {}
        for variable in sorted(variable for variable in environment if variable.startswith(_PREFIX)):
            if variable not in names:
                raise ValueError(f"`{variable}` is no bound of the app; use one of {', '.join(sorted(names))}.")
            text = environment[variable].strip()
            try:
                # Digits alone: `int` would also take "1_0", and digits of other scripts.
                if not (text.isascii() and text.isdigit() and len(text) <= 15):
                    raise ValueError(f"`{names[variable]}` must be a whole number of at least 1, got {text[:40]!r}.")
                values[names[variable]] = int(text)
                cls(**{names[variable]: int(text)})
            except ValueError as error:
                raise ValueError(str(error).replace(f"`{names[variable]}`", f"`{variable}`")) from error
        return cls(**values)
