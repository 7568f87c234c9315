"""Keep normal feature vectors of every part, and find the nearest, Eqs. (13) and (14) of AnomalySD (arXiv
2408.01960)."""

import json

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from ..method.deviations import gaps_of, missing_distances, stress, unlikeness, views_of, weigh
from ..method.neighbors import NeighborSearch
from .collection import is_finite, spread_of
from .coreset import greedy_coreset

_NEIGHBORS = 9
_UNBOUNDED = 2**62
_COLORS = 4096
PACKED_BESIDE = 2
"""Columns of `PrototypeBank.packed` beside the prototype."""
MISSING_WEIGHT = 0.4
"""Of what a picture lacks, beside what it has too much. Chosen on drawn parts, whole and with pieces broken off."""
COLOR_WEIGHT = 0.75
"""Of the colors by themselves, beside all channels together. Chosen on drawn parts and metal plates."""


class PrototypeBank(ModelMixin, ConfigMixin):
    """Keeps a bank of normal feature vectors P_c per category, Eq. (13), savable as safetensors.

    Banks are buffers [size, dim] named `bank_0`, `bank_1`, … in the alphabetical order of their categories (the order
    in which a saved config lists them), so that a category may have any name. Dtype and device follow `.to()`. Beside
    each is a buffer `spread_0`, … [size]: how far a prototype is from the nearest in another normal picture, which is
    how much normal parts differ there. A third, `gap_0`, … [whole], belongs to the first prototypes, where these are
    all positions of the normal pictures, one picture after another: see `deviations.gaps_of`. A fourth, `view_0`, …,
    tells how the pictures differ as wholes, see `deviations.views_of`.

    Args:
        sizes: Number of prototypes per category.
        whole: How many of these, the first, are all positions of the normal pictures; 0: not known.
        dim: Length of a prototype; 0 while there are no categories.
        max_size: A category with more vectors than this is thinned to a coreset.
        max_unturned: In a category that is thinned, as many vectors of the pictures as they were given, not turned,
            are kept beside the coreset: all where they fit, else evenly spaced ones. A coreset keeps what is rare, and
            few of the many that look alike, among which small defects hide.
        color_channels: How many of the last channels are colors that are also looked at by themselves, see `add`.
        color_sizes: Number of color prototypes per category.
        views: Number of rows of `deviations.views_of` per category.
    """

    @register_to_config
    def __init__(
        self,
        sizes: dict[str, int] | None = None,
        dim: int = 0,
        max_size: int = 10000,
        max_unturned: int = 0,
        whole: dict[str, int] | None = None,
        color_channels: int = 0,
        color_sizes: dict[str, int] | None = None,
        views: dict[str, int] | None = None,
    ):
        super().__init__()
        self._search: tuple[Tensor, NeighborSearch] | None = None
        # Safetensors and `.to()` need a tensor even when there are no banks: it also holds the dtype and device.
        self.register_buffer("placeholder", torch.zeros(1))
        sizes = dict(sorted((sizes or {}).items()))
        counts = {
            name: {category: (given or {}).get(category, 0) for category in sizes}
            for name, given in (("whole", whole), ("views", views))
        }
        self.register_to_config(sizes=sizes, **counts)
        for index, (category, size) in enumerate(sizes.items()):
            self.register_buffer(f"bank_{index}", torch.zeros(size, dim))
            self.register_buffer(f"spread_{index}", torch.zeros(size))
            self.register_buffer(f"gap_{index}", torch.zeros(self.config.whole[category]))
            self.register_buffer(f"view_{index}", torch.zeros(self.config.views[category], dim + 1))
        self.colors = PrototypeBank(color_sizes, color_channels, _COLORS, _UNBOUNDED) if color_channels else None

    @property
    def categories(self) -> list[str]:
        """Lists the categories in alphabetical order."""
        return list(self.config.sizes)

    def __contains__(self, category: str) -> bool:
        return category in self.config.sizes

    def __getitem__(self, category: str) -> Tensor:
        """Prototypes of `category`, [size, dim]. Raises ValueError if it has none."""
        if category not in self:
            known = ", ".join(json.dumps(c, ensure_ascii=False) for c in self.categories) or "none"
            raise ValueError(f"`category` must be one that has a prototype bank ({known}), got {category!r}.")
        return getattr(self, f"bank_{self.categories.index(category)}")

    def spread(self, category: str) -> Tensor:
        """Gives the spread of each prototype of `category`, [size], >= 0. Raises ValueError if it has none."""
        self[category]
        return getattr(self, f"spread_{self.categories.index(category)}")

    def gaps(self, category: str) -> Tensor:
        """Gives the gap of each of the first prototypes, [whole], >= 0. Raises ValueError without a bank."""
        self[category]
        return getattr(self, f"gap_{self.categories.index(category)}")

    def views(self, category: str) -> Tensor:
        """Gives the normal pictures as wholes, [V, dim + 1], see `views_of`. Raises ValueError if there is no bank."""
        self[category]
        return getattr(self, f"view_{self.categories.index(category)}")

    def take_reach(self, category: str, other: "PrototypeBank") -> None:
        """Lets pictures be as unlike the normal ones as `other` lets them, which knows more pictures of the category.
        Raises ValueError if one of them has no bank."""
        own, known = self.views(category), other.views(category)
        if len(own) and len(known):
            own[:, -1] = known[0, -1]

    def packed(self, category: str) -> dict[str, Tensor]:
        """Packs all that is known of a category, for `add_packed`.

        "bank" holds prototypes and, in the last columns, spread and gap (-1: none), [size, dim + 2]; "colors" the same
        of the colors, and "views" the views, where there are such.
        """
        bank, gaps, views = self[category], self.gaps(category), self.views(category)
        column = F.pad(gaps, (0, len(bank) - len(gaps)), value=-1.0)
        packed = {"bank": torch.cat([bank, self.spread(category)[:, None], column[:, None]], dim=1)}
        if self._has_colors(category):
            packed["colors"] = self.colors.packed(category)["bank"]
        return packed | {"views": views} if len(views) else packed

    def add_packed(self, category: str, packed: dict[str, Tensor]) -> None:
        """Stores what `packed` gave. Raises ValueError as `add` does."""
        bank, colors = packed["bank"], packed.get("colors")
        self._check(category, bank[:, :-PACKED_BESIDE])
        gaps = bank[:, -1]
        views = packed.get("views", bank.new_zeros(0, bank.shape[1] - PACKED_BESIDE + 1))
        stored = self._stored(bank[:, :-PACKED_BESIDE], bank[:, -2], gaps[gaps >= 0], views)
        if colors is not None:
            self._color_bank().add_packed(category, {"bank": colors})
        else:
            self._forget_colors(category)
        self._replace({**self._held(), category: stored})

    def add(
        self,
        category: str,
        features: Tensor,
        seed: int = 0,
        sources: Tensor | None = None,
        unturned: int = 0,
        whole: int = 0,
        colors: int = 0,
    ) -> None:
        """Stores the prototypes of a category, in place of those it had; more than `max_size` become a coreset.

        Args:
            category: Any non-empty name.
            features: [M, dim], M >= 1, finite; `dim` as in the other categories.
            seed: Of the coreset, see [`greedy_coreset`].
            sources: Whole numbers [M], from which picture each vector is, see `collection.prototype_sources`; None, or
                one number alone: nothing is known of how normal parts differ, and every spread is 1.
            unturned: How many vectors, from the first on, are of pictures that were not turned.
            whole: How many pictures these are, all of them equally large, to know how another picture differs as a
                whole and, where all that was not turned is kept, what it lacks. Less than 2: neither.
            colors: How many of the last channels are colors, which `deviations` also looks at by themselves: among
                hundreds of other channels a wrong color hardly counts. The same wherever there are any; 0: none.

        Raises:
            ValueError: If `category` is empty, or `features` has another shape, is not finite, or overflows the dtype.
        """
        self._check(category, features)
        kept = torch.arange(len(features), device=features.device)
        if len(features) > self.config.max_size:
            kept = greedy_coreset(features, self.config.max_size, seed).to(features.device)
            count = min(unturned, self.config.max_unturned)
            straight = torch.linspace(0, unturned - 1, count, dtype=torch.float64).round().long()
            kept = torch.cat([kept, straight.to(kept.device)]).unique() if count else kept
        if sources is None or len(sources.unique()) < 2:
            spread = features.new_ones(len(kept))
        else:
            spread = spread_of(features, sources.to(features.device), kept, seed)
        gaps, views = features.new_zeros(0), features.new_zeros(0, features.shape[1] + 1)
        if whole > 1 and unturned and unturned % whole == 0:
            if len(features) % unturned == 0:
                views = views_of(features, whole, unturned)
            if torch.equal(kept[:unturned], torch.arange(unturned, device=kept.device)):
                gaps = gaps_of(features[:unturned].unflatten(0, (whole, -1))).flatten()
        stored = self._stored(features[kept], spread, gaps, views)
        if colors:
            self._color_bank().add(category, features[:, -colors:].contiguous(), seed, sources, unturned)
        else:
            self._forget_colors(category)
        self._replace({**self._held(), category: stored})

    def _check(self, category: str, features: Tensor) -> None:
        if not category:
            raise ValueError("`category` must be a non-empty name, got ''.")
        if features.ndim != 2 or 0 in features.shape:
            raise ValueError(f"`features` must be [M, dim] with at least one vector, got {list(features.shape)}.")
        if any(other != category for other in self.categories) and features.shape[1] != self.config.dim:
            raise ValueError(
                f"`features` must have {self.config.dim} channels like the other categories, got {features.shape[1]}."
            )
        if not is_finite(features):
            raise ValueError("`features` must be finite, got NaN or infinity.")

    def _has_colors(self, category: str) -> bool:
        return self.colors is not None and category in self.colors

    def _forget_colors(self, category: str) -> None:
        if self._has_colors(category):
            self.colors.remove(category)

    def _color_bank(self) -> "PrototypeBank":
        if self.colors is None:
            self.colors = PrototypeBank(max_size=_COLORS, max_unturned=_UNBOUNDED).to(self.placeholder)
        return self.colors

    def _stored(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        like = {"dtype": self.placeholder.dtype, "device": self.placeholder.device}
        stored = tuple(tensor.detach().to(**like, copy=True) for tensor in tensors)
        if not all(torch.isfinite(tensor).all() for tensor in stored):
            raise ValueError(
                f"`features` must fit in the bank's {stored[0].dtype}, got up to {tensors[0].abs().max():g}."
            )
        return stored

    def empty(self) -> "PrototypeBank":
        """Makes a bank of the same limits, dtype and device without categories."""
        limits = {name: self.config[name] for name in ("max_size", "max_unturned")}
        return PrototypeBank(**limits).to(self.placeholder)

    def remove(self, category: str) -> None:
        """Forgets a category. Raises ValueError if it has no bank."""
        self[category]
        self._forget_colors(category)
        self._replace({other: held for other, held in self._held().items() if other != category})

    def _held(self) -> dict[str, tuple[Tensor, ...]]:
        kinds = (self.__getitem__, self.spread, self.gaps, self.views)
        return {category: tuple(kind(category) for kind in kinds) for category in self.categories}

    def _replace(self, banks: dict[str, tuple[Tensor, ...]]) -> None:
        names = ("bank", "spread", "gap", "view")
        for index in range(len(self.categories)):
            for name in names:
                delattr(self, f"{name}_{index}")
        banks = dict(sorted(banks.items()))
        for index, tensors in enumerate(banks.values()):
            for name, tensor in zip(names, tensors, strict=True):
                self.register_buffer(f"{name}_{index}", tensor)
        self.register_to_config(
            sizes={category: len(bank) for category, (bank, *_) in banks.items()},
            dim=next((bank.shape[1] for bank, *_ in banks.values()), 0),
            whole={category: len(gaps) for category, (_, _, gaps, _) in banks.items()},
            views={category: len(views) for category, (*_, views) in banks.items()},
            color_channels=0 if self.colors is None else self.colors.config.dim,
            color_sizes=None if self.colors is None else dict(self.colors.config.sizes),
        )

    @torch.no_grad()
    def distances(self, category: str, psi: Tensor, chunk: int | None = None) -> Tensor:
        """Measures the squared distance E of every position to its nearest prototype, Eq. (14).

        Matrix products find the nearest prototype; the distance to it is then computed by differences, so that small
        distances are not lost to cancellation.

        Args:
            category: A category with a bank.
            psi: [N, C, h, w], C = dim.
            chunk: Positions compared at once, which takes `chunk * size` float32 values of memory besides float32
                copies of `psi` and of the bank; None: as many as fit in 2^22 values (16 MiB).

        Returns:
            float32 [N, h, w], >= 0; exactly 0 where the distance is below 1e-10 of the squared length of psi.

        Raises:
            ValueError: If `category` has no bank or `psi` has another shape.
        """
        return self._nearest(category, psi, chunk, 1)[0]

    def relative_distances(self, category: str, psi: Tensor, chunk: int | None = None) -> Tensor:
        """Measures E in units of what normal parts differ by there: E / (2 m + s), not in the paper.

        s is the mean spread of the 9 nearest prototypes and m that of the whole category. Where normal parts vary, a
        distance means little; this also makes the numbers of different features and parts comparable, some tenths
        for a normal position.

        Args and errors: see [`distances`].

        Returns:
            float32 [N, h, w], >= 0.
        """
        spread = self.spread(category).float()
        distances, index = self._nearest(category, psi, chunk, min(_NEIGHBORS, len(spread)))
        local = spread[index].mean(dim=-1)
        return distances / (2 * spread.mean() + local).clamp(min=torch.finfo(torch.float32).tiny)

    def missing_distances(self, category: str, psi: Tensor) -> Tensor | None:
        """Measures what normal parts have and a picture lacks, see `deviations.missing_distances`.

        Args and errors: see [`distances`].

        Returns:
            float32 [N, h, w], >= 0; None where nothing is known, because the normal pictures are fewer than two, too
            many to be kept whole, or of another size than `psi`.
        """
        gaps, bank = self.gaps(category), self[category]
        positions = psi.shape[-2] * psi.shape[-1]
        if len(gaps) == 0 or len(gaps) % positions:
            return None
        grids = bank[: len(gaps)].unflatten(0, (-1, positions))
        return missing_distances(grids, gaps.unflatten(0, (-1, positions)), psi)

    def deviations(self, category: str, psi: Tensor, repainted: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Measures what sets a picture apart from normal ones: the largest of [`relative_distances`],
        `MISSING_WEIGHT` times [`missing_distances`], and `COLOR_WEIGHT` times the relative distances of the colors.
        Where a picture as a whole is unlike the normal ones, what stands out counts more, see `deviations.unlikeness`.

        Args:
            repainted: psi of the repainted pictures, and of these with what the autoencoder loses of the originals put
                back, both [N, C, h, w]: what they are at the same positions is weighed in, see `weigh`. None: not.

        Other args, and errors: see [`distances`].

        Returns:
            float32 [N, h, w], >= 0.
        """
        original, missing = self.relative_distances(category, psi), self.missing_distances(category, psi)
        found = original
        if missing is not None:
            found = torch.maximum(found, MISSING_WEIGHT * missing)
        if self._has_colors(category):
            colors = self.colors.relative_distances(category, psi[:, -self.colors.config.dim :])
            found = torch.maximum(found, COLOR_WEIGHT * colors)
        views = self.views(category)
        if len(views):
            found = stress(found, unlikeness(views, psi))
        if repainted is None:
            return found
        return weigh(found, original, *(self.relative_distances(category, features) for features in repainted))

    def _nearest(self, category: str, psi: Tensor, chunk: int | None, count: int) -> tuple[Tensor, Tensor]:
        """Finds E, [N, h, w], and the `count` nearest prototypes, [N, h, w, count]."""
        bank = self[category]  # [M, C]
        if psi.ndim != 4 or psi.shape[1] != bank.shape[1]:
            raise ValueError(f"`psi` must be [N, {bank.shape[1]}, h, w] as in the bank, got {list(psi.shape)}.")
        # Prepared once for all pictures in a row; the tensor itself is the key, because a changed bank is another one.
        if self._search is None or self._search[0] is not bank:
            self._search = bank, NeighborSearch(bank)
        n, _, h, w = psi.shape
        queries = psi.float().permute(0, 2, 3, 1).flatten(end_dim=2)  # [N h w, C]
        distances, indices = self._search[1].nearest(queries, count, chunk)
        return distances.view(n, h, w), indices.view(n, h, w, count)

    def __getstate__(self) -> dict:
        # Copies and pickles leave out what can be prepared anew.
        return {**self.__dict__, "_search": None}
