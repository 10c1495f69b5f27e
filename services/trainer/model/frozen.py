"""Frozen linear layers that read the same input, multiplied as one product, forwards and backwards.

Owns where their weights lie and what multiplies them: unquantised ones become slices of one matrix, the others are
dequantised into a buffer that all layers share, so that a quantised base stays as small as it is. Knows no LoRA.
"""

import weakref
from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from shared.logs import get_logger
from shared.processor import this_processor

_log = get_logger("frozen")


class Buffer:
    """Memory for one dequantised matrix at a time, reused by all products: fresh pages cost more than filling them."""

    def __init__(self, device: torch.device | None = None) -> None:
        self._flat = torch.empty(0, device=device)
        # Weak: users hold the buffer, and a base in a circle would stay beside the next one.
        self._user: Callable[[], object] = lambda: None

    def take(self, user: object, rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, bool]:
        """A [rows, columns] matrix, valid until the next call, and whether it still holds what this user wrote."""
        unchanged = self._user() is user and self._flat.dtype == dtype
        if self._flat.dtype != dtype or self._flat.numel() < rows * columns:
            self._flat = torch.empty(rows * columns, dtype=dtype, device=self._flat.device)
        self._user = weakref.ref(user)
        return self._flat[: rows * columns].view(rows, columns), unchanged


class FrozenLinears:
    """Frozen layers without bias and with one input.

    Args:
        in_bf16: multiply in bf16 and return the input's dtype; int8 weights are exact in it, scales come after.
        as_gpu: multiply as on a GPU, by no kernel that only CPUs have.

    Attributes:
        slices: which output columns are each layer's.
    """

    def __init__(
        self, layers: Sequence[nn.Linear], buffer: Buffer, *, in_bf16: bool = False, as_gpu: bool = False
    ) -> None:
        self._layers = list(layers)
        self._buffer = buffer
        self._in_bf16 = in_bf16
        self._multiply = plain_product if as_gpu else multiply
        self._joined = _join(self._layers, torch.bfloat16 if in_bf16 else torch.float32)
        self._row_scales: Tensor | None = None
        ends = accumulate((layer.out_features for layer in layers), initial=0)
        self.slices = [slice(start, end) for start, end in pairwise(ends)]

    def product(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """`x W^T (+ residual)`: [tokens, inputs] → [tokens, outputs], of x's dtype."""
        if not self._in_bf16:
            return self._multiply(x, self._weight(x.dtype), residual)
        y, scales = self._multiply(x.bfloat16(), self._weight(torch.bfloat16)), self._scales()
        if scales is None:
            return y.to(x.dtype) if residual is None else residual + y
        return y * scales if residual is None else torch.addcmul(residual, y.to(x.dtype), scales)

    def gradient(self, grad: Tensor) -> Tensor:
        """`grad W`, the gradient of `product` by x: [tokens, outputs] → [tokens, inputs], of grad's dtype."""
        if not self._in_bf16:
            return self._multiply(grad, self._weight(grad.dtype).T)
        scales = self._scales()
        scaled = grad.bfloat16() if scales is None else torch.mul(grad, scales, out=grad.new_empty(0).bfloat16())
        return self._multiply(scaled, self._weight(torch.bfloat16).T).to(grad.dtype)

    def _weight(self, dtype: torch.dtype) -> Tensor:
        """All layers' weights [all outputs, inputs] in `dtype`; valid until any layer's next call."""
        first = self._layers[0].weight
        if first.dtype == dtype and first.is_floating_point():
            if len(self._layers) == 1:
                return first.detach()
            # A model that was moved to another dtype or device no longer uses the joined matrix.
            if self._joined is not None and self._joined.untyped_storage() is first.untyped_storage():
                return self._joined
        rows, filled = self._buffer.take(self, self.slices[-1].stop, self._layers[0].in_features, dtype)
        if not filled:
            for layer, part in zip(self._layers, self.slices, strict=True):
                dequantise(layer, rows[part], scaled=not self._in_bf16)
        return rows

    def _scales(self) -> Tensor | None:
        """fp32 scale of each output where weights are int8, else None."""
        if self._layers[0].weight.dtype != torch.int8:
            return None
        if self._row_scales is None:
            self._row_scales = torch.cat([row_scales(layer) for layer in self._layers])
        return self._row_scales


def multiply(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor:
    """`x W^T (+ residual)`: [tokens, inputs], [outputs, inputs] in any strides → [tokens, outputs].

    On CPUs oneDNN's kernels use AVX-512 on every processor that has it and bf16 instructions where there are any;
    MKL's use neither on AMD's (230 against 490 GFLOP/s in fp32, 1,000 in bf16, on two Zen 5 cores).
    """
    if x.device.type == "cpu" and _onednn_multiplies(x.dtype):
        if residual is None:
            return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")  # type: ignore[no-any-return]
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight, None, "add")  # type: ignore[no-any-return]
    return plain_product(x, weight, residual)


def plain_product(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor:
    """What `multiply` computes, by the device's own library."""
    return x @ weight.T if residual is None else torch.addmm(residual, x, weight.T)


@cache
def _onednn_multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN's product is the faster one on this processor, and runs: it raises where it has no kernel."""
    if dtype not in (torch.float32, torch.bfloat16) or not this_processor().avx512:
        return False
    x = torch.ones(1, 16, dtype=dtype)
    try:
        torch.ops.mkldnn._linear_pointwise(x, x, None, "none", [], "")
        torch.ops.mkldnn._linear_pointwise.binary(x, x[:, :1], x, None, "add")
    except (RuntimeError, AttributeError) as error:
        _log.warning("oneDNN kernel left out", dtype=str(dtype), error=str(error), processor=str(this_processor()))
        return False
    return True


def _join(layers: list[nn.Linear], dtype: torch.dtype) -> Tensor | None:
    """Make the layers' weights slices of one new matrix, if they are stored in the dtype they are multiplied in."""
    if len(layers) == 1 or any(hasattr(layer.weight, "quant_state") for layer in layers):
        return None
    if any(layer.weight.dtype not in (dtype, torch.float64) for layer in layers):
        return None
    joined = torch.cat([layer.weight.detach() for layer in layers])
    start = 0
    for layer in layers:
        layer.weight.data = joined[start : start + layer.out_features]
        start += layer.out_features
    return joined


@torch.no_grad()
def dequantise(layer: nn.Linear, out: Tensor, *, scaled: bool = True) -> None:
    """Write a frozen layer's weight, dequantised or cast, into `out` [outputs, inputs] of a wider dtype.

    bitsandbytes' int8: row i is q[i] * SCB[i] / 127 (LLM.int8(), Dettmers et al. 2022).

    Args:
        scaled: False leaves int8 weights unscaled: whole numbers, which bf16 holds exactly.
    """
    weight = layer.weight
    state = getattr(weight, "quant_state", None)
    if state is not None:
        from bitsandbytes.functional import dequantize_4bit

        out.copy_(dequantize_4bit(weight.data, state))
        return
    out.copy_(weight.data)
    if weight.dtype == torch.int8 and scaled:
        out.mul_(row_scales(layer).to(out.dtype)[:, None])


def row_scales(layer: nn.Linear) -> Tensor:
    """The scale of each row of bitsandbytes' int8 weight: fp32 [outputs]."""
    # bitsandbytes moves them from the weight to the layer's state on the layer's first own forward pass.
    on_weight: Tensor | None = getattr(layer.weight, "SCB", None)
    scales: Tensor = on_weight if on_weight is not None else layer.state.SCB  # type: ignore[union-attr, assignment]
    return scales / 127
