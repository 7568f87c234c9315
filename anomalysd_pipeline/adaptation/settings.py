"""Define the settings of a fine-tuning, with the paper's values as defaults, and check them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields

from ..common.checks import require_kind, require_number, require_whole, shown
from ..method.masks import MASK_DESIGNS
from ..method.prompts import PROMPT_DESIGNS

METHODS = ("lora", "full")
SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")

MOST_STEPS, MOST_PICTURES, MOST_RANK = 10**9, 10**5, 4096
"""Of a fine-tuning; of a step; and of LoRA weights. More are a mistake."""

AUGMENTATION = {"brightness": 1, "contrast": 1, "scale": 0.9, "degrees": 360}
"""The limits of `data.augment`, each with the highest that it may have."""

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class AdaptationSettings:
    """Holds all that a fine-tuning depends on besides the pictures; defaults are the paper's where it names a value.

    method: "full" trains all weights of a part, as the paper does; "lora" trains low-rank additions to them, a few MB.
    train_denoiser, train_decoder: whether to train each part (the rows of the paper's Table 3).
    steps, decoder_steps: optimizer steps of each part; None: as many as `epochs` and `decoder_epochs` take.
    epochs, decoder_epochs: passes over all pictures.
    train_batch_size: pictures per process and forward pass.
    gradient_accumulation_steps: forward passes per optimizer step.
    learning_rate, decoder_learning_rate: of Adam; the decoder's None: the same.
    lr_scheduler, lr_warmup_steps: as `diffusers.optimization.get_scheduler` knows them.
    max_grad_norm: gradients are scaled down to this length.
    use_8bit_adam: optimizer states in 8 bits; needs the package `bitsandbytes` and a GPU.
    mask_design: "foreground" (the paper's), "random", or "detection", see `FewShotDataset`.
    prompt_design: "hierarchical" (the paper's), "simple" or "none".
    noise_range: share of the noise schedule that is trained, (low, high); the paper trains all of it.
    augmentation: limits of `data.augment`.
    defect_share: share of the samples that are shown with a drawn defect, which the denoiser learns to repaint as the
        normal part; none of those in the first 8 % of the noise schedule; 0 in the paper.
    repainting_weight: weight of a loss on repainted pictures in the denoiser's, see `losses.repainting_loss`; 0 in the
        paper.
    decoder_latents: latents that the decoder learns to decode: "encoded" pictures (the paper's), or "repainted" by the
        denoiser in a single step.
    rank, target_modules: of the denoiser's LoRA; the modules by the ends of their names.
    decoder_rank, decoder_target_modules: of the decoder's.
    use_ema, ema_decay: whether the moving average of the weights is kept in place of the last ones, and its decay.
    gradient_checkpointing: takes less memory and more time.
    mixed_precision: "no", "bf16", "fp16", or "auto": bf16 where the processor computes in it.
    seed: of initial LoRA weights, order, augmentation, masks, prompts and noise.
    """

    method: str = "lora"
    train_denoiser: bool = True
    train_decoder: bool = True
    steps: int | None = None
    decoder_steps: int | None = None
    epochs: int = 4000
    decoder_epochs: int = 200
    train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-4
    decoder_learning_rate: float | None = None
    lr_scheduler: str = "constant"
    lr_warmup_steps: int = 0
    max_grad_norm: float = 1.0
    use_8bit_adam: bool = False
    mask_design: str = "foreground"
    prompt_design: str = "hierarchical"
    noise_range: tuple[float, float] = (0.0, 1.0)
    augmentation: dict = field(
        default_factory=lambda: {"brightness": 0.1, "contrast": 0.1, "scale": 0.1, "degrees": 15.0}
    )
    defect_share: float = 0.0
    repainting_weight: float = 0.0
    decoder_latents: str = "encoded"
    rank: int = 16
    target_modules: tuple[str, ...] = _ATTENTION
    decoder_rank: int = 16
    decoder_target_modules: tuple[str, ...] = (*_ATTENTION, "conv1", "conv2", "conv_shortcut")
    use_ema: bool = False
    ema_decay: float = 0.9999
    gradient_checkpointing: bool = False
    mixed_precision: str = "auto"
    seed: int = 0

    @classmethod
    def resolve(cls, layers: Sequence[Mapping]) -> AdaptationSettings:
        """Overrides the defaults by each layer in turn; `None` in a layer means "not given".

        Raises:
            TypeError: a name is no setting.
            ValueError: a value is out of its range.
        """
        known = {f.name for f in fields(cls)}
        values = {}
        for layer in layers:
            unknown = sorted(set(layer) - known)
            if unknown:
                raise TypeError(f"`{unknown[0]}` is not a setting of a fine-tuning.")
            values.update({name: value for name, value in layer.items() if value is not None})
        for name in ("noise_range", "target_modules", "decoder_target_modules"):
            if isinstance(values.get(name), list):
                values[name] = tuple(values[name])
        settings = cls(**values)
        settings.check()
        return settings

    def check(self) -> None:
        """Raises ValueError, naming the argument, for a value out of its range."""
        choices = {"method": METHODS, "mask_design": MASK_DESIGNS, "prompt_design": PROMPT_DESIGNS}
        choices["lr_scheduler"] = SCHEDULERS
        choices["decoder_latents"] = ("encoded", "repainted")
        choices["mixed_precision"] = ("auto", "no", "bf16", "fp16")
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"`{name}` must be one of {', '.join(map(repr, allowed))}, got {shown(getattr(self, name))}."
                )
        for name in ("steps", "decoder_steps"):
            if getattr(self, name) is not None:
                leave = "; to leave a part as it is, give `train_denoiser=False` or `train_decoder=False`"
                require_whole(name, getattr(self, name), 1, MOST_STEPS, leave)
        for name in ("epochs", "decoder_epochs"):
            require_whole(name, getattr(self, name), 1, MOST_STEPS)
        for name in ("train_batch_size", "gradient_accumulation_steps"):
            require_whole(name, getattr(self, name), 1, MOST_PICTURES)
        for name in ("rank", "decoder_rank"):
            require_whole(name, getattr(self, name), 1, MOST_RANK)
        for name in ("learning_rate", "decoder_learning_rate", "max_grad_norm"):
            if getattr(self, name) is not None or name != "decoder_learning_rate":
                require_number(name, getattr(self, name), 0, 1e38, above=True)
        require_whole("lr_warmup_steps", self.lr_warmup_steps, 0, MOST_STEPS)
        if self.lr_warmup_steps and self.lr_scheduler == "constant":
            raise ValueError(
                f"`lr_warmup_steps` is {self.lr_warmup_steps}, but the `lr_scheduler` 'constant' has no warmup; give "
                "'constant_with_warmup'."
            )
        limits = self.noise_range if isinstance(self.noise_range, tuple) else ()
        numbers = all(isinstance(limit, (int, float)) for limit in limits)
        if len(limits) != 2 or not numbers or not 0 <= limits[0] < limits[1] <= 1:
            raise ValueError(f"`noise_range` must be two rising numbers in [0, 1], got {shown(self.noise_range)}.")
        require_kind("augmentation", self.augmentation, Mapping, "a dictionary of limits, see `data.augment`")
        for name, limit in self.augmentation.items():
            if name not in AUGMENTATION:
                raise ValueError(f"`augmentation` may have {', '.join(AUGMENTATION)}, got {shown(name)}.")
            require_number(f"augmentation[{name!r}]", limit, 0, AUGMENTATION[name])
        for name in ("target_modules", "decoder_target_modules"):
            value = getattr(self, name)
            if not isinstance(value, tuple) or not all(isinstance(end, str) for end in value):
                raise ValueError(f"`{name}` must be a list of the ends of names, got {shown(value)}.")
        for name in ("train_denoiser", "train_decoder", "use_8bit_adam", "use_ema", "gradient_checkpointing"):
            require_kind(name, getattr(self, name), bool, "true or false")
        require_number("defect_share", self.defect_share, 0, 1)
        require_number("repainting_weight", self.repainting_weight, 0, 1e6)
        if not isinstance(self.ema_decay, (int, float)) or not 0 < self.ema_decay < 1:
            raise ValueError(f"`ema_decay` must be a number above 0 and below 1, got {shown(self.ema_decay)}.")
        require_whole("seed", self.seed, 0, 2**63 - 1)
        if not (self.train_denoiser or self.train_decoder):
            raise ValueError("`train_denoiser` and `train_decoder` are both off; leave at least one on.")

    def course(self) -> dict:
        """Returns the settings that a resumed run must share with the one that wrote the checkpoint.

        These are all but the lengths, which may be extended, and `gradient_checkpointing`, which changes time and
        memory.
        """
        lengths = ("steps", "decoder_steps", "epochs", "decoder_epochs", "gradient_checkpointing")
        return {name: value for name, value in self.to_dict().items() if name not in lengths}

    def to_dict(self) -> dict:
        """Returns all settings as JSON-serializable values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
