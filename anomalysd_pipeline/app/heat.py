"""The heatmap over an inspected picture, drawn again at once for another threshold."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from . import views


class HeatView:
    """Keeps a picture and its map at the size of the page: a few megabytes, whatever was uploaded.

    Args:
        image: RGB, W x H.
        anomaly_map: float [H, W], 0 or more.
        region: region of interest, see `data.region`, outside of which the picture is darkened; None: all of it.
    """

    def __init__(self, image: Image.Image, anomaly_map: np.ndarray, region: str | None = None):
        small = views.shrunk(image)
        values = np.asarray(anomaly_map, dtype=np.float32)
        self._words = ""
        if region is not None:
            from ..data.region import unpack_region
            from .figures import lit

            small = lit(small, unpack_region(region).numpy())
            self._words = "<p>Dark: outside of the region of interest, where nothing counts.</p>"
        self.size, self._picture = small.size, views.data_uri(small)
        self._values = np.asarray(Image.fromarray(values).resize(small.size)).clip(0)
        # The highest value under each pixel of the page, so that a region narrower than one leaves a line.
        starts = [np.arange(new) * old // new for old, new in zip(values.shape, small.size[::-1], strict=True)]
        self._peaks = np.maximum.reduceat(np.maximum.reduceat(values, starts[0], axis=0), starts[1], axis=1)

    def html(self, threshold: float | None, maximum: float | None = None, outlined: bool = False) -> str:
        """Shows the picture under its heatmap; the page sets the opacity of the heatmap.

        Args:
            threshold, maximum: ends of the color scale, see `drawing.heatmap`.
            outlined: whether to outline what lies above the threshold.
        """
        from ..common.drawing import contour
        from ..common.drawing import heatmap as colored

        top = 2 * threshold if threshold is not None else maximum
        # As in `drawing.overlay`: invisible up to a quarter of the scale, opaque from its middle on.
        alpha = np.clip(self._values / top * 4 - 1, 0, 1)
        heat = colored(self._values, threshold, maximum)
        heat.putalpha(Image.fromarray(np.rint(alpha * 255).astype(np.uint8)))
        layers = f"<img src='{self._picture}' alt='The inspected picture'>"
        layers += f"<img class='heat' src='{views.data_uri(heat)}' alt='Heatmap over the picture'>"
        region = self._peaks > threshold if outlined else None
        if region is not None and region.any():
            line = np.asarray(contour(Image.new("RGB", self.size), region))
            edge = Image.fromarray(np.dstack([line, np.where(line.any(axis=2), 255, 0).astype(np.uint8)]))
            layers += f"<img src='{views.data_uri(edge)}' alt='Outline of the region above the threshold'>"
        ends = (
            ("0", "threshold", "2 × or more") if threshold is not None else ("0", f"{top / 2:g}", f"{top:g} or more")
        )
        legend = "".join(f"<span>{end}</span>" for end in ends)
        return (
            f"<figure class='heat-view'><div class='stack'>{layers}</div><figcaption><div class='colors' "
            f"aria-hidden='true'></div><div class='labels'>{legend}</div>{self._words}</figcaption></figure>"
        )


@dataclass(frozen=True)
class Shown:
    """Describes the result that a page shows.

    Attributes:
        inputs: picture, part and thoroughness that it belongs to.
        part: the part that was taught; None where its threshold cannot be changed.
        view: its heatmap.
        score: of the picture.
        threshold: of the part; None where it has none.
    """

    inputs: tuple
    part: str | None
    view: HeatView
    score: float
    threshold: float | None

    def reach(self) -> dict[str, float]:
        """Gives the arguments of a slider from a quarter of the threshold to beyond the score, in round steps."""
        digits = 2 - math.floor(math.log10(self.threshold))
        highest = max(4 * self.threshold, 1.25 * self.score)
        values = {"minimum": self.threshold / 4, "maximum": highest, "value": self.threshold}
        return {"step": round(0.1**digits, max(0, digits)), **{name: round(v, digits) for name, v in values.items()}}
