"""One adapter as it was read: a pair of matrices for each linear layer it changes. Knows no slots and no products."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch


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
