"""Describe the base of adaptations: the networks that a fine-tuning starts from, and that inspections return to."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from .. import EMBEDDED
from ..method.prompts import PromptBook
from ..models.adapters import fingerprint

EMBEDDED_NAME = "embedded"


@dataclass(frozen=True)
class Base:
    """Holds the networks of a pipeline as they are, without copies.

    unet, vae, scheduler, tokenizer, text_encoder, extractor, perceptual: components of a pipeline.
    prompts: a copy of the prompts of all parts.
    resolution: side in pixels at which pictures are inspected.
    vae_scale_factor: picture side by latent side.
    name_or_path: where it was loaded from.
    """

    unet: object
    vae: object
    scheduler: object
    tokenizer: object
    text_encoder: object
    extractor: object
    perceptual: object
    prompts: PromptBook
    resolution: int
    vae_scale_factor: int
    name_or_path: str | None

    @property
    def name(self) -> str:
        """Names the base for a file: a Hub id, "embedded", or the bare name of a folder."""
        name = str(self.name_or_path or "")
        if name == EMBEDDED:
            return EMBEDDED_NAME
        return Path(name).name if os.path.isdir(name) else name

    def fingerprint(self) -> dict[str, list[float]]:
        """Takes a few weights of each network, by which an adaptation finds its base again."""
        return fingerprint({name: getattr(self, name) for name in ("unet", "vae", "extractor", "perceptual")})
