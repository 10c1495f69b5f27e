"""Health and metrics of the gateway."""

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, Field

from services.gateway.http.auth import AuthenticatedRoute
from services.gateway.inference.scrape import inference_metrics
from services.gateway.routes.dependencies import HealthDep, MetricsDep, ModelsDep, ReplicasDep
from services.gateway.routes.responses import NEEDS_KEY, TGI_ERRORS

# Open to everybody: load balancers have no key, and the answers hold nothing that a key would protect.
health = APIRouter(tags=["operations"])
router = APIRouter(route_class=AuthenticatedRoute, tags=["operations"], responses=TGI_ERRORS, dependencies=[NEEDS_KEY])


class LiveJson(BaseModel):
    status: Literal["live"] = "live"


class ReadyJson(BaseModel):
    """A gateway is ready if it can take and keep a job, that is, if the database answers. The rest is only reported."""

    status: Literal["ready", "not_ready"]
    database: bool
    redis: bool
    inference: dict[str, bool]
    workers_out_of_service: Annotated[
        int | None,
        Field(description="workers that take no job, or none of a base, for now; null if the database does not answer"),
    ]


@health.get("/health/live")
async def health_live() -> LiveJson:
    """This process answers."""
    return LiveJson()


@health.get("/health", include_in_schema=False)
@health.get("/health/ready", responses={503: {"model": ReadyJson}})
async def health_ready(
    health: HealthDep,
    replicas: ReplicasDep,
    models: ModelsDep,
    base: Annotated[str | None, Query(max_length=256, include_in_schema=False)] = None,
) -> Response:
    """Whether the database answers; the body also says whether Redis and the workers are well, and what is served.

    With `base`, ready only while that base is served: a start waits for this.
    """
    found = await health.check()
    served = replicas.served()
    ready = found.database and (base is None or base in served)
    outages = found.worker_outages
    state = ReadyJson(
        status="ready" if ready else "not_ready",
        database=found.database,
        redis=found.redis,
        inference={base.id: base.id in served for base in models.bases},
        workers_out_of_service=None if outages is None else len({outage.worker for outage in outages}),
    )
    return JSONResponse(state.model_dump(), 200 if ready else 503)


@router.get("/metrics", response_class=Response)
def metrics(metrics: MetricsDep) -> Response:
    """Prometheus text: requests of this gateway; jobs, workers, queue, disk and what is served, for all of it."""
    return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)


@router.get("/metrics/inference", response_class=Response)
async def metrics_of_inference(replicas: ReplicasDep) -> Response:
    """Prometheus text of every inference process behind this gateway, told apart by the label `replica`."""
    return Response(await inference_metrics(replicas), media_type=CONTENT_TYPE_LATEST)
