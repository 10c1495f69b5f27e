"""Many adapters in one forward pass: each linear layer holds a stack of adapters, each row picks its own.

`y = W x + B[slot] (A[slot] x)`, slot 0 being zero for rows of the base. Ranks are padded with zeros, which is exact,
and only the largest rank in the current batch is computed. Knows slots; the engine knows which adapter is in which.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from services.inference.engine.cache import lazy_zeros


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """One adapter.

    Attributes:
        rank: of every pair.
        pairs: module path → (A [rank, in], B [out, rank]); B carries the scaling.
    """

    rank: int
    pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]]

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for pair in self.pairs.values() for t in pair)

    def pinned(self) -> "LoraWeights":
        """The same adapter in one page-locked buffer, which a GPU reads without holding up the thread that asks.

        Needs CUDA. The buffer may be let go while a copy from it is under way: torch's allocator waits for that.
        """
        elements = sum(t.numel() for pair in self.pairs.values() for t in pair)
        dtype = next(iter(self.pairs.values()))[0].dtype
        return self.within(torch.empty(elements, dtype=dtype, pin_memory=True))

    def within(self, buffer: torch.Tensor) -> "LoraWeights":
        """The same adapter, its matrices copied one behind the other into a buffer [elements] of their dtype.

        B lies there as [rank, out], which is how slots hold it: anything else is laid out anew, in other memory, before
        a GPU takes it.
        """
        pairs, first = {}, 0
        for path, (a, b) in self.pairs.items():
            second = first + a.numel()
            end = second + b.numel()
            moved_a = buffer[first:second].view(a.shape).copy_(a)
            pairs[path] = moved_a, buffer[second:end].view(b.T.shape).copy_(b.T).T
            first = end
        return LoraWeights(self.rank, pairs)


class Selection:
    """Which slot each row of the current forward pass uses; shared by all layers."""

    def __init__(self) -> None:
        self.index: torch.Tensor | None = None
        self.single: int | None = None
        self.rank = 0

    def set(self, slots: Sequence[int], ranks: Sequence[int], device: torch.device) -> None:
        """One slot and rank per row; slot 0 is the base."""
        distinct = set(slots)
        self.rank = max(ranks, default=0)
        self.single = distinct.pop() if len(distinct) == 1 else None
        self.index = None if self.single is not None else torch.tensor(slots, device=device)


class LoraLinear(nn.Module):
    """A linear layer with a stack of adapters.

    Attributes:
        a: [slots, rank, in]; b: [slots, rank, out]; None until an adapter touches this layer.
    """

    def __init__(self, base: nn.Linear, selection: Selection) -> None:
        super().__init__()
        self.base = base
        self.in_features, self.out_features = base.in_features, base.out_features
        self._selection = selection
        self.a: torch.Tensor | None = None
        self.b: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base(x)
        selection = self._selection
        if self.a is None or self.b is None or selection.single == 0:
            return y
        a, b = self.a[:, : selection.rank], self.b[:, : selection.rank]
        rows = x.to(a.dtype)
        if selection.single is not None:
            delta = (rows @ a[selection.single].T) @ b[selection.single]
        else:
            assert selection.index is not None
            lora_hidden = torch.bmm(rows, a.index_select(0, selection.index).transpose(1, 2))
            delta = torch.bmm(lora_hidden, b.index_select(0, selection.index))
        return y + delta.to(y.dtype)


class LoraStack:
    """All adapter slots of a model.

    Args:
        model: its linear layers under `root` are replaced by `LoraLinear` in place.
        slots: adapters held at once.
        dtype: what adapters are held and computed in.
    """

    def __init__(self, model: nn.Module, *, root: str, slots: int, dtype: torch.dtype, device: torch.device) -> None:
        self.slots = slots
        self.selection = Selection()
        self._dtype, self._device = dtype, device
        self._written = 0
        self._layers: dict[str, LoraLinear] = {}
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and name.startswith(root + "."):
                parent, _, child = name.rpartition(".")
                layer = LoraLinear(module, self.selection)
                setattr(model.get_submodule(parent), child, layer)
                self._layers[name] = layer

    @property
    def modules(self) -> dict[str, tuple[int, int]]:
        """Path of every layer an adapter may target → (in, out) features."""
        return {path: (layer.in_features, layer.out_features) for path, layer in self._layers.items()}

    def write(self, slot: int, weights: LoraWeights) -> None:
        """Put an adapter into a slot (from 1), replacing what was there."""
        fresh, self._written = slot > self._written, max(slot, self._written)
        for path, layer in self._layers.items():
            pair = weights.pairs.get(path)
            if pair is not None:
                self._reserve(layer, weights.rank)
            if layer.a is None or layer.b is None:
                continue
            if not fresh:
                layer.a[slot] = 0
                layer.b[slot] = 0
            if pair is not None:
                layer.a[slot, : weights.rank].copy_(pair[0], non_blocking=True)
                layer.b[slot, : weights.rank].copy_(pair[1].T, non_blocking=True)

    def _reserve(self, layer: LoraLinear, rank: int) -> None:
        """Make room for `rank` in a layer's stack; it grows in powers of two, and never back."""
        present = 0 if layer.a is None else layer.a.shape[1]
        if rank <= present:
            return
        grown = max(8, 1 << (rank - 1).bit_length())
        a = lazy_zeros((self.slots + 1, grown, layer.in_features), self._dtype, self._device)
        b = lazy_zeros((self.slots + 1, grown, layer.out_features), self._dtype, self._device)
        if layer.a is not None and layer.b is not None:
            # Slots never written stay untouched, and so take no memory.
            used = slice(1, self._written + 1)
            a[used, :present], b[used, :present] = layer.a[used], layer.b[used]
        layer.a, layer.b = a, b
