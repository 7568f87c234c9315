"""Run anomalib's PatchCore, PaDiM and WinCLIP with our features and seeding, without its trainer."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Sequence
from importlib.metadata import version

import torch
from PIL import Image
from torch import Tensor, nn

from ..data.tensors import to_tensor
from ..method.prompts import readable_name
from ..models.extractor import PrototypeExtractor
from .backbones import PEERS_HINT, Backbone, import_anomalib, load_backbone, seeded
from .detector import Prediction, TensorDetector, require_normals

_SCAFFOLD = "resnet10t"
_LEVEL = "features"


class _Features(nn.Module):
    """Gives anomalib the levels of a `Backbone` as a dictionary, as its own extractor does."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.backbone = backbone

    def train(self, mode: bool = True) -> _Features:
        """Changes nothing: anomalib collects features in training mode, where BatchNorm would learn."""
        return self

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {f"{_LEVEL}{index}": level for index, level in enumerate(self.backbone(images))}


class _FeaturePeer(TensorDetector):
    """Gives PatchCore and PaDiM our backbone, and shows them the normal pictures and their rotations."""

    one_model_per_category = False

    def __init__(self, backbone, levels: Sequence[int], resolution: int, rotations: int | None, device):
        super().__init__()
        if resolution < 32 or rotations not in (None, 1, 2, 4):
            raise ValueError(
                f"`resolution` must be at least 32 and `rotations` 1, 2 or 4, got {resolution} and {rotations}."
            )
        self.backbone = load_backbone(backbone, levels, device)
        self.device, self.resolution, self.rotations = self.backbone.device, resolution, rotations

    def describe(self) -> dict:
        return {
            "detector": self.name,
            "implementation": f"anomalib {version('anomalib')}",
            **self.backbone.facts,
            "resolution": self.resolution,
        }

    def _install(self, model: nn.Module) -> nn.Module:
        """Replaces the features of an anomalib model by ours."""
        model.feature_extractor = _Features(self.backbone)
        model.layers = [f"{_LEVEL}{index}" for index in range(len(self.backbone.channels))]
        return model.to(self.device)

    def _show(self, model: nn.Module, normals: Sequence[Image.Image], rotations: int) -> None:
        """Passes the normal pictures through `model` in training mode, so that it collects them."""
        model.train()
        for image in normals:
            picture = to_tensor(image, self.resolution)[None].to(self.device)  # [1, 3, R, R]
            for step in range(rotations):
                model(picture.rot90(4 // rotations * step, dims=(2, 3)))
        model.eval()

    def _ask(self, model: nn.Module, image: Image.Image) -> Prediction:
        found = model(to_tensor(image, self.resolution)[None].to(self.device))
        return Prediction(found.pred_score.item(), found.anomaly_map.float().squeeze().cpu().numpy())


class PatchCore(_FeaturePeer):
    """Measures the distance to a coreset of patch features: PatchCore (Roth et al. 2022).

    Args:
        backbone: see `load_backbone`.
        levels: feature levels of a backbone that has none of its own; strides 8 and 16 as in the paper.
        coreset_sampling_ratio: share of the patches that is kept; 1: all. anomalib's default is 0.1.
        num_neighbors: neighbors in the weight of the image score; anomalib's default.
        resolution: side in pixels.
        rotations: copies of each normal picture; PatchCore itself uses none but the picture.
        device: where it computes; a given extractor stays where it is.

    Raises:
        ValueError: for an option out of its range, or a package or weights that are missing.
    """

    name = "patchcore"

    def __init__(
        self,
        backbone: str | PrototypeExtractor = "embedded",
        levels: Sequence[int] = (2, 3),
        coreset_sampling_ratio: float = 0.1,
        num_neighbors: int = 9,
        resolution: int = 256,
        rotations: int = 1,
        device: str | torch.device = "cpu",
    ):
        if not 0 < coreset_sampling_ratio <= 1 or num_neighbors < 1:
            raise ValueError(
                "`coreset_sampling_ratio` must be in (0, 1] and `num_neighbors` at least 1, got "
                f"{coreset_sampling_ratio} and {num_neighbors}."
            )
        anomalib_model = import_anomalib("models.image.patchcore.torch_model").PatchcoreModel
        super().__init__(backbone, levels, resolution, rotations, device)
        self.coreset_sampling_ratio, self.num_neighbors = coreset_sampling_ratio, num_neighbors
        self.model = self._install(
            anomalib_model(layers=[0], backbone=_SCAFFOLD, pre_trained=False, num_neighbors=num_neighbors)
        ).eval()

    def describe(self) -> dict:
        return super().describe() | {
            "coreset_sampling_ratio": self.coreset_sampling_ratio,
            "num_neighbors": self.num_neighbors,
            "rotations": self.rotations,
            "map": "anomalib's: nearest-neighbor upsampling, Gaussian of sigma 4",
            "score": "anomalib's: largest patch distance, weighted by its neighborhood",
        }

    @torch.no_grad()
    def fit(self, category: str, normals: Sequence[Image.Image], seed: int) -> None:
        require_normals(self.name, normals)
        self.model.embedding_store.clear()
        self._show(self.model, normals, self.rotations)
        if self.coreset_sampling_ratio == 1:
            bank = torch.vstack(self.model.embedding_store)
            self.model.embedding_store.clear()
        else:
            # anomalib draws a progress bar, and warns of an argument that is not given.
            with seeded(seed, self.device), contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.model.subsample_embedding(self.coreset_sampling_ratio)
            bank = self.model.memory_bank
        self.remember(category, {"memory_bank": bank})

    @torch.no_grad()
    def predict(self, category: str, image: Image.Image) -> Prediction:
        self.model.memory_bank = self.recall(category)["memory_bank"].to(self.device)
        return self._ask(self.model, image)


class PaDiM(_FeaturePeer):
    """Measures the Mahalanobis distance to a Gaussian at every position: PaDiM (Defard et al. 2021).

    Args:
        backbone: see `load_backbone`.
        levels: feature levels of a backbone that has none of its own; strides 4, 8 and 16 as in the paper.
        n_features: channels kept, drawn by the seed; the paper's number for its smaller network, at most all.
        resolution: side in pixels.
        rotations: copies of each normal picture; None: four of a single picture, from which alone no covariance can be
            estimated, else none but the pictures. anomalib adds 0.01 to the diagonal.
        device: where it computes; a given extractor stays where it is.

    Raises:
        ValueError: for an option out of its range, or a package or weights that are missing.
    """

    name = "padim"

    def __init__(
        self,
        backbone: str | PrototypeExtractor = "embedded",
        levels: Sequence[int] = (1, 2, 3),
        n_features: int = 100,
        resolution: int = 256,
        rotations: int | None = None,
        device: str | torch.device = "cpu",
    ):
        if n_features < 1:
            raise ValueError(f"`n_features` must be at least 1, got {n_features}.")
        anomalib_model = import_anomalib("models.image.padim.torch_model").PadimModel
        super().__init__(backbone, levels, resolution, rotations, device)
        self.n_features = min(n_features, sum(self.backbone.channels))
        self.model = self._install(
            anomalib_model(backbone=_SCAFFOLD, layers=[0], pre_trained=False, n_features=1)
        ).eval()

    def describe(self) -> dict:
        return super().describe() | {
            "n_features": self.n_features,
            "rotations": self.rotations or "4 with a single picture, else 1",
            "covariance": "anomalib's: 0.01 added to the diagonal",
            "map": "anomalib's: bilinear upsampling, Gaussian of sigma 4",
            "score": "maximum of the map",
        }

    @torch.no_grad()
    def fit(self, category: str, normals: Sequence[Image.Image], seed: int) -> None:
        require_normals(self.name, normals)
        rotations = self.rotations or (4 if len(normals) == 1 else 1)
        if len(normals) * rotations < 2:
            raise ValueError(
                f"`normals` must hold at least 2 pictures for `{self.name}` with `rotations` 1, got {len(normals)}."
            )
        total = sum(self.backbone.channels)
        chosen = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[: self.n_features]
        self.model.idx = chosen.to(self.device)
        self.model.memory_bank = []
        self._show(self.model, normals, rotations)
        self.model.fit()
        gaussian = self.model.gaussian
        # Off the GPU: a category takes a hundred megabytes and more.
        learned = {"idx": self.model.idx, "mean": gaussian.mean, "inv_covariance": gaussian.inv_covariance}
        self.remember(category, {name: tensor.cpu() for name, tensor in learned.items()})

    @torch.no_grad()
    def predict(self, category: str, image: Image.Image) -> Prediction:
        learned = {name: tensor.to(self.device) for name, tensor in self.recall(category).items()}
        self.model.idx = learned["idx"]
        self.model.gaussian.mean, self.model.gaussian.inv_covariance = learned["mean"], learned["inv_covariance"]
        return self._ask(self.model, image)


class WinCLIP(TensorDetector):
    """Compares windows of the picture with prompts and with normal pictures: WinCLIP (Jeong et al. 2023).

    It works with its own weights only: CLIP ViT-B/16+ at 240 px, trained on LAION-400M.

    Args:
        checkpoint: those weights as a local file, for `open_clip`; None: downloaded by `open_clip`.
        device: where it computes.

    Raises:
        ValueError: if a package or the weights are missing.
    """

    name = "winclip"
    zero_shot = True
    one_model_per_category = False

    def __init__(self, checkpoint: str | os.PathLike | None = None, device: str | torch.device = "cpu"):
        super().__init__()
        anomalib_module = import_anomalib("models.image.winclip.torch_model")
        preprocessor = import_anomalib("models.image.winclip").WinClip.configure_pre_processor()
        if checkpoint is not None and not os.path.isfile(checkpoint):
            raise ValueError(f"`checkpoint` must be an existing file of CLIP weights, got '{checkpoint}'.")
        self.device, self.transform = torch.device(device), preprocessor.transform
        self.weights = "laion400m_e31, downloaded by open_clip" if checkpoint is None else os.path.basename(checkpoint)
        # anomalib reads the name of the weights from its module only.
        default = anomalib_module.PRETRAINED
        try:
            anomalib_module.PRETRAINED = default if checkpoint is None else os.fspath(checkpoint)
            self.model = anomalib_module.WinClipModel().eval().to(self.device)
        except ImportError as error:
            raise ValueError(
                f"`peer` 'winclip' needs open_clip, which is not installed; run `{PEERS_HINT}`."
            ) from error
        # A failed download raises whatever huggingface_hub and the network beneath it do.
        except Exception as error:
            raise ValueError(
                f"`peer` 'winclip' could not load its CLIP weights ({error}); let open_clip download them "
                "once, or give a local file as `checkpoint`."
            ) from error
        finally:
            anomalib_module.PRETRAINED = default

    def describe(self) -> dict:
        return {
            "detector": self.name,
            "implementation": f"anomalib {version('anomalib')}",
            "backbone": self.model.backbone,
            "weights": self.weights,
            "resolution": 240,
            "window_scales": list(self.model.scales),
            "temperature": self.model.temperature,
            "score": "anomalib's: text score, averaged with the map's maximum where there are normal pictures",
        }

    def _picture(self, image: Image.Image) -> Tensor:
        pixels = (to_tensor(image, (image.height, image.width)) + 1) / 2  # [3, H, W] in [0, 1]
        return self.transform(pixels)[None].to(self.device)  # [1, 3, 240, 240]

    @torch.no_grad()
    def fit(self, category: str, normals: Sequence[Image.Image], seed: int) -> None:
        model = self.model
        model.reference_images = None  # anomalib keeps those of the category before
        model.setup(
            readable_name(category), torch.cat([self._picture(image) for image in normals]) if normals else None
        )
        learned = {"text": model.text_embeddings}
        if normals:
            learned |= {"patches": model.patch_embeddings}
            learned |= {f"windows_{index}": windows for index, windows in enumerate(model.visual_embeddings)}
        self.remember(category, learned)

    @torch.no_grad()
    def predict(self, category: str, image: Image.Image) -> Prediction:
        if category not in self:
            self.fit(category, [], 0)
        model, learned = self.model, {name: t.to(self.device) for name, t in self.recall(category).items()}
        model._text_embeddings = learned["text"]
        model.k_shot = len(learned.get("patches", ()))
        if model.k_shot:
            model._patch_embeddings = learned["patches"]
            model._visual_embeddings = [learned[f"windows_{index}"] for index in range(len(model.scales))]
        found = model(self._picture(image))
        return Prediction(found.pred_score.item(), found.anomaly_map[0].float().cpu().numpy())
