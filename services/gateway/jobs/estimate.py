"""What a job will take: a pure function of its specification, of its files' tokens and of what was measured before.

Steps and checkpoints are those of the trainer's own plan, memory comes from the model's shape and the largest
micro-batch, minutes from what finished jobs of the same base and precision have measured, which also corrects the
memory. Before the first of them nothing can be said about time.
"""

import random
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from services.gateway.bases.tokenised import TokenCounts
from services.gateway.jobs.calibration import Calibration
from shared.errors import InvalidRequest
from shared.jobs.spec import BasePrecision, JobSpec
from shared.training.memory import ModelShape, peak_memory_mb
from shared.training.plan import CPU_TOKEN_BUDGET, held_out_rows, plan_training

SHUFFLES = 3
# A validation token costs the forward half of a training token's products.
EVALUATION_SHARE = 0.5


class EstimateJson(BaseModel):
    object: Literal["fine_tuning.estimate"] = "fine_tuning.estimate"
    model: str
    base_precision: BasePrecision
    rows: int
    dropped_rows: Annotated[int, Field(description="nothing of their response is left within max_length")]
    truncated_rows: Annotated[int, Field(description="a part of them is cut at max_length")]
    total_steps: int
    checkpoints: Annotated[int, Field(description="of the whole run, the last one included")]
    tokens: Annotated[int, Field(description="real tokens over the whole run")]
    supervised_tokens: int
    calibration: Annotated[
        Literal["calibrated", "not calibrated"],
        Field(description="whether a job of this base and precision has finished here, whose throughput is known"),
    ]
    tokens_per_second: float | None
    minutes: Annotated[float | None, Field(description="of training and evaluation; loading the base not counted")]
    peak_memory_mb: Annotated[
        float | None,
        Field(description="of the worker; before the first finished job what the model's shape says of one on a CPU"),
    ]
    warnings: list[str]


def estimate(
    spec: JobSpec,
    training: TokenCounts,
    validation: TokenCounts | None,
    calibration: Calibration | None,
    warnings: list[str],
    shape: ModelShape | None = None,
) -> EstimateJson:
    """What a job will take.

    Args:
        validation: of the validation file, if there is one.
        calibration: what finished jobs have measured, if there are any.
        shape: of the base, if its memory can be computed.

    Raises:
        InvalidRequest: nothing is left to train on.
    """
    hyper = spec.hyperparameters
    if training.rows == 0:
        raise InvalidRequest("no row has anything left to learn within max_length", param="hyperparameters.max_length")
    held_out = held_out_rows(training.rows, hyper.validation_split)
    rows = training.rows - held_out
    if rows == 0:
        raise InvalidRequest("validation_split leaves no row to train on", param="hyperparameters.validation_split")
    plan = plan_training(rows, hyper)
    checkpoints = plan.checkpoints_after(0)
    # How often the whole file is trained on; one epoch without held-out rows is 1.
    passes = plan.total_steps / plan.steps_per_epoch * rows / training.rows
    tokens = round(training.tokens * passes)
    evaluated = validation.tokens if validation else training.tokens * held_out / training.rows
    # Evaluated before the first step and at every checkpoint.
    training_equivalent = tokens + EVALUATION_SHARE * evaluated * (1 + checkpoints)
    rate = calibration.tokens_per_second if calibration else None
    return EstimateJson(
        model=spec.base,
        base_precision=spec.base_precision,
        rows=training.rows,
        dropped_rows=training.dropped,
        truncated_rows=training.truncated,
        total_steps=plan.total_steps,
        checkpoints=checkpoints,
        tokens=tokens,
        supervised_tokens=round(training.supervised_tokens * passes),
        calibration="calibrated" if calibration else "not calibrated",
        tokens_per_second=rate,
        minutes=round(training_equivalent / rate / 60, 2) if rate else None,
        peak_memory_mb=_peak_memory_mb(spec, training, calibration, shape),
        warnings=warnings,
    )


def _peak_memory_mb(
    spec: JobSpec, training: TokenCounts, calibration: Calibration | None, shape: ModelShape | None
) -> float | None:
    if shape is None or not training.lengths:
        return calibration.peak_memory_mb if calibration else None
    tokens = largest_micro_batch_tokens(training.lengths, spec.hyperparameters.batch_size)
    beyond = calibration.memory_beyond_model_mb or 0 if calibration else 0
    return round(peak_memory_mb(shape, spec.base_precision, spec.lora, tokens) + beyond, 1)


def largest_micro_batch_tokens(lengths: Sequence[int], batch_size: int) -> int:
    """Tokens of the largest micro-batch that steps of random rows come to; the trainer has an order of its own."""
    order = random.Random(0)  # noqa: S311
    epochs = [order.sample(lengths, len(lengths)) for _ in range(SHUFFLES)]
    steps = (sum(epoch[start : start + batch_size]) for epoch in epochs for start in range(0, len(epoch), batch_size))
    return max(max(lengths), min(CPU_TOKEN_BUDGET, max(steps)))
