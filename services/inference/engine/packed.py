"""Linear layers of the served base as fast matrix products: how weights are held, and the kernel that reads them.

Decoding a few rows reads every weight once per step, so its speed is bytes per weight. Activations and sums stay fp32
in every form here; which form is fast on this processor is the affair of `probe`. Knows matrices, no model.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import nn

PackedPrecision = Literal["plain", "fp16w", "int8w"]
PACKED: tuple[PackedPrecision, ...] = get_args(PackedPrecision)


class PlainLinear:
    """Weights as they are, in any dtype and on any device."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight, self._bias = weight, bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, in] → [rows, out]."""
        return F.linear(x, self._weight, self._bias)


class HalfLinear:
    """fp16 weights, fp32 arithmetic (FBGEMM's packed product): half the bytes, no error but the rounding to fp16."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        # The product adds the bias it was packed with.
        self._packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), None if bias is None else bias.float())
        self._multiply: Callable[..., torch.Tensor] = torch.ops.quantized.linear_dynamic_fp16

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, in] → [rows, out]."""
        return self._multiply(x, self._packed)


class ByteLinear:
    """int8 weights with one scale per output row; activations bf16, sums fp32: a quarter of the bytes."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        weight = weight.float()
        scales = (weight.abs().amax(1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        self._weight = (weight / scales[:, None]).round().to(torch.int8)
        self._scales, self._bias = scales.bfloat16(), bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, in] → [rows, out]."""
        y = torch._weight_int8pack_mm(x.bfloat16(), self._weight, self._scales).float()
        return y if self._bias is None else y.add_(self._bias)


Linear = PlainLinear | HalfLinear | ByteLinear
_KINDS: dict[PackedPrecision, Any] = {"plain": PlainLinear, "fp16w": HalfLinear, "int8w": ByteLinear}


def pack(layers: list[nn.Linear], precision: PackedPrecision) -> Linear:
    """Several layers with the same input as one product, their outputs side by side."""
    # One layer alone keeps its tensor: an output layer tied to the embedding stays tied.
    weights: list[torch.Tensor] = [layer.weight.detach() for layer in layers]
    weight = torch.cat(weights) if len(weights) > 1 else weights[0]
    biases: list[torch.Tensor] = [
        torch.zeros_like(layer.weight[:, 0]) if layer.bias is None else layer.bias.detach() for layer in layers
    ]
    bias = torch.cat(biases) if any(layer.bias is not None for layer in layers) else None
    linear: Linear = _KINDS[precision](weight, bias)
    return linear


class Embedding:
    """Token embeddings, held in half the bytes where the rest of the model is packed too."""

    def __init__(self, weight: torch.Tensor, precision: PackedPrecision) -> None:
        self._weight = weight if precision == "plain" else weight.half()
        self._dtype = weight.dtype

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """[rows] → [rows, hidden]."""
        return F.embedding(ids, self._weight).to(self._dtype)
