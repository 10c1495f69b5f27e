"""Which adapters this process holds: list, load, unload, pin."""

from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.routing import APIRoute

from services.inference.adapters.residency import Entry
from services.inference.routes.dependencies import ServingDep, SettingsDep
from shared.inference_api.administration import (
    ADAPTERS,
    MAX_PROTECT_RECENT_SECONDS,
    PROTECT_RECENT_SECONDS_OLD,
    ResidentAdapterJson,
    ResidentAdapterListJson,
    UnloadedJson,
)
from shared.logs import get_logger

_Seconds = Annotated[float, Query(ge=0, le=MAX_PROTECT_RECENT_SECONDS)]
_OldSeconds = Annotated[
    float, Query(ge=0, le=MAX_PROTECT_RECENT_SECONDS, alias=PROTECT_RECENT_SECONDS_OLD, deprecated=True)
]


def adapters_router(route_class: type[APIRoute]) -> APIRouter:
    """The routes under `/adapters`."""
    router = APIRouter(prefix=ADAPTERS, route_class=route_class, tags=["adapters"])
    router.get("", operation_id="list_adapters")(list_adapters)
    router.put("/{adapter_id}", operation_id="load_adapter")(load_adapter)
    router.delete("/{adapter_id}", operation_id="unload_adapter")(unload_adapter)
    router.put("/{adapter_id}/pin", operation_id="pin_adapter")(pin_adapter)
    router.delete("/{adapter_id}/pin", operation_id="unpin_adapter")(unpin_adapter)
    return router


async def list_adapters(serving: ServingDep, settings: SettingsDep) -> ResidentAdapterListJson:
    return ResidentAdapterListJson(
        data=[_json(entry) for entry in serving.adapters.entries()],
        resident_bytes=serving.adapters.used_bytes,
        budget_bytes=settings.adapter_bytes,
        slots=settings.adapter_slots,
    )


async def load_adapter(
    adapter_id: str, serving: ServingDep, protect_recent_seconds: _Seconds = 0, old_name: _OldSeconds = 0
) -> ResidentAdapterJson:
    """Make an adapter resident; at once if it is.

    With `protect_recent_seconds`, what was used within so many seconds is not evicted for it: 429 if there is no other
    room.
    """
    if old_name:
        get_logger("adapters").warning(
            "old query parameter: use protect_recent_seconds", parameter=PROTECT_RECENT_SECONDS_OLD
        )
    seconds = protect_recent_seconds or old_name
    return _json(await serving.adapters.load(adapter_id, protect_recent_seconds=seconds))


async def unload_adapter(adapter_id: str, serving: ServingDep) -> UnloadedJson:
    """Take an adapter out of memory; requests in flight finish on it. What is on disk stays."""
    return UnloadedJson(id=adapter_id, unloaded=serving.adapters.unload(adapter_id))


async def pin_adapter(adapter_id: str, serving: ServingDep) -> ResidentAdapterJson:
    """Keep an adapter resident, loading it if need be."""
    return _json(await serving.adapters.pin(adapter_id))


async def unpin_adapter(adapter_id: str, serving: ServingDep) -> ResidentAdapterJson:
    """Let an adapter be evicted again."""
    return _json(serving.adapters.unpin(adapter_id))


def _json(entry: Entry) -> ResidentAdapterJson:
    return ResidentAdapterJson(
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
