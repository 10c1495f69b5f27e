"""What a job will take: a pure function of its specification, of its files' tokens and of what was measured before.

Steps and checkpoints are those of the trainer's own plan, minutes come from what finished jobs of the same base and
precision have measured on the same kind of device. Before the first of them nothing can be said about time, and about
memory only on a CPU.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from services.gateway.bases.tokenised import TokenCounts
from services.gateway.jobs.calibration import Calibration
from services.gateway.jobs.peak_memory import memory_on_cpu_mb, memory_on_gpu_mb
from shared.errors import InvalidRequest
from shared.jobs.spec import BasePrecision, DeviceKind, JobSpec
from shared.training.memory import ModelShape
from shared.training.plan import held_out_rows, plan_training

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
    device: Annotated[
        DeviceKind | None,
        Field(description="what the worker computes on that took a job last; null before the first has said so"),
    ]
    calibration: Annotated[
        Literal["calibrated", "not calibrated"],
        Field(description="whether a job of this base and precision has finished here on such a device"),
    ]
    tokens_per_second: float | None
    minutes: Annotated[float | None, Field(description="of training and evaluation; loading the base not counted")]
    peak_memory_mb: Annotated[
        float | None,
        Field(
            description="of the worker on a CPU, before the first finished job by the model's shape; of a GPU what "
            "finished jobs with micro-batches of about as many tokens took, else null"
        ),
    ]
    warnings: list[str]


def estimate(
    spec: JobSpec,
    training: TokenCounts,
    validation: TokenCounts | None,
    calibration: Calibration | None,
    warnings: list[str],
    shape: ModelShape | None = None,
    device: DeviceKind | None = None,
) -> EstimateJson:
    """What a job will take.

    Args:
        validation: of the validation file, if there is one.
        calibration: what finished jobs have measured on such a device, if there are any.
        warnings: about the job; what cannot be said of its time and memory is added to them.
        shape: of the base, if its memory can be computed.
        device: what the job will be computed on, if that is known.

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
    memory = _peak_memory_mb(spec, training, calibration, shape, device)
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
        device=device,
        calibration="calibrated" if calibration else "not calibrated",
        tokens_per_second=rate,
        minutes=round(training_equivalent / rate / 60, 2) if rate else None,
        peak_memory_mb=memory,
        warnings=[*warnings, *_unknown(device, calibration, memory)],
    )


def _peak_memory_mb(
    spec: JobSpec,
    training: TokenCounts,
    calibration: Calibration | None,
    shape: ModelShape | None,
    device: DeviceKind | None,
) -> float | None:
    if device == "cuda":
        return memory_on_gpu_mb(spec, training.lengths, calibration.peaks if calibration else ())
    return memory_on_cpu_mb(spec, training.lengths, calibration, shape)


def _unknown(device: DeviceKind | None, calibration: Calibration | None, memory: float | None) -> list[str]:
    """Why time or memory is missing, or may be another device's."""
    if device is None and memory is not None:
        return ["no worker has said yet what it computes on: peak_memory_mb is reckoned for a CPU"]
    if device != "cuda" or memory is not None:
        return []
    if calibration is None:
        return [
            "no job of this base and precision has been trained on a GPU of this installation yet: minutes and "
            "peak_memory_mb are not known"
        ]
    return [
        "the jobs of this base and precision that were trained on a GPU here had much larger or smaller micro-batches: "
        "peak_memory_mb is not known"
    ]
