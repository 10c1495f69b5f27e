"""Frozen linear layers that read the same input, multiplied as one product.

Owns where their weights lie: unquantised ones become slices of one matrix, the others are widened into a buffer that
all layers share, so that a quantised base stays as small as it is. Knows nothing of LoRA.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


class Buffer:
    """Memory for one widened matrix at a time, kept between products: fresh pages cost more than filling them."""

    def __init__(self) -> None:
        self._flat = torch.empty(0)

    def take(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """A [rows, columns] matrix of any content, valid until the next call."""
        if self._flat.dtype != dtype or self._flat.numel() < rows * columns:
            self._flat = torch.empty(rows * columns, dtype=dtype)
        return self._flat[: rows * columns].view(rows, columns)


class FrozenLinears:
    """Frozen layers without bias and with one input.

    Attributes:
        slices: which output columns are each layer's.
    """

    def __init__(self, layers: Sequence[nn.Linear], buffer: Buffer) -> None:
        self._layers = list(layers)
        self._buffer = buffer
        self._joined = _join(self._layers)
        ends = torch.tensor([0, *(layer.out_features for layer in layers)]).cumsum(0).tolist()
        self.slices = [slice(start, end) for start, end in pairwise(ends)]

    def weight(self, dtype: torch.dtype) -> Tensor:
        """All layers' weights [all outputs, inputs] in `dtype`; valid until any layer's next call."""
        first = self._layers[0].weight
        if first.dtype == dtype and first.is_floating_point():
            if len(self._layers) == 1:
                return first.detach()
            # A model that was moved to another dtype or place has left the joined matrix.
            if self._joined is not None and self._joined.data_ptr() == first.data_ptr():
                return self._joined
        rows = self._buffer.take(self.slices[-1].stop, self._layers[0].in_features, dtype)
        for layer, part in zip(self._layers, self.slices, strict=True):
            widen(layer, rows[part])
        return rows


def _join(layers: list[nn.Linear]) -> Tensor | None:
    """Let the layers' weights be slices of one new matrix, if they are held as they are multiplied."""
    if len(layers) == 1 or any(type(layer.weight) is not nn.Parameter for layer in layers):
        return None
    if any(layer.weight.dtype not in (torch.float32, torch.float64) for layer in layers):
        return None
    joined = torch.cat([layer.weight.detach() for layer in layers])
    start = 0
    for layer in layers:
        layer.weight.data = joined[start : start + layer.out_features]
        start += layer.out_features
    return joined


@torch.no_grad()
def widen(layer: nn.Linear, out: Tensor) -> None:
    """Write a frozen layer's weight, dequantised if need be, into `out` [outputs, inputs] of a wider dtype.

    bitsandbytes' int8: row i is q[i] * SCB[i] / 127 (LLM.int8(), Dettmers et al. 2022).
    """
    weight = layer.weight
    state = getattr(weight, "quant_state", None)
    if state is not None:
        from bitsandbytes.functional import dequantize_4bit

        out.copy_(dequantize_4bit(weight.data, state))
        return
    out.copy_(weight.data)
    if weight.dtype == torch.int8:
        out.mul_(_row_scales(layer).to(out.dtype)[:, None] / 127)


def _row_scales(layer: nn.Linear) -> Tensor:
    # bitsandbytes moves them from the weight to the layer's state on the layer's first own forward pass.
    on_weight: Tensor | None = getattr(layer.weight, "SCB", None)
    scales: Tensor = on_weight if on_weight is not None else layer.state.SCB  # type: ignore[union-attr, assignment]
    return scales
