"""Keep normal feature vectors of every part, and find the nearest, Eqs. (13) and (14) of AnomalySD (arXiv
2408.01960)."""

import json
from collections.abc import Mapping

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from ..common.checks import require_kind, require_whole
from ..data.shots import SHOT_NAMES, Shots
from ..method.neighbors import NeighborSearch
from .collection import is_finite
from .coreset import greedy_coreset

MOST = 10**7
"""Prototypes of a part, and channels of each."""
MOST_PIXELS = 2**31
"""Values of all normal pictures of a part."""
_ASKED = 512
"""Vectors of normal pictures whose distances tell what is usual."""
_OLD_COLUMNS = 2
"""Of what earlier versions packed in one tensor with the prototypes: how much normal pictures differ."""


def unpacked(packed: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Gives the prototypes [size, dim] and their sources [size] of what `PrototypeBank.packed` gave, also in an
    earlier version."""
    bank = packed["bank"]
    if "sources" in packed:
        return bank, packed["sources"]
    return bank[:, :-_OLD_COLUMNS], torch.zeros(len(bank), dtype=torch.int32)


def unpacked_shots(packed: dict[str, Tensor]) -> Shots | None:
    """Gives the normal pictures of what `PrototypeBank.packed` gave; None without.

    Raises:
        ValueError: if they are not complete or do not fit.
    """
    given = {name: packed[name] for name in SHOT_NAMES if name in packed}
    if not given:
        return None
    if len(given) < len(SHOT_NAMES):
        raise ValueError(f"normal pictures beside a bank that lack {sorted(set(SHOT_NAMES) - set(given))[0]!r}")
    shots = Shots(**given)
    shots.check(len(packed["bank"]))
    return shots


class PrototypeBank(ModelMixin, ConfigMixin):
    """Keeps a bank of normal feature vectors P_c per category, Eq. (13), savable as safetensors.

    Banks are buffers `bank_0`, `bank_1`, … [size, dim] in the alphabetical order of their categories (the order in
    which a saved config lists them), so that a category may have any name. Dtype and device follow `.to()`. Beside
    each is a buffer `source_0`, … [size], int32: from which normal picture each vector is; all 0: not known. Where the
    normal pictures are kept too, buffers `places_0`, `pixels_0`, `sizes_0` and `rotations_0` hold them, see `Shots`.

    Args:
        sizes: Number of prototypes per category.
        dim: Length of a prototype; 0 while there are no categories.
        max_size: A category with more vectors than this is thinned.
        max_unturned: 0: to a coreset. Above: vectors of the pictures as they were given come first, at most this many
            and evenly spaced, and vectors of their turned copies drawn at random fill up; the cheapest, and no small
            defect then hides in the gaps of a coreset.
        half: Whether vectors are rounded to half precision (by at most 0.05 %) and packed in it, which halves files.
        shots: For each category whose normal pictures are kept, their number and that of their pixels.

    Raises:
        ValueError: If one of these is no whole number, or negative.
    """

    # Of earlier versions, which kept beside each prototype how much normal pictures differ.
    _keys_to_ignore_on_load_unexpected = [r"^(spread|gap|view)_\d+$", r"^colors\."]

    @register_to_config
    def __init__(
        self,
        sizes: dict[str, int] | None = None,
        dim: int = 0,
        max_size: int = 10000,
        max_unturned: int = 0,
        half: bool = False,
        shots: dict[str, tuple[int, int]] | None = None,
    ):
        super().__init__()
        require_kind("sizes", sizes or {}, Mapping, "a dictionary from categories to numbers of prototypes")
        for name, value, low in (
            ("dim", dim, 0),
            ("max_size", max_size, 1),
            ("max_unturned", max_unturned, 0),
            *((f"sizes[{category!r}]", size, 1) for category, size in (sizes or {}).items()),
        ):
            require_whole(name, value, low, MOST)
        for category, counts in (shots or {}).items():
            require_kind(f"shots[{category!r}]", counts, (list, tuple), "two whole numbers")
            require_whole(f"len(shots[{category!r}])", len(counts), 2, 2)
            for count in counts:
                require_whole(f"shots[{category!r}]", count, 1, MOST_PIXELS)
        self._search: tuple[Tensor, tuple, list[NeighborSearch]] | None = None
        self._usual: tuple[Tensor, int, float | None] | None = None
        # Safetensors and `.to()` need a tensor even when there are no banks: it also holds the dtype and device.
        self.register_buffer("placeholder", torch.zeros(1))
        sizes = dict(sorted((sizes or {}).items()))
        self.register_to_config(sizes=sizes, shots=dict(shots or {}))
        for index, (category, size) in enumerate(sizes.items()):
            self.register_buffer(f"bank_{index}", torch.zeros(size, dim))
            self.register_buffer(f"source_{index}", torch.zeros(size, dtype=torch.int32))
            if category in self.config.shots:
                count, pixels = self.config.shots[category]
                self.register_buffer(f"places_{index}", torch.zeros(size, 3, dtype=torch.int16))
                self.register_buffer(f"pixels_{index}", torch.zeros(pixels, dtype=torch.uint8))
                self.register_buffer(f"sizes_{index}", torch.zeros(count, 2, dtype=torch.int32))
                self.register_buffer(f"rotations_{index}", torch.zeros((), dtype=torch.int32))

    @property
    def categories(self) -> list[str]:
        """Lists the categories in alphabetical order."""
        return list(self.config.sizes)

    def __contains__(self, category: str) -> bool:
        return category in self.config.sizes

    def __getitem__(self, category: str) -> Tensor:
        """Prototypes of `category`, [size, dim]. Raises ValueError if it has none."""
        return getattr(self, f"bank_{self._index(category)}")

    def sources(self, category: str) -> Tensor:
        """Tells from which normal picture each prototype is, int32 [size]. Raises ValueError if there is no bank."""
        return getattr(self, f"source_{self._index(category)}")

    def shots(self, category: str | None, left_out: int | None = None) -> Shots | None:
        """Gives the normal pictures of a category, and the places in them of the prototypes that are looked at without
        a picture; None where they are not kept."""
        if category not in self.config.shots:
            return None
        index = self._index(category)
        shots = Shots(**{name: getattr(self, f"{name}_{index}") for name in SHOT_NAMES})
        return shots.select(self.compared(category, left_out))

    def check_shots(self) -> None:
        """Raises ValueError unless all normal pictures fit their banks; a loaded file may hold anything."""
        for category in self.categories:
            shots = self.shots(category)
            if shots is not None:
                shots.check(len(self[category]))

    def forget_shots(self, category: str) -> None:
        """Drops the normal pictures of a category, and keeps its prototypes."""
        self._replace({**self._held(), category: (self[category], self.sources(category), None)})

    def _index(self, category: str) -> int:
        if category not in self:
            known = ", ".join(json.dumps(c, ensure_ascii=False) for c in self.categories) or "none"
            raise ValueError(f"`category` must be one that has a prototype bank ({known}), got {category!r}.")
        return self.categories.index(category)

    def packed(self, category: str) -> dict[str, Tensor]:
        """Packs all that is known of a category, for `add_packed`: "bank" [size, dim], "sources" [size], and the
        attributes of `Shots` where there are some."""
        bank, shots = self[category], self.shots(category)
        packed = {"bank": bank.half() if self.config.half else bank, "sources": self.sources(category)}
        return packed if shots is None else {**packed, **shots.packed()}

    def add_packed(self, category: str, packed: dict[str, Tensor]) -> None:
        """Stores what `packed` gave. Raises ValueError as `add` does, or for pictures that do not fit."""
        bank, sources = unpacked(packed)
        self._check(category, bank)
        shots = unpacked_shots(packed)
        self._replace({**self._held(), category: (self._stored(bank), sources.to(self.placeholder.device), shots)})

    def add(
        self,
        category: str,
        features: Tensor,
        sources: Tensor | None = None,
        unturned: int = 0,
        seed: int = 0,
        shots: Shots | None = None,
    ) -> None:
        """Stores the prototypes of a category, in place of those it had; more than `max_size` are thinned.

        Args:
            category: Any non-empty name.
            features: [M, dim], M >= 1, finite; `dim` as in the other categories.
            sources: Whole numbers [M], from which picture each vector is, so that [`distances`] can leave one out;
                None: from one.
            unturned: How many vectors, from the first on, are of pictures that were not turned.
            seed: Of the thinning.
            shots: The normal pictures, to be kept beside.

        Raises:
            ValueError: If `category` is empty, or `features` has another shape, is not finite, or overflows the dtype.
        """
        self._check(category, features)
        if sources is None:
            sources = torch.zeros(len(features), dtype=torch.int32)
        kept = self._kept(features, unturned, seed)
        features = features if kept is None else features[kept]
        stored = self._stored(features.half() if self.config.half else features)
        sources = sources.to(self.placeholder.device, torch.int32)
        sources = sources.clone() if kept is None else sources[kept.to(sources.device)]
        self._replace({**self._held(), category: (stored, sources, None if shots is None else shots.select(kept))})

    def _kept(self, features: Tensor, unturned: int, seed: int) -> Tensor | None:
        """Chooses the vectors that stay, indices in order; None: all."""
        if len(features) <= self.config.max_size:
            return None
        drawn = self.drawn(len(features), unturned, seed)
        return greedy_coreset(features, self.config.max_size, seed) if drawn is None else drawn

    def drawn(self, count: int, unturned: int, seed: int = 0) -> Tensor | None:
        """Chooses the vectors that stay where their numbers alone decide: int64, rising; None: all stay, or a coreset.

        Args:
            count: of the vectors.
            unturned, seed: as of [`add`].
        """
        size = self.config.max_size
        straight = min(unturned, self.config.max_unturned, size)
        if count <= size or not straight:
            return None
        first = torch.linspace(0, unturned - 1, straight, dtype=torch.float64).round().long()
        turned = torch.randperm(count - unturned, generator=torch.Generator().manual_seed(seed))
        return torch.cat([first, (turned[: size - straight] + unturned).sort().values])

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

    def _stored(self, bank: Tensor) -> Tensor:
        stored = bank.detach().to(self.placeholder, copy=True)
        if not is_finite(stored):
            raise ValueError(f"`features` must fit in the bank's {stored.dtype}, got up to {bank.abs().max():g}.")
        return stored

    def remove(self, category: str) -> None:
        """Forgets a category. Raises ValueError if it has no bank."""
        self[category]
        self._replace({other: held for other, held in self._held().items() if other != category})

    def _held(self) -> dict[str, tuple[Tensor, Tensor, Shots | None]]:
        return {name: (self[name], self.sources(name), self.shots(name)) for name in self.categories}

    def _replace(self, banks: dict[str, tuple[Tensor, Tensor, Shots | None]]) -> None:
        for name in [name for name in self._buffers if name != "placeholder"]:
            delattr(self, name)
        banks = dict(sorted(banks.items()))
        for index, (bank, sources, shots) in enumerate(banks.values()):
            self.register_buffer(f"bank_{index}", bank)
            self.register_buffer(f"source_{index}", sources)
            for name, tensor in {} if shots is None else shots.to(self.placeholder.device).packed().items():
                self.register_buffer(f"{name}_{index}", tensor)
        kept = {category: shots for category, (_, _, shots) in banks.items() if shots is not None}
        self.register_to_config(
            sizes={category: len(bank) for category, (bank, _, _) in banks.items()},
            dim=next((bank.shape[1] for bank, _, _ in banks.values()), 0),
            shots={category: (len(shots.sizes), len(shots.pixels)) for category, shots in kept.items()},
        )

    @torch.no_grad()
    def distances(
        self,
        category: str,
        psi: Tensor,
        parts: int = 1,
        left_out: int | None = None,
        chunk: int | None = None,
        total: Tensor | None = None,
    ) -> Tensor:
        """Measures the squared distance E of every position to its nearest prototype, Eq. (14).

        Matrix products find the nearest prototype; the distance to it is then computed by differences, so that small
        distances are not lost to cancellation.

        Args:
            category: A category with a bank.
            psi: [N, C, h, w], C = dim.
            parts: Into how many equal parts the channels are split, see `PrototypeExtractor.parts`. The nearest is
                found for each part by itself, and E is the geometric mean of their squared distances (not in the
                paper): it is large where all agree, and no part needs a weight.
            left_out: Number of a normal picture whose prototypes are not looked at, to score it as if it were new;
                None: all are.
            chunk: Positions compared at once, which takes `chunk * size` float32 values of memory besides float32
                copies of `psi` and of the bank; None: as many as fit in 2^22 values (16 MiB).
            total: float32 [N h w, M], to which the squared distances in all channels to all M prototypes that are
                looked at are added; None: they are not kept.

        Returns:
            float32 [N, h, w], >= 0; exactly 0 where a distance is below 1e-10 of the squared length of psi.

        Raises:
            ValueError: If `category` has no bank, `psi` has another shape, or no prototype is left.
        """
        bank = self[category]  # [M, C]
        if psi.ndim != 4 or psi.shape[1] != bank.shape[1]:
            raise ValueError(f"`psi` must be [N, {bank.shape[1]}, h, w] as in the bank, got {list(psi.shape)}.")
        searches = self._searches(category, parts, left_out)
        n, _, h, w = psi.shape
        queries = psi.float().permute(0, 2, 3, 1).flatten(end_dim=2)  # [N h w, C]
        asked = zip(searches, queries.chunk(len(searches), dim=1), strict=True)
        found = [search.nearest(part, chunk, total)[0] for search, part in asked]
        mean = found[0] if len(found) == 1 else torch.stack(found).log().mean(dim=0).exp()
        return mean.view(n, h, w)

    def all_distances(self, category: str, psi: Tensor, parts: int = 1, left_out: int | None = None) -> Tensor:
        """Measures the squared distances of every position to all prototypes that are looked at.

        Args:
            category, psi, parts, left_out: as of [`distances`], which adds the same to its `total`; `parts` changes
                nothing but what is prepared.

        Returns:
            float32 [N, h, w, M], with the errors of cancellation.
        """
        searches = self._searches(category, parts, left_out)
        n, _, h, w = psi.shape
        queries = psi.float().permute(0, 2, 3, 1).flatten(end_dim=2).chunk(len(searches), dim=1)
        queries = [part - search.center for part, search in zip(queries, searches, strict=True)]
        total = sum(part.square().sum(dim=1, keepdim=True) for part in queries)  # [N h w, 1]
        total = total + sum(search.squares for search in searches)
        for part, search in zip(queries, searches, strict=True):
            total.addmm_(part, search.vectors.T, alpha=-2)
        return total.view(n, h, w, -1)

    def usual_distance(self, category: str, parts: int = 1) -> float | None:
        """Measures what E is where nothing is wrong: its median between normal pictures, each beside the others'
        prototypes. None where these are of one picture, or are not known to be of several.

        Args:
            category, parts: as of [`distances`].
        """
        bank, found = self[category], self._usual
        if found is None or found[0] is not bank or found[1] != parts:
            found = self._usual = bank, parts, self._measured(category, parts)
        return found[2]

    def _measured(self, category: str, parts: int) -> float | None:
        bank, sources, shots = self[category], self.sources(category), self.shots(category)
        if int(sources.max()) == int(sources.min()):
            return None
        own = torch.arange(len(bank), device=bank.device)
        if shots is not None and (straight := shots.places[:, 0] < len(shots.sizes)).any():
            own = own[straight]  # as inspected pictures are: not turned
        own = own[torch.linspace(0, len(own) - 1, min(len(own), _ASKED), device=bank.device).round().long()]
        others = sources[own, None] != sources  # [Q, M]
        logarithms = []
        for vectors in bank.float().chunk(parts, dim=1):
            far = torch.cdist(vectors[own], vectors).square()  # [Q, M]
            logarithms.append(torch.where(others, far, torch.inf).amin(dim=1).log())
        return float(torch.stack(logarithms).mean(dim=0).median().exp())

    def compared(self, category: str, left_out: int | None) -> Tensor | None:
        """Tells which prototypes are looked at without a picture, bool [size]; None: all."""
        return None if left_out is None else self.sources(category) != left_out

    def relative(self, category: str, distances: Tensor, parts: int = 1) -> Tensor:
        """Gives D: distances of [`distances`] in units of the mean squared length of the prototypes, which is the same
        for any extractor and part: 2 - 2 cos, in [0, 4], for features at unit length. Not in the paper."""
        lengths = [part.float().square().sum(dim=1).mean() for part in self[category].chunk(parts, dim=1)]
        return distances / torch.stack(lengths).clamp(min=torch.finfo(torch.float32).tiny).log().mean().exp()

    def deviations(self, *arguments) -> Tensor:
        """Tells a pipeline.py that an earlier version published, and that asks for its score, what to do."""
        raise ValueError(
            "This pipeline.py was published by an earlier version, whose score the installed anomalysd-pipeline no "
            "longer has; load the repository by `AnomalySDPipeline.from_pretrained` of the package instead."
        )

    def _searches(self, category: str, parts: int, left_out: int | None) -> list[NeighborSearch]:
        bank, search = self[category], self._search
        # Prepared once for all pictures in a row; the tensor itself is a key, because a changed bank is another one.
        if search is None or search[0] is not bank or search[1] != (parts, left_out):
            rows = bank if left_out is None else bank[self.compared(category, left_out)]
            if not len(rows):
                raise ValueError(f"`left_out` must leave prototypes of another picture, got {left_out!r}.")
            search = bank, (parts, left_out), [NeighborSearch(part) for part in rows.chunk(parts, dim=1)]
            self._search = search  # and not read from there again: another thread may put its own there
        return search[2]

    def __getstate__(self) -> dict:
        # Copies and pickles leave out what can be prepared anew.
        return {**self.__dict__, "_search": None, "_usual": None}
