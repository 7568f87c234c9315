"""The bases that all sessions share, and the knowledge that each session keeps beside them."""

from __future__ import annotations

import copy
import functools
import inspect
import os
import threading
from dataclasses import dataclass
from pathlib import Path

EMBEDDED_BASE, FULL_BASE = "embedded", "full"
FULL_ID = "stable-diffusion-v1-5/stable-diffusion-inpainting"


def has_gpu() -> bool:
    """Tells whether to expect a CUDA GPU, without the time that importing PyTorch takes."""
    return bool(os.environ.get("SPACES_ZERO_GPU")) or any(Path("/dev").glob("nvidia[0-9]*"))


@dataclass(frozen=True)
class ModelFacts:
    """Describes a base for visitors.

    Attributes:
        name: key of the base.
        title: words for a person.
        state: "loading", "ready", "not loaded" or "failed".
        device: such as "CPU" or "GPU (NVIDIA ...)"; "" until it is loaded.
        resolution: side in pixels of the pictures it inspects; 0 until it is loaded.
        parameters: number of its weights; 0 until it is loaded.
        error: a sentence where it failed.
    """

    name: str
    title: str
    state: str
    device: str = ""
    resolution: int = 0
    parameters: int = 0
    error: str = ""


@functools.cache
def shared_models() -> Models:
    """Returns the bases of this process."""
    return Models()


class Models:
    """Loads bases by name, each once for all threads.

    Args:
        checkpoint: Hub id or folder to offer in place of the embedded checkpoint; None: `ANOMALYSD_MODEL`.
        full: whether to offer Stable Diffusion too; None: where there is a GPU.
    """

    def __init__(self, checkpoint: str | None = None, full: bool | None = None):
        checkpoint = checkpoint or os.environ.get("ANOMALYSD_MODEL") or None
        # Only the name of a folder: the page must not tell places on the server.
        shown = Path(checkpoint).name if checkpoint and os.path.isdir(checkpoint) else checkpoint
        self._ids: dict[str, str | None] = {EMBEDDED_BASE: checkpoint}
        self.titles = {EMBEDDED_BASE: shown or "Embedded (small)"}
        self.is_embedded = checkpoint is None
        if has_gpu() if full is None else full:
            self._ids[FULL_BASE] = FULL_ID
            self.titles[FULL_BASE] = "Full (Stable Diffusion 1.5)"
        self._bases: dict[str, object] = {}
        self._errors: dict[str, str] = {}
        self._locks = {name: threading.Lock() for name in self._ids}

    @property
    def names(self) -> list[str]:
        """Names of the bases on offer; a new session starts with the first."""
        return list(self._ids)

    def base(self, name: str = EMBEDDED_BASE):
        """Returns the shared pipeline of a base, which nobody may change; waits until it is loaded.

        Raises:
            ValueError: there is no base of that name, or it cannot be loaded.
        """
        if name not in self._ids:
            raise ValueError(f"`base` must be one of {', '.join(map(repr, self.names))}, got {name!r}.")
        with self._locks[name]:
            if name not in self._bases:
                try:
                    self._bases[name] = _load(self._ids[name])
                    self._errors.pop(name, None)
                # A hub, a disk or a GPU may raise anything; the visitor gets a sentence, the log the whole.
                except Exception as error:
                    self._errors[name] = f"{self.titles[name]} could not be loaded; try again later."
                    raise ValueError(self._errors[name]) from error
            return self._bases[name]

    def pipeline(self, name: str = EMBEDDED_BASE):
        """Makes a new session's own pipeline on a base; see `own_pipeline`."""
        return own_pipeline(self.base(name))

    def facts(self, name: str = EMBEDDED_BASE) -> ModelFacts:
        """Describes a base as it is now, without waiting for it."""
        title, base = self.titles[name], self._bases.get(name)
        if base is None:
            if name in self._errors:
                return ModelFacts(name, title, "failed", error=self._errors[name])
            return ModelFacts(name, title, "loading" if self._locks[name].locked() else "not loaded")
        modules = (base.unet, base.vae, base.text_encoder, base.extractor, base.perceptual)
        count = sum(p.numel() for module in modules if module is not None for p in module.parameters())
        return ModelFacts(name, title, "ready", _device_words(base.device), base.config.resolution, count)


def _load(checkpoint: str | None):
    from ..inspection.result import load_pipeline

    return load_pipeline(checkpoint, "auto", "auto")


def _device_words(device) -> str:
    if device.type != "cuda":
        return "CPU" if device.type == "cpu" else device.type
    import torch

    return f"GPU ({torch.cuda.get_device_name(device)})"


@dataclass(frozen=True)
class Knowledge:
    """Holds a copy of a session's knowledge, without the shared weights; can be pickled.

    Attributes:
        known: a `knowledge.Knowledge`.
    """

    known: object

    @classmethod
    def of(cls, pipe) -> Knowledge:
        """Copies the knowledge of a pipeline."""
        return cls(pipe.knowledge.copy())

    def give(self, pipe) -> None:
        """Replaces the knowledge of a pipeline of the same base."""
        pipe.knowledge = self.known


def own_pipeline(base):
    """Makes a pipeline with the weights of `base` and a bank, adaptations and settings of its own."""
    own = {"bank": copy.deepcopy(base.bank), "adapters": copy.deepcopy(base.adapters)}
    components = {**base.components, **own}
    accepted = inspect.signature(type(base)).parameters
    settings = {key: value for key, value in base.config.items() if key in accepted and key not in components}
    pipe = type(base)(**components, **settings)
    pipe.mixed_precision = base.mixed_precision
    pipe.set_progress_bar_config(disable=True)
    return pipe


@dataclass
class Carried:
    """Carries a session's pipeline as an argument, to another process without the shared weights."""

    pipe: object
    base: str = EMBEDDED_BASE

    def __reduce__(self):
        return _carried_over, (self.base, Knowledge.of(self.pipe))


def _carried_over(base: str, knowledge: Knowledge) -> Carried:
    pipe = own_pipeline(shared_models().base(base))
    knowledge.give(pipe)
    return Carried(pipe, base)
