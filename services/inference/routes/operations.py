"""What this process says of itself: `/info`, health and metrics."""

from importlib.metadata import version

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from services.inference.metrics import Metrics
from services.inference.routes.dependencies import ServingDep, SettingsDep
from shared.inference_api.administration import INFO, InfoJson
from shared.inference_api.fields import MAX_CANDIDATES, MAX_PROMPTS, MAX_STOP_STRINGS

READY_SECONDS = 10.0

# Open to everybody.
health = APIRouter(tags=["health"])


def operations_router(route_class: type[APIRoute]) -> APIRouter:
    """The routes that need the token."""
    router = APIRouter(route_class=route_class, tags=["operations"])
    router.get(INFO, operation_id="info")(info)
    router.get("/metrics", operation_id="metrics", response_class=Response)(metrics)
    return router


async def info(serving: ServingDep, settings: SettingsDep) -> InfoJson:
    """What is served, and within which limits."""
    base, context = serving.base, serving.engine.context
    return InfoJson(
        base=base.id,
        aliases=list(base.aliases),
        revision=base.revision,
        base_sha256=base.sha256,
        precision=base.precision,
        runner=base.runner,
        measured=list(base.measured),
        slots=serving.slots,
        context=context,
        adapter_slots=settings.adapter_slots,
        adapter_bytes=settings.adapter_bytes,
        max_rank=settings.largest_rank,
        model_id=base.id,
        model_sha=base.revision,
        model_dtype=base.dtype,
        model_device_type=base.device,
        model_pipeline_tag="text-generation",
        max_concurrent_requests=serving.slots + settings.queue_requests,
        max_best_of=MAX_CANDIDATES,
        max_stop_sequences=MAX_STOP_STRINGS,
        max_input_tokens=context - 1,
        max_input_length=context - 1,
        max_total_tokens=context,
        validation_workers=1,
        max_client_batch_size=MAX_PROMPTS,
        router="tunesmith-inference",
        version=version("tunesmith"),
    )


async def metrics(request: Request) -> Response:
    """Prometheus text."""
    own: Metrics = request.app.state.metrics
    return Response(generate_latest(own.registry), media_type=CONTENT_TYPE_LATEST)


@health.get("/health/live", operation_id="live")
async def live() -> dict[str, str]:
    """This process answers."""
    return {"status": "live"}


@health.get("/health/ready", operation_id="ready")
@health.get("/health", operation_id="health", include_in_schema=False)
async def ready(serving: ServingDep) -> dict[str, str]:
    """A real token came out of the engine in the last ten seconds; one is generated if need be."""
    await serving.ready(READY_SECONDS)
    return {"status": "ready"}
