"""Load and save a pipeline, and what it has learned."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from .. import EMBEDDED
from ..adaptation.folder import (
    StoredAdaptation,
    adaptation_base_of,
    is_adaptation_folder,
    read_adaptation,
    write_adaptation,
    write_part,
)
from ..common.files import disk_errors, recover, write_whole, written_into
from ..method.calibration import class_names
from ..models.adapters import merge_lora, take_out_adapters
from ..models.extractor import make_extractor, wants_extractor
from ..models.missing import made_networks
from ..models.perceptual import PerceptualDistance
from .turns import computes, learns


class StoringMixin:
    """Goes to the Hub and to disk, and comes from there."""

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
            ValueError: for a UNet without 9 input channels, a weights file that does not fit, or is neither here nor
                to be downloaded, or a `timm_model` other than that of the prototypes which the checkpoint holds.
        """
        if kwargs.get("torch_dtype") is None:
            # Said aloud, because transformers would otherwise keep a text encoder in the precision it is stored in.
            kwargs["dtype"] = kwargs.get("dtype") or torch.float32
        kwargs.setdefault("use_safetensors", True)  # no pickles, unless a caller insists
        path = pretrained_model_name_or_path or EMBEDDED
        if path == EMBEDDED and not os.path.isdir(path):
            raise ValueError(
                "`pretrained_model_name_or_path` must be a folder or a Hub id where a published pipeline.py stands "
                "for the package: the embedded checkpoint comes with the installed package anomalysd-pipeline."
            )
        recover(path)
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
        from ..hub.components import class_of, own_components, readable

        with readable(path, folder):
            pipe = super().from_pretrained(path, **kwargs, **own_components(folder, kwargs))
            # Thresholds in the folder are of its own components, not of those a caller gives.
            given = {part: class_of(folder, part) for part in pipe._usual_classes if part in kwargs}
        pipe._usual_classes |= {part: name for part, name in given.items() if name}
        wanted = kwargs.get("extractor") is None and wants_extractor(
            pipe.extractor, pipe.bank.categories, timm_model, timm_checkpoint
        )
        made = made_networks(
            path,
            (lambda: make_extractor(timm_model, timm_checkpoint, pipe.config.resolution)) if wanted else None,
            None
            if pipe.perceptual is not None
            else lambda: PerceptualDistance.from_files(alexnet_checkpoint, lpips_checkpoint),
        )
        # Assignment would leave those unregistered that were registered as missing.
        made = {name: module.to(pipe.unet.dtype, memory_format=torch.channels_last) for name, module in made.items()}
        pipe.register_modules(**made)
        return pipe

    @learns
    @computes
    def load_lora_weights(self, pretrained_model_name_or_path_or_dict, lora_scale: float = 1.0, **kwargs) -> None:
        """Merges LoRA weights into denoiser and text encoder for good, such as an LCM-LoRA, which needs few steps.

        Thresholds are forgotten: call `calibrate` next. Networks that other pipelines share stay as they are there.

        Args:
            pretrained_model_name_or_path_or_dict: Hub id, folder, file or weights by name.
            lora_scale: factor of what the weights add.
            **kwargs: those of diffusers' `load_lora_weights`, such as `weight_name`.

        Raises:
            ValueError: if adaptations rest on the networks as they are, or these are no LoRA weights.
        """
        self._check_base("`load_lora_weights`")
        self._check_hooks("load_lora_weights")
        source = pretrained_model_name_or_path_or_dict
        self.register_modules(**merge_lora(self.unet, self.text_encoder, source, lora_scale, **kwargs))
        self._forget_thresholds()

    @computes
    def save_pretrained(self, save_directory, *args, **kwargs) -> None:
        """As `DiffusionPipeline.save_pretrained`; adaptations, banks, prompts and thresholds included.

        By its `pipeline.py` diffusers loads the folder where this package is not installed.

        The files appear when all of them are on disk; other files of the folder stay.

        Raises:
            ValueError: if the folder cannot be written; it is then as before.
        """
        # Their weights are in the store, so the modules can be written as they were loaded.
        take_out_adapters(self.unet)
        take_out_adapters(self.vae)
        folder = Path(os.path.abspath(save_directory))
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", folder.name)
        if class_names(self.scheduler, self.vae) != self._usual_classes:  # which the folder will not tell any more
            known = self.knowledge
            known.note_classes(self._usual_classes)
            self.knowledge = known
        from ..hub.bundle import bundle_source

        with disk_errors("save_directory", folder), written_into(folder) as partial:
            (partial / "pipeline.py").write_text(bundle_source(), encoding="utf-8", newline="\n")
            super().save_pretrained(partial, *args, **kwargs)

    def save_adaptation(self, save_directory, adaptation: str | None = None, exemplars: bool = True) -> None:
        """Writes what was learned of parts, without the base: LoRA weights, banks, prompts, thresholds and the
        normal pictures that were registered, a few MB.

        Args:
            save_directory: folder, made if missing and replaced as a whole if it holds an adaptation; or a file that
                ends in ".safetensors", as the app and `anomalysd detect` write it.
            adaptation: its name, or that of a part without a fine-tuning; None: the only one there is.
            exemplars: False leaves the normal pictures out. Whoever loads it then repaints from the image itself
                (`start`), and has to calibrate anew.

        Raises:
            ValueError: if there is none of that name, or several and none is named, or it cannot be written.
        """
        known = self.knowledge
        bare = [category for category in self.categories if known.record(category).get("adaptation") is None]
        names = self.adaptations or bare
        if adaptation is None:
            if len(names) != 1:
                raise ValueError(f"`adaptation` must name one of {', '.join(names) or 'none: call `adapt` first'}.")
            adaptation = names[0]
        if adaptation not in bare:
            self._check_adaptation(adaptation)
        stored, path = known.pack_adaptation(adaptation, exemplars), Path(save_directory)
        if path.suffix != ".safetensors":
            return write_adaptation(stored, self.base, path)
        with disk_errors("save_directory", path):
            write_whole(path, lambda unfinished: write_part(stored, self.base, unfinished))

    def read_adaptation(self, pretrained_adaptation_name_or_path, **hub) -> StoredAdaptation:
        """Reads an adaptation and checks that it fits, without taking it in; arguments and errors are those of
        `load_adaptation`."""
        return read_adaptation(pretrained_adaptation_name_or_path, self.base, self.settings, **hub)

    @learns
    @computes
    def load_adaptation(self, pretrained_adaptation_name_or_path, overwrite: bool = False, **hub) -> list[str]:
        """Takes in an adaptation that `save_adaptation` wrote, from a folder, a file or the Hub; all or nothing.

        Args:
            pretrained_adaptation_name_or_path: folder, also that of a fine-tuning which holds it, file or Hub id.
            overwrite: whether categories of the same names may be replaced.
            **hub: `revision`, `token`, `cache_dir`, `local_files_only`, as of `huggingface_hub.snapshot_download`.

        Returns:
            The categories it brought.

        Raises:
            ValueError: if it is missing, damaged or made for another base, or its categories are registered already,
                or others rest on an adaptation of its name.
        """
        found = self.read_adaptation(pretrained_adaptation_name_or_path, **hub)
        registered = [category for category in found.categories if category in self.config.categories]
        if registered and not overwrite:
            raise ValueError(
                f"`pretrained_adaptation_name_or_path` brings {', '.join(map(repr, registered))}, which this pipeline "
                "knows already; give `overwrite=True`, or remove them with `remove_category` first."
            )
        others = sorted(set(self.knowledge.categories_of(found.name)) - set(found.categories))
        if others and found.state:
            raise ValueError(
                f"`pretrained_adaptation_name_or_path` brings an adaptation {found.name!r}, and on one of that name "
                f"{', '.join(map(repr, others))} rest here; remove it with `remove_adaptation` first."
            )
        with self._undone_on_error():
            known = self.knowledge
            known.unpack_adaptation(found)
            self.knowledge = known
        return list(found.categories)

    def push_to_hub(self, repo_id: str, **kwargs) -> str:
        """Publishes the pipeline, or one of its adaptations, on the Hub, with a model card.

        Args:
            repo_id: "user/name"; made if it does not exist.
            **kwargs: those of `publishing.push_to_hub`: `adaptation` (a name; None: the whole pipeline), `private`,
                `create_pr`, `token`, `figures` (measured ones, for the card), `license`, `commit_message`, `revision`,
                `exemplars` (False leaves the registered normal pictures out).

        Returns:
            The address of the commit or of the pull request.

        Raises:
            ValueError: for a bad name, or if the Hub cannot be reached or refuses.
        """
        from ..hub.publishing import push_to_hub

        return push_to_hub(self, repo_id, **kwargs)
