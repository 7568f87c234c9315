"""Define the interface of detectors under evaluation: this package's pipeline, peers and floors."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True)
class Prediction:
    """Holds a detector's answer about one picture.

    Args:
        score: anomaly score of the picture; higher is more anomalous, on one scale for all pictures of a category.
        anomaly_map: float32 `[h, w]`, of any size, higher is more anomalous, on one scale for all pictures of a
            category.
        threshold: a picture with a higher score is called defective; None: the detector has no threshold.
        inpainted: the picture as the detector repaints it; None: it repaints none.
    """

    score: float
    anomaly_map: np.ndarray
    threshold: float | None = None
    inpainted: Image.Image | None = None


class Detector(ABC):
    """Learns categories from normal pictures and inspects others: a method under evaluation.

    The results of `fit` and `predict` depend on the pictures and the seed only, never on earlier calls, so that N
    processes together find the same as a single process.
    """

    name: str
    """Short name, as in the tables."""
    zero_shot: bool = False
    """Whether `predict` works for a category that was never fitted."""
    one_model_per_category: bool = True
    """Whether weights are trained for each category by itself; a bank of features per category does not count."""
    shareable: bool = False
    """Whether `save` and `load` work, so that a category is fitted by a single process."""

    @abstractmethod
    def describe(self) -> dict:
        """Describes features and weights, sizes and settings as JSON facts for the report."""

    @abstractmethod
    def fit(self, category: str, normals: Sequence[Image.Image], seed: int) -> None:
        """Learns a category from normal pictures, in place of all that it knew of it.

        Args:
            category: name of the part.
            normals: RGB pictures; may be empty where `zero_shot`.
            seed: of all random numbers.

        Raises:
            ValueError: for too few pictures.
        """

    @abstractmethod
    def predict(self, category: str, image: Image.Image) -> Prediction:
        """Inspects one RGB picture.

        Raises:
            ValueError: if `category` was never fitted and the detector is not `zero_shot`.
        """

    def save(self, category: str, path: str | Path) -> None:
        """Writes the state that `fit` learned of `category` to a safetensors file.

        Raises:
            ValueError: if the detector is not `shareable` or knows nothing of `category`.
        """
        raise ValueError(f"`{self.name}` has no state to save; fit it in every process instead.")

    def load(self, category: str, path: str | Path) -> None:
        """Reads a file that `save` wrote, in place of a `fit`.

        Raises:
            ValueError: if the detector is not `shareable` or the file does not fit.
        """
        raise ValueError(f"`{self.name}` has no state to load; fit it in every process instead.")


class TensorDetector(Detector):
    """Keeps the state of each category as named tensors, and saves and loads them.

    Subclasses store with `remember` and read with `recall`.
    """

    shareable = True

    def __init__(self) -> None:
        self._learned: dict[str, dict[str, Tensor]] = {}

    def __contains__(self, category: str) -> bool:
        """Tells whether anything was learned of `category`."""
        return category in self._learned

    def remember(self, category: str, tensors: dict[str, Tensor]) -> None:
        """Stores the tensors of `category` in place of earlier ones."""
        self._learned[category] = tensors

    def recall(self, category: str) -> dict[str, Tensor]:
        """Returns the tensors of `category`.

        Raises:
            ValueError: if nothing was learned of it.
        """
        if category not in self._learned:
            known = ", ".join(map(repr, self._learned)) or "none yet"
            raise ValueError(f"`category` must be one that `{self.name}` was fitted to ({known}), got {category!r}.")
        return self._learned[category]

    def save(self, category: str, path: str | Path) -> None:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.recall(category).items()}
        save_file(tensors, path, metadata={"detector": json.dumps(self.describe(), sort_keys=True)})

    def load(self, category: str, path: str | Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"`path` must be a file that `save` wrote, got '{path}' ({error}).") from error
        own = json.dumps(self.describe(), sort_keys=True)
        if metadata.get("detector") != own:
            raise ValueError(
                f"`path` must hold what `{self.name}` learned with these settings, {own}; '{path}' is of "
                f"{metadata.get('detector', 'something else')}."
            )
        self.remember(category, tensors)


def require_normals(detector: str, normals: Sequence[Image.Image], least: int = 1) -> None:
    """Raises ValueError for fewer normal pictures than `detector` needs."""
    if len(normals) < least:
        raise ValueError(f"`normals` must hold at least {least} picture(s) for `{detector}`, got {len(normals)}.")
