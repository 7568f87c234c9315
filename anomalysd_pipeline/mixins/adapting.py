"""Fine-tune on the parts, and keep many fine-tunings beside one base."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from diffusers.utils import logging

from ..adaptation.base import Base
from ..adaptation.registry import check_shots, default_name
from ..adaptation.settings import AdaptationSettings
from ..common.threads import alone
from ..method.calibration import check_rate
from ..method.prompts import check_category
from ..models.adapters import switch_adapter, take_out_adapters
from .turns import computes, learns

if TYPE_CHECKING:
    from ..adaptation.loop import AdaptationProgress, AdaptedWeights

logger = logging.get_logger(__name__)


class AdaptingMixin:
    """Fine-tunes, and switches between fine-tunings."""

    _chosen_adaptation: str | None = None
    _warned_of_half = False

    @property
    def adaptations(self) -> list[str]:
        """Names of the adaptations kept beside the base, alphabetically."""
        return sorted(self.config.adaptations)

    def adaptation_settings(self, **given) -> AdaptationSettings:
        """The settings that `adapt` would use with these arguments: call, then checkpoint, then the paper's.

        Raises:
            TypeError: for a name that is no setting.
            ValueError: for a value out of its range.
        """
        return AdaptationSettings.resolve([self.config.adaptation, given])

    @learns
    def adapt(
        self,
        normal_images: Mapping[str, object],
        steps: int | None = None,
        method: str | None = None,
        decoder_steps: int | None = None,
        name: str | None = None,
        prompts: Mapping[str, object] | None = None,
        calibrate: bool = True,
        false_alarm_rate: float = 0.05,
        callback: Callable[[AdaptationProgress], None] | None = None,
        **settings,
    ) -> AdaptedWeights:
        """Fine-tunes the denoiser and the decoder on a few normal pictures, then registers and calibrates the parts.

        All or nothing: until it has succeeded, and after an error or a cancellation, the pipeline is as it was.

        Args:
            normal_images: category to 1 or more pictures of good parts, anything `load_image` takes.
            steps, decoder_steps: optimizer steps of the denoiser and of the decoder; None: the checkpoint's own.
            method: "lora": the learned weights are kept beside the base, and inspections of these categories use them,
                so that many adaptations share one base. "full": the base itself is replaced in this pipeline.
            name: of the adaptation; None: the categories' names. One of that name is replaced, if no other categories
                rest on it.
            prompts: category to T_c, as `PromptBook.add` takes it; None keeps the part's own or the generic set.
            calibrate: whether thresholds are set from the same pictures.
            false_alarm_rate: see `calibrate`.
            callback: called with an `AdaptationProgress` after every step; an exception that it raises cancels.
            **settings: others of `AdaptationSettings`, such as `learning_rate`, `train_decoder`, `rank`, `seed`.

        Returns:
            The learned weights, with the loss of every step.

        Raises:
            ValueError: for bad names, pictures, prompts or settings.
        """
        from ..adaptation.loop import fine_tune, in_memory_accelerator

        shots = check_shots(normal_images, prompts)
        chosen = self.adaptation_settings(steps=steps, method=method, decoder_steps=decoder_steps, **settings)
        self.check_adaptable(name or default_name(shots), chosen.method, shots)
        check_rate(false_alarm_rate)
        self._check_hooks("adapt")
        with in_memory_accelerator(self.device, chosen) as accelerator:
            weights = fine_tune(self.base, shots, chosen, accelerator, prompts=prompts, callback=callback)
        self.learn(shots, weights, name, prompts, calibrate, false_alarm_rate)
        return weights

    @learns
    def learn(
        self,
        normal_images: Mapping[str, object],
        weights: AdaptedWeights,
        name: str | None = None,
        prompts: Mapping[str, object] | None = None,
        calibrate: bool = True,
        false_alarm_rate: float = 0.05,
    ) -> None:
        """Takes in the result of `fine_tune`, and registers and calibrates its categories; all or nothing.

        Arguments and errors are those of `adapt`.
        """
        shots = check_shots(normal_images, prompts)
        name = name or default_name(shots)
        full = weights.settings.method == "full"
        self.check_adaptable(name, weights.settings.method, shots)
        with self._undone_on_error():
            if full:
                self._replace_weights(weights)
            for category, images in shots.items():
                self.add_category(category, images, (prompts or {}).get(category))
                # Inspected with the prompts that it was trained with.
                design = weights.settings.prompt_design
                self._store_category(category, adaptation=None if full else name, prompt_design=design)
            if not full:
                # In half precision, as it will be saved: inspections now equal those after a reload.
                state = {
                    part: {key: value.half() for key, value in own.items()}
                    for part, own in (("denoiser", weights.denoiser), ("decoder", weights.decoder))
                    if own is not None
                }
                # After the categories: they drop the adaptation that this one replaces.
                with alone(self.components.values()):
                    known = self.knowledge
                    known.add_adaptation(name, {"settings": weights.settings.to_dict()}, state)
                    self.knowledge = known
            if calibrate:
                for category, images in shots.items():
                    self.calibrate(category, images, false_alarm_rate)

    def check_adaptable(self, name: str, method: str, categories: Collection[str] | None = None) -> None:
        """Checks what can be told to be wrong with an adaptation before it is trained.

        Args:
            name: of the adaptation.
            method: "lora" or "full".
            categories: those it is for.

        Raises:
            ValueError: for a bad name, one on which other categories rest, or a method that would change the base of
                other adaptations.
        """
        try:
            check_category(name)
        except ValueError as error:
            raise ValueError(str(error).replace("`category`", "`name`")) from error
        if method == "full":
            self._check_base("`method` 'full'")
        others = [c for c in self.knowledge.categories_of(name) if categories is not None and c not in categories]
        if others:
            raise ValueError(
                f"`name` {name!r} is that of an adaptation on which {', '.join(map(repr, others))} rest; give another "
                "name, or remove it with `remove_adaptation` first."
            )

    @learns
    @computes
    def remove_adaptation(self, name: str) -> None:
        """Forgets an adaptation and the categories that rest on it.

        Raises:
            ValueError: if there is none of that name.
        """
        self._check_adaptation(name)
        known = self.knowledge
        for category in known.categories_of(name):
            known.remove(category)
        known.drop_unused_adaptations()
        self.knowledge = known

    def set_adaptation(self, name: str | None) -> None:
        """Chooses the adaptation that direct calls of `inpaint` use; None, as at first: the base. An inspection
        switches by itself, to the adaptation of its category.

        Raises:
            ValueError: if there is none of that name.
        """
        if name is not None:
            self._check_adaptation(name)
        self._chosen_adaptation = name

    @computes
    def use_adaptation(self, name: str | None) -> None:
        """Switches the denoiser and the decoder to an adaptation or to the base. Called before every run: another
        pipeline may share them and have switched them since."""
        if self.unet.dtype == torch.float16 and self._execution_device.type == "cpu" and not self._warned_of_half:
            self._warned_of_half = True
            logger.warning(
                "float16 is slow and inaccurate on a CPU; call `pipe.to(torch.float32)`, and for speed set "
                "`pipe.mixed_precision = 'bf16'` where the CPU computes in it, or move the pipeline to a GPU."
            )
        for module, part in ((self.unet, "denoiser"), (self.vae, "decoder")):
            switch_adapter(module, None if name is None else self.adapters.adapter(name, part), self)

    def use_adaptation_of(self, category: str | None) -> None:
        """Switches to the adaptation of a category; to the base for one that has none."""
        self.use_adaptation(self.config.categories.get(category, {}).get("adaptation"))

    @property
    def base(self) -> Base:
        """The networks that adaptations rest on, with a copy of the prompts."""
        names = ("unet", "vae", "scheduler", "tokenizer", "text_encoder", "extractor", "perceptual")
        return Base(
            **{name: getattr(self, name) for name in names},
            prompts=self.prompt_book,
            resolution=self.config.resolution,
            vae_scale_factor=self.vae_scale_factor,
            name_or_path=self.name_or_path,
        )

    def adaptation_base(self) -> dict:
        """A few weights of each network, by which an adaptation finds its base again."""
        return self.base.fingerprint()

    def _replace_weights(self, weights: AdaptedWeights) -> None:
        """Puts fully trained weights in new modules: the old ones may be another pipeline's too."""
        if weights.denoiser is not None:
            unet = copy.deepcopy(self.unet)
            take_out_adapters(unet)  # of adaptations that are gone, or of another pipeline
            unet.load_state_dict(weights.denoiser)
            self.register_modules(unet=unet)
        if weights.decoder is not None:
            vae = copy.deepcopy(self.vae)
            take_out_adapters(vae)
            vae.load_state_dict(weights.decoder, strict=False)
            self.register_modules(vae=vae)
        self._forget_thresholds()

    @contextlib.contextmanager
    def _undone_on_error(self) -> Iterator[None]:
        """Lets a block change knowledge and weights; after an error all is as it was."""
        known, modules, chosen = self.knowledge, {"unet": self.unet, "vae": self.vae}, self._chosen_adaptation
        self.knowledge = known.copy()  # the originals can then simply be put back
        try:
            yield
        except BaseException:
            self.register_modules(**modules)
            self.knowledge = known
            self._chosen_adaptation = chosen
            raise

    def _check_base(self, cause: str) -> None:
        if self.adaptations:
            raise ValueError(
                f"{cause} would change the base that {', '.join(map(repr, self.adaptations))} rest on; remove them "
                "with `remove_adaptation`, or use a pipeline that is loaded anew."
            )

    def _check_hooks(self, method: str) -> None:
        if getattr(self, "_all_hooks", None):
            raise ValueError(
                f"`{method}` needs the pipeline on one device, but parts of it are offloaded; call "
                "`pipe.remove_all_hooks()` and `pipe.to(...)` first."
            )

    def _check_adaptation(self, name: str) -> None:
        if name not in self.config.adaptations:
            raise ValueError(f"`adaptation` must be one of {', '.join(self.adaptations) or 'none yet'}, got {name!r}.")
