"""The part of the pipeline that comes from a folder or the Hub, and goes there."""

from __future__ import annotations

import os

import torch

from . import EMBEDDED
from .adaptation_folder import adaptation_base_of, is_adaptation_folder
from .components import own_components
from .prototypes import PrototypeExtractor
from .scoring import PerceptualDistance


class LoadingMixin:
    """Loading and publishing of an `AnomalySDPipeline`."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path=None,
        *,
        timm_model: str = "tf_efficientnet_b6",
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
            timm_model, timm_checkpoint: the extractor for a bare checkpoint, and its weights as a local file (None:
                timm downloads them).
            alexnet_checkpoint, lpips_checkpoint: torchvision's AlexNet and LPIPS' layer weights as local files (None:
                torchvision downloads the first, the second lies in the `lpips` package).
            **kwargs: those of `DiffusionPipeline.from_pretrained`, such as `dtype`, `variant`, `cache_dir`,
                `local_files_only`, and components to use in place of the stored ones.

        Raises:
            ValueError: for a UNet without 9 input channels or a weights file that does not fit.
        """
        if kwargs.get("torch_dtype") is None:
            # Said aloud, because transformers would otherwise keep a text encoder in the precision it is stored in.
            kwargs["dtype"] = kwargs.get("dtype") or torch.float32
        path = pretrained_model_name_or_path or EMBEDDED
        if is_adaptation_folder(path):
            base, resolution = adaptation_base_of(path)
            pipe = cls.from_pretrained(base, **{"resolution": resolution, **kwargs})
            pipe.load_adaptation(path)
            return pipe
        folder = path if os.path.isdir(path) else cls.download(path, **kwargs)
        pipe = super().from_pretrained(path, **kwargs, **own_components(folder, kwargs))
        made = {}
        if pipe.extractor is None:
            made["extractor"] = PrototypeExtractor.from_timm(timm_model, checkpoint_path=timm_checkpoint)
        if pipe.perceptual is None:
            made["perceptual"] = PerceptualDistance.from_files(alexnet_checkpoint, lpips_checkpoint)
        # Assignment would leave them unregistered, because they were registered as missing.
        pipe.register_modules(**{name: module.to(pipe.unet.dtype) for name, module in made.items()})
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
        from .publishing import push_to_hub

        return push_to_hub(self, repo_id, **kwargs)
