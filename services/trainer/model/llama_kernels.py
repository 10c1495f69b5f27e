"""The pieces of a Llama layer as functions with hand-written gradients, over flat tokens; linear ones: `lora_kernels`.

autograd would save and pass over more than is needed: the frozen base has no gradients of its own, the product that
follows a residual can add it, and the gradient of the loss is known as soon as the logits are. Tests compare each
function with autograd's gradient of the plain formula.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from services.trainer.model.frozen import FrozenLinears
from shared.training.memory import LOSS_ROWS


class _NormBranch(Function):
    """x → (x, weight * x / rms(x), x / rms(x)): where a residual stream forks (Zhang and Sennrich 2019)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, epsilon: float, kept: torch.dtype | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        scaled = x * inverse
        normed = scaled * weight
        scaled = scaled.to(kept or x.dtype)
        ctx.save_for_backward(scaled, inverse, weight)
        ctx.mark_non_differentiable(scaled)
        ctx.set_materialize_grads(False)
        return x.view_as(x), normed, scaled

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        scaled, inverse, weight = ctx.saved_tensors
        grad_residual, grad_normed, _ = grads
        if grad_normed is None:
            return grad_residual, None, None, None
        grad_scaled = grad_normed * weight
        along = (grad_scaled * scaled).mean(-1, keepdim=True)
        grad_x = grad_scaled.addcmul_(scaled, along, value=-1)
        grad_x = grad_x.mul_(inverse) if grad_residual is None else torch.addcmul(grad_residual, grad_x, inverse)
        return grad_x, None, None, None


def norm_branch(
    x: Tensor, weight: Tensor, epsilon: float, kept: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """A residual stream and its norm, whose weight is frozen.

    Args:
        x: [tokens, width].
        kept: dtype of what is kept for the gradient; x's own if None.

    Returns:
        (residual, normed, scaled), each [tokens, width]: `scaled` is what is kept, without a gradient of its own;
        `scaled * weight` is `normed` again.
    """
    branch: tuple[Tensor, Tensor, Tensor] = _NormBranch.apply(x, weight, epsilon, kept)  # type: ignore[no-untyped-call]
    return branch


class _RotateAndSplit(Function):
    """Rotary embedding (Su et al. 2021) of queries and keys in one pass; values are copied out unrotated."""

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
        grad_rotated, grad_values = grads
        grad_joined = grad_rotated.new_empty(ctx.shape)
        heads = grad_joined.view(grad_rotated.shape[0], -1, grad_rotated.shape[-1])
        # The transpose of a rotation is the rotation by the opposite angle.
        _rotate(grad_rotated, cos, -sin, heads[:, : grad_rotated.shape[1]])
        heads[:, grad_rotated.shape[1] :].copy_(grad_values)
        return grad_joined, None, None, None


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
    """Causal attention within each sample; gradients are written straight into the packed tensors."""

    @staticmethod
    def forward(ctx: Any, rotated: Tensor, values: Tensor, lengths: Sequence[int], queries: int) -> Tensor:
        attn_output = rotated.new_empty(len(rotated), queries, rotated.shape[-1])
        ctx.spans = [slice(end - length, end) for length, end in zip(lengths, accumulate(lengths), strict=True)]
        ctx.queries, log_sums = queries, []
        for span in ctx.spans:
            sample, log_sum = _attention(*_heads_first(rotated[span], values[span], queries), 0.0, True)
            attn_output[span] = sample[0].transpose(0, 1)
            log_sums.append(log_sum)
        ctx.save_for_backward(rotated, values, attn_output, *log_sums)
        return attn_output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rotated, values, attn_output, *log_sums = ctx.saved_tensors
        grad_rotated, grad_values = torch.empty_like(rotated), torch.empty_like(values)
        for span, log_sum in zip(ctx.spans, log_sums, strict=True):
            grad, output = (t[span].transpose(0, 1)[None] for t in (grads[0], attn_output))
            inputs = _heads_first(rotated[span], values[span], ctx.queries)
            input_grads = _attention_backward(grad, *inputs, output, log_sum, 0.0, True)
            targets = _heads_first(grad_rotated[span], grad_values[span], ctx.queries)
            for target, input_grad in zip(targets, input_grads, strict=True):
                target.copy_(input_grad)
        return grad_rotated, grad_values, None, None


@dataclass(frozen=True, slots=True)
class Bounds:
    """Where samples lie in a pack.

    Attributes:
        starts: where each sample begins, and where the last one ends: int32 [samples + 1].
        longest: tokens of the longest sample.
    """

    starts: Tensor
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> "Bounds":
        return cls(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device), max(lengths))


class _AttendTogether(Function):
    """The same for all samples at once, in bf16: flash attention over samples of any lengths (Dao 2023)."""

    @staticmethod
    def forward(ctx: Any, rotated: Tensor, values: Tensor, bounds: Bounds, queries: int) -> tuple[Tensor, Tensor]:
        q, k, v = (t.bfloat16().contiguous() for t in (rotated[:, :queries], rotated[:, queries:], values))
        starts, longest = bounds.starts, bounds.longest
        attn_output, log_sum, *random, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, starts, starts, longest, longest, 0.0, True, False
        )
        ctx.save_for_backward(q, k, v, attn_output, log_sum, starts, *random)
        ctx.longest, ctx.dtype = longest, rotated.dtype
        ctx.mark_non_differentiable(attn_output)
        ctx.set_materialize_grads(False)
        return attn_output.to(rotated.dtype), attn_output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        q, k, v, attn_output, log_sum, starts, *random = ctx.saved_tensors
        grad_q, grad_k, grad_v = torch.ops.aten._flash_attention_backward(
            grads[0].bfloat16().contiguous(), q, k, v, attn_output, log_sum, starts, starts, ctx.longest, ctx.longest,
            0.0, True, *random,
        )  # fmt: skip
        return torch.cat([grad_q, grad_k], 1).to(ctx.dtype), grad_v.to(ctx.dtype), None, None


def _heads_first(rotated: Tensor, values: Tensor, queries: int) -> list[Tensor]:
    """Views of queries, keys and values as [1, heads, tokens, dimension]."""
    return [t.transpose(0, 1)[None] for t in (rotated[:, :queries], rotated[:, queries:], values)]


def attend_per_sample(rotated: Tensor, values: Tensor, lengths: Sequence[int], queries: int) -> Tensor:
    """Causal attention within each of the packed samples.

    Args:
        rotated: [tokens, query then key heads, dimension].
        values: [tokens, key heads, dimension].
        queries: query heads; a key head serves several of them (Ainslie et al. 2023).

    Returns:
        [tokens, queries, dimension].
    """
    attn_output: Tensor = _AttendPerSample.apply(rotated, values, lengths, queries)  # type: ignore[no-untyped-call]
    return attn_output


def attend_together(rotated: Tensor, values: Tensor, bounds: Bounds, queries: int) -> tuple[Tensor, Tensor]:
    """What `attend_per_sample` computes, in bf16 on a GPU, and once more in bf16, as it is kept for the gradient."""
    both: tuple[Tensor, Tensor] = _AttendTogether.apply(rotated, values, bounds, queries)  # type: ignore[no-untyped-call]
    return both


class _SwiGlu(Function):
    @staticmethod
    def forward(ctx: Any, joined: Tensor, kept: Tensor) -> Tensor:
        ctx.save_for_backward(kept)
        return gated(joined)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        joined = ctx.saved_tensors[0].to(grads[0].dtype)
        gate, up = joined.chunk(2, -1)
        grad_joined = torch.empty_like(joined)
        grad_gate, grad_up = grad_joined.chunk(2, -1)
        torch.mul(torch.nn.functional.silu(gate), grads[0], out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grads[0] * up, gate, grad_input=grad_gate)
        return grad_joined, None


def gated(joined: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020) of joined [tokens, gate then up], without a gradient."""
    gate, up = joined.chunk(2, -1)
    return torch.nn.functional.silu(gate).mul_(up)


def swiglu(joined: Tensor, kept: Tensor | None = None) -> Tensor:
    """`gated` with its gradient, for which `kept` is kept: joined itself if None, or joined in a narrower dtype."""
    product: Tensor = _SwiGlu.apply(joined, joined.detach() if kept is None else kept)  # type: ignore[no-untyped-call]
    return product


class _HeadLoss(Function):
    """Summed cross-entropy over blocks of rows; each block's gradient is computed while its logits exist."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: FrozenLinears, labels: Tensor, block: int) -> Tensor:
        total = hidden.new_zeros(())
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(labels), block):
            rows = slice(start, start + block)
            targets = labels[rows, None]
            log_probs = torch.log_softmax(head.product(hidden[rows]), -1)
            total -= log_probs.gather(1, targets).sum()
            if grad_hidden is not None:
                grad_logits = log_probs.exp_()
                grad_logits.scatter_add_(1, targets, torch.full_like(targets, -1, dtype=grad_logits.dtype))
                grad_hidden[rows] = head.gradient(grad_logits)
        if grad_hidden is not None:
            ctx.save_for_backward(grad_hidden)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad_hidden,) = ctx.saved_tensors
        return grad_hidden * grads[0], None, None, None


def head_loss(hidden: Tensor, head: FrozenLinears, labels: Tensor, block: int = LOSS_ROWS) -> Tensor:
    """Cross-entropy in nats, summed over the rows of hidden [supervised, width] and labels int64 [supervised].

    Args:
        block: rows of logits made at a time.
    """
    loss: Tensor = _HeadLoss.apply(hidden, head, labels, block)  # type: ignore[no-untyped-call]
    return loss
