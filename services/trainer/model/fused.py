"""The pieces of a Llama layer as functions with hand-written gradients, over flat tokens and a frozen base.

autograd would keep and pass over more than is needed: the base has no gradients of its own, a residual can be added by
the product that follows it, and the loss's gradient is known as soon as the logits are. Each function is held against
autograd's gradient of the plain formula in tests.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from services.trainer.model.frozen import FrozenLinears
from shared.training.memory import LOSS_ROWS

# Logits that a GPU makes at a time: it wants more to do at once than a CPU.
GPU_LOSS_ROWS = 1024
_STEPS = 1 << 16


def loss_rows(device: torch.device) -> int:
    """Rows of logits made at a time on a device."""
    return LOSS_ROWS if device.type == "cpu" else GPU_LOSS_ROWS


@dataclass(frozen=True, slots=True)
class Lora:
    """LoRA on some columns of a product: `y[:, columns] += scale * dropout(x) A^T B^T`."""

    columns: slice
    a: Tensor
    b: Tensor
    scale: float
    dropout: float


class _NormBranch(Function):
    """x → (x, weight * x / rms(x)): where a residual stream forks (Zhang and Sennrich 2019)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, inverse, weight)
        return x.view_as(x), (x * inverse).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, inverse, weight = ctx.saved_tensors
        through, normed = grads
        scaled = normed * weight
        along = (scaled * x).sum(-1, keepdim=True).mul_(inverse.pow(3)).div_(-x.shape[-1])
        return torch.addcmul(through, scaled, inverse).addcmul_(x, along), None, None


def norm_branch(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """(residual, normed), both as x [tokens, width]; the norm's weight is frozen."""
    branch: tuple[Tensor, Tensor] = _NormBranch.apply(x, weight, epsilon)  # type: ignore[no-untyped-call]
    return branch


class _RotateAndSplit(Function):
    """Rotary embedding (Su et al. 2021) of queries and keys in one pass; values are copied out beside them."""

    @staticmethod
    def forward(ctx: Any, joined: Tensor, cos: Tensor, sin: Tensor, rotated_heads: int) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.shape = joined.shape
        tokens, half = joined.shape[0], cos.shape[-1]
        heads = joined.view(tokens, -1, 2 * half)
        rotated = joined.new_empty(tokens, rotated_heads, 2 * half)
        _rotate(heads[:, :rotated_heads], cos, sin, rotated)
        return rotated, heads[:, rotated_heads:].contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        rotated, values = grads
        joined = rotated.new_empty(ctx.shape)
        heads = joined.view(rotated.shape[0], -1, rotated.shape[-1])
        # The rotation's transpose turns the other way.
        _rotate(rotated, cos, -sin, heads[:, : rotated.shape[1]])
        heads[:, rotated.shape[1] :].copy_(values)
        return joined, None, None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    (x1, x2), (out1, out2) = x.chunk(2, -1), out.chunk(2, -1)
    torch.mul(x1, cos, out=out1).addcmul_(x2, sin, value=-1)
    torch.mul(x2, cos, out=out2).addcmul_(x1, sin)


def rotate_and_split(joined: Tensor, cos: Tensor, sin: Tensor, rotated_heads: int) -> tuple[Tensor, Tensor]:
    """Joined queries, keys and values → rotated queries and keys, and values.

    Args:
        joined: [tokens, heads x dimension], queries first.
        cos, sin: [tokens, 1, dimension / 2].
        rotated_heads: query and key heads.

    Returns:
        [tokens, rotated heads, dimension] and [tokens, value heads, dimension].
    """
    split: tuple[Tensor, Tensor] = _RotateAndSplit.apply(joined, cos, sin, rotated_heads)  # type: ignore[no-untyped-call]
    return split


_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _AttendPerSample(Function):
    """Causal attention of each sample by itself, its gradients written where they belong: no slices to put together."""

    @staticmethod
    def forward(ctx: Any, rotated: Tensor, values: Tensor, lengths: Sequence[int], queries: int) -> Tensor:
        attended = rotated.new_empty(len(rotated), queries, rotated.shape[-1])
        ctx.spans = [slice(end - length, end) for length, end in zip(lengths, accumulate(lengths), strict=True)]
        ctx.queries, log_sums = queries, []
        for span in ctx.spans:
            sample, log_sum = _attention(*_heads_first(rotated[span], values[span], queries), 0.0, True)
            attended[span] = sample[0].transpose(0, 1)
            log_sums.append(log_sum)
        ctx.save_for_backward(rotated, values, attended, *log_sums)
        return attended

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rotated, values, attended, *log_sums = ctx.saved_tensors
        to_rotated, to_values = torch.empty_like(rotated), torch.empty_like(values)
        for span, log_sum in zip(ctx.spans, log_sums, strict=True):
            grad, said = (t[span].transpose(0, 1)[None] for t in (grads[0], attended))
            inputs = _heads_first(rotated[span], values[span], ctx.queries)
            found = _attention_backward(grad, *inputs, said, log_sum, 0.0, True)
            for into, part in zip(_heads_first(to_rotated[span], to_values[span], ctx.queries), found, strict=True):
                into.copy_(part)
        return to_rotated, to_values, None, None


class _AttendPerSampleOnGpu(Function):
    """The same for all samples at once, in bf16: flash attention over samples of any lengths (Dao 2023)."""

    @staticmethod
    def forward(ctx: Any, rotated: Tensor, values: Tensor, lengths: Sequence[int], queries: int) -> Tensor:
        q, k, v = (t.bfloat16().contiguous() for t in (rotated[:, :queries], rotated[:, queries:], values))
        bounds, longest = _bounds(tuple(lengths), rotated.device), max(lengths)
        attended, log_sum, *random, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, bounds, bounds, longest, longest, 0.0, True, False
        )
        ctx.save_for_backward(q, k, v, attended, log_sum, bounds, *random)
        ctx.longest, ctx.dtype = longest, rotated.dtype
        return attended.to(rotated.dtype)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        q, k, v, attended, log_sum, bounds, *random = ctx.saved_tensors
        to_q, to_k, to_v = torch.ops.aten._flash_attention_backward(
            grads[0].bfloat16().contiguous(), q, k, v, attended, log_sum, bounds, bounds, ctx.longest, ctx.longest, 0.0,
            True, *random,
        )  # fmt: skip
        return torch.cat([to_q, to_k], 1).to(ctx.dtype), to_v.to(ctx.dtype), None, None


@lru_cache(maxsize=16)
def _bounds(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each sample begins, and where the last one ends: int32 [samples + 1]. All layers ask for the same."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def _heads_first(rotated: Tensor, values: Tensor, queries: int) -> list[Tensor]:
    """Views of queries, keys and values as [1, heads, tokens, dimension]."""
    return [t.transpose(0, 1)[None] for t in (rotated[:, :queries], rotated[:, queries:], values)]


def attend_per_sample(rotated: Tensor, values: Tensor, lengths: Sequence[int], queries: int) -> Tensor:
    """Causal attention within each of the samples that lie one behind the other.

    Args:
        rotated: [tokens, query then key heads, dimension].
        values: [tokens, key heads, dimension].
        queries: query heads; a key head serves several of them (Ainslie et al. 2023).

    Returns:
        [tokens, queries, dimension].
    """
    how = _AttendPerSample if rotated.device.type == "cpu" else _AttendPerSampleOnGpu
    attended: Tensor = how.apply(rotated, values, lengths, queries)  # type: ignore[no-untyped-call]
    return attended


class _SwiGlu(Function):
    @staticmethod
    def forward(ctx: Any, joined: Tensor) -> Tensor:
        ctx.save_for_backward(joined)
        gate, up = joined.chunk(2, -1)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (joined,) = ctx.saved_tensors
        gate, up = joined.chunk(2, -1)
        out = torch.empty_like(joined)
        to_gate, to_up = out.chunk(2, -1)
        torch.mul(torch.nn.functional.silu(gate), grads[0], out=to_up)
        torch.ops.aten.silu_backward.grad_input(grads[0] * up, gate, grad_input=to_gate)
        return out


def swiglu(joined: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020) of joined [tokens, gate then up]."""
    product: Tensor = _SwiGlu.apply(joined)  # type: ignore[no-untyped-call]
    return product


class _LoraLinears(Function):
    """y = x W^T (+ residual) + LoRA; what dropout keeps is one byte a number."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        frozen: FrozenLinears,
        loras: Sequence[Lora],
        *matrices: Tensor,
    ) -> Tensor:
        y = frozen.product(x, residual)
        masks = [_kept(x, lora.dropout) for lora in loras]
        inner = []
        for mask, group in _by_input(masks, loras):
            a = torch.cat([lora.a for lora in group])
            narrow = _masked(x, mask) @ a.T
            for lora, columns in zip(group, torch.split(narrow, [lora.a.shape[0] for lora in group], 1), strict=True):
                y[:, lora.columns].addmm_(columns.mul_(_scale(lora)), lora.b.T)
            inner.append(narrow)
        ctx.frozen, ctx.loras = frozen, loras
        ctx.has_residual, ctx.masked = residual is not None, bool(masks) and masks[0] is not None
        if loras:
            ctx.save_for_backward(x, *inner, *(mask for mask in masks if mask is not None))
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (grad,), loras = grads, ctx.loras
        to_x = ctx.frozen.gradient(grad) if ctx.needs_input_grad[0] else None
        to_matrices: list[Tensor] = []
        if loras:
            x, *rest = ctx.saved_tensors
            masks: list[Tensor | None] = rest[len(loras) :] if ctx.masked else [None] * len(loras)
            for narrow, (mask, group) in zip(rest, _by_input(masks, loras), strict=False):
                ranks = [lora.a.shape[0] for lora in group]
                to_narrow = torch.empty_like(narrow)
                to_b = []
                for lora, part, inner in zip(
                    group, torch.split(to_narrow, ranks, 1), torch.split(narrow, ranks, 1), strict=True
                ):
                    own = grad[:, lora.columns]
                    torch.mm(own, lora.b, out=part).mul_(_scale(lora))
                    to_b.append(own.T @ inner)
                to_a = torch.split(to_narrow.T @ _masked(x, mask), ranks)
                to_matrices += [tensor for pair in zip(to_a, to_b, strict=True) for tensor in pair]
                if to_x is not None:
                    a = torch.cat([lora.a for lora in group])
                    if mask is None:
                        to_x.addmm_(to_narrow, a)
                    else:
                        to_x.add_((to_narrow @ a).mul_(mask))
        return (to_x, grad if ctx.has_residual else None, None, None, *to_matrices)


def _by_input(masks: Sequence[Tensor | None], loras: Sequence[Lora]) -> list[tuple[Tensor | None, Sequence[Lora]]]:
    """LoRA pairs that read the very same input share the product with A; each dropout makes an input of its own."""
    if loras and masks[0] is None:
        return [(None, loras)]
    return [(mask, [lora]) for mask, lora in zip(masks, loras, strict=True)]


def _dropped_steps(dropout: float) -> int:
    return round(dropout * _STEPS)


def _scale(lora: Lora) -> float:
    return lora.scale / (1 - _dropped_steps(lora.dropout) / _STEPS)


def _kept(x: Tensor, dropout: float) -> Tensor | None:
    """What dropout keeps, drawn from torch's generator at 16 bits a number: four times as fast as its Bernoulli."""
    if dropout == 0:
        return None
    draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64, device=x.device).random_(-(2**63), None)
    return (draws.view(torch.int16)[: x.numel()] >= _dropped_steps(dropout) - _STEPS // 2).view_as(x)


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask


def lora_linears(x: Tensor, residual: Tensor | None, frozen: FrozenLinears, loras: Sequence[Lora]) -> Tensor:
    """Several frozen layers of one input, with LoRA on some of them.

    Args:
        x: [tokens, inputs].
        residual: [tokens, outputs], added to the product.
    """
    matrices = [matrix for lora in loras for matrix in (lora.a, lora.b)]
    y: Tensor = _LoraLinears.apply(x, residual, frozen, loras, *matrices)  # type: ignore[no-untyped-call]
    return y


class _HeadLoss(Function):
    """Summed cross-entropy, some rows of logits at a time; their gradient is taken while they are there."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: FrozenLinears, labels: Tensor) -> Tensor:
        total = hidden.new_zeros(())
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if wanted else None
        at_once = loss_rows(hidden.device)
        for start in range(0, len(labels), at_once):
            rows = slice(start, start + at_once)
            own = labels[rows, None]
            logs = torch.log_softmax(head.product(hidden[rows]), -1)
            total -= logs.gather(1, own).sum()
            if gradient is not None:
                soft = logs.exp_()
                soft.scatter_add_(1, own, torch.full_like(own, -1, dtype=soft.dtype))
                gradient[rows] = head.gradient(soft)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0], None, None


def head_loss(hidden: Tensor, head: FrozenLinears, labels: Tensor) -> Tensor:
    """Cross-entropy in nats, summed over the rows of hidden [targets, width] and labels int64 [targets]."""
    loss: Tensor = _HeadLoss.apply(hidden, head, labels)  # type: ignore[no-untyped-call]
    return loss
