"""LoRA on the frozen linear layers of a micro-batch, as one function with a hand-written gradient, over flat tokens.

autograd would keep each product of a LoRA pair and the dropped-out input of each; here a mask of one byte a number and
the hidden products are all that is saved beside the input, or beside what that can be made of again (`Kept`). Tests
compare the gradients with autograd's of the plain formula.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from services.trainer.model.frozen import FrozenLinears

_DROPOUT_LEVELS = 1 << 16


@dataclass(frozen=True, slots=True)
class Lora:
    """LoRA on some columns of a product: `y[:, columns] += scale * dropout(x) A^T B^T`."""

    columns: slice
    a: Tensor
    b: Tensor
    scale: float
    dropout: float


@dataclass(frozen=True, slots=True)
class Kept:
    """What a product's input is made of again for the gradient, where that takes less memory than the input.

    Attributes:
        tensor: kept for another function's gradient anyway.
        restore: tensor → the input [tokens, inputs], up to the rounding of `tensor`.
    """

    tensor: Tensor
    restore: Callable[[Tensor], Tensor]


class _LoraLinears(Function):
    """y = x W^T (+ residual) + LoRA; a dropout mask takes one byte a number."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        frozen: FrozenLinears,
        loras: Sequence[Lora],
        kept: Kept | None,
        *matrices: Tensor,
    ) -> Tensor:
        y = frozen.product(x, residual)
        masks = [_dropout_mask(x, lora.dropout) for lora in loras]
        saved_hidden = []
        for mask, group in _by_input(masks, loras):
            lora_hidden = _masked(x, mask) @ _stacked(group).T
            parts = torch.split(lora_hidden, [lora.a.shape[0] for lora in group], 1)
            for lora, part in zip(group, parts, strict=True):
                y[:, lora.columns].addmm_(part.mul_(_scale(lora)), lora.b.T)
            saved_hidden.append(lora_hidden)
        ctx.frozen, ctx.loras = frozen, loras
        ctx.has_residual, ctx.masked = residual is not None, bool(masks) and masks[0] is not None
        if loras:
            ctx.restore = None if kept is None else kept.restore
            ctx.save_for_backward(
                x if kept is None else kept.tensor, *saved_hidden, *(mask for mask in masks if mask is not None)
            )
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (grad,), loras = grads, ctx.loras
        grad_x = ctx.frozen.gradient(grad) if ctx.needs_input_grad[0] else None
        grad_matrices: list[Tensor] = []
        if loras:
            x, *rest = ctx.saved_tensors
            if ctx.restore is not None:
                x = ctx.restore(x)
            masks: list[Tensor | None] = rest[len(loras) :] if ctx.masked else [None] * len(loras)
            for lora_hidden, (mask, group) in zip(rest, _by_input(masks, loras), strict=False):
                ranks = [lora.a.shape[0] for lora in group]
                grad_hidden = torch.empty_like(lora_hidden)
                grad_b = []
                for lora, grad_part, part in zip(
                    group, torch.split(grad_hidden, ranks, 1), torch.split(lora_hidden, ranks, 1), strict=True
                ):
                    grad_y = grad[:, lora.columns]
                    torch.mm(grad_y, lora.b, out=grad_part).mul_(_scale(lora))
                    grad_b.append(grad_y.T @ part)
                grad_a = torch.split(grad_hidden.T @ _masked(x, mask), ranks)
                grad_matrices += [tensor for pair in zip(grad_a, grad_b, strict=True) for tensor in pair]
                if grad_x is not None:
                    a = _stacked(group)
                    if mask is None:
                        grad_x.addmm_(grad_hidden, a)
                    else:
                        grad_x.add_((grad_hidden @ a).mul_(mask))
        return (grad_x, grad if ctx.has_residual else None, None, None, None, *grad_matrices)


def _stacked(loras: Sequence[Lora]) -> Tensor:
    """The A of all pairs, one below the other."""
    return loras[0].a if len(loras) == 1 else torch.cat([lora.a for lora in loras])


def _by_input(masks: Sequence[Tensor | None], loras: Sequence[Lora]) -> list[tuple[Tensor | None, Sequence[Lora]]]:
    """LoRA pairs with the same input share the product with A; with dropout, each pair has an input of its own."""
    if loras and masks[0] is None:
        return [(None, loras)]
    return [(mask, [lora]) for mask, lora in zip(masks, loras, strict=True)]


def _dropped_levels(dropout: float) -> int:
    return round(dropout * _DROPOUT_LEVELS)


def _scale(lora: Lora) -> float:
    return lora.scale / (1 - _dropped_levels(lora.dropout) / _DROPOUT_LEVELS)


def _dropout_mask(x: Tensor, dropout: float) -> Tensor | None:
    """True where dropout keeps a number of x: 16 random bits each, four times as fast as torch's Bernoulli."""
    if dropout == 0:
        return None
    draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64, device=x.device).random_(-(2**63), None)
    return (draws.view(torch.int16)[: x.numel()] >= _dropped_levels(dropout) - _DROPOUT_LEVELS // 2).view_as(x)


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask


def lora_linears(
    x: Tensor, residual: Tensor | None, frozen: FrozenLinears, loras: Sequence[Lora], kept: Kept | None = None
) -> Tensor:
    """Several frozen layers of one input, with LoRA on some of them.

    Args:
        x: [tokens, inputs].
        residual: [tokens, outputs], added to the product.
        kept: what x is made of again for LoRA's gradients; x itself is kept if None.

    Returns:
        [tokens, outputs], the layers' outputs side by side.
    """
    matrices = [matrix for lora in loras for matrix in (lora.a, lora.b)]
    y: Tensor = _LoraLinears.apply(x, residual, frozen, loras, kept, *matrices)  # type: ignore[no-untyped-call]
    return y
