"""Extract ImageNet features, a vector per position: psi of Eq. (12) of AnomalySD (arXiv 2408.01960)."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from huggingface_hub import constants
from torch import Tensor, nn

from ..common.console import renaming
from .backbones import backbone_kind, create_backbone, hub_id, load_weights
from .missing import fetched
from .packages import PACKAGES, PIXEL_MEAN, PIXEL_STD, packaged_weights

NORMALIZATIONS = ("none", "layer", "position")
LONGEST = 4.0
"""Ratio of the sides up to which `keep_shape` keeps it."""
SIDES = 32
"""What the sides of a picture whose shape is kept are multiples of: the stride of a CNN's last level."""


class PrototypeExtractor(ModelMixin, ConfigMixin):
    """Turns a picture into a feature vector per position, psi of Eq. (12), by a frozen timm backbone.

    For EfficientNets the paper's second and third feature levels are timm's `out_indices` 1 and 2, at strides 4 and 8:
    psi has stride 4, and 40 + 72 = 112 channels for B6. Other CNNs and hierarchical transformers get the same two.

    Plain vision transformers (ViT, DeiT, DINOv2, DINOv3, EVA, BEiT; not in the paper) give the patch tokens of their
    last block after the final normalization, at unit length, so that E of Eq. (14) is 2 - 2 cos, in [0, 4]. Class and
    register tokens are left out, and pictures are resized to the nearest multiples of the patch.

    A new object has random weights and is in eval mode, so that `forward` leaves BatchNorm's statistics alone; use
    [`from_timm`] or `from_pretrained` for trained weights.

    Args:
        model_name: timm model name, with or without a pretrained tag.
        out_indices: timm feature levels, the one with the finest grid first; None: (1, 2), or the last of a plain
            transformer.
        image_size: Side in px to which pictures are resized first; None keeps theirs, or takes the model's own where
            it is made for one size only.
        keep_shape: Whether pictures are described in their own shape (not in the paper), see [`picture_size`]:
            squeezed to a square, a thin part loses half of what there is to see. `forward` then resizes nothing.
        windows: Odd sides, in positions of each level, over which levels are averaged before they are scaled to unit
            length; psi has all of its channels once for each (not in the paper). A single position tells fine
            structure, an average what surrounds it.
        source: Package that the weights come from, one of `packages.PACKAGES`, see [`from_package`].
        normalize: "none" (the paper); "layer": every level's channel vectors are scaled to unit length; "position":
            the same after levels were brought to one grid, where "layer" leaves them shorter between positions; None:
            "none", or "layer" for a plain transformer.
        model_kwargs: Further arguments of `timm.create_model`.
        mean: Per-channel mean of pictures in [0, 1]; None: the model's own.
        std: Per-channel standard deviation of pictures in [0, 1]; None: the model's own.
        color_weight: Where above 0, the colors of the 3 x 3 grid cells around each position, times this, are 27 more
            channels of psi (not in the paper): small backbones see less of a color than the eye does.
        context_size: Odd side, in grid cells, of the window over which `context_weight` averages the last level.
        context_weight: Where above 0, the average of the last level around each position, at unit length and times
            this, is further channels of psi (not in the paper): what is normal depends on what is around it.
        final_norm: Whether a plain transformer's last normalization is applied to each level; None: where
            `out_indices` is None too.

    Raises:
        ValueError: If timm does not know `model_name`, the model has no such `out_indices`, `normalize` is another
            word, `image_size` is not positive or missing with `keep_shape`, `context_size` or one of `windows` is
            even, or `final_norm` is asked of another network.
    """

    @register_to_config
    def __init__(
        self,
        model_name: str = "tf_efficientnet_b6",
        out_indices: tuple[int, ...] | None = None,
        image_size: int | None = None,
        normalize: str | None = None,
        model_kwargs: dict | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        color_weight: float = 0.0,
        context_size: int = 9,
        context_weight: float = 0.0,
        final_norm: bool | None = None,
        keep_shape: bool = False,
        windows: tuple[int, ...] = (1,),
        source: str | None = None,
    ):
        super().__init__()
        if normalize not in (None, *NORMALIZATIONS):
            raise ValueError(f"`normalize` must be one of {', '.join(NORMALIZATIONS)}, got {normalize!r}.")
        if context_size < 1 or context_size % 2 == 0:
            raise ValueError(f"`context_size` must be an odd number of at least 1, got {context_size}.")
        if image_size is not None and image_size < 1:
            raise ValueError(
                f"`image_size` must be at least 1 pixel, or None for the pictures' own, got {image_size}."
            )
        if keep_shape and image_size is None:
            raise ValueError("`image_size` must be given with `keep_shape`: the side of a square of as many pixels.")
        if not windows or not all(isinstance(side, int) and side >= 1 and side % 2 for side in windows):
            raise ValueError(f"`windows` must be odd whole numbers of at least 1 such as (1, 3), got {windows!r}.")
        self.kind = backbone_kind(model_name, dict(model_kwargs or {}))
        if final_norm and not self.kind.is_plain:
            raise ValueError(f"`final_norm` must be left out for {model_name}, which is no plain vision transformer.")
        if final_norm is None:
            final_norm = self.kind.is_plain and out_indices is None
        if out_indices is None:
            out_indices = (-1,) if self.kind.is_plain else (1, 2)
        depth = self.kind.depth
        if not out_indices or not all(-depth <= index < depth for index in out_indices):
            raise ValueError(
                f"`out_indices` must name levels of {model_name}, which are 0 to {depth - 1}, got {list(out_indices)}."
            )
        if image_size is None and not self.kind.any_size:
            image_size = self.kind.own_size
        # In the config, so that a reload does not depend on the pretrained configurations of the installed timm.
        self.register_to_config(
            out_indices=[index % depth for index in out_indices],
            image_size=image_size,
            normalize=normalize or ("layer" if self.kind.is_plain else "none"),
            final_norm=final_norm,
            windows=list(windows),
        )
        self.model = self._create(pretrained=False)
        mean = list(mean or self.model.pretrained_cfg["mean"])
        std = list(std or self.model.pretrained_cfg["std"])
        self.register_to_config(mean=mean, std=std)
        self.register_buffer("pixel_mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)
        self.eval()

    @property
    def channels(self) -> list[int]:
        """Counts the channels of each part of `levels`: levels, and where they are asked for context and colors."""
        levels, c = list(self.model.feature_info.channels()), self.config
        return levels + [levels[-1]] * (c.context_weight > 0) + [27] * (c.color_weight > 0)

    @property
    def parts(self) -> int:
        """Counts the equal parts of psi's channels, a part for each of `windows`."""
        return len(self.config.windows)

    def picture_size(self, height: int, width: int) -> tuple[int, int] | None:
        """Finds the height and width at which a picture of that size is described.

        With `keep_shape`, sides in the picture's own ratio (at most 4 : 1), multiples of 32, with about as many pixels
        as a square of `image_size`. None without: any size will do, because `forward` resizes.
        """
        if not self.config.keep_shape:
            return None
        ratio = min(max(height / width, 1 / LONGEST), LONGEST) ** 0.5
        sides = (self.config.image_size * ratio, self.config.image_size / ratio)
        return tuple(max(1, round(side / SIDES)) * SIDES for side in sides)

    def _create(self, **weights) -> nn.Module:
        c = self.config
        arguments = {**(c.model_kwargs or {}), **self.kind.size_arguments(c.image_size)}
        return create_backbone(c.model_name, tuple(c.out_indices), c.final_norm, arguments, **weights)

    @classmethod
    def from_timm(
        cls,
        model_name: str = "tf_efficientnet_b6",
        pretrained: bool = True,
        checkpoint_path: str | Path | None = None,
        out_indices: tuple[int, ...] | None = None,
        image_size: int | None = None,
        normalize: str | None = None,
        model_kwargs: dict | None = None,
        final_norm: bool | None = None,
    ) -> PrototypeExtractor:
        """Creates an extractor with trained weights.

        Args:
            pretrained: Let timm download the weights; ignored with `checkpoint_path`.
            checkpoint_path: Local weights of the whole classifier, .safetensors or .pth (read with weights_only=True).

        See the class for the others.

        Raises:
            ValueError: If `checkpoint_path` does not exist or does not hold all weights of `model_name`.
        """
        extractor = cls(model_name, out_indices, image_size, normalize, model_kwargs, final_norm=final_norm)
        if checkpoint_path is not None:
            extractor.model = load_weights(checkpoint_path, model_name, extractor._create)
        elif pretrained:
            extractor.model = extractor._create(pretrained=True)
        return extractor.eval()

    @classmethod
    def from_package(cls, package: str, out_indices: tuple[int, ...] | None = None, **config) -> PrototypeExtractor:
        """Creates an extractor with the ImageNet weights of an installed package.

        Args:
            package: one of `packages.PACKAGES`.
            config: further arguments of the class.

        Raises:
            ValueError: If the package is unknown or not installed.
        """
        state = packaged_weights(package)
        own = {"mean": PIXEL_MEAN, "std": PIXEL_STD, "source": package}
        extractor = cls(PACKAGES[package].model_name, out_indices, **{**config, **own})
        # Of the classifier, whose last stages are left out here.
        extractor.model.load_state_dict({name: state[name] for name in extractor.model.state_dict()})
        return extractor

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs) -> PrototypeExtractor:
        """As `ModelMixin.from_pretrained`; a folder without weights whose config names a `source` gets them from that
        package.

        Raises:
            ValueError: If that package is unknown or not installed.
        """
        folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        if not (folder / "config.json").is_file() or any(folder.glob("*.safetensors")) or any(folder.glob("*.bin")):
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        config = cls.load_config(folder)
        if config.get("source") is None:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        own = {name: value for name, value in config.items() if not name.startswith("_")}
        own.pop("model_name")
        extractor = cls.from_package(own.pop("source"), **own)
        dtype = kwargs.get("dtype") or kwargs.get("torch_dtype")
        return nn.Module.to(extractor, dtype) if isinstance(dtype, torch.dtype) else extractor

    def forward(self, x: Tensor) -> Tensor:
        """Computes psi(x) of Eq. (12): the levels, upsampled to the first level's grid and concatenated; once for each
        of `windows`.

        Args:
            x: [N, 3, H, W] in [-1, 1].

        Returns:
            [N, C, h, w] in the module's dtype, C the sum of `channels` times the number of windows.

        Raises:
            ValueError: If `x` has another shape.
        """
        raw, pictures = self._raw_levels(x)
        return torch.cat([t for side in self.config.windows for t in self._join(raw, pictures, side)], dim=1)

    def levels(self, x: Tensor) -> list[Tensor]:
        """Computes what psi is made of, without averages: each level on the first one's grid, then context and colors
        where they are asked for, [N, C_l, h, w] in the order of `channels`. Arguments and errors as of [`forward`]."""
        return self._join(*self._raw_levels(x), 1)

    def _raw_levels(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Gives the network's levels, [N, C_l, h_l, w_l] each, and the pictures as it saw them."""
        if x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(f"`x` must be [N, 3, H, W], got {list(x.shape)}.")
        c = self.config
        wanted = x.shape[-2:] if c.image_size is None or c.keep_shape else (c.image_size,) * 2
        size = tuple(self.kind.side(length) for length in wanted)
        if x.shape[-2:] != size:
            # In float32: CPUs cannot resize in half precision.
            x = F.interpolate(x.float(), size=size, mode="bilinear", antialias=True)
        x = x.to(self.pixel_mean.dtype)
        levels = self.model(((x + 1) / 2 - self.pixel_mean) / self.pixel_std)
        if getattr(self.model, "output_fmt", "NCHW") == "NHWC":  # hierarchical transformers
            levels = [level.permute(0, 3, 1, 2) for level in levels]
        return levels, x

    def _join(self, raw: list[Tensor], pictures: Tensor, side: int) -> list[Tensor]:
        """Averages, scales and brings to one grid what [`_raw_levels`] gave."""
        c, levels = self.config, []
        for level in raw:
            if side > 1:
                level = _averaged(level, side)
            if c.normalize == "layer":
                level = _unit(level)
            if levels and level.shape[-2:] != levels[0].shape[-2:]:
                level = F.interpolate(level, size=levels[0].shape[-2:], mode="bilinear", align_corners=False)
            levels.append(_unit(level) if c.normalize == "position" else level)
        if c.context_weight > 0:
            levels.append(c.context_weight * _unit(_averaged(levels[-1], c.context_size)))
        if c.color_weight > 0:
            cells = F.adaptive_avg_pool2d(pictures, levels[0].shape[-2:])  # [N, 3, h, w]
            around = F.unfold(F.pad(cells, (1, 1, 1, 1), mode="replicate"), 3)
            levels.append(c.color_weight * around.view(len(pictures), -1, *cells.shape[-2:]))  # [N, 27, h, w]
        return levels


def _unit(level: Tensor) -> Tensor:
    return F.normalize(level.float(), dim=1).to(level.dtype)


def _averaged(level: Tensor, side: int) -> Tensor:
    return F.avg_pool2d(level, side, stride=1, padding=side // 2, count_include_pad=False)


def wants_extractor(
    own: PrototypeExtractor | None,
    categories: list[str],
    timm_model: str | None,
    timm_checkpoint: str | os.PathLike | None,
) -> bool:
    """Tells whether another extractor than a checkpoint's own is asked for.

    Args:
        own: the checkpoint's; None: it has none, so that one is wanted.
        categories: parts whose prototypes were made with it.
        timm_model, timm_checkpoint: see `AnomalySDPipeline.from_pretrained`.

    Raises:
        ValueError: if prototypes were made with its own, or weights are given without saying of which model.
    """
    if own is None:
        return True
    name = own.config.model_name
    if timm_model is None and timm_checkpoint is not None:
        raise ValueError(
            f"`timm_checkpoint` must come with a `timm_model`, because this checkpoint has an extractor ({name}); "
            "give both to replace it, or neither."
        )
    if timm_model is None or (timm_model == name and timm_checkpoint is None):
        return False
    if categories:
        raise ValueError(
            f"`timm_model` {timm_model!r} would replace the extractor {name}, which made the prototypes of "
            f"{', '.join(map(repr, categories))}; leave `timm_model` out, or first remove these parts by "
            "`remove_category` and save the pipeline."
        )
    return True


def make_extractor(
    timm_model: str | None, timm_checkpoint: str | os.PathLike | None, resolution: int
) -> PrototypeExtractor:
    """Makes an extractor for pictures of `resolution`; arguments and errors are those of
    `AnomalySDPipeline.from_pretrained`, and `MissingWeights` where timm cannot download."""
    timm_model = timm_model or "tf_efficientnet_b6"
    with renaming({"model_name": "timm_model", "checkpoint_path": "timm_checkpoint"}):
        # A network that takes pictures of one size only is made for those that it will get.
        image_size = None if backbone_kind(timm_model, {}).any_size else resolution
        file = f"model.safetensors of {timm_model} ('{hub_id(timm_model)}' on the Hub)"
        with fetched("timm_checkpoint", file, constants.HF_HUB_CACHE):
            return PrototypeExtractor.from_timm(timm_model, checkpoint_path=timm_checkpoint, image_size=image_size)
