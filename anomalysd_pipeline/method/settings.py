"""Settle the settings of an inspection: presets, overrides of checkpoint and category, and their rules."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields

from ..common.checks import require_kind, require_number, require_whole, shown
from ..data.tiles import check_tiles

STARTS = ("image", "exemplar")
GROUPINGS = ("none", "grouped", "joined")

_FAST = {
    "num_inference_steps": 20,
    "mask_scales": (1, 2, 4, 8),
    "mask_grouping": "joined",
    "feature_weight": 0.0,
    "top_share": 0.0,
    "start": "exemplar",
}

PRESETS = {
    "paper": {
        "num_inference_steps": 50,
        "mask_scales": (1, 2, 4, 8),
        "mask_grouping": "none",
        "feature_weight": 0.0,
        "top_share": 0.0,
        "start": "image",
    },
    "fast": _FAST,
    # See docs/features.md: the distance to the prototypes then outweighs the perceptual one.
    "sota": {**_FAST, "feature_weight": 1.0, "top_share": 0.01},
}
"""What a preset sets where the checkpoint's own config does not say otherwise."""

OVERRIDDEN = (*PRESETS, "exemplar")
"""What a checkpoint may change, see `AnomalySDPipeline`."""

MOST_STEPS, MOST_SCALES, MOST_CELLS = 1000, 32, 64
"""Of a noise schedule; of the masks; and of the cells along a side. More are a mistake that would take days."""


def check_overrides(preset_overrides: Mapping) -> None:
    """Raises ValueError, naming the argument, for other names than those of `OVERRIDDEN`, or what is no dictionary."""
    for name, given in preset_overrides.items():
        if name not in OVERRIDDEN:
            raise ValueError(f"`preset_overrides` may be of {', '.join(OVERRIDDEN)}, got {shown(name)}.")
        require_kind(f"preset_overrides[{name!r}]", given, Mapping, "a dictionary of settings")


def checkpoint_settings(config: Mapping) -> dict:
    """Reads a checkpoint's settings for all presets, as a layer of `InspectionSettings.resolve`.

    Its `feature_weight` of 0, the default, stands for none of its own, so that a preset can bring one.
    """
    own = {key: config[key] for key in ("noise_strength", "prototype_weight", "feature_weight")}
    return {**own, "feature_weight": own["feature_weight"] or None}


@dataclass(frozen=True)
class InspectionSettings:
    """Holds everything besides the picture and the noise that a score depends on.

    noise_strength: lambda, in (0, 1]: the share of the noise schedule that is added and removed again.
    num_inference_steps: length of the whole schedule; about `noise_strength` of it is run.
    mask_scales: the k of the multi-scale masks.
    mask_grouping: "none" (a pass per cell), "grouped" (cells that do not touch share a pass) or "joined" (grouped, and
        what the passes of a scale repaint is decoded and compared as one picture: Eqs. (16) and (17) once a scale).
    prototype_weight: alpha of Eq. (21), in [0, 1].
    feature_weight: weight of the prototypes' own finding in the score, see `PrototypeBank.relative`; 0 in the paper.
    guidance_scale: classifier-free guidance, 1 for none.
    top_share: share of the map, the highest values, of which the image score is the mean; 0 for the maximum, as in the
        paper.
    start: from where the inside of a mask is repainted: "image", the picture itself, Eq. (11), or "exemplar", the part
        as it should look, see `exemplars.build_exemplar`; a part without kept normal pictures has none.
    tile_size: side in pixels of the tiles in which a large picture is inspected, each at the pipeline's resolution; 0:
        pictures are inspected whole. The score is that of the worst tile.
    tile_overlap: pixels by which neighboring tiles overlap at least, at most half of `tile_size`.
    """

    noise_strength: float
    num_inference_steps: int
    mask_scales: tuple[int, ...]
    mask_grouping: str
    prototype_weight: float
    feature_weight: float
    guidance_scale: float
    top_share: float = 0.0
    start: str = "image"
    tile_size: int = 0
    tile_overlap: int = 0

    @classmethod
    def resolve(cls, preset: str, layers: Sequence[Mapping]) -> InspectionSettings:
        """Overrides the preset's values by each layer in turn; `None` in a layer means "not given".

        Raises:
            ValueError: for an unknown preset or a value out of its range.
        """
        if not isinstance(preset, str) or preset not in PRESETS:
            raise ValueError(f"`preset` must be one of {', '.join(map(repr, PRESETS))}, got {shown(preset)}.")
        values = dict(PRESETS[preset])
        for layer in layers:
            values.update({f.name: layer[f.name] for f in fields(cls) if layer.get(f.name) is not None})
        return cls.of(values)

    @classmethod
    def of(cls, values: Mapping) -> InspectionSettings:
        """Inverts `to_dict`.

        Raises:
            TypeError: a name is no setting, or one is missing.
            ValueError: a value is out of its range.
        """
        scales = values.get("mask_scales")
        if isinstance(scales, (str, bytes)) or not isinstance(scales, Sequence) or len(scales) > MOST_SCALES:
            raise ValueError(
                f"`mask_scales` must be a list of at most {MOST_SCALES} whole numbers such as (1, 2, 4, 8), got "
                f"{shown(scales)}."
            )
        settings = cls(**{**values, "mask_scales": tuple(scales)})
        settings.check()
        return settings

    def check(self) -> None:
        """Raises ValueError, naming the argument, for a value out of its range."""
        require_number("noise_strength", self.noise_strength, 0, 1, above=True)
        require_whole("num_inference_steps", self.num_inference_steps, 1, MOST_STEPS)
        if int(self.num_inference_steps * self.noise_strength) < 1:
            raise ValueError(
                f"`num_inference_steps` ({self.num_inference_steps}) times `noise_strength` ({self.noise_strength}) "
                f"leaves no step; give at least {math.ceil(1 / self.noise_strength)} steps or a higher strength."
            )
        scales = self.mask_scales
        fits = all(isinstance(k, int) and not isinstance(k, bool) and 1 <= k <= MOST_CELLS for k in scales)
        if not fits or not scales or len(set(scales)) != len(scales):
            raise ValueError(
                f"`mask_scales` must hold whole numbers of at least 1 such as (1, 2, 4, 8), each once and at most "
                f"{MOST_CELLS}, got {shown(scales)}."
            )
        if self.mask_grouping not in GROUPINGS:
            known = ", ".join(map(repr, GROUPINGS))
            raise ValueError(f"`mask_grouping` must be one of {known}, got {self.mask_grouping!r}.")
        require_number("prototype_weight", self.prototype_weight, 0, 1)
        require_number("feature_weight", self.feature_weight, 0, 1e6)
        require_number("guidance_scale", self.guidance_scale, 1, 1000)
        require_number("top_share", self.top_share, 0, 1)
        check_tiles(self.tile_size, self.tile_overlap)
        if self.start not in STARTS:
            raise ValueError(f"`start` must be one of {', '.join(map(repr, STARTS))}, got {self.start!r}.")

    def with_exemplars(self, preset_overrides: Mapping) -> InspectionSettings:
        """Adds what a checkpoint changes where exemplars are the start, "exemplar" among its `preset_overrides`.

        Raises:
            TypeError, ValueError: as of `of`.
        """
        if self.start != "exemplar":
            return self
        return self.of({**self.to_dict(), **preset_overrides.get("exemplar", {})})

    def to_dict(self) -> dict:
        """Gives JSON-serializable values, for a category's calibration record."""
        return {**asdict(self), "mask_scales": list(self.mask_scales)}
