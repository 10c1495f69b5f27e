"""Keys and values of all layers in one tensor: one row per running sequence, every row starting at position 0.

Running rows lie at the front, so that a forward pass sees them as a view and copies nothing. Knows tensors and rows;
the scheduler knows which sequence is in which row.
"""

import torch

from services.inference.engine.cache import lazy_zeros


class KeyValues:
    """One tensor [layers, 2, rows, heads, capacity, head_dim]; the second dimension is keys, then values."""

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
        self._all = lazy_zeros((layers, 2, rows, heads, capacity, head_dim), dtype, device)
        self.layers = list(self._all.unbind(0))
        self.heads = heads

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of a row over another row."""
        self._all[:, :, target, :, :length] = self._all[:, :, source, :, :length]

    def clear(self, row: int, length: int) -> None:
        """Zero a row's first `length` positions; see `RowCache.clear`."""
        self._all[:, :, row, :, :length] = 0
