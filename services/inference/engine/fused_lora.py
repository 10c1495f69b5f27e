"""Many adapters in one forward pass over fused projections: q, k and v are one product, and so is their LoRA.

A fused product's adapter is one pair again: the A of its parts one below the other, their B in the columns of the
part, zero elsewhere. Rows of one adapter share two products; rows of many adapters use batched ones over a copy of
what each row needs. A row keeps its copy until it gets another adapter. A step reads one copy per row, so that its
time does not depend on how many adapters there are.

An adapter takes what its own rank needs, in one buffer that the thread that read it lays out: the engine's thread only
takes it in. The rows' copies are as large as the largest rank held, in powers of two.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from services.inference.engine.cache import lazy_zeros
from services.inference.engine.lora import LoraWeights

Pair = tuple[torch.Tensor, torch.Tensor]
"""(A [rank, in], B [rank, out]) of one fused product, rank being the sum over its parts."""
Delta = tuple[torch.Tensor, torch.Tensor, bool]
"""(A, B, batched): A [rank, in] and B [rank, out] for all rows, or [rows, rank, in] and [rows, rank, out]."""


@dataclass(frozen=True, slots=True)
class Part:
    """One linear layer within a fused product: its path, and which output columns it has."""

    path: str
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class Product:
    """One fused product: its linear layers and how many features go in."""

    parts: Sequence[Part]
    in_features: int

    @property
    def out_features(self) -> int:
        return sum(part.size for part in self.parts)

    def rank(self, weights: LoraWeights) -> int:
        """The adapter's rank over all parts; 0 if it leaves the product alone."""
        return sum(len(weights.pairs[part.path][0]) for part in self.parts if part.path in weights.pairs)

    def fill(self, pair: Pair, weights: LoraWeights) -> None:
        """Lay the parts' matrices out in a pair of zeros."""
        first = 0
        for part in self.parts:
            if part.path in weights.pairs:
                a, b = weights.pairs[part.path]
                rows = slice(first, first + len(a))
                pair[0][rows] = a
                pair[1][rows, part.start : part.start + part.size] = b.T
                first += len(a)


@dataclass(frozen=True, slots=True)
class FusedAdapter:
    """One adapter as the products hold it.

    Attributes:
        rank: of each of its layers.
        ranks: of each product's pair; 0 where the adapter leaves the product alone.
        buffer: [elements] all pairs, one behind the other.
    """

    rank: int
    ranks: Sequence[int]
    buffer: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.buffer.numel() * self.buffer.element_size()

    def pairs(self, products: Sequence[Product]) -> list[Pair | None]:
        """Each product's pair, views of the buffer."""
        found: list[Pair | None] = []
        start = 0
        for product, rank in zip(products, self.ranks, strict=True):
            middle = start + rank * product.in_features
            end = middle + rank * product.out_features
            a, b = self.buffer[start:middle], self.buffer[middle:end]
            found.append((a.view(rank, -1), b.view(rank, -1)) if rank else None)
            start = end
        return found


class RowCopies:
    """For each row a copy of one product's pair, zero beyond the pair's own rank.

    Attributes:
        rank: the largest it has room for.
        a: [rows, rank, in]; b: [rows, rank, out].
    """

    def __init__(self, product: Product, rows: int, rank: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rank = rank
        self.a = lazy_zeros((rows, rank, product.in_features), dtype, device)
        self.b = lazy_zeros((rows, rank, product.out_features), dtype, device)
        self._ranks = [0] * rows

    def put(self, row: int, pair: Pair | None) -> None:
        """Overwrite a row's copy."""
        before, rank = self._ranks[row], 0
        if pair is not None:
            rank = len(pair[0])
            self.a[row, :rank] = pair[0]
            self.b[row, :rank] = pair[1]
        if rank < before:
            self.a[row, rank:before] = 0
            self.b[row, rank:before] = 0
        self._ranks[row] = rank


class FusedLora:
    """All adapter slots of a model whose products are fused.

    Args:
        products: in the order the forward pass asks for them.
        slots: adapters held at once.
        rows: sequences decoded together at most.
    """

    def __init__(
        self, products: Sequence[Product], *, slots: int, rows: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.slots = slots
        self._products, self._rows = products, rows
        self._dtype, self._device = dtype, device
        # Slot → the pair of each product.
        self._held: dict[int, list[Pair | None]] = {0: [None] * len(products)}
        self._copies = [RowCopies(product, rows, 0, dtype, device) for product in products]
        # The slot that each row has a copy of; -1 for none.
        self._copied = [-1] * rows
        self._chosen: tuple[int, ...] = ()
        self._deltas: Sequence[Delta | None] = []

    @property
    def modules(self) -> Mapping[str, tuple[int, int]]:
        """Path of every layer an adapter may target → (in, out) features."""
        return {part.path: (product.in_features, part.size) for product in self._products for part in product.parts}

    def prepare(self, weights: LoraWeights) -> FusedAdapter:
        """Lay an adapter out as `write` takes it, in memory that the device can read while this goes on: any thread."""
        ranks = [product.rank(weights) for product in self._products]
        sizes = (product.in_features + product.out_features for product in self._products)
        elements = sum(rank * size for rank, size in zip(ranks, sizes, strict=True))
        buffer = torch.zeros(elements, dtype=self._dtype, pin_memory=self._device.type == "cuda")
        adapter = FusedAdapter(weights.rank, ranks, buffer)
        for product, pair in zip(self._products, adapter.pairs(self._products), strict=True):
            if pair is not None:
                product.fill(pair, weights)
        return adapter

    def write(self, slot: int, adapter: FusedAdapter) -> None:
        """Put an adapter into a slot (from 1), replacing what was there.

        Raises:
            torch.OutOfMemoryError: the device has no room; every slot holds what it held.
        """
        # The copy from page-locked memory holds up nobody, and torch keeps the buffer until it is done.
        moved = FusedAdapter(adapter.rank, adapter.ranks, adapter.buffer.to(self._device, non_blocking=True))
        copies = [self._with_room(number, slot, rank) for number, rank in enumerate(adapter.ranks)]
        # From here on nothing can fail.
        if copies != self._copies:
            self._copies, self._copied = copies, [-1] * self._rows
        self._held[slot] = moved.pairs(self._products)
        self._forget_copies(slot)

    def free(self, slot: int) -> None:
        """Give back a slot's memory; no row uses it any more."""
        self._held.pop(slot, None)
        self._forget_copies(slot)

    def choose(self, slots: Sequence[int]) -> Sequence[Delta | None]:
        """What to add to each product when row i uses `slots[i]`."""
        if len(set(slots)) == 1:
            return [None if pair is None else (*pair, False) for pair in self._pairs(slots[0])]
        chosen = tuple(slots)
        if chosen != self._chosen:
            self._copy(chosen)
            self._chosen, self._deltas = chosen, self._for_each(chosen)
        return self._deltas

    def _pairs(self, slot: int) -> list[Pair | None]:
        return self._held.get(slot) or self._held[0]

    def _for_each(self, slots: tuple[int, ...]) -> list[Delta | None]:
        """What the copies of the first rows add, one copy to each row."""
        distinct = [self._pairs(slot) for slot in set(slots)]
        deltas: list[Delta | None] = []
        for number, copies in enumerate(self._copies):
            rank = max(_rank(pairs[number]) for pairs in distinct)
            deltas.append((copies.a[: len(slots), :rank], copies.b[: len(slots), :rank], True) if rank else None)
        return deltas

    def _copy(self, slots: tuple[int, ...]) -> None:
        """Bring the rows' copies up to date; most rows have theirs from the step before."""
        for row, slot in enumerate(slots):
            if self._copied[row] != slot:
                for copies, pair in zip(self._copies, self._pairs(slot), strict=True):
                    copies.put(row, pair)
                self._copied[row] = slot

    def _with_room(self, number: int, slot: int, rank: int) -> RowCopies:
        """The rows' copies of a product as large as its slots need once one of them holds this rank."""
        others = (_rank(pairs[number]) for held, pairs in self._held.items() if held != slot)
        room, present = _with_room_for(max(rank, *others)), self._copies[number]
        if room == present.rank:
            return present
        return RowCopies(self._products[number], self._rows, room, self._dtype, self._device)

    def _forget_copies(self, slot: int) -> None:
        self._copied = [-1 if copied == slot else copied for copied in self._copied]
        self._chosen = ()


def add_delta(y: torch.Tensor, x: torch.Tensor, delta: Delta | None) -> torch.Tensor:
    """`y + B (A x)`; y [rows, out] is changed in place, x [rows, in], all of one dtype."""
    if delta is None:
        return y
    a, b, batched = delta
    if not batched:
        return y.addmm_(x @ a.T, b)
    # The row vector is on the left: with a column vector on the right MKL's batched product takes ten times as long.
    lora_hidden = torch.bmm(x[:, None], a.transpose(1, 2))
    return y.unsqueeze(1).baddbmm_(lora_hidden, b).squeeze(1)


def copied_bytes(products: Sequence[Product], rank: int, dtype: torch.dtype) -> int:
    """Bytes of one row's copies where adapters of this rank change every layer."""
    return sum(
        _with_room_for(rank * len(product.parts)) * (product.in_features + product.out_features) * dtype.itemsize
        for product in products
    )


def _rank(pair: Pair | None) -> int:
    return 0 if pair is None else len(pair[0])


def _with_room_for(rank: int) -> int:
    """The next power of two, 8 at least; 0 for 0."""
    return max(8, 1 << (rank - 1).bit_length()) if rank else 0
