"""The old place of classes that saved checkpoints name."""

from .models.perceptual import PerceptualDistance

__all__ = ["PerceptualDistance"]
