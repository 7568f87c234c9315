"""The part of the pipeline that comes from a folder or the Hub, and goes there."""

from __future__ import annotations

import os

import torch

from . import EMBEDDED
from .adaptation.folder import adaptation_base_of, is_adaptation_folder
from .hub.components import own_components
from .models.backbones import backbone_kind
from .models.extractor import PrototypeExtractor
from .models.perceptual import PerceptualDistance

_TIMM_MODEL = "tf_efficientnet_b6"


class LoadingMixin:
    """Loading and publishing of an `AnomalySDPipeline`."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path=None,
        *,
        timm_model: str | None = None,
        timm_checkpoint: str | None = None,
        alexnet_checkpoint: str | None = None,
        lpips_checkpoint: str | None = None,
        **kwargs,
    ):
        """Loads a saved pipeline, or any Stable Diffusion inpainting checkpoint, from the Hub or from disk; or an
        adaptation's folder, along with its base.

        A bare inpainting checkpoint lacks the networks that look for defects; they are made: an ImageNet model by timm
        for the prototypes, and AlexNet LPIPS for the distance.

        Args:
            pretrained_model_name_or_path: Hub id or folder; None: the embedded checkpoint (`EMBEDDED`).
            timm_model: the extractor, also in place of the checkpoint's own: a timm name such as
                "vit_small_patch14_dinov2.lvd142m". None: the checkpoint's own, or "tf_efficientnet_b6" where it has
                none.
            timm_checkpoint: its weights as a local file; None: timm downloads them, unless the checkpoint's own
                extractor is a `timm_model` already.
            alexnet_checkpoint, lpips_checkpoint: torchvision's AlexNet and LPIPS' layer weights as local files (None:
                torchvision downloads the first, the second lies in the `lpips` package).
            **kwargs: those of `DiffusionPipeline.from_pretrained`, such as `dtype`, `variant`, `cache_dir`,
                `local_files_only`, and components to use in place of the stored ones.

        Raises:
            ValueError: for a UNet without 9 input channels, a weights file that does not fit, or a `timm_model` other
                than that of the prototypes which the checkpoint holds.
        """
        if kwargs.get("torch_dtype") is None:
            # Said aloud, because transformers would otherwise keep a text encoder in the precision it is stored in.
            kwargs["dtype"] = kwargs.get("dtype") or torch.float32
        path = pretrained_model_name_or_path or EMBEDDED
        if is_adaptation_folder(path):
            base, resolution = adaptation_base_of(path)
            pipe = cls.from_pretrained(
                base,
                timm_model=timm_model,
                timm_checkpoint=timm_checkpoint,
                alexnet_checkpoint=alexnet_checkpoint,
                lpips_checkpoint=lpips_checkpoint,
                **{"resolution": resolution, **kwargs},
            )
            pipe.load_adaptation(path)
            return pipe
        folder = path if os.path.isdir(path) else cls.download(path, **kwargs)
        pipe = super().from_pretrained(path, **kwargs, **own_components(folder, kwargs))
        made = {}
        if kwargs.get("extractor") is None and _wants_extractor(pipe, timm_model, timm_checkpoint):
            made["extractor"] = _make_extractor(timm_model or _TIMM_MODEL, timm_checkpoint, pipe.config.resolution)
        if pipe.perceptual is None:
            made["perceptual"] = PerceptualDistance.from_files(alexnet_checkpoint, lpips_checkpoint)
        # Assignment would leave those unregistered that were registered as missing.
        made = {name: module.to(pipe.unet.dtype, memory_format=torch.channels_last) for name, module in made.items()}
        pipe.register_modules(**made)
        return pipe

    def push_to_hub(self, repo_id: str, **kwargs) -> str:
        """Publishes the pipeline, or one of its adaptations, on the Hub, with a model card.

        Args:
            repo_id: "user/name"; made if it does not exist.
            **kwargs: those of `publishing.push_to_hub`: `adaptation` (a name; None: the whole pipeline), `private`,
                `create_pr`, `token`, `figures` (measured ones, for the card), `license`, `commit_message`, `revision`.

        Returns:
            The address of the commit or of the pull request.

        Raises:
            ValueError: for a bad name, or if the Hub cannot be reached or refuses.
        """
        from .hub.publishing import push_to_hub

        return push_to_hub(self, repo_id, **kwargs)


def _wants_extractor(pipe, timm_model: str | None, timm_checkpoint: str | os.PathLike | None) -> bool:
    """Whether another extractor than the pipeline's own is asked for.

    Raises:
        ValueError: if prototypes were made with its own, or weights are given without saying of which model.
    """
    if pipe.extractor is None:
        return True
    own = pipe.extractor.config.model_name
    if timm_model is None and timm_checkpoint is not None:
        raise ValueError(
            f"`timm_checkpoint` must come with a `timm_model`, because this checkpoint has an extractor ({own}); give "
            "both to replace it, or neither."
        )
    if timm_model is None or (timm_model == own and timm_checkpoint is None):
        return False
    if pipe.bank.categories:
        raise ValueError(
            f"`timm_model` {timm_model!r} would replace the extractor {own}, which made the prototypes of "
            f"{', '.join(map(repr, pipe.bank.categories))}; leave `timm_model` out, or first remove these parts by "
            "`remove_category` and save the pipeline."
        )
    return True


def _make_extractor(timm_model: str, timm_checkpoint: str | os.PathLike | None, resolution: int) -> PrototypeExtractor:
    names = {"`model_name`": "`timm_model`", "`checkpoint_path`": "`timm_checkpoint`"}
    try:
        # A network that takes pictures of one size only is made for those that it will get.
        image_size = None if backbone_kind(timm_model, {}).any_size else resolution
        return PrototypeExtractor.from_timm(timm_model, checkpoint_path=timm_checkpoint, image_size=image_size)
    except ValueError as error:
        message = str(error)
        for theirs, ours in names.items():
            message = message.replace(theirs, ours)
        raise ValueError(message) from error
