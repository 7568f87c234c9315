"""AnomalySD: find defects on industrial parts from zero to a handful of normal pictures (arXiv 2408.01960)."""

from pathlib import Path

__version__ = "0.1.0"
EMBEDDED = str(Path(__file__).resolve().parent / "embedded")
"""Folder of the embedded checkpoint, the default of `AnomalySDPipeline.from_pretrained()`."""

__all__ = ["EMBEDDED", "AnomalySDPipeline", "AnomalySDPipelineOutput", "__version__"]


def __getattr__(name: str):
    # torch and diffusers take many seconds to import, and `anomalysd --help` needs neither.
    if name in ("AnomalySDPipeline", "AnomalySDPipelineOutput"):
        from . import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
