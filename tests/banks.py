"""What the tests of prototype banks share."""

import torch

from anomalysd_pipeline.models.bank import PrototypeBank


def check_copies(bank: PrototypeBank, category: str, psi: torch.Tensor, folder) -> None:
    """A bank that is loaded from files, and one that is given what this one packs, find what it finds."""
    bank.save_pretrained(folder)
    dtype = bank.placeholder.dtype
    loaded, copied = PrototypeBank.from_pretrained(folder, torch_dtype=dtype), PrototypeBank().to(dtype)
    copied.add_packed(category, bank.packed(category))
    for other in (loaded, copied):
        assert torch.equal(other.deviations(category, psi), bank.deviations(category, psi))
