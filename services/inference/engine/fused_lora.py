"""Many adapters in one forward pass over fused projections: q, k and v are one product, and so is their LoRA.

A fused product's adapter is one pair again: the A of its parts one below the other, their B in the columns of the
part, zero elsewhere. Rows of one adapter share two products; rows of many adapters use batched ones over a copy of
what each row needs. A row keeps its copy until it gets another adapter. A step reads one copy per row, so that its
time does not depend on how many adapters there are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from services.inference.engine.cache import lazy_zeros
from services.inference.engine.lora import LoraWeights


@dataclass(frozen=True, slots=True)
class Part:
    """One linear layer within a fused product: its path, and which output columns it has."""

    path: str
    start: int
    size: int


class FusedStack:
    """Slots of one fused product.

    Attributes:
        a: [slots + 1, rank, in]; b: [slots + 1, rank, out]; None until an adapter touches one of the parts.
        ranks: of what each slot holds, over all parts; 0 for nothing.
    """

    def __init__(self, parts: Sequence[Part], in_features: int, *, slots: int, rows: int) -> None:
        self.parts, self.in_features, self._rows = parts, in_features, rows
        self.out_features = sum(part.size for part in parts)
        self.ranks = [0] * (slots + 1)
        self.a: torch.Tensor | None = None
        self.b: torch.Tensor | None = None
        self._row_a = self._row_b = torch.zeros(0)

    def write(self, slot: int, weights: LoraWeights, dtype: torch.dtype, device: torch.device) -> bool:
        """Overwrite a slot with an adapter's pairs; True if the rows' copies are no longer valid."""
        pairs = [(part, *weights.pairs[part.path]) for part in self.parts if part.path in weights.pairs]
        rank, before = sum(len(a) for _, a, _ in pairs), self.ranks[slot]
        self.ranks[slot] = rank
        invalid = self._reserve(rank, dtype, device)
        if self.a is None or self.b is None or not (rank or before):
            return invalid
        self.a[slot, rank:before] = 0
        self.b[slot, : max(rank, before)] = 0
        first = 0
        for part, a, b in pairs:
            rows = slice(first, first + len(a))
            self.a[slot, rows].copy_(a, non_blocking=True)
            self.b[slot, rows, part.start : part.start + part.size].copy_(b.T, non_blocking=True)
            first += len(a)
        return invalid

    def copy(self, rows: torch.Tensor, slots: torch.Tensor) -> None:
        """Give each of `rows` a copy of what the slot beside it holds."""
        if self.a is not None and self.b is not None:
            self._row_a[rows] = self.a[slots]
            self._row_b[rows] = self.b[slots]

    def for_all(self, slot: int) -> "Delta | None":
        """What one adapter adds to every row."""
        rank = self.ranks[slot]
        if not rank or self.a is None or self.b is None:
            return None
        return self.a[slot, :rank], self.b[slot, :rank], False

    def for_each(self, slots: Sequence[int]) -> "Delta | None":
        """What the copies of the first rows add, one copy to each row."""
        rank = max(self.ranks[slot] for slot in slots)
        if not rank:
            return None
        return self._row_a[: len(slots), :rank], self._row_b[: len(slots), :rank], True

    def _reserve(self, rank: int, dtype: torch.dtype, device: torch.device) -> bool:
        """Make room for a rank, in powers of two, never less again; True if the rows' copies are no longer valid."""
        present = 0 if self.a is None else self.a.shape[1]
        if rank <= present:
            return False
        grown = max(8, 1 << (rank - 1).bit_length())
        a = lazy_zeros((len(self.ranks), grown, self.in_features), dtype, device)
        b = lazy_zeros((len(self.ranks), grown, self.out_features), dtype, device)
        if self.a is not None and self.b is not None:
            # Slots never written stay untouched, and so take no memory.
            for slot in (slot for slot, used in enumerate(self.ranks) if used):
                a[slot, :present], b[slot, :present] = self.a[slot], self.b[slot]
        self.a, self.b = a, b
        self._row_a = lazy_zeros((self._rows, grown, self.in_features), dtype, device)
        self._row_b = lazy_zeros((self._rows, grown, self.out_features), dtype, device)
        return True


Delta = tuple[torch.Tensor, torch.Tensor, bool]
"""(A, B, batched): A [rank, in] and B [rank, out] for all rows, or [rows, rank, in] and [rows, rank, out]."""


class FusedLora:
    """All adapter slots of a model whose products are fused.

    Args:
        stacks: one for each fused product, in the order the forward pass asks for them.
        slots: adapters held at once.
        rows: sequences decoded together at most.
    """

    def __init__(
        self, stacks: Sequence[FusedStack], *, slots: int, rows: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.slots = slots
        self._stacks = stacks
        self._dtype, self._device = dtype, device
        self._nothing: list[Delta | None] = [None] * len(stacks)
        # The slot that each row has a copy of; -1 for none.
        self._copied = [-1] * rows
        self._chosen: tuple[int, ...] = ()
        self._deltas = self._nothing

    @property
    def modules(self) -> Mapping[str, tuple[int, int]]:
        """Path of every layer an adapter may target → (in, out) features."""
        return {part.path: (stack.in_features, part.size) for stack in self._stacks for part in stack.parts}

    def write(self, slot: int, weights: LoraWeights) -> None:
        """Put an adapter into a slot (from 1), replacing what was there."""
        invalid = [stack.write(slot, weights, self._dtype, self._device) for stack in self._stacks]
        self._copied = [-1 if any(invalid) or copied == slot else copied for copied in self._copied]
        self._chosen = ()

    def choose(self, slots: Sequence[int]) -> Sequence[Delta | None]:
        """What to add to each fused product when row i uses `slots[i]`."""
        distinct = set(slots)
        if distinct == {0}:
            return self._nothing
        if len(distinct) == 1:
            return [stack.for_all(slots[0]) for stack in self._stacks]
        chosen = tuple(slots)
        if chosen != self._chosen:
            self._copy(chosen)
            self._chosen, self._deltas = chosen, [stack.for_each(chosen) for stack in self._stacks]
        return self._deltas

    def _copy(self, slots: tuple[int, ...]) -> None:
        """Bring the rows' copies up to date; most rows have it from the step before."""
        stale = [row for row, slot in enumerate(slots) if self._copied[row] != slot]
        if not stale:
            return
        rows = torch.tensor(stale, device=self._device)
        wanted = torch.tensor([slots[row] for row in stale], device=self._device)
        for stack in self._stacks:
            stack.copy(rows, wanted)
        for row in stale:
            self._copied[row] = slots[row]


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
