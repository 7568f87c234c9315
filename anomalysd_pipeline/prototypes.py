"""The old place of classes that saved checkpoints name; diffusers looks for their base class here, too."""

from diffusers import ModelMixin

from .models.bank import PrototypeBank
from .models.extractor import PrototypeExtractor

__all__ = ["ModelMixin", "PrototypeBank", "PrototypeExtractor"]
