"""One optimizer step: gradients over its micro-batches, clipping, Adam. Knows no job, file or session."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from services.trainer.contract import Check
from services.trainer.model.forward import Packed, loss_sum
from services.trainer.model.lora import Parameters
from services.trainer.model.precision import Precision
from shared.errors import JobFailed
from shared.jobs.spec import Hyperparameters

# Loss scaling starts high on purpose and skips the steps that overflow; this many in a row are no longer its search.
MAX_SKIPPED_STEPS = 25


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step did.

    Attributes:
        loss: mean over the step's supervised tokens, in nats, before the update.
        grad_norm: L2 norm of all gradients before clipping; not finite in an fp16 step that was skipped.
        tokens, supervised_tokens: real tokens of the step, and how many of them count in the loss.
    """

    loss: float
    grad_norm: float
    tokens: int
    supervised_tokens: int

    @property
    def skipped(self) -> bool:
        return not math.isfinite(self.grad_norm)


def make_optimizer(parameters: Parameters, hyper: Hyperparameters) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) with fp32 moments."""
    return torch.optim.AdamW(
        list(parameters.values()),
        lr=hyper.learning_rate,
        betas=(hyper.adam_beta1, hyper.adam_beta2),
        eps=hyper.adam_epsilon,
        weight_decay=hyper.weight_decay,
    )


def accumulate_gradients(model: Any, packs: Sequence[Packed], precision: Precision, check: Check) -> float:
    """Add the gradient of the step's loss to the parameters' `grad`.

    The loss is the sum over the supervised tokens of all packs, divided by their number: how samples are packed does
    not change it.

    Returns:
        The loss, in nats per supervised token.

    Raises:
        StopRequested: between two packs.
    """
    supervised = sum(len(pack.labels) for pack in packs)
    losses: list[torch.Tensor] = []
    for packed in packs:
        check()
        with precision.autocast():
            loss = loss_sum(model, packed) / supervised
        losses.append(loss.detach())
        scaled = precision.scaler.scale(loss) if precision.scaler else loss
        torch.autograd.backward(scaled)
    # Read once, and last: a GPU computes on while its work is queued.
    return float(sum(torch.stack(losses).tolist())) if losses else 0.0


def take_step(
    model: Any,
    parameters: Parameters,
    optimizer: torch.optim.Optimizer,
    packs: Sequence[Packed],
    *,
    learning_rate: float,
    max_grad_norm: float,
    precision: Precision,
    check: Check,
) -> StepResult:
    """One whole optimizer step, or none: if it is interrupted, only gradients and random state have changed.

    Raises:
        StopRequested: see `accumulate_gradients`.
        JobFailed: `non_finite_loss`, or `zero_gradient` although there is something to learn.
    """
    optimizer.zero_grad(set_to_none=True)
    loss = accumulate_gradients(model, packs, precision, check)
    if not math.isfinite(loss):
        raise JobFailed(
            f"the loss became {loss}; lower the learning rate, or use compute_dtype fp32 or bf16",
            code="non_finite_loss",
        )
    scaler = precision.scaler
    if scaler:
        scaler.unscale_(optimizer)
    norm = _clip(parameters, max_grad_norm, loss, scaled=scaler is not None)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    if scaler:
        # Leaves the weights alone if a gradient overflowed, and lowers the scale.
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(loss, norm, sum(pack.tokens for pack in packs), sum(len(pack.labels) for pack in packs))


def _clip(parameters: Parameters, max_norm: float, loss: float, *, scaled: bool) -> float:
    grads = [p.grad for p in parameters.values() if p.grad is not None]
    total = torch.nn.utils.get_total_norm(grads)
    norm = float(total)
    # A loss of zero has no gradient: the model has learnt everything, nothing is broken.
    if not grads or (norm == 0 and loss > 1e-6):
        raise JobFailed(
            "no gradient reaches the LoRA weights, so nothing would be learnt; check target_modules, or use "
            "compute_dtype fp32",
            code="zero_gradient",
        )
    if not math.isfinite(norm):
        if not scaled:
            raise JobFailed(
                f"the gradient's norm became {norm}; lower the learning rate, or use compute_dtype fp32",
                code="non_finite_loss",
            )
        return norm
    torch.nn.utils.clip_grads_with_norm_(parameters.values(), max_norm, total)
    return norm
