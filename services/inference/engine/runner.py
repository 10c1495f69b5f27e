"""What the engine needs of a model: forward passes over numbered rows, LoRA slots, and a cache whose rows can move.

There are two: `llama` (plain tensors, fused and packed, for decoders of the Llama architecture) and
`transformers_runner` (transformers' own forward pass, for the rest). Knows no requests, no sampling and no text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from services.inference.engine.fused_lora import FusedLora


@dataclass(frozen=True, slots=True)
class Piece:
    """Prompt tokens to put into a row from position `start`, with the adapter in `slot`."""

    row: int
    ids: Sequence[int]
    start: int
    slot: int


class RowCache(Protocol):
    """Keys and values of the rows."""

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of a row over another row."""
        ...

    def clear(self, row: int, length: int) -> None:
        """Zero a row's first `length` positions.

        Masked positions have no weight, but 0 x NaN is NaN: what a broken adapter left must not reach the row's next
        sequence.
        """
        ...


class ModelRunner(Protocol):
    """A model with its LoRA slots and its KV cache.

    Attributes:
        dtype: what adapters are held and computed in.
        rows: sequences held at once.
        context: most tokens of one sequence.
    """

    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def rows(self) -> int: ...
    @property
    def context(self) -> int: ...
    @property
    def vocabulary(self) -> int: ...
    @property
    def lora(self) -> FusedLora: ...
    @property
    def cache(self) -> RowCache: ...

    def prefill(self, row: int, ids: Sequence[int], start: int, slot: int, *, all_logits: bool) -> torch.Tensor:
        """Put prompt tokens into a row from position `start`.

        Returns:
            Logits, fp32: [len(ids), vocabulary] if `all_logits`, else [1, vocabulary] of the last token.
        """
        ...

    def prefill_together(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """Put pieces of several prompts into as many rows.

        Returns:
            Logits of each piece's last token, fp32 [pieces, vocabulary].
        """
        ...

    def decode(self, first: int, ids: Sequence[int], positions: Sequence[int], slots: Sequence[int]) -> torch.Tensor:
        """One token for each of the rows `first, first + 1, …`, each at its own position and with its own adapter.

        Returns:
            Logits, fp32 [rows, vocabulary].
        """
        ...
