"""Linear layers of the served base as fast matrix products: how weights are held, and the kernel that reads them.

Decoding a few rows reads every weight once per step, so its speed is bytes per weight. Sums are fp32 in every form.
Says which forms run on this processor (`unusable`); `probe` says which of them is fastest. Knows matrices, no model.
"""

from collections.abc import Callable
from functools import cache
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import nn

from shared.logs import get_logger
from shared.processor import this_processor

PackedPrecision = Literal["plain", "fp16w", "bf16w", "int8w"]
PACKED: tuple[PackedPrecision, ...] = get_args(PackedPrecision)
_log = get_logger("engine")


class PlainLinear:
    """Weights as they are, in any dtype and on any device."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight, self._bias = weight, bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, in] → [rows, out]."""
        return F.linear(x, self._weight, self._bias)


class ReorderedLinear:
    """Weights laid out for oneDNN's kernels, as Inductor does: the same fp32 product in less than half the time.

    Args:
        dtype: of weights and activations; bf16 is fast where the processor multiplies it.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> None:
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype), None)
        self._bias = None if bias is None else bias.to(dtype)
        self._dtype, self._returned = dtype, weight.dtype
        self._multiply: Callable[..., torch.Tensor] = torch.ops.mkldnn._linear_pointwise

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, in] → [rows, out]."""
        return self._multiply(x.to(self._dtype), self._packed, self._bias, "none", [], "").to(self._returned)


class HalfLinear:
    """fp16 weights, fp32 arithmetic (FBGEMM's packed product): half the bytes; the only error is rounding to fp16."""

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


Linear = PlainLinear | ReorderedLinear | HalfLinear | ByteLinear


def _reordered_fp32(weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
    return ReorderedLinear(weight, bias, torch.float32)


def _reordered_bf16(weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
    return ReorderedLinear(weight, bias, torch.bfloat16)


def _plain(weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
    plain = weight.device.type == "cpu" and weight.dtype == torch.float32
    return _reordered_fp32(weight, bias) if plain and _reorders_fp32() else PlainLinear(weight, bias)


Pack = Callable[[torch.Tensor, torch.Tensor | None], Linear]
_KINDS: dict[PackedPrecision, Pack] = {
    "plain": _plain,
    "fp16w": HalfLinear,
    "bf16w": _reordered_bf16,
    "int8w": ByteLinear,
}


@cache
def _reorders_fp32() -> bool:
    reason = _failure(_reordered_fp32)
    if reason is not None:
        _log.warning("kernel left out", kernel="oneDNN fp32", error=reason, processor=str(this_processor()))
    return reason is None


def unusable(precision: PackedPrecision) -> str | None:
    """Why this processor cannot multiply weights packed so; None if it can, which a small product shows."""
    if precision == "bf16w" and not this_processor().converts_bf16:
        return f"bf16 weights need AVX-512, and this processor has none ({this_processor()})"
    return _failure(_KINDS[precision])


def _failure(kind: Pack) -> str | None:
    """What is wrong with a kernel: it raises, or sixteen ones and a bias of one do not add up to about 17."""
    ones = torch.ones(16, 16)
    try:
        product = kind(ones, ones[0])(ones[:2])
    except Exception as error:
        return (str(error).splitlines() or [type(error).__name__])[0]
    return None if torch.allclose(product.float(), torch.tensor(17.0), rtol=0.01) else "its product is wrong"


def pack(layers: list[nn.Linear], precision: PackedPrecision) -> Linear:
    """Several layers with the same input as one product, their outputs side by side.

    Where the product keeps its weights as they are, the layers' become views of them: a base is never there twice.
    """
    weights: list[torch.Tensor] = [layer.weight.detach() for layer in layers]
    weight = torch.cat(weights) if len(weights) > 1 else weights[0]
    biases: list[torch.Tensor] = [
        torch.zeros_like(layer.weight[:, 0]) if layer.bias is None else layer.bias.detach() for layer in layers
    ]
    bias = torch.cat(biases) if any(layer.bias is not None for layer in layers) else None
    packed = _KINDS[precision](weight, bias)
    if isinstance(packed, PlainLinear):
        for layer, part in zip(layers, torch.split(weight, [layer.out_features for layer in layers]), strict=True):
            layer.weight.data = part
    return packed


class Embedding:
    """Token embeddings, held in half the bytes where the rest of the model is packed too."""

    def __init__(self, weight: torch.Tensor, precision: PackedPrecision) -> None:
        self._weight = weight if precision == "plain" else weight.half()
        self._dtype = weight.dtype

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """[rows] → [rows, hidden]."""
        return F.embedding(ids, self._weight).to(self._dtype)
