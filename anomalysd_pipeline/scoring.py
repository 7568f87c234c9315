"""The old place of classes that saved checkpoints name; diffusers looks for their base class here, too."""

from diffusers import ModelMixin

from .models.perceptual import PerceptualDistance

__all__ = ["ModelMixin", "PerceptualDistance"]
