"""Keep what a pipeline has learned of its parts: records, prompts, prototype banks and adaptations."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .adaptation.folder import StoredAdaptation
from .data.shots import SHOT_NAMES
from .method.prompts import PromptBook
from .models.adapters import AdapterStore, check_fits
from .models.bank import PrototypeBank
from .models.collection import is_in_range

KEYS = ("categories", "prompts", "adaptations")
"""Entries of a pipeline's config that hold knowledge."""


@dataclass(frozen=True)
class PackedPart:
    """All that is known of a part, apart from its adaptation.

    record: its settings and calibration, JSON-serializable.
    tensors: what `PrototypeBank.packed` gives of it; empty for a part without normal pictures.
    """

    record: dict
    tensors: dict[str, Tensor]

    def save(self, path: Path) -> None:
        """Writes a safetensors file, with the record in its header.

        Raises:
            OSError, SafetensorError: if it cannot be written.
        """
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self.tensors.items()}
        metadata = {"record": json.dumps(self.record)}
        save_file(tensors or {"bank": torch.zeros(0)}, path, metadata=metadata)  # a file without tensors is none

    @classmethod
    def load(cls, path: Path) -> PackedPart:
        """Reads what `save` wrote.

        Raises:
            ValueError: if the file is missing or damaged.
        """
        try:
            with safe_open(path, framework="pt") as file:
                record, names = json.loads(file.metadata()["record"]), file.keys()
                tensors = {"bank": file.get_tensor("bank")} | {name: file.get_tensor(name) for name in names}
        except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"'{path}' must hold a part as `PackedPart.save` writes it, got {error}.") from error
        return cls(dict(record), tensors if len(tensors["bank"]) else {})


@dataclass
class Knowledge:
    """What a pipeline has learned; everything but the weights that it shares with others of the same base.

    categories: part to its record: `shots`, `digests`, `fingerprints`, `rotations`, `noise_strength`, `bit_depth`,
        `adaptation`, `prompt_design`, `calibration`, `region`, `tile_size`
        and `tile_overlap`.
    prompts: the prompts of every part, and the generic ones.
    adaptations: adaptation to the settings it was made with.
    bank: the prototypes of every part.
    adapters: the LoRA weights of every adaptation.
    """

    categories: dict[str, dict]
    prompts: PromptBook
    adaptations: dict[str, dict]
    bank: PrototypeBank
    adapters: AdapterStore

    @classmethod
    def of(cls, config: Mapping, bank: PrototypeBank, adapters: AdapterStore) -> Knowledge:
        """Reads the entries `KEYS` of a pipeline's config; banks and adapters are those given, not copies."""
        categories, prompts, adaptations = (copy.deepcopy(dict(config[key])) for key in KEYS)
        return cls(categories, PromptBook.from_dict(prompts), adaptations, bank, adapters)

    def config(self) -> dict[str, dict]:
        """The entries `KEYS` of a config, JSON-serializable."""
        return {"categories": self.categories, "prompts": self.prompts.to_dict(), "adaptations": self.adaptations}

    def check(self, unet, vae) -> None:
        """Raises ValueError for a bank out of range, normal pictures that do not fit theirs, a threshold without a
        bank, an adaptation without weights, and weights that do not fit the denoiser or the decoder; see
        `adapters.check_fits`."""
        for category in self.bank.categories:
            if not is_in_range(self.bank[category]) or self.bank.sources(category).min() < 0:
                raise ValueError(
                    f"`bank` holds prototypes of {category!r} that are not finite, or far too large; register the "
                    "part anew."
                )
        self.bank.check_shots()
        calibrated = {category for category, record in self.categories.items() if record["calibration"] is not None}
        for argument, missing in (
            ("adapters", set(self.adaptations) - set(self.adapters.names)),
            ("bank", calibrated - set(self.bank.categories)),
        ):
            if missing:
                raise ValueError(f"`{argument}` holds nothing of {', '.join(map(repr, sorted(missing)))}.")
        for name in self.adapters.names:
            for part, own in self.adapters.state(name).items():
                try:
                    check_fits({"denoiser": unet, "decoder": vae}[part], own)
                except (LookupError, ValueError) as error:
                    raise ValueError(f"`adapters` does not fit, in {name!r}: {error}.") from error

    def copy(self) -> Knowledge:
        """A copy that shares nothing, to change and to drop on an error."""
        return copy.deepcopy(self)

    # Parts

    def record(self, category: str | None) -> dict:
        """The record of a part; empty for a part that is not registered."""
        return self.categories.get(category, {})

    def store(self, category: str, **facts) -> None:
        """Sets entries of a part's record, and registers it if it is new."""
        self.categories[category] = {**self.record(category), **facts}

    def set_facts(self, category: str, **facts) -> None:
        """Sets entries of a registered part's record that most parts have not; None or 0 takes them out."""
        kept = {key: value for key, value in self.record(category).items() if key not in facts}
        self.categories[category] = kept | {key: value for key, value in facts.items() if value}

    def note_classes(self, names: Mapping[str, str]) -> None:
        """Adds the classes of scheduler and VAE to each threshold that names none; see `calibration.class_names`."""
        for category, record in self.categories.items():
            calibration = record["calibration"]
            if calibration is not None:
                classes = {**names, **calibration.get("classes", {})}
                self.store(category, calibration={**calibration, "classes": classes})

    def remove(self, category: str) -> None:
        """Forgets a part, and its adaptation if no other part rests on it.

        Raises:
            ValueError: if it is not registered.
        """
        if category not in self.categories:
            known = ", ".join(sorted(self.categories)) or "none yet"
            raise ValueError(f"`category` must be a registered part ({known}), got {category!r}.")
        if category in self.bank:
            self.bank.remove(category)
        del self.categories[category]
        self.drop_unused_adaptations()

    def pack(self, category: str) -> PackedPart:
        """Packs a registered part for a file or another pipeline.

        Raises:
            ValueError: if it is not registered.
        """
        if category not in self.categories:
            raise ValueError(f"`category` must be registered before it is saved, got {category!r}.")
        return PackedPart(self.categories[category], self.bank.packed(category) if category in self.bank else {})

    def unpack(self, category: str, part: PackedPart, prompts=None) -> None:
        """Registers a packed part, in place of an earlier one of that name.

        Args:
            prompts: see `PromptBook.add`; None keeps the part's own or the generic set.

        Raises:
            ValueError: for bad prompts, or a bank that does not fit the others.
        """
        self.prompts.add(category, prompts)
        if part.tensors:
            device = self.bank.device
            self.bank.add_packed(category, {name: tensor.to(device) for name, tensor in part.tensors.items()})
        self.store(category, **part.record)

    # Adaptations

    def categories_of(self, adaptation: str) -> list[str]:
        """Parts that rest on an adaptation, alphabetically."""
        records = self.categories.items()
        return sorted(category for category, record in records if record.get("adaptation") == adaptation)

    def add_adaptation(self, name: str, record: Mapping, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Keeps the LoRA weights of an adaptation, in place of those of that name.

        Args:
            record: settings it was made with.
            state: part ("denoiser", "decoder") to LoRA weights by name.
        """
        self.adapters.add(name, state)
        self.adaptations[name] = dict(record)

    def pack_adaptation(self, name: str, exemplars: bool = True) -> StoredAdaptation:
        """Packs an adaptation and the parts that rest on it, or a part that rests on none, with their normal
        pictures or without.

        Raises:
            ValueError: if there is neither an adaptation nor a part of that name.
        """
        tuned = name in self.adaptations
        parts = {category: self.pack(category) for category in (self.categories_of(name) if tuned else [name])}
        prompts = self.prompts.to_dict()["categories"]
        return StoredAdaptation(
            name=name,
            record=self.adaptations[name] if tuned else {"settings": {}},
            categories={category: part.record for category, part in parts.items()},
            prompts={category: prompts[category] for category in parts},
            banks={
                category: {key: value for key, value in part.tensors.items() if exemplars or key not in SHOT_NAMES}
                for category, part in parts.items()
            },
            state=self.adapters.state(name) if tuned else {},
        )

    def unpack_adaptation(self, stored: StoredAdaptation) -> None:
        """Takes in an adaptation and its parts, in place of those of the same names.

        Raises:
            ValueError: as `unpack`.
        """
        for category, record in stored.categories.items():
            adaptation = stored.name if stored.state else None
            part = PackedPart({**record, "adaptation": adaptation}, stored.banks[category])
            self.unpack(category, part, stored.prompts[category])
        if stored.state:
            self.add_adaptation(stored.name, stored.record, stored.state)
        self.drop_unused_adaptations()

    def drop_unused_adaptations(self) -> None:
        """Forgets adaptations on which no part rests."""
        used = {record.get("adaptation") for record in self.categories.values()}
        for name in [name for name in self.adaptations if name not in used]:
            self.adapters.remove(name)
            del self.adaptations[name]
