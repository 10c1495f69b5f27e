"""A job, its events and checkpoints as clients see them: OpenAI's shapes, strictly, and our extra keys beside them."""

import time
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from services.gateway.jobs.event_ids import event_id
from shared.jobs.rows import Checkpoint, Event, Job
from shared.jobs.spec import (
    PRESETS,
    BasePrecision,
    ComputeDtype,
    Hyperparameters,
    JobFault,
    LoraSpec,
    Phase,
    Progress,
    State,
    TrainingReport,
)
from shared.paging import Page

Status = Literal["validating_files", "queued", "running", "succeeded", "failed", "cancelled"]


class EffectiveHyperparameters(Hyperparameters):
    """All hyperparameters as they are used; the multiplier is relative to the preset, for OpenAI's readers."""

    learning_rate_multiplier: float


class SupervisedJson(BaseModel):
    hyperparameters: EffectiveHyperparameters


class MethodJson(BaseModel):
    type: Literal["supervised"] = "supervised"
    supervised: SupervisedJson


class JobJson(BaseModel):
    """OpenAI's keys down to `method`; ours after it."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    error: JobFault | None
    fine_tuned_model: str | None
    finished_at: int | None
    hyperparameters: EffectiveHyperparameters
    model: str
    organization_id: str
    result_files: list[str]
    status: Status
    trained_tokens: int | None
    training_file: str
    validation_file: str | None
    seed: int
    estimated_finish: int | None
    integrations: list[Any] = Field(default_factory=list)
    metadata: dict[str, str] | None
    method: MethodJson

    state: State
    phase: Phase | None
    progress: Progress
    warnings: list[str]
    preset: str
    lora: LoraSpec
    base_precision: BasePrecision
    compute_dtype: ComputeDtype
    keep_checkpoints: int
    training_files: Annotated[list[str], Field(description="all of them, `training_file` the first")]
    initial_adapter: Annotated[str | None, Field(description="id of the adapter the job continues")]
    suffix: str | None
    started_at: int | None
    attempt: Annotated[int, Field(description="how many times a worker has begun or continued the job")]
    report: Annotated[TrainingReport | None, Field(description="what was really trained; there once it succeeded")]


class JobListJson(BaseModel):
    object: Literal["list"] = "list"
    data: list[JobJson]
    has_more: bool


class EventJson(BaseModel):
    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any] | None


class EventListJson(BaseModel):
    object: Literal["list"] = "list"
    data: list[EventJson]
    has_more: bool


class CheckpointMetrics(BaseModel):
    """OpenAI's names; the trainer may add its own."""

    model_config = {"extra": "allow"}

    step: float
    train_loss: float | None = None
    train_mean_token_accuracy: float | None = None
    valid_loss: float | None = None
    valid_mean_token_accuracy: float | None = None
    full_valid_loss: float | None = None
    full_valid_mean_token_accuracy: float | None = None


class CheckpointJson(BaseModel):
    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    step_number: int
    metrics: CheckpointMetrics
    adapter: Annotated[str, Field(description="id of the servable adapter of this step")]


class CheckpointListJson(BaseModel):
    object: Literal["list"] = "list"
    data: list[CheckpointJson]
    first_id: str | None
    last_id: str | None
    has_more: bool


def job_json(job: Job) -> JobJson:
    spec = job.spec
    usual = PRESETS[spec.preset].hyperparameters.learning_rate
    effective = EffectiveHyperparameters(
        **spec.hyperparameters.model_dump(), learning_rate_multiplier=spec.hyperparameters.learning_rate / usual
    )
    return JobJson(
        id=job.id,
        created_at=job.created_at,
        error=job.fault,
        fine_tuned_model=job.adapter_name,
        finished_at=job.finished_at,
        hyperparameters=effective,
        model=spec.base,
        organization_id=job.project,
        result_files=[],
        status=job.state.status,
        trained_tokens=job.report.trained_tokens if job.report else None,
        training_file=spec.training_file,
        validation_file=spec.validation_file,
        seed=spec.seed,
        estimated_finish=_estimated_finish(job),
        metadata=job.metadata,
        method=MethodJson(supervised=SupervisedJson(hyperparameters=effective)),
        state=job.state,
        phase=job.phase,
        progress=job.progress,
        warnings=job.warnings,
        preset=spec.preset,
        lora=spec.lora,
        base_precision=spec.base_precision,
        compute_dtype=spec.compute_dtype,
        keep_checkpoints=spec.keep_checkpoints,
        training_files=[file.id for file in spec.training_files],
        initial_adapter=spec.initial_adapter,
        suffix=spec.suffix,
        started_at=job.started_at,
        attempt=job.attempt,
        report=job.report,
    )


def _estimated_finish(job: Job) -> int | None:
    progress = job.progress
    if not job.state.leased or progress.eta_seconds is None:
        return None
    return round((progress.written_at or time.time()) + progress.eta_seconds)


def job_list_json(page: Page[Job]) -> JobListJson:
    return JobListJson(data=[job_json(job) for job in page.items], has_more=page.has_more)


def event_json(event: Event) -> EventJson:
    return EventJson.model_validate(
        {
            "id": event_id(event.job, event.number),
            "created_at": event.created_at,
            "level": event.level,
            "message": event.message,
            "type": event.type,
            "data": event.data,
        }
    )


def event_list_json(page: Page[Event]) -> EventListJson:
    return EventListJson(data=[event_json(event) for event in page.items], has_more=page.has_more)


def checkpoint_list_json(page: Page[Checkpoint]) -> CheckpointListJson:
    data = [
        CheckpointJson(
            id=checkpoint.id,
            created_at=checkpoint.created_at,
            fine_tuned_model_checkpoint=checkpoint.adapter_name,
            fine_tuning_job_id=checkpoint.job,
            step_number=checkpoint.step,
            metrics=CheckpointMetrics.model_validate({"step": checkpoint.step} | checkpoint.metrics),
            adapter=checkpoint.adapter,
        )
        for checkpoint in page.items
    ]
    return CheckpointListJson(
        data=data,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=page.has_more,
    )
