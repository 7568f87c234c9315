"""List the figures of the paper, AnomalySD (arXiv 2408.01960), Tables 1 to 5, in percent.

Metrics are named as in an evaluation's summary. Table 1 gives means over all categories of a data set; the paper gives
no figures for single categories. Its ablations (Tables 3 to 5) are of MVTec-AD with 1 shot.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

SOURCE = "arXiv 2408.01960"
MVTEC_AD, VISA = "MVTec-AD", "VisA"
OURS = "AnomalySD"
"""The paper's name for its own method, in every table."""

DATASETS = {
    MVTEC_AD: frozenset(
        [
            "bottle",
            "cable",
            "capsule",
            "carpet",
            "grid",
            "hazelnut",
            "leather",
            "metal_nut",
            "pill",
            "screw",
            "tile",
            "toothbrush",
            "transistor",
            "wood",
            "zipper",
        ]
    ),
    VISA: frozenset(
        [
            "candle",
            "capsules",
            "cashew",
            "chewinggum",
            "fryum",
            "macaroni1",
            "macaroni2",
            "pcb1",
            "pcb2",
            "pcb3",
            "pcb4",
            "pipe_fryum",
        ]
    ),
}
"""The categories of the paper's data sets, spelled as their folders are."""

COUNTS = {MVTEC_AD: ("test pictures", 1725), VISA: ("defective pictures", 1200)}
"""Kind and number of pictures in the paper's evaluation of a data set."""

RESOLUTION = 512
"""Side of the paper's scaled pictures, in pixels."""

TABLE_1_METRICS = ("image_auroc", "image_aupr", "image_f1_max", "pixel_auroc", "pixel_pro")


@dataclass(frozen=True)
class PaperRow:
    """Holds a row of the paper's tables.

    Attributes:
        table: its number.
        dataset: a key of `DATASETS`.
        setup: such as "1-shot".
        method: name of the method; in an ablation, of the variant.
        figures: metric to percent; a metric that the paper does not give is left out.
        topic: what an ablation varies; None in Tables 1 and 2.
    """

    table: int
    dataset: str
    setup: str
    method: str
    figures: Mapping[str, float]
    topic: str | None = None

    @property
    def source(self) -> str:
        """Names the paper and the table."""
        return f"{SOURCE}, Table {self.table}"


# Setup, method, then the five metrics on MVTec-AD and the five on VisA.
_TABLE_1 = [
    ("0-shot", "SD", 52.3, 77.9, 84.4, 74.2, 55.3, 55.7, 62.5, 72.7, 75.4, 49.2),
    ("0-shot", "WinCLIP", 91.8, 96.5, 92.9, 85.1, 64.6, 78.1, 81.2, 79.0, 79.6, 56.8),
    ("0-shot", OURS, 86.6, 93.7, 90.5, 87.6, 81.5, 80.9, 83.4, 79.8, 92.8, 90.5),
    ("1-shot", "SPADE", 81.0, 90.6, 90.3, 91.2, 83.9, 79.5, 82.0, 80.7, 95.6, 84.1),
    ("1-shot", "PaDiM", 76.6, 88.1, 88.2, 89.3, 73.3, 62.8, 68.3, 75.3, 89.9, 64.3),
    ("1-shot", "PatchCore", 83.4, 92.2, 90.5, 92.0, 79.7, 79.9, 82.8, 81.7, 95.4, 80.5),
    ("1-shot", "WinCLIP", 93.1, 96.5, 93.7, 95.2, 87.1, 83.8, 85.1, 83.1, 96.4, 85.1),
    ("1-shot", OURS, 93.6, 96.9, 94.9, 94.8, 89.2, 86.1, 89.1, 83.4, 96.5, 93.9),
    ("2-shot", "SPADE", 82.9, 91.7, 91.1, 92.0, 85.7, 80.7, 82.3, 81.7, 96.2, 85.7),
    ("2-shot", "PaDiM", 78.9, 89.3, 89.2, 91.3, 78.2, 67.4, 71.6, 75.7, 92.0, 70.1),
    ("2-shot", "PatchCore", 86.3, 93.8, 92.0, 93.3, 82.3, 81.6, 84.8, 82.5, 96.1, 82.6),
    ("2-shot", "WinCLIP", 94.4, 97.0, 94.4, 96.0, 88.4, 84.6, 85.8, 83.0, 96.8, 86.2),
    ("2-shot", OURS, 94.8, 97.0, 95.2, 95.8, 90.4, 87.4, 90.1, 83.7, 96.8, 94.1),
    ("4-shot", "SPADE", 84.8, 92.5, 91.5, 92.7, 87.0, 81.7, 83.4, 82.1, 96.6, 87.3),
    ("4-shot", "PaDiM", 80.4, 90.5, 90.2, 92.6, 81.3, 72.8, 75.6, 78.0, 93.2, 72.6),
    ("4-shot", "PatchCore", 88.8, 94.5, 92.6, 94.3, 84.3, 85.3, 87.5, 84.3, 96.8, 84.9),
    ("4-shot", "WinCLIP", 95.2, 97.3, 94.7, 96.2, 89.0, 87.3, 88.8, 84.2, 97.2, 87.6),
    ("4-shot", OURS, 95.6, 97.6, 95.6, 96.2, 90.8, 88.9, 90.9, 85.4, 97.5, 94.3),
]
TABLE_1 = tuple(
    PaperRow(1, dataset, setup, method, dict(zip(TABLE_1_METRICS, figures[start : start + 5], strict=True)))
    for dataset, start in ((MVTEC_AD, 0), (VISA, 5))
    for setup, method, *figures in _TABLE_1
)
"""Means over a data set's categories by setup and method, in the paper's order."""

TABLE_2 = tuple(
    PaperRow(2, MVTEC_AD, setup, method, {"image_auroc": image} | ({} if pixel is None else {"pixel_auroc": pixel}))
    for setup, method, image, pixel in [
        ("1-shot", OURS, 93.6, 94.8),
        ("2-shot", OURS, 94.8, 95.8),
        ("4-shot", OURS, 95.6, 96.2),
        ("16-shot", "DiffNet", 87.3, None),
        ("10-shot", "TDG", 78.0, None),
        ("2-shot", "RegAD", 81.5, 93.3),
        ("4-shot + aggregation", "RegAD", 88.1, 95.8),
    ]
)
"""Comparison with methods that learn from more normal pictures, or from other categories."""

ABLATIONS = tuple(
    PaperRow(table, MVTEC_AD, "1-shot", method, {"image_auroc": image, "pixel_auroc": pixel}, topic)
    for table, topic, method, image, pixel in [
        (3, "fine-tuned modules", "none", 86.6, 87.6),
        (3, "fine-tuned modules", "decoder", 87.2, 88.9),
        (3, "fine-tuned modules", "denoising network", 93.2, 94.1),
        (3, "fine-tuned modules", "decoder and denoising network", 93.6, 94.8),
        (4, "training mask", "random", 93.0, 93.9),
        (4, "training mask", "designed", 93.6, 94.8),
        (4, "prompts", "none", 91.5, 92.7),
        (4, "prompts", "simple", 92.4, 93.3),
        (4, "prompts", "designed", 93.6, 94.8),
        (5, "inference masks", "one full mask", 84.9, 89.6),
        (5, "inference masks", "multi-scale", 93.1, 94.2),
        (5, "inference masks", "multi-scale + prototype", 93.6, 94.8),
    ]
)
"""Tables 3, 4 and 5, in the paper's order."""


def paper_dataset(categories: Iterable[str]) -> str | None:
    """Finds the data set of the paper with exactly these categories.

    Case does not matter, and a space or hyphen stands for an underscore.

    Args:
        categories: names.

    Returns:
        A key of `DATASETS`; None if there is none, also for a part of its categories, since the paper's figures are
        means over all of them.
    """
    names = _folder_names(categories)
    return next((dataset for dataset, members in DATASETS.items() if names == members), None)


def part_of(categories: Iterable[str]) -> str | None:
    """Finds the data set of the paper that has these categories among its own; None if there is none."""
    names = _folder_names(categories)
    return next((dataset for dataset, members in DATASETS.items() if names and names <= members), None)


def table_1(dataset: str, setup: str) -> list[PaperRow]:
    """Lists the rows of Table 1 for a data set and a setup such as "1-shot", in the paper's order."""
    return [row for row in TABLE_1 if (row.dataset, row.setup) == (dataset, setup)]


def _folder_names(categories: Iterable[str]) -> set[str]:
    return {name.strip().lower().replace(" ", "_").replace("-", "_") for name in categories}
