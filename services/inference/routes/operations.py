"""Routes about the server itself: adapters by id, `/info`, health and metrics."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel

from services.inference.adapters.registry import Entry
from services.inference.metrics import Metrics
from services.inference.serving import Serving
from services.inference.settings import InferenceSettings

READY_SECONDS = 10.0


class AdapterView(BaseModel):
    """An adapter that this process holds.

    Attributes:
        bytes: what it takes in the engine; 0 while it is being read.
        ms: how long its load took, from reading the folder to residency.
        in_flight: requests that use it or wait for it.
    """

    id: str
    state: Literal["loading", "resident", "draining"]
    rank: int
    bytes: int
    step: int | None
    ms: float
    pinned: bool
    in_flight: int
    template: str | None


class AdapterList(BaseModel):
    data: list[AdapterView]
    resident_bytes: int
    budget_bytes: int
    slots: int


class Unloaded(BaseModel):
    id: str
    unloaded: bool


class Info(BaseModel):
    """Ours first, then text-generation-inference's names for the same things.

    Attributes:
        precision: what the base's weights are held in.
        runner: `llama` (our forward pass) or `transformers`.
        measured: with precision `auto`, what the probe at start saw of each candidate.
    """

    base: str
    aliases: list[str]
    revision: str
    base_sha256: str
    precision: str
    runner: str
    measured: list[dict[str, Any]]
    slots: int
    context: int
    adapter_slots: int
    adapter_bytes: int
    max_rank: int
    model_id: str
    model_sha: str
    model_dtype: str
    model_device_type: str
    model_pipeline_tag: str
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_tokens: int
    max_input_length: int
    max_total_tokens: int
    validation_workers: int
    max_client_batch_size: int
    router: str
    version: str


def _view(entry: Entry) -> AdapterView:
    return AdapterView(
        id=entry.id,
        state=entry.state,
        rank=entry.rank,
        bytes=entry.nbytes,
        step=entry.step,
        ms=round(entry.load_ms, 1),
        pinned=entry.pinned,
        in_flight=entry.references,
        template=entry.template.id if entry.template else None,
    )


def operations_router(route_class: type[APIRoute], settings: InferenceSettings, version: str) -> APIRouter:
    """The guarded routes."""
    router = APIRouter(route_class=route_class, tags=["operations"])

    @router.get("/info", operation_id="info")
    async def info(request: Request) -> Info:
        serving: Serving = request.app.state.serving
        base = serving.base
        return Info(
            base=base.id,
            aliases=list(base.aliases),
            revision=base.revision,
            base_sha256=base.sha256,
            precision=base.precision,
            runner=base.runner,
            measured=list(base.measured),
            slots=settings.slots,
            context=serving.engine.context,
            adapter_slots=settings.adapter_slots,
            adapter_bytes=settings.adapter_bytes,
            max_rank=settings.max_rank,
            model_id=base.id,
            model_sha=base.revision,
            model_dtype=base.dtype,
            model_device_type=base.device,
            model_pipeline_tag="text-generation",
            max_concurrent_requests=settings.slots + settings.queue_requests,
            max_best_of=1,
            max_stop_sequences=4,
            max_input_tokens=serving.engine.context - 1,
            max_input_length=serving.engine.context - 1,
            max_total_tokens=serving.engine.context,
            validation_workers=1,
            max_client_batch_size=1,
            router="tunesmith-inference",
            version=version,
        )

    @router.get("/adapters", operation_id="list_adapters")
    async def list_adapters(request: Request) -> AdapterList:
        serving: Serving = request.app.state.serving
        return AdapterList(
            data=[_view(entry) for entry in serving.adapters.entries()],
            resident_bytes=serving.adapters.used_bytes,
            budget_bytes=settings.adapter_bytes,
            slots=settings.adapter_slots,
        )

    @router.put("/adapters/{adapter_id}", operation_id="load_adapter")
    async def load_adapter(
        adapter_id: str, request: Request, gently: Annotated[float, Query(ge=0, le=86_400)] = 0
    ) -> AdapterView:
        """Make an adapter resident; at once if it is.

        With `gently`, what was used within so many seconds is not evicted for it: 429 if there is no other room.
        """
        serving: Serving = request.app.state.serving
        return _view(await serving.adapters.load(adapter_id, gently=gently))

    @router.delete("/adapters/{adapter_id}", operation_id="unload_adapter")
    async def unload_adapter(adapter_id: str, request: Request) -> Unloaded:
        """Take an adapter out of memory; requests in flight finish on it. What is on disk stays."""
        serving: Serving = request.app.state.serving
        return Unloaded(id=adapter_id, unloaded=serving.adapters.unload(adapter_id))

    @router.put("/adapters/{adapter_id}/pin", operation_id="pin_adapter")
    async def pin_adapter(adapter_id: str, request: Request) -> AdapterView:
        """Keep an adapter resident, loading it if need be."""
        serving: Serving = request.app.state.serving
        return _view(await serving.adapters.pin(adapter_id, True))

    @router.delete("/adapters/{adapter_id}/pin", operation_id="unpin_adapter")
    async def unpin_adapter(adapter_id: str, request: Request) -> AdapterView:
        """Let an adapter be evicted again."""
        serving: Serving = request.app.state.serving
        return _view(await serving.adapters.pin(adapter_id, False))

    @router.get("/metrics", operation_id="metrics", response_class=Response)
    async def metrics(request: Request) -> Response:
        own: Metrics = request.app.state.metrics
        return Response(generate_latest(own.registry), media_type=CONTENT_TYPE_LATEST)

    return router


def health_router() -> APIRouter:
    """The routes open to everybody."""
    router = APIRouter(tags=["health"])

    @router.get("/health/live", operation_id="live")
    async def live() -> dict[str, str]:
        return {"status": "live"}

    @router.get("/health/ready", operation_id="ready")
    @router.get("/health", operation_id="health", include_in_schema=False)
    async def ready(request: Request) -> dict[str, str]:
        """A real token came out of the engine in the last ten seconds; one is generated if need be."""
        serving: Serving = request.app.state.serving
        await serving.ready(READY_SECONDS)
        return {"status": "ready"}

    return router
