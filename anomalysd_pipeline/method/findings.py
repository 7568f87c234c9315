"""What an inspection found in a picture, in the picture's own size; and tiles joined to their picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from ..data.tensors import resize, to_pil, to_tensor
from ..data.tiles import Box, blend
from .scoring import ScoreMaps, image_score
from .settings import InspectionSettings


@dataclass(frozen=True)
class Finding:
    """Holds what was found in a picture of H x W pixels.

    Attributes:
        score: float32 `[]`.
        anomaly_map: float32 `[H, W]`.
        proposed: the prototype-guided mask, bool `[H, W]`; None without normal pictures.
        inpainted: the part as it should look.
    """

    score: Tensor
    anomaly_map: Tensor
    proposed: Tensor | None
    inpainted: Image.Image


def findings(maps: ScoreMaps, settings: InspectionSettings, sizes: Sequence[tuple[int, int]]) -> list[Finding]:
    """Runs stages 7 to 9 of an inspection: fused maps, image scores, and all in the pictures' own sizes (H, W)."""
    fused = maps.fused(settings.prototype_weight, settings.feature_weight)  # [N, R, R], Eq. (21)
    # Before resizing: a score must not depend on the size of the file.
    scores = image_score(fused, settings.top_share, maps.regions)  # [N]
    found = []
    for number, size in enumerate(sizes):
        proposed = None
        if maps.prototype_masks is not None:
            proposed = resize(maps.prototype_masks[number].float(), size, "nearest")[0] > 0.5
        own = resize(fused[number, None], size)[0]  # [H, W]
        found.append(Finding(scores[number], own, proposed, to_pil(maps.repainted[number], size)))
    return found


def joined(tiles: Sequence[Finding], boxes: Sequence[Box], size: tuple[int, int], overlap: int) -> Finding:
    """Joins what was found in the tiles of a picture: the highest score, and blended maps and pictures.

    Args:
        boxes: where each tile lies.
        size: (H, W) of the picture.
        overlap: see `tiles.blend`.
    """
    shown = [to_tensor(tile.inpainted, tuple(tile.anomaly_map.shape)) for tile in tiles]
    proposed = [tile.proposed.float() for tile in tiles if tile.proposed is not None]
    return Finding(
        max(tile.score for tile in tiles),
        blend([tile.anomaly_map for tile in tiles], boxes, size, overlap),
        blend(proposed, boxes, size, overlap) > 0.5 if proposed else None,
        to_pil(blend(shown, boxes, size, overlap), size),
    )
