"""The old place of classes that saved checkpoints name."""

from .models.bank import PrototypeBank
from .models.extractor import PrototypeExtractor

__all__ = ["PrototypeBank", "PrototypeExtractor"]
