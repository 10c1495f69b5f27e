"""Mixed precision on a CPU: base weights stored in half precision, everything between the products in fp32.

The products are fp32 too, at half the memory of an fp32 base, unless autocast or `frozen` multiplies in bf16: CPUs
without bf16 arithmetic gain nothing by that (it runs at fp32's rate or below). bitsandbytes does the same for int8 and
nf4.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class _MixedPrecisionProduct(torch.autograd.Function):
    """y = x W^T + b with a frozen half-precision W, cast in both directions instead of stored as an fp32 copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return grads[0] @ weight.to(grads[0].dtype), None, None


class MixedPrecisionLinear(nn.Linear):
    """A frozen linear layer whose weight is cast to its input's dtype on the fly."""

    def forward(self, input: Tensor) -> Tensor:
        product: Tensor = _MixedPrecisionProduct.apply(input, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return product


def compute_in_fp32(model: nn.Module) -> None:
    """Let a frozen half-precision model compute in fp32, in place; a no-op on an fp32 model."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter) or weight.dtype not in (torch.bfloat16, torch.float16):
            continue
        if type(module) is nn.Linear:
            module.__class__ = MixedPrecisionLinear
        elif isinstance(module, nn.Embedding):
            module.register_forward_hook(lambda _module, _args, output: output.float())
        else:
            # Norms: a few thousand numbers.
            module.float()
