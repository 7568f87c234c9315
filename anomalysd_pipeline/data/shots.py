"""Keep the normal pictures of a part beside its prototypes, to copy from; see `method.exemplars`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .tensors import rotate

MOST_COPIES = 2**15 - 1
"""Turned copies that a place can number."""


@dataclass(frozen=True)
class Shots:
    """Holds K normal pictures, and where in them each of M prototypes is from.

    Attributes:
        places: int16 `[M, 3]`: number of the copy (its turn times K, plus its picture), row and column in its grid.
        pixels: uint8 `[sum of 3 H W]`, the pictures one after another.
        sizes: int32 `[K, 2]`, height and width of each.
        rotations: int32 `[]`, into how many turns the full circle was divided.
    """

    places: Tensor
    pixels: Tensor
    sizes: Tensor
    rotations: Tensor

    @classmethod
    def of(cls, images: Sequence[Tensor], places: Tensor, rotations: int) -> Shots | None:
        """Rounds pictures `[3, H, W]` in [-1, 1] to 8 bits; None for more copies than `MOST_COPIES`.

        Args:
            places: whole numbers `[M, 3]`.
        """
        if len(images) * rotations > MOST_COPIES:
            return None
        pixels = [((image.detach().float() + 1) * 127.5).round().clamp(0, 255).byte().flatten() for image in images]
        sizes = torch.tensor([image.shape[1:] for image in images], dtype=torch.int32)
        return cls(places.to(torch.int16), torch.cat(pixels), sizes, torch.tensor(rotations, dtype=torch.int32))

    def check(self, prototypes: int) -> None:
        """Raises ValueError unless all parts fit each other and a number of prototypes; files may hold anything."""
        whole = all(not t.is_floating_point() for t in (self.places, self.sizes, self.rotations))
        fits = whole and self.places.shape == (prototypes, 3) and self.rotations.shape == () and self.sizes.ndim == 2
        fits = fits and self.sizes.shape[1] == 2 and len(self.sizes) > 0 and bool((self.sizes > 0).all())
        if fits:
            lengths = (3 * self.sizes.long().prod(dim=1)).tolist()
            copies = len(lengths) * int(self.rotations)
            fits = self.pixels.dtype == torch.uint8 and self.pixels.shape == (sum(lengths),)
            fits = fits and 0 < copies <= MOST_COPIES and int(self.places.min()) >= 0
            # A place is a cell of the picture's grid, of a pixel or more.
            fits = fits and int(self.places[:, 0].max()) < copies
            fits = fits and int(self.places[:, 1:].max()) < int(self.sizes.max())
        if not fits:
            raise ValueError("normal pictures beside a bank that do not fit it or each other")

    def copy(self, number: int) -> Tensor:
        """Gives the turned copy of a number, float32 `[3, h, w]` in [-1, 1]."""
        turn, source = divmod(number, len(self.sizes))
        ends = (3 * self.sizes.long().prod(dim=1)).cumsum(dim=0).tolist()
        height, width = self.sizes[source].tolist()
        picture = self.pixels[ends[source] - 3 * height * width : ends[source]].view(1, 3, height, width)
        return rotate(picture.float() / 127.5 - 1, 360 * turn / int(self.rotations))[0]

    def packed(self) -> dict[str, Tensor]:
        """Maps the names of the attributes to them."""
        return dict(vars(self))

    def select(self, kept: Tensor | None) -> Shots:
        """Keeps the places of some prototypes, in their order; None: of all."""
        return self if kept is None else Shots(**{**vars(self), "places": self.places[kept.to(self.places.device)]})

    def to(self, device) -> Shots:
        """Moves all to a device."""
        return Shots(**{name: tensor.to(device) for name, tensor in vars(self).items()})


SHOT_NAMES = tuple(field.name for field in fields(Shots))
"""Names of the attributes, by which files hold them."""
