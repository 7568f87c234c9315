"""Learn parts from a few good pictures, without a gradient step: prompts, prototypes and thresholds."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from diffusers.utils import logging

from ..common.console import renaming
from ..common.threads import give_way
from ..data.depth import KEY
from ..data.images import load_pictures
from ..data.inputs import Inputs
from ..data.region import pack_region, unpack_region
from ..data.tiles import TILES_AT_ONCE
from ..knowledge import Knowledge
from ..method.calibration import Calibration, calibrate_threshold, check_rate, class_names, differing_settings
from ..method.prompts import PromptBook, check_category
from ..method.scoring import image_score
from ..method.settings import InspectionSettings
from ..models.collection import fill_bank
from .turns import computes, learns

logger = logging.get_logger(__name__)


class LearningMixin:
    """Registers parts, and sets their thresholds."""

    @property
    def categories(self) -> list[str]:
        """Names of the registered categories, alphabetically."""
        return sorted(self.config.categories)

    @property
    def prompt_book(self) -> PromptBook:
        """A copy of the prompts in use; `add_category` changes them."""
        return PromptBook.from_dict(self.config.prompts)

    @property
    def knowledge(self) -> Knowledge:
        """What was learned of the parts. Records and prompts are copies, to be changed and assigned; bank and adapters
        are the pipeline's own."""
        return Knowledge.of(self.config, self.bank, self.adapters)

    @knowledge.setter
    @computes
    def knowledge(self, known: Knowledge) -> None:
        self.register_modules(bank=known.bank, adapters=known.adapters)
        self.register_to_config(**known.config())
        if self._chosen_adaptation not in known.adaptations:
            self._chosen_adaptation = None

    def _store_category(self, category: str, **facts) -> None:
        known = self.knowledge
        known.store(category, **facts)
        self.knowledge = known

    @torch.no_grad()
    @learns
    @computes
    def add_category(
        self,
        category: str,
        normal_images,
        prompts=None,
        noise_strength: float | None = None,
        rotations: int | None = None,
        bit_depth: int | None = None,
        region=None,
        tile_size: int | None = None,
        tile_overlap: int | None = None,
        callback: Callable[[int, int], object] | None = None,
    ) -> None:
        """Registers a part from its normal pictures, without a gradient step: prompts and the prototype bank of Eq.
        (13).

        A category of that name is replaced, and its calibration and adaptation forgotten. Of copies of one picture the
        first counts, see `Inputs.alike`. On an error nothing is changed.

        Args:
            category: name of the part; it fills the generic prompts where the part has none of its own.
            normal_images: 1 or more pictures of good parts, anything `load_image` takes.
            prompts: T_c as `PromptBook.add` takes it; None keeps the part's own or the generic set.
            noise_strength: lambda for this part; None: the checkpoint's.
            rotations: number of rotated copies of each picture in the bank, evenly spaced; None: the checkpoint's.
            bit_depth: bits in use in 16-bit gray of this part, from 8 to 16; None: what the files tell, else what
                their largest value looks like, see `images.common_depth`. Further pictures of the part are read so.
            region: the region of interest, see `set_region`; None keeps the part's own.
            tile_size, tile_overlap: cut these pictures into tiles, as inspections of the part then are; see
                `InspectionSettings`. None: pictures are looked at whole.
            callback: called as `callback(done, total)` after each copy of a picture; an exception that it raises
                cancels.

        Raises:
            ValueError: for a bad name, no or unreadable pictures, bad prompts, a strength outside (0, 1], a depth
                or a tile out of its range or a bad region.
        """
        check_category(category)
        packed = self.config.categories.get(category, {}).get("region")
        if region is not None:
            with renaming({"mask": "region"}):
                packed = pack_region(region)
        known = self.knowledge
        known.prompts.add(category, prompts)
        if noise_strength is not None:
            self.settings(noise_strength=noise_strength)
        tiling = self.settings(tile_size=tile_size or 0, tile_overlap=tile_overlap)
        loaded = load_pictures(normal_images, "normal_images", bit_depth)
        if bit_depth is None:  # pictures that were read before keep theirs
            bit_depth = max((picture.info[KEY] for picture in loaded if KEY in picture.info), default=None)
        counts = None if packed is None else unpack_region(packed)
        inputs = self._inputs(loaded, counts, tiling)
        device = self._execution_device
        rotations = self.config.rotations if rotations is None else rotations
        # Copies say nothing twice, and could not be left out of each other's comparison.
        kept = sorted(set(inputs.alike()))
        digests, marks = inputs.digests(), inputs.fingerprints()
        if inputs.tiles is None:
            shaped, regions, sources = [inputs.shaped[index] for index in kept], [counts] * len(kept), None
        else:
            tiles = [inputs.tiles[index].inputs for index in kept]
            shaped = [tile for own in tiles for tile in own.shaped]
            sources = [number for number, own in enumerate(tiles) for _ in own.shaped]
            regions = [] if counts is None else [one[0] for own in tiles for one in own.regions]
        shaped = [picture.to(device) for picture in shaped]
        regions = None if counts is None else regions
        if len(kept) < len(inputs):
            logger.warning(
                f"{len(inputs) - len(kept)} of the {len(inputs)} normal pictures of {category!r} are copies of "
                "others, and count once with these."
            )
        between = None if callback is None else functools.partial(give_way, callback)
        fill_bank(self.bank.to(device), category, self.extractor, shaped, rotations, regions, sources, between)
        known.store(
            category,
            shots=len(kept),
            digests=[digests[index] for index in kept],
            fingerprints=[marks[index] for index in kept],
            rotations=rotations,
            noise_strength=noise_strength,
            bit_depth=bit_depth,
            adaptation=None,
            prompt_design="hierarchical",
            calibration=None,
        )
        known.set_facts(category, region=packed, tile_size=tiling.tile_size, tile_overlap=tiling.tile_overlap)
        known.drop_unused_adaptations()
        self.knowledge = known

    @torch.no_grad()
    @learns
    @computes
    def set_region(self, category: str, mask) -> None:
        """Sets a part's region of interest: outside of it nothing counts, in learning and in inspection.

        Its prototypes are taken anew from the kept normal pictures, without cells that lie outside, and its threshold
        is forgotten: call `calibrate` next. Maps are 0 outside; score, verdict and mask are of what lies inside. What
        lies outside stays visible to the networks, as surroundings. Fine-tuning looks at whole pictures.

        Args:
            category: a part registered by `add_category`.
            mask: a picture that is bright inside and dark outside, or a bool array `[H, W]`, for pictures of the same
                view whatever their size; or a polygon, 3 or more points (x, y) as shares of width and height in
                [0, 1]. None: the whole picture.

        Raises:
            ValueError: for a part that is not registered or whose normal pictures are not kept, or a bad mask.
        """
        shots = self.bank.shots(category)
        if category not in self.config.categories or shots is None or self.settings(category=category).tile_size:
            raise ValueError(
                f"`category` must be a part whose normal pictures are kept, and whole, got {category!r}; register it "
                "by `add_category`, which takes a `region` too."
            )
        packed = None if mask is None else pack_region(mask)
        known, device = self.knowledge, self._execution_device
        pictures = [shots.copy(number).to(device) for number in range(len(shots.sizes))]  # not turned
        regions = None if packed is None else [unpack_region(packed)] * len(pictures)
        fill_bank(self.bank.to(device), category, self.extractor, pictures, int(shots.rotations), regions)
        known.store(category, calibration=None)
        known.set_facts(category, region=packed)
        self.knowledge = known

    @learns
    @computes
    def remove_category(self, category: str) -> None:
        """Forgets a registered part: its bank, settings and calibration.

        Raises:
            ValueError: if it is not registered.
        """
        known = self.knowledge
        known.remove(category)
        self.knowledge = known

    @torch.no_grad()
    @learns
    def calibrate(
        self,
        category: str,
        normal_images,
        false_alarm_rate: float = 0.05,
        seed: int = 0,
        defective_images=None,
        callback: Callable[[int, int], object] | None = None,
        **settings,
    ) -> Calibration:
        """Sets a part's threshold from normal pictures, alone or with a few known defective ones; see
        `calibration.calibrate_threshold`.

        Called again with further pictures of good parts, the threshold follows; those of earlier calls with the same
        settings count on until the part is registered anew.

        Args:
            category: a part registered by `add_category`.
            normal_images: 1 or more pictures of good parts; those given to `add_category` will do, because each is
                compared with the others alone. From one of these alone the threshold is a guess.
            false_alarm_rate: share of good parts that may exceed the threshold.
            seed: of the noise, and of the copies where there is one picture.
            defective_images: pictures of defective parts, none of them normal; None: none are known. The threshold is
                then where as large a share of good parts is expected above it as of defective ones below it, with a
                warning where that is more than `false_alarm_rate`.
            callback: called as `callback(done, total)` after each picture; an exception that it raises cancels.
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
        chosen = self.settings(category=category, **settings)
        check_rate(false_alarm_rate)
        record = self.config.categories[category]
        if "digests" not in record:
            raise ValueError(
                f"`category` {category!r} was registered by an earlier version, which did not note its pictures; "
                "register it again by `add_category`."
            )
        region = self._region(category)
        loaded = load_pictures(normal_images, "normal_images", record.get("bit_depth"))
        inputs = self._inputs(loaded, region, chosen)
        defective = None
        if defective_images is not None:
            loaded = load_pictures(defective_images, "defective_images", record.get("bit_depth"))
            defective = self._inputs(loaded, region, chosen)

        def score(picture: Inputs, left_out: int | None) -> float:
            noise = torch.Generator().manual_seed(seed)
            parts = [picture] if picture.tiles is None else picture.tiles[0].inputs.chunks(TILES_AT_ONCE)
            scores = []
            for part in parts:
                found = self._score_maps(part, category, chosen, left_out, generator=noise)
                maps = found.fused(chosen.prototype_weight, chosen.feature_weight)
                scores += image_score(maps, chosen.top_share, found.regions).tolist()
            return max(scores)

        before = record["calibration"]
        if before is not None and self._differing(before, chosen):
            before = None
        try:
            calibration = calibrate_threshold(
                score,
                inputs,
                record["digests"],
                chosen,
                false_alarm_rate,
                seed,
                before,
                record.get("fingerprints", ()),
                defective,
                callback,
            )
        finally:
            self.maybe_free_model_hooks()
        for doubt in calibration.doubts(category):
            logger.warning(doubt)
        names = class_names(self.scheduler, self.vae).items()
        others = {part: name for part, name in names if name != self._usual_classes[part]}
        calibration = replace(calibration, classes=others)
        self._store_category(category, calibration=calibration.to_dict())
        return calibration

    def _threshold(self, category: str | None, settings: InspectionSettings) -> float | None:
        if category is not None and self.categories and category not in self.categories:
            logger.warning(
                f"`category` {category!r} is not registered, so there is no verdict and nothing to compare with; "
                f"registered are {', '.join(map(repr, self.categories))}."
            )
        record = self.config.categories.get(category, {}).get("calibration")
        if record is None:
            return None
        changed = self._differing(record, settings)
        if changed:
            logger.warning(
                f"{category!r} is calibrated for other settings ({', '.join(changed)} differ), so its threshold does "
                "not apply; call `calibrate` with these settings."
            )
            return None
        return record["threshold"]

    def _differing(self, record: Mapping, settings: InspectionSettings) -> list[str]:
        return differing_settings(record, settings, class_names(self.scheduler, self.vae), self._usual_classes)

    def _forget_thresholds(self) -> None:
        """Forgets the thresholds that were set with other weights."""
        known = self.knowledge
        for category in known.categories:
            known.store(category, calibration=None)
        self.knowledge = known
