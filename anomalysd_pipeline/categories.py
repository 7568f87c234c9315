"""The part of the pipeline that knows parts: registering them, their prompts, and their thresholds."""

from __future__ import annotations

import copy

import torch

from .data.images import load_pictures
from .data.tensors import to_tensor
from .method.calibration import Calibration, calibrate_threshold
from .method.prompts import PromptBook, check_category
from .models.collection import COMPARED_PICTURES, fill_bank


class CategoryMixin:
    """Registered parts of an `AnomalySDPipeline`."""

    @property
    def categories(self) -> list[str]:
        """Names of the registered categories, alphabetically."""
        return sorted(self.config.categories)

    @property
    def prompt_book(self) -> PromptBook:
        """A copy of the prompts in use; `add_category` changes them."""
        return PromptBook.from_dict(self.config.prompts)

    def _store_category(self, category: str, **facts) -> None:
        categories = copy.deepcopy(dict(self.config.categories))
        categories[category] = {**categories.get(category, {}), **facts}
        self.register_to_config(categories=categories)

    @torch.no_grad()
    def add_category(
        self,
        category: str,
        normal_images,
        prompts=None,
        noise_strength: float | None = None,
        rotations: int | None = None,
    ) -> None:
        """Registers a part from its normal pictures, without a gradient step: prompts and the prototype bank of Eq.
        (13).

        A category of that name is replaced, and its calibration and adaptation forgotten. On an error nothing is
        changed.

        Args:
            category: name of the part; it fills the generic prompts where the part has none of its own.
            normal_images: 1 or more pictures of good parts, anything `load_image` takes.
            prompts: T_c as `PromptBook.add` takes it; None keeps the part's own or the generic set.
            noise_strength: lambda for this part; None: the checkpoint's.
            rotations: number of rotated copies of each picture in the bank, evenly spaced; None: the checkpoint's.

        Raises:
            ValueError: for a bad name, no or unreadable pictures, bad prompts or a strength outside (0, 1].
        """
        check_category(category)
        book = self.prompt_book
        book.add(category, prompts)
        if noise_strength is not None:
            self.settings(noise_strength=noise_strength)
        loaded = load_pictures(normal_images, "normal_images")
        pictures = torch.stack([to_tensor(picture, self.config.resolution) for picture in loaded])  # [K, 3, R, R]
        device = self._execution_device
        rotations = self.config.rotations if rotations is None else rotations
        compare = len(pictures) >= COMPARED_PICTURES
        fill_bank(self.bank.to(device), category, self.extractor, pictures.to(device), rotations, compare)
        self.register_to_config(prompts=book.to_dict())
        self._store_category(
            category,
            shots=len(pictures),
            rotations=rotations,
            noise_strength=noise_strength,
            adaptation=None,
            prompt_design="hierarchical",
            adapted=False,
            calibration=None,
        )
        self._drop_unused_adaptations()

    def remove_category(self, category: str) -> None:
        """Forgets a registered part: its bank, settings and calibration.

        Raises:
            ValueError: if it is not registered.
        """
        if category not in self.config.categories:
            raise ValueError(
                f"`category` must be a registered part ({', '.join(self.categories) or 'none yet'}), got {category!r}."
            )
        self.bank.remove(category)
        self.register_to_config(categories={k: v for k, v in self.config.categories.items() if k != category})
        self._drop_unused_adaptations()

    @torch.no_grad()
    def calibrate(
        self, category: str, normal_images, false_alarm_rate: float = 0.05, seed: int = 0, **settings
    ) -> Calibration:
        """Sets a part's threshold from normal pictures alone; see `calibration.calibrate_threshold`.

        Args:
            category: a part registered by `add_category`.
            normal_images: 1 or more pictures of good parts; those given to `add_category` will do, because each is
                scored against a bank that was made without it.
            false_alarm_rate: share of good parts that may exceed the threshold.
            **settings: the settings of `__call__` (`preset`, `noise_strength`, ...) at which the part will be
                inspected. The threshold applies to inspections with the same settings.

        Returns:
            The stored record: threshold, the scores it rests on, the settings.

        Raises:
            ValueError: for a part that is not registered, unreadable pictures or bad settings.
        """
        if category not in self.config.categories:
            raise ValueError(
                f"`category` must be registered by `add_category` before it is calibrated, got {category!r}."
            )
        pictures = load_pictures(normal_images, "normal_images")
        chosen = self.settings(category=category, **settings)
        calibration = calibrate_threshold(self, category, pictures, chosen, false_alarm_rate, seed)
        self._store_category(category, calibration=calibration.to_dict())
        return calibration
