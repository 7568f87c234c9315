"""Extract ImageNet features, a vector per position: psi of Eq. (12) of AnomalySD (arXiv 2408.01960)."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ..common.console import renaming
from .backbones import backbone_kind, create_backbone, load_weights

NORMALIZATIONS = ("none", "layer")


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
        normalize: "none" (the paper), or "layer": every level's channel vectors are scaled to unit length; None:
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
            word, `image_size` is not positive, `context_size` is even, or `final_norm` is asked of another network.
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
        """Counts the channels of each part of psi: levels, and where they are asked for context and colors."""
        levels, c = list(self.model.feature_info.channels()), self.config
        return levels + [levels[-1]] * (c.context_weight > 0) + [self.color_channels] * (c.color_weight > 0)

    @property
    def color_channels(self) -> int:
        """Counts those of psi's last channels that are colors."""
        return 27 * (self.config.color_weight > 0)

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

    def forward(self, x: Tensor) -> Tensor:
        """Computes psi(x) of Eq. (12): the levels, upsampled to the first level's grid and concatenated.

        Args:
            x: [N, 3, H, W] in [-1, 1].

        Returns:
            [N, C, h, w] in the module's dtype, C the sum of the levels' channels.

        Raises:
            ValueError: If `x` has another shape.
        """
        if x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(f"`x` must be [N, 3, H, W], got {list(x.shape)}.")
        wanted = x.shape[-2:] if self.config.image_size is None else (self.config.image_size,) * 2
        size = tuple(self.kind.side(length) for length in wanted)
        if x.shape[-2:] != size:
            # In float32: CPUs cannot resize in half precision.
            x = F.interpolate(x.float(), size=size, mode="bilinear", antialias=True)
        x = x.to(self.pixel_mean.dtype)
        levels = []
        for level in self.model(((x + 1) / 2 - self.pixel_mean) / self.pixel_std):
            if getattr(self.model, "output_fmt", "NCHW") == "NHWC":
                level = level.permute(0, 3, 1, 2)  # hierarchical transformers
            if self.config.normalize == "layer":
                level = F.normalize(level.float(), dim=1).to(level.dtype)
            if levels and level.shape[-2:] != levels[0].shape[-2:]:
                level = F.interpolate(level, size=levels[0].shape[-2:], mode="bilinear", align_corners=False)
            levels.append(level)
        if self.config.context_weight > 0:
            side = self.config.context_size
            around = F.avg_pool2d(levels[-1], side, stride=1, padding=side // 2, count_include_pad=False)
            unit = F.normalize(around.float(), dim=1).to(around.dtype)
            levels.append(self.config.context_weight * unit)
        if self.config.color_weight > 0:
            cells = F.adaptive_avg_pool2d(x, levels[0].shape[-2:])  # [N, 3, h, w]
            around = F.unfold(F.pad(cells, (1, 1, 1, 1), mode="replicate"), 3).view(len(x), -1, *cells.shape[-2:])
            levels.append(self.config.color_weight * around)  # [N, 27, h, w]
        return torch.cat(levels, dim=1)


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
    `AnomalySDPipeline.from_pretrained`."""
    timm_model = timm_model or "tf_efficientnet_b6"
    with renaming({"model_name": "timm_model", "checkpoint_path": "timm_checkpoint"}):
        # A network that takes pictures of one size only is made for those that it will get.
        image_size = None if backbone_kind(timm_model, {}).any_size else resolution
        return PrototypeExtractor.from_timm(timm_model, checkpoint_path=timm_checkpoint, image_size=image_size)
