"""The slot KV cache: one row per running sequence, every row starting at position 0.

Running rows always lie at the front, so that a forward pass sees them as a view and copies nothing. Knows tensors and
rows; the scheduler knows which sequence is in which row.
"""

from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache, CacheLayerMixin


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros that take memory only where they are written: on a CPU the pages come from calloc, untouched.

    `torch.zeros` writes every page; a cache for 16 rows of 2,048 tokens would take 1.5 GB at once.
    """
    if device.type != "cpu" or 0 in shape:
        return torch.zeros(shape, dtype=dtype, device=device)
    size = int(np.prod(shape)) * dtype.itemsize
    return torch.from_numpy(np.zeros(size, np.uint8)).view(dtype).view(shape)


class Window:
    """Which part of the cache the current forward pass writes and reads.

    Attributes:
        first, count: the rows.
        positions: where each row's new tokens go: int64 [count, new].
        length: how many positions are read, at least the largest position + 1.
    """

    def __init__(self) -> None:
        self.first = 0
        self.count = 0
        self.length = 0
        self.positions = torch.zeros(0, 0, dtype=torch.int64)
        self.row_index = torch.zeros(0, 1, dtype=torch.int64)

    def set(self, first: int, positions: torch.Tensor, length: int) -> None:
        self.first, self.count, self.length = first, positions.shape[0], length
        self.positions = positions
        self.row_index = torch.arange(first, first + self.count, device=positions.device)[:, None]


class SlotLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one layer: [rows, heads, capacity, head_dim]."""

    is_sliding = False

    def __init__(self, window: Window, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device):
        super().__init__()
        self._window = window
        self.keys = lazy_zeros(shape, dtype, device)
        self.values = lazy_zeros(shape, dtype, device)
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the tensors are allocated by the constructor."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new tokens' [count, heads, new, head_dim] and return all that the rows may attend to."""
        window = self._window
        # Indices on both sides of a slice put the heads last: [count, new, heads, head_dim].
        self.keys[window.row_index, :, window.positions] = key_states.transpose(1, 2)
        self.values[window.row_index, :, window.positions] = value_states.transpose(1, 2)
        rows = slice(window.first, window.first + window.count)
        return self.keys[rows, :, : window.length], self.values[rows, :, : window.length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._window.length, 0

    def get_seq_length(self) -> int:
        return self._window.length

    def get_max_length(self) -> int:
        return int(self.keys.shape[2])


class SlotCache(Cache):  # type: ignore[misc]
    """KV cache of `rows` sequences of at most `capacity` tokens each, as transformers' models take it."""

    def __init__(
        self,
        *,
        layers: int,
        rows: int,
        heads: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.window = Window()
        shape = (rows, heads, capacity, head_dim)
        self._slots = [SlotLayer(self.window, shape, dtype, device) for _ in range(layers)]
        super().__init__(layers=self._slots)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of a row over another row."""
        for layer in self._slots:
            layer.keys[target, :, :length] = layer.keys[source, :, :length]
            layer.values[target, :, :length] = layer.values[source, :, :length]

    def clear(self, row: int, length: int) -> None:
        """Zero a row's first `length` positions.

        Masked positions have no weight, but 0 × NaN is NaN: what a broken adapter left must not reach the row's next
        sequence.
        """
        for layer in self._slots:
            layer.keys[row, :, :length] = 0
            layer.values[row, :, :length] = 0
