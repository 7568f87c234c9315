"""The old place of classes that saved checkpoints name."""

from .models.adapters import AdapterStore

__all__ = ["AdapterStore"]
