"""The part of the pipeline that learns: fine-tuning in memory, several adaptations on one base, saving and loading
them."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .adaptation.folder import read_adaptation, write_adaptation
from .adaptation.registry import check_shots, default_name
from .adaptation.settings import AdaptationSettings
from .method.calibration import prediction_threshold
from .method.prompts import check_category
from .models.adapters import fingerprint, switch_adapter, take_out_adapters

if TYPE_CHECKING:
    from .adaptation.loop import AdaptationProgress, AdaptedWeights


class AdaptationMixin:
    """Fine-tuning of an `AnomalySDPipeline`."""

    _chosen_adaptation: str | None = None

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
        from .adaptation.loop import fine_tune, in_memory_accelerator

        shots = check_shots(normal_images, prompts)
        chosen = self.adaptation_settings(steps=steps, method=method, decoder_steps=decoder_steps, **settings)
        self.check_adaptable(name or default_name(shots), chosen.method, shots)
        prediction_threshold([1.0, 2.0], false_alarm_rate)  # a bad rate is refused before minutes of work
        if getattr(self, "_all_hooks", None):
            raise ValueError(
                "`adapt` needs the pipeline on one device, but parts of it are offloaded; call "
                "`pipe.remove_all_hooks()` and `pipe.to(...)` first."
            )
        accelerator = in_memory_accelerator(self.device, chosen)
        weights = fine_tune(self, shots, chosen, accelerator, prompts=prompts, callback=callback)
        self.learn(shots, weights, name, prompts, calibrate, false_alarm_rate)
        return weights

    def learn(
        self,
        normal_images: Mapping[str, object],
        weights: AdaptedWeights,
        name: str | None = None,
        prompts: Mapping[str, object] | None = None,
        calibrate: bool = True,
        false_alarm_rate: float = 0.05,
    ) -> None:
        """Takes in what `adaptation.fine_tune` returned, and registers and calibrates its categories; all or nothing.

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
                self._store_category(category, adaptation=None if full else name, prompt_design=design, adapted=True)
            if not full:
                # In half precision, as it will be saved: what is measured now is what a reload will give.
                state = {
                    part: {key: value.half() for key, value in own.items()}
                    for part, own in (("denoiser", weights.denoiser), ("decoder", weights.decoder))
                    if own is not None
                }
                # After the categories: they drop the adaptation that this one replaces.
                self.adapters.add(name, state)
                self._store_adaptation(name, {"settings": weights.settings.to_dict()})
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
        if method == "full" and self.adaptations:
            raise ValueError(
                f"`method` 'full' would change the base that {', '.join(map(repr, self.adaptations))} rest on; remove "
                "them with `remove_adaptation`, or use a pipeline that is loaded anew."
            )
        others = [c for c in self._categories_of(name) if categories is not None and c not in categories]
        if others:
            raise ValueError(
                f"`name` {name!r} is that of an adaptation on which {', '.join(map(repr, others))} rest; give another "
                "name, or remove it with `remove_adaptation` first."
            )

    def remove_adaptation(self, name: str) -> None:
        """Forgets an adaptation and the categories that rest on it.

        Raises:
            ValueError: if there is none of that name.
        """
        self._check_adaptation(name)
        for category in self._categories_of(name):
            self.remove_category(category)
        self._drop_unused_adaptations()

    def set_adaptation(self, name: str | None) -> None:
        """Chooses the adaptation that direct calls of `inpaint` use; None, as at first: the base. An inspection
        switches by itself, to the adaptation of its category.

        Raises:
            ValueError: if there is none of that name.
        """
        if name is not None:
            self._check_adaptation(name)
        self._chosen_adaptation = name

    def use_adaptation(self, name: str | None) -> None:
        """Switches the denoiser and the decoder to an adaptation or to the base. Called before every run: another
        pipeline may share them and have switched them since."""
        state = {} if name is None else self.adapters.state(name)
        switch_adapter(self.unet, state.get("denoiser"), self)
        switch_adapter(self.vae, state.get("decoder"), self)

    def use_adaptation_of(self, category: str | None) -> None:
        """Switches to the adaptation of a category; to the base for one that has none."""
        self.use_adaptation(self.config.categories.get(category, {}).get("adaptation"))

    def save_adaptation(self, save_directory, adaptation: str | None = None) -> None:
        """Writes an adaptation without the base: LoRA weights, banks, prompts and thresholds, a few MB
        to some 20.

        Args:
            save_directory: made if missing; replaced as a whole if it holds an adaptation.
            adaptation: its name; None: the only one there is.

        Raises:
            ValueError: if there is none of that name, or several and none is named, or the folder cannot be written.
        """
        if adaptation is None:
            if len(self.adaptations) != 1:
                raise ValueError(
                    f"`adaptation` must name one of {', '.join(self.adaptations) or 'none: call `adapt` first'}."
                )
            adaptation = self.adaptations[0]
        self._check_adaptation(adaptation)
        write_adaptation(self, adaptation, self._categories_of(adaptation), Path(save_directory))

    def load_adaptation(self, pretrained_adaptation_name_or_path, overwrite: bool = False, **hub) -> list[str]:
        """Takes in an adaptation that `save_adaptation` wrote, from a folder or from the Hub; all or nothing.

        Args:
            pretrained_adaptation_name_or_path: folder or Hub id.
            overwrite: whether categories of the same names may be replaced.
            **hub: `revision`, `token`, `cache_dir`, `local_files_only`, as of `huggingface_hub.snapshot_download`.

        Returns:
            The categories it brought.

        Raises:
            ValueError: if it is missing, damaged or made for another base, or its categories are registered already,
                or others rest on an adaptation of its name.
        """
        found = read_adaptation(pretrained_adaptation_name_or_path, self, **hub)
        registered = [category for category in found.categories if category in self.config.categories]
        if registered and not overwrite:
            raise ValueError(
                f"`pretrained_adaptation_name_or_path` brings {', '.join(map(repr, registered))}, which this pipeline "
                "knows already; give `overwrite=True`, or remove them with `remove_category` first."
            )
        others = [category for category in self._categories_of(found.name) if category not in found.categories]
        if others:
            raise ValueError(
                f"`pretrained_adaptation_name_or_path` brings an adaptation {found.name!r}, and on one of that name "
                f"{', '.join(map(repr, others))} rest here; remove it with `remove_adaptation` first."
            )
        with self._undone_on_error():
            book = self.prompt_book
            for category in found.categories:
                book.add(category, found.prompts[category])
                packed = {name: tensor.to(self.bank.device) for name, tensor in found.banks[category].items()}
                self.bank.add_packed(category, packed)
            self.register_to_config(prompts=book.to_dict())
            self.adapters.add(found.name, found.state)
            for category, record in found.categories.items():
                self._store_category(category, **{**record, "adaptation": found.name})
            self._store_adaptation(found.name, found.record)
            self._drop_unused_adaptations()
        return list(found.categories)

    def adaptation_base(self) -> dict:
        """What an adaptation must find again: a few weights of each network that it rests on."""
        names = ("unet", "vae", "extractor", "perceptual")
        return fingerprint({name: self.components[name] for name in names})

    def save_pretrained(self, save_directory, *args, **kwargs) -> None:
        """As `DiffusionPipeline.save_pretrained`; adaptations, banks, prompts and thresholds included."""
        # Their weights are in the store, so the modules can be written as they were loaded.
        take_out_adapters(self.unet)
        take_out_adapters(self.vae)
        super().save_pretrained(save_directory, *args, **kwargs)

    # Parts of the above

    def _categories_of(self, adaptation: str) -> list[str]:
        records = self.config.categories.items()
        return sorted(category for category, record in records if record.get("adaptation") == adaptation)

    def _check_adaptation(self, name: str) -> None:
        if name not in self.config.adaptations:
            raise ValueError(f"`adaptation` must be one of {', '.join(self.adaptations) or 'none yet'}, got {name!r}.")

    def _store_adaptation(self, name: str, record: dict) -> None:
        self.register_to_config(adaptations={**copy.deepcopy(dict(self.config.adaptations)), name: record})

    def _drop_unused_adaptations(self) -> None:
        used = {record.get("adaptation") for record in self.config.categories.values()}
        for name in self.adaptations:
            if name not in used:
                self.adapters.remove(name)
        kept = {name: record for name, record in self.config.adaptations.items() if name in used}
        self.register_to_config(adaptations=kept)
        if self._chosen_adaptation not in kept:
            self._chosen_adaptation = None

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
        for category in self.categories:
            self._store_category(category, calibration=None, adapted=False)  # both of the old weights

    @contextlib.contextmanager
    def _undone_on_error(self):
        keys = ("categories", "prompts", "adaptations")
        before = {key: copy.deepcopy(self.config[key]) for key in keys}
        modules = {"unet": self.unet, "vae": self.vae, "bank": self.bank, "adapters": self.adapters}
        chosen = self._chosen_adaptation
        # Work on copies, so that the originals can simply be put back.
        self.register_modules(bank=copy.deepcopy(self.bank), adapters=copy.deepcopy(self.adapters))
        try:
            yield
        except BaseException:
            self.register_modules(**modules)
            self.register_to_config(**before)
            self._chosen_adaptation = chosen
            raise
