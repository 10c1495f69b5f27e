"""`/v1/fine_tuning/jobs/{id}/metrics`: what a job measured while it trained, as one series by step."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field
from sqlalchemy import select

from services.gateway.http.auth import AuthenticatedRoute
from services.gateway.routes.dependencies import JobId, Project, Using
from services.gateway.routes.responses import NEEDS_KEY, OPENAI_ERRORS
from shared.storage.database import Database
from shared.storage.tables import events

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


@router.get("/v1/fine_tuning/jobs/{job_id}/metrics", response_model_exclude_none=True)
def list_fine_tuning_job_metrics(
    services: Using,
    project: Project,
    job_id: JobId,
    after_step: Annotated[int, Query(ge=0, le=2**53, description="only points of later steps")] = 0,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 1_000,
) -> MetricsListJson:
    """Loss, learning rate, gradient norm, speed and memory by step, ascending."""
    services.jobs.get(project, job_id)
    points = read_series(services.database, job_id, after_step, limit + 1)
    data = [MetricsPoint.model_validate(point) for point in points[:limit]]
    return MetricsListJson(data=data, has_more=len(points) > limit)


def read_series(database: Database, job_id: str, after_step: int, limit: int) -> list[dict[str, Any]]:
    """At most `limit` points by ascending step. Steps that were trained again after a loss count as last told."""
    step = events.c.data["step"].as_integer()
    query = (
        select(events.c.data)
        .where(events.c.job == job_id, events.c.type == "metrics", step > after_step)
        .order_by(step, events.c.number.desc())
    )
    points: dict[int, dict[str, Any]] = {}
    with database.read() as connection:
        for (data,) in connection.execute(query.limit(2 * limit)):
            points.setdefault(data["step"], data)
    return list(points.values())[:limit]
