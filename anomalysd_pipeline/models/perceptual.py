"""Measure AlexNet LPIPS as a map and as a number, Eqs. (10), (16) and (17) of AnomalySD (arXiv 2408.01960)."""

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from huggingface_hub import constants
from safetensors.torch import load_file
from torch import Tensor, nn

from .missing import fetched

# (kernel, stride, padding) of the five convolutions, and where their `features.<i>` sit in torchvision's AlexNet.
_CONVOLUTIONS = ((11, 4, 2), (5, 1, 2), (3, 1, 1), (3, 1, 1), (3, 1, 1))
_TORCHVISION_INDICES = (0, 3, 6, 8, 10)
_POOLED_INPUTS = (1, 2)
_SMALLEST_SIDE = 31
_EPS = 1e-10


class PerceptualDistance(ModelMixin, ConfigMixin):
    """Measures AlexNet LPIPS (Zhang et al. 2018), both as a map per picture and as a number for training.

    Parameters hold torchvision's AlexNet convolutions (`convs`) and LPIPS' non-negative layer weights (`lins`, each
    [1, C_l, 1, 1]), which are the squares of the w^(l) in Eq. (16). A new object is randomly initialized and frozen;
    use [`from_files`], [`from_lpips`] or `from_pretrained` for trained weights.

    Convolutions run in the module's dtype. Normalization, differences and maps are float32, because eps = 1e-10
    vanishes in half precision and the distance of two nearly equal pictures would drown in rounding.

    Args:
        channels: Output channels of the five convolutions.
    """

    @register_to_config
    def __init__(self, channels: tuple[int, ...] = (64, 192, 384, 256, 256)):
        super().__init__()
        if len(channels) != len(_CONVOLUTIONS):
            raise ValueError(f"`channels` must have {len(_CONVOLUTIONS)} entries, got {tuple(channels)}.")
        inputs = (3, *channels[:-1])
        self.convs = nn.ModuleList(
            nn.Conv2d(c_in, c_out, kernel, stride, padding)
            for c_in, c_out, (kernel, stride, padding) in zip(inputs, channels, _CONVOLUTIONS, strict=True)
        )
        self.lins = nn.ParameterList(nn.Parameter(torch.full((1, c, 1, 1), 1.0 / c)) for c in channels)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def from_lpips(cls, lpips_module: nn.Module) -> "PerceptualDistance":
        """Copies the weights of an `lpips.LPIPS(net="alex")` object.

        Raises:
            ValueError: If `lpips_module` is not an AlexNet LPIPS with layer weights.
        """
        state = lpips_module.state_dict()
        slices = zip(range(1, 6), _TORCHVISION_INDICES, strict=True)
        convs = {
            f"features.{i}.{p}": state.get(f"net.slice{s}.{i}.{p}") for s, i in slices for p in ("weight", "bias")
        }
        return cls._from_states(convs, state, "`lpips_module`", "`lpips_module`")

    @classmethod
    def from_files(
        cls, alexnet_path: str | Path | None = None, lin_path: str | Path | None = None
    ) -> "PerceptualDistance":
        """Loads torchvision's AlexNet and LPIPS' layer weights.

        Args:
            alexnet_path: State dict of torchvision's `alexnet` (`alexnet-owt-7be5be79.pth`), .pth or .safetensors;
                None: downloaded once through `torch.hub`.
            lin_path: LPIPS' `alex.pth` (v0.1), .pth or .safetensors; default: the one in the installed `lpips`
                package.

        Raises:
            ValueError: If a file does not exist, does not hold the expected weights, or `lin_path` is left out and
                `lpips` is not installed.
            MissingWeights: If AlexNet's cannot be downloaded.
        """
        if lin_path is None:
            spec = importlib.util.find_spec("lpips")
            if spec is None:
                raise ValueError("`lin_path` is needed because the package `lpips`, which ships it, is not installed.")
            lin_path = Path(spec.origin).parent / "weights" / "v0.1" / "alex.pth"
        if alexnet_path is None:
            from torchvision.models import AlexNet_Weights

            weights = AlexNet_Weights.IMAGENET1K_V1
            name, folder = Path(weights.url).name, Path(torch.hub.get_dir(), "checkpoints")
            with fetched("alexnet_checkpoint", name, folder):
                if constants.HF_HUB_OFFLINE and not (folder / name).is_file():
                    raise OSError("HF_HUB_OFFLINE is set")
                alexnet = weights.get_state_dict(check_hash=True, weights_only=True)
        else:
            alexnet = _load_state(alexnet_path, "alexnet_path")
        lins = _load_state(lin_path, "lin_path")
        return cls._from_states(alexnet, lins, "`alexnet_path`", "`lin_path`")

    @classmethod
    def _from_states(cls, alexnet: dict, lins: dict, alexnet_source: str, lin_source: str) -> "PerceptualDistance":
        state = {}
        for layer, index in enumerate(_TORCHVISION_INDICES):
            for part in ("weight", "bias"):
                tensor = alexnet.get(f"features.{index}.{part}")
                if tensor is None:
                    raise ValueError(
                        f"{alexnet_source} must hold AlexNet's weights; `features.{index}.{part}` is missing."
                    )
                state[f"convs.{layer}.{part}"] = tensor
            lin = lins.get(f"lin{layer}.model.1.weight")
            if lin is None:
                raise ValueError(
                    f"{lin_source} must hold LPIPS' layer weights; `lin{layer}.model.1.weight` is missing."
                )
            if (lin < 0).any():
                raise ValueError(
                    f"{lin_source} must hold non-negative layer weights, but layer {layer} has negative ones."
                )
            state[f"lins.{layer}"] = lin
        model = cls(channels=tuple(state[f"convs.{layer}.bias"].numel() for layer in range(len(_CONVOLUTIONS))))
        try:
            model.load_state_dict(state | {"shift": model.shift, "scale": model.scale})
        except RuntimeError as error:
            raise ValueError(f"{alexnet_source} and {lin_source} do not fit AlexNet's shapes: {error}") from error
        return model

    @apply_forward_hook  # offloading moves a module when it is used, and this is a use besides `forward`
    def features(self, x: Tensor) -> list[Tensor]:
        """Computes activations after each ReLU, each position's channel vector scaled to unit length.

        Args:
            x: [N, 3, H, W] in [-1, 1], sides of at least 31 px.

        Returns:
            Five float32 tensors [N, C_l, h_l, w_l]; a position where every channel is zero stays zero.

        Raises:
            ValueError: If `x` has another shape.
        """
        if x.ndim != 4 or x.shape[1] != 3 or min(x.shape[2:]) < _SMALLEST_SIDE:
            raise ValueError(
                f"`x` must be [N, 3, H, W] with sides of at least {_SMALLEST_SIDE} px, got {list(x.shape)}."
            )
        x = (x.to(self.shift.dtype) - self.shift) / self.scale
        levels = []
        for layer, conv in enumerate(self.convs):
            if layer in _POOLED_INPUTS:
                x = F.max_pool2d(x, kernel_size=3, stride=2)
            x = F.relu(conv(x))
            level = x.float()
            # vector_norm has gradient 0 at the zero vector, where sqrt(sum of squares) has NaN.
            levels.append(level / (torch.linalg.vector_norm(level, dim=1, keepdim=True) + _EPS))
        return levels

    def _layer_maps(self, features_x: list[Tensor], features_y: list[Tensor]) -> list[Tensor]:
        return [
            ((fx - fy).square() * lin.float()).sum(dim=1)  # [N, h_l, w_l], Eq. (16)
            for fx, fy, lin in zip(features_x, features_y, self.lins, strict=True)
        ]

    @apply_forward_hook
    def distance_map(self, features_x: list[Tensor], features_y: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Measures the perceptual distance at every pixel, Eqs. (16) and (17); `lpips`' `spatial=True`.

        Args:
            features_x: [`features`] of one picture (batch 1, compared with every y) or of N pictures.
            features_y: [`features`] of N pictures.
            size: (H, W) of the map.

        Returns:
            float32 [N, H, W], >= 0, summed over the five layers.
        """
        maps = (
            F.interpolate(d.unsqueeze(1), size=size, mode="bilinear", align_corners=False)
            for d in self._layer_maps(features_x, features_y)
        )
        return sum(maps).squeeze(1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Measures LPIPS of pairs of pictures, Eq. (10); differentiable in both.

        Args:
            x: [N, 3, H, W] in [-1, 1].
            y: As `x`.

        Returns:
            float32 [N], >= 0.
        """
        return sum(d.mean(dim=(1, 2)) for d in self._layer_maps(self.features(x), self.features(y)))


def _load_state(path: str | Path, argument: str) -> dict[str, Tensor]:
    if not Path(path).is_file():
        raise ValueError(f"`{argument}` must be an existing weights file, got {str(path)!r}.")
    if Path(path).suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)
