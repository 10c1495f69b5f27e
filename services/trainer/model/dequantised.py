"""int8 layers on a GPU as half-precision products of their dequantised weights, forwards and backwards.

bitsandbytes' own product rounds activations to int8, looks for outlier columns over everything that shares a
micro-batch (so that a sample's loss depends on its neighbours), reads the device once or twice a layer, and computes
the gradient in fp32 (LLM.int8(), Dettmers et al. 2022; made for inference). This is the function CPUs train with:
unrounded activations times the weights that int8 stands for.
"""

from typing import Any

import torch
from bitsandbytes.nn import Linear8bitLt
from torch import Tensor, nn
from torch.nn import functional

from services.trainer.model.frozen import Buffer, row_scales


class _DequantisedProduct(torch.autograd.Function):
    """y = x W^T + b; W is dequantised again for each direction, nothing but the layer is saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: "DequantisedLinear", dtype: torch.dtype) -> Tensor:
        ctx.layer, ctx.input_dtype = layer, x.dtype
        bias = None if layer.bias is None else layer.bias.to(dtype)
        return functional.linear(x.to(dtype), layer.dequantised(dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        return (grad @ ctx.layer.dequantised(grad.dtype)).to(ctx.input_dtype), None, None


class DequantisedLinear(Linear8bitLt):  # type: ignore[misc]
    """A frozen int8 layer that multiplies in autocast's dtype, or its input's without autocast."""

    buffer: Buffer

    def forward(self, x: Tensor) -> Tensor:
        """[…, inputs] → […, outputs] in the dtype of the product."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        product: Tensor = _DequantisedProduct.apply(x, self, dtype)  # type: ignore[no-untyped-call]
        return product

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """The weight [outputs, inputs] in `dtype`; valid until any layer's next call, which its stream comes after."""
        out, filled = self.buffer.take(self, self.out_features, self.in_features, dtype)
        if not filled:
            # One kernel, computed in fp32 and rounded once.
            torch.mul(self.weight.data, row_scales(self)[:, None], out=out)
        return out


def multiply_dequantised(model: nn.Module) -> None:
    """Let every int8 layer of a frozen model multiply its dequantised weights, in place."""
    buffers: dict[torch.device, Buffer] = {}
    module: Any
    for module in model.modules():
        if type(module) is Linear8bitLt:
            module.__class__ = DequantisedLinear
            module.buffer = buffers.setdefault(module.weight.device, Buffer(module.weight.device))
