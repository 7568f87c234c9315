"""Fine-tune the denoiser and the decoder on a few normal pictures."""


def __getattr__(name: str):
    # A pipeline.py published before the rooms asks for these here, and hands over itself instead of a base.
    if name in ("fine_tune", "in_memory_accelerator"):
        raise ImportError(
            "This pipeline.py is of an earlier version and cannot fine-tune with the installed package; load its "
            "folder with `AnomalySDPipeline.from_pretrained` instead."
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
