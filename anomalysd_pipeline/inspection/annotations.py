"""Write findings for other programs: scores in anomalib's words, and boxes in COCO's format."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from scipy import ndimage

MOST_BOXES = 100
"""Boxes kept of a picture, the largest: as many as COCO's own evaluation looks at."""


def find_boxes(pred_mask: np.ndarray, anomaly_map: np.ndarray) -> list[list[float]]:
    """Boxes the connected regions of a mask, the largest first.

    Args:
        pred_mask: bool [H, W]; pixels that touch at a corner belong together.
        anomaly_map: [H, W].

    Returns:
        [x, y, width, height, area, score] of each, in pixels; the score is the region's highest value in the map.
    """
    labels, count = ndimage.label(pred_mask, np.ones((3, 3)))
    numbers = np.arange(1, count + 1)
    areas = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    scores = ndimage.maximum(anomaly_map, labels, numbers) if count else []
    boxes = [
        [columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start, int(area), float(score)]
        for (rows, columns), area, score in zip(ndimage.find_objects(labels), areas, scores, strict=True)
    ]
    return sorted(boxes, key=lambda box: -box[4])[:MOST_BOXES]


def prediction(row: Mapping) -> dict[str, object]:
    """Names what a row of results holds as anomalib does; see `folder.ResultFolder` for its files."""
    if "error" in row:
        return {"image_path": row["file"], "error": row["error"]}
    score, threshold = row["score"], row["threshold"]
    return {
        "image_path": row["file"],
        "pred_score": score,
        "pred_label": None if threshold is None else score > threshold,
        "threshold": threshold,
        "pred_mask": None if threshold is None else f"masks/{row['name']}.png",
        "heatmap": f"heatmaps/{row['name']}.png",
    }


def write_list(path: Path, items: Iterable[Mapping]) -> None:
    """Writes a JSON list, an item in each line, without holding them all."""
    with open(path, "w", encoding="utf-8") as file:
        file.write("[")
        file.writelines(_lines(items))
        file.write("]\n")


def write_coco(path: Path, rows: Callable[[], Iterable[Mapping]]) -> None:
    """Writes boxes in COCO's format, of one category, "defect"; pictures without a defect are listed too.

    Args:
        rows: called for each of the two lists; gives rows of results, of which those with an error are left out.
    """

    def found() -> Iterator[tuple[int, Mapping]]:
        return enumerate((row for row in rows() if "error" not in row), 1)

    images = (
        {"id": number, "file_name": row["file"], "width": row["width"], "height": row["height"]}
        for number, row in found()
    )
    boxes = ((number, box) for number, row in found() for box in row["boxes"])
    annotations = (
        {
            "id": index,
            "image_id": number,
            "category_id": 1,
            "bbox": box[:4],
            "area": box[4],
            "iscrowd": 0,
            "score": box[5],
        }
        for index, (number, box) in enumerate(boxes, 1)
    )
    with open(path, "w", encoding="utf-8") as file:
        file.write('{"categories": [{"id": 1, "name": "defect"}],\n"images": [')
        file.writelines(_lines(images))
        file.write('],\n"annotations": [')
        file.writelines(_lines(annotations))
        file.write("]}\n")


def _lines(items: Iterable[Mapping]) -> Iterator[str]:
    for index, item in enumerate(items):
        yield f"{',' if index else ''}\n{json.dumps(item)}"
