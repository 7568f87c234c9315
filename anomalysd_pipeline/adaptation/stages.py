"""Set up the two parts that are fine-tuned: their copies, the weights that train, and their losses."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import itertools
import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Collection
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.training_utils import cast_training_params
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..common.threads import alone
from ..method.inpainting import encode
from ..method.prompts import encode_prompts
from .base import Base
from .losses import Decoder, clean_latents, decoder_loss, noisy_latents, repainting_loss
from .samples import FewShotDataset
from .settings import AdaptationSettings
from .training_state import TrainingState

_TRAINED = "trained.safetensors"
_PROMPTS_AT_ONCE = 16


class Stage(ABC):
    """Trains one part.

    Attributes:
        name: "denoiser" or "decoder".
        module: a copy of the part; only the weights that train require gradients.
        dataset: its samples.
        learning_rate: of its optimizer.
        facts: marks of the pictures and of the base, on which its result depends; JSON-serializable.
    """

    name: str
    module: nn.Module

    def __init__(self, base: Base, dataset: FewShotDataset, settings: AdaptationSettings):
        self.dataset, self.settings = dataset, settings
        self.vae, self.scheduler, self.perceptual = base.vae, base.scheduler, base.perceptual
        self.learning_rate = settings.learning_rate
        mark = json.dumps(base.fingerprint(), sort_keys=True).encode()
        self.facts: dict = {"pictures": dataset.fingerprint(), "base": hashlib.sha256(mark).hexdigest()[:16]}
        self._average = None

    def steps(self, processes: int) -> int:
        """Counts the optimizer steps of this stage: as given, or as its epochs take."""
        given, epochs = self._length()
        per_step = self.settings.train_batch_size * self.settings.gradient_accumulation_steps * processes
        return given or math.ceil(epochs * len(self.dataset) / per_step)

    @abstractmethod
    def _length(self) -> tuple[int | None, int]:
        """Returns the steps as given, or None, and the epochs."""

    @abstractmethod
    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Computes the mean loss over a batch of samples, float32 `[]`."""

    def trained_names(self) -> list[str]:
        """Names the parameters that train; called before anything wraps the module."""
        return [name for name, parameter in self.module.named_parameters() if parameter.requires_grad]

    @contextlib.contextmanager
    def evaluation(self):
        """Puts the module into eval mode inside and, where an average is kept, gives it the averaged weights."""
        trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        if self._average is not None:
            self._average.store(trained)
            self._average.copy_to(trained)
        self.module.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.module.train()
            if self._average is not None:
                self._average.restore(trained)

    def keep_average(self, average) -> None:
        """Sets the moving average of the weights that `evaluation` uses."""
        self._average = average


class DenoiserStage(Stage):
    """Trains the UNet on Eq. (8), and with a `repainting_weight` on its repainted pictures too."""

    name = "denoiser"

    def __init__(self, base: Base, dataset: FewShotDataset, settings: AdaptationSettings, device):
        super().__init__(base, dataset, settings)
        self.module = trainable_copy(base.unet, settings, settings.rank, list(settings.target_modules))
        if settings.gradient_checkpointing:
            self.module.enable_gradient_checkpointing()
        self.predict = Prediction(base, self.module, dataset, device)
        self.decoder = Decoder(frozen_copy(base.vae))

    def _length(self):
        return self.settings.steps, self.settings.epochs

    def loss(self, batch):
        predicted, target, noisy = self.predict(self.module, batch)
        loss = nn.functional.mse_loss(predicted, target)  # Eq. (8)
        if self.settings.repainting_weight > 0:
            latents = clean_latents(self.scheduler, noisy, predicted, batch["timestep"])
            repainted = self.decoder(latents.to(self.vae.dtype)).float()
            weight = self.settings.repainting_weight
            loss = loss + weight * repainting_loss(self.perceptual, repainted, batch["image"], batch["mask"])
        return loss


class DecoderStage(Stage):
    """Trains the VAE's decoder on Eq. (9); the encoder stays as it is, so latents keep their meaning."""

    name = "decoder"

    def __init__(self, base: Base, dataset: FewShotDataset, settings: AdaptationSettings, device, unet: nn.Module):
        super().__init__(base, dataset, settings)
        ends = "|".join(re.escape(end) for end in settings.decoder_target_modules)
        # A pattern and not a list: the encoder's modules have the same endings.
        vae = trainable_copy(base.vae, settings, settings.decoder_rank, rf"decoder\.(.*\.)?({ends})", part="decoder")
        if settings.gradient_checkpointing:
            vae.enable_gradient_checkpointing()
        self.dtype = next(vae.decoder.parameters()).dtype
        self.module = Decoder(vae)
        self.unet = unet
        self.predict = Prediction(base, unet, dataset, device)
        self.learning_rate = settings.decoder_learning_rate or settings.learning_rate

    def _length(self):
        return self.settings.decoder_steps, self.settings.decoder_epochs

    def loss(self, batch):
        images = batch["image"]
        if self.settings.decoder_latents == "encoded":
            with torch.no_grad():
                latents = encode(self.vae, images).to(self.dtype)
            return decoder_loss(self.module, self.perceptual, latents, images)
        with torch.no_grad():
            predicted, _, noisy = self.predict(self.unet, batch)
            latents = clean_latents(self.scheduler, noisy, predicted, batch["timestep"]).to(self.dtype)
        return repainting_loss(self.perceptual, self.module(latents).float(), images, batch["mask"])


class Prediction:
    """Computes the denoiser's answers to batches of samples, and their targets.

    Args:
        base: the networks that do not train.
        unet: the denoiser, for its dtype.
        dataset: for the texts that samples refer to, and whether they show defects.
        device: of the prompts' embeddings.
    """

    def __init__(self, base: Base, unet: nn.Module, dataset: FewShotDataset, device):
        self.vae, self.scheduler, self.dtype = base.vae, base.scheduler, unet.dtype
        self.repairs = dataset.defect_share > 0
        prompts = dataset.prompts
        parts = [
            encode_prompts(prompts[start : start + _PROMPTS_AT_ONCE], base.tokenizer, base.text_encoder)
            for start in range(0, len(prompts), _PROMPTS_AT_ONCE)
        ]
        self.prompt_embeds = torch.cat(parts).to(device, self.dtype)  # [P, L, d]

    def __call__(self, unet: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the answer, the target, and z_t; float32 `[N, 4, h, w]` each."""
        timesteps = batch["timestep"]
        shown = batch["shown"] if self.repairs else None
        sample, target = noisy_latents(
            self.vae, self.scheduler, batch["image"], batch["mask"], batch["noise"], timesteps, shown
        )
        embeds = self.prompt_embeds[batch["prompt"]]  # [N, L, d]
        predicted = unet(sample.to(self.dtype), timesteps, encoder_hidden_states=embeds, return_dict=False)[0]
        return predicted.float(), target.float(), sample[:, : target.shape[1]]


def frozen_copy(module: nn.Module, copied: Collection[nn.Parameter] = ()) -> nn.Module:
    """Copies a module without gradients; its parameters share their numbers with the original's.

    Args:
        module: an adapter in it is left out of the copy.
        copied: parameters that get numbers of their own.
    """
    memo: dict[int, object] = {}
    apart = {id(parameter) for parameter in copied}
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        if id(tensor) not in apart:
            # New parameters over the same numbers: freezing these does not freeze the pipeline's own.
            memo[id(tensor)] = nn.Parameter(tensor.detach(), False) if isinstance(tensor, nn.Parameter) else tensor
    with alone([module]):  # an inspection in another thread may be switching adapters
        twin = copy.deepcopy(module, memo)
    if getattr(twin, "_hf_peft_config_loaded", False):
        twin.unload_lora()
    return twin.requires_grad_(False)


def trainable_copy(module: nn.Module, settings: AdaptationSettings, rank: int, targets, part: str | None = None):
    """Copies a module for training, on the same device; weights that do not train are shared.

    With "lora" all original weights are shared, in their own precision, and LoRA weights are added in float32; with
    "full" the weights are copied in float32, those of `part` (a submodule's name) alone where it is given.

    Raises:
        ValueError: no module's name ends as `targets` say, or the module's class cannot take adapters.
    """
    if settings.method == "full":
        twin = frozen_copy(module, list((module.get_submodule(part) if part else module).parameters()))
        twin.float()  # all of it: the forward pass of `part` meets others, such as the convolution before a decoder
        (twin.get_submodule(part) if part else twin).requires_grad_(True)
        return twin
    from peft import LoraConfig

    twin = frozen_copy(module)
    if not hasattr(twin, "add_adapter"):
        raise ValueError(
            f"`method` 'lora' needs a {part or 'denoiser'} that takes adapters, but {type(twin).__name__} does not; "
            f"give method='full', or train_{part or 'denoiser'}=False."
        )
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        try:
            twin.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
        except ValueError as error:
            name = f"{part}_target_modules" if part else "target_modules"
            raise ValueError(f"`{name}` must name modules of {type(twin).__name__}: {error}") from error
    cast_training_params(twin)  # to float32
    return twin


def trained_state(stage: Stage, accelerator: Accelerator, names: list[str]) -> dict[str, Tensor]:
    """Returns the weights that train, float32 on the CPU, by their names in the unwrapped module.

    Every process gets them; where the module is sharded, the main process alone.
    """
    state = accelerator.get_state_dict(stage.module) or {}
    # Without peft's name of an adapter in training: a pipeline loads it under another.
    return {
        name.replace(".default.", "."): state[name].detach().float().cpu().clone() for name in names if name in state
    }


def checkpoint_only_trained(stage: Stage, accelerator: Accelerator, names: list[str], state: TrainingState) -> list:
    """Makes the accelerator's checkpoints hold `state`, and the weights that train instead of whole models.

    Sharded models (FSDP, DeepSpeed) are written by their own means, before these hooks are called.

    Returns:
        The handles of the hooks.
    """

    def save(models, weights, output_dir):
        if accelerator.is_main_process:
            state.save(output_dir)
        if weights:
            weights.clear()
            if accelerator.is_main_process:
                own = dict(accelerator.unwrap_model(stage.module).named_parameters())
                save_file({name: own[name].detach().contiguous() for name in names}, Path(output_dir, _TRAINED))

    def load(models, input_dir):
        state.load(input_dir)
        if models:
            models.clear()
            own = dict(accelerator.unwrap_model(stage.module).named_parameters())
            with torch.no_grad():
                for name, value in load_file(Path(input_dir, _TRAINED)).items():
                    own[name].copy_(value)

    return [accelerator.register_save_state_pre_hook(save), accelerator.register_load_state_pre_hook(load)]
