"""`/v1/fine_tuning/jobs/{id}/metrics`: what a job measured while it trained, as one series by step."""

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel, Field

from services.gateway.http.auth import AuthenticatedRoute
from services.gateway.routes.dependencies import DatabaseDep, JobId, JobsDep, Project
from services.gateway.routes.responses import NEEDS_KEY, OPENAI_ERRORS, json_response

router = APIRouter(
    route_class=AuthenticatedRoute, tags=["fine-tuning"], responses=OPENAI_ERRORS, dependencies=[NEEDS_KEY]
)


class MetricsPoint(BaseModel):
    """Means over the optimizer steps since the point before; what was not measured is missing."""

    model_config = {"extra": "allow"}

    step: int
    epoch: float | None = None
    train_loss: Annotated[float | None, Field(description="nats per supervised token")] = None
    valid_loss: float | None = None
    learning_rate: float | None = None
    grad_norm: Annotated[float | None, Field(description="before clipping")] = None
    tokens_per_second: Annotated[float | None, Field(description="real tokens, padding not counted")] = None
    trained_tokens: Annotated[int | None, Field(description="supervised tokens so far")] = None
    peak_memory_mb: float | None = None
    mfu: Annotated[float | None, Field(description="4N FLOP per token, of the worker's measured sgemm peak")] = None


class MetricsListJson(BaseModel):
    object: Literal["list"] = "list"
    data: list[MetricsPoint]
    has_more: bool


@router.get("/v1/fine_tuning/jobs/{job_id}/metrics", response_model=MetricsListJson)
def list_fine_tuning_job_metrics(
    database: DatabaseDep,
    jobs: JobsDep,
    project: Project,
    job_id: JobId,
    after_step: Annotated[int, Query(ge=0, le=2**53, description="only points of later steps")] = 0,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 1_000,
) -> Response:
    """Loss, learning rate, gradient norm, speed and memory by step, ascending."""
    with database.read() as tx:
        page = jobs.metrics(tx, project, job_id, after_step=after_step, limit=limit)
    data = [MetricsPoint.model_validate(point) for point in page.items]
    return json_response(MetricsListJson(data=data, has_more=page.has_more), exclude_none=True)
