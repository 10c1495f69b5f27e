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


def accumulate_gradients(model: Any, packs: Sequence[Packed], precision: Precision, check: Check) -> torch.Tensor:
    """Add the gradient of the step's loss to the parameters' `grad`.

    The loss is the sum over the supervised tokens of all packs, divided by their number: how samples are packed does
    not change it.

    Returns:
        What each pack adds to the loss: [packs], on the device; the loss, in nats per supervised token, is their sum.

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
    return torch.stack(losses) if losses else torch.zeros(0, device=precision.device)


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
    losses = accumulate_gradients(model, packs, precision, check)
    scaler = precision.scaler
    if scaler:
        scaler.unscale_(optimizer)
    total = torch.nn.utils.get_total_norm([p.grad for p in parameters.values() if p.grad is not None])
    # Read once, when all is queued: a GPU would stand still at every read before.
    *parts, norm = torch.cat([losses, total.to(losses.device)[None]]).tolist()
    loss = float(sum(parts))
    _check(loss, norm, scaled=scaler is not None)
    if math.isfinite(norm):
        torch.nn.utils.clip_grads_with_norm_(parameters.values(), max_grad_norm, total)
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


def _check(loss: float, norm: float, *, scaled: bool) -> None:
    """Raise what `take_step` says it raises; a norm that is not finite only skips the step where the loss is scaled."""
    if not math.isfinite(loss):
        raise JobFailed(
            f"the loss became {loss}; lower the learning rate, or use compute_dtype fp32 or bf16",
            code="non_finite_loss",
        )
    # A loss of zero has no gradient: the model has learnt everything, nothing is broken.
    if norm == 0 and loss > 1e-6:
        raise JobFailed(
            "no gradient reaches the LoRA weights, so nothing would be learnt; check target_modules, or use "
            "compute_dtype fp32",
            code="zero_gradient",
        )
    if not math.isfinite(norm) and not scaled:
        raise JobFailed(
            f"the gradient's norm became {norm}; lower the learning rate, or use compute_dtype fp32",
            code="non_finite_loss",
        )
