"""The bases that all sessions share: loaded once, in the background, and what a session keeps beside them."""

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
    """Whether a CUDA GPU can be expected, told without importing PyTorch, so that a page can be drawn at once."""
    return bool(os.environ.get("SPACES_ZERO_GPU")) or any(Path("/dev").glob("nvidia[0-9]*"))


@dataclass(frozen=True)
class ModelFacts:
    """What a visitor is told of a base.

    name: key of the base.
    title: for a person.
    state: "loading", "ready", "not loaded" or "failed".
    device: such as "CPU" or "GPU (NVIDIA ...)"; "" until it is loaded.
    resolution: side in pixels at which it inspects; 0 until it is loaded.
    parameters: how many weights it has; 0 until it is loaded.
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
    """The bases of this process."""
    return Models()


class Models:
    """Bases by name, each loaded once however many ask for it.

    Args:
        checkpoint: Hub id or folder that is offered in place of the embedded checkpoint; None: `ANOMALYSD_MODEL`.
        full: whether to offer Stable Diffusion too; None: where there is a GPU.
    """

    def __init__(self, checkpoint: str | None = None, full: bool | None = None):
        checkpoint = checkpoint or os.environ.get("ANOMALYSD_MODEL") or None
        # Of a folder its name alone: the page must not tell where things lie on the server.
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
        """Those on offer; the first is everybody's at first."""
        return list(self._ids)

    def base(self, name: str = EMBEDDED_BASE):
        """The shared pipeline of a base, which nobody may change; waits until it is loaded.

        Raises:
            ValueError: there is none of that name, or it cannot be loaded.
        """
        if name not in self._ids:
            raise ValueError(f"`base` must be one of {', '.join(map(repr, self.names))}, got {name!r}.")
        with self._locks[name]:
            if name not in self._bases:
                try:
                    self._bases[name] = _load(self._ids[name])
                    self._errors.pop(name, None)
                # Whatever a hub, a disk or a GPU may come up with; the visitor is told, and the log has it all.
                except Exception as error:
                    self._errors[name] = f"{self.titles[name]} could not be loaded; try again later."
                    raise ValueError(self._errors[name]) from error
            return self._bases[name]

    def pipeline(self, name: str = EMBEDDED_BASE):
        """A new session's own pipeline on a base; see `own_pipeline`."""
        return own_pipeline(self.base(name))

    def warm_up(self) -> threading.Thread:
        """Starts to load the first base in the background."""
        thread = threading.Thread(target=self._try, name="load the model", daemon=True)
        thread.start()
        return thread

    def _try(self) -> None:
        try:
            self.base()
        except ValueError:
            return  # whoever needs it will be told

    def facts(self, name: str = EMBEDDED_BASE) -> ModelFacts:
        """What is known of a base now; never waits for it."""
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
    """A copy of all that a session has taught its pipeline, without the shared weights; can be pickled.

    known: see `knowledge.Knowledge`.
    """

    known: object

    @classmethod
    def of(cls, pipe) -> Knowledge:
        """Copies what a pipeline knows."""
        return cls(pipe.knowledge.copy())

    def give(self, pipe) -> None:
        """Puts it in the place of what a pipeline of the same base knows."""
        pipe.knowledge = self.known


def own_pipeline(base):
    """A pipeline with the weights of `base`, but a bank, adaptations and settings of its own."""
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
    """A session's pipeline as an argument: itself within this process, without the shared weights to another one."""

    pipe: object
    base: str = EMBEDDED_BASE

    def __reduce__(self):
        return _carried_over, (self.base, Knowledge.of(self.pipe))


def _carried_over(base: str, knowledge: Knowledge) -> Carried:
    pipe = own_pipeline(shared_models().base(base))
    knowledge.give(pipe)
    return Carried(pipe, base)
