"""Procedurally drawn industrial parts with defects and exact masks.

Seeded and fast; needs only numpy, scipy and PIL.
"""

from .dataset import (
    FAMILIES,
    OBJECTS,
    TEXTURES,
    UNSEEN,
    Sample,
    draw_defective,
    draw_normal,
    draw_surface,
    normal_images,
    sample_style,
    test_samples,
    write_dataset,
)
from .defects import DEFECTS, apply_defect

__all__ = [
    "DEFECTS",
    "FAMILIES",
    "OBJECTS",
    "TEXTURES",
    "UNSEEN",
    "Sample",
    "apply_defect",
    "draw_defective",
    "draw_normal",
    "draw_surface",
    "normal_images",
    "sample_style",
    "test_samples",
    "write_dataset",
]
