"""`/v1/models`: bases, adapters and checkpoints under one list of names."""

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool

from services.gateway.http.auth import AuthenticatedRoute
from services.gateway.models.schemas import ModelDeletedJson, ModelJson, ModelListJson, adapter_json, base_json
from services.gateway.routes.dependencies import ModelId, Project, Using
from services.gateway.routes.responses import NEEDS_KEY, OPENAI_ERRORS
from services.gateway.services import Services
from shared.bases.catalogue import Base
from shared.storage.artifacts import is_published

router = APIRouter(route_class=AuthenticatedRoute, tags=["models"], responses=OPENAI_ERRORS, dependencies=[NEEDS_KEY])


@router.get("/v1/models")
async def list_models(services: Using, project: Project) -> ModelListJson:
    """The bases, then adapters and checkpoints, newest first."""
    served = services.replicas.served()

    def listed() -> ModelListJson:
        bases = [_base(services, base, served) for base in services.models.bases]
        adapters = [adapter_json(adapter, project) for adapter in services.models.adapters(project)]
        return ModelListJson(data=bases + adapters)

    return await run_in_threadpool(listed)


@router.get("/v1/models/{model_id:path}")
async def retrieve_model(services: Using, project: Project, model_id: ModelId) -> ModelJson:
    """One model, by any of its names."""
    base = services.models.base(model_id)
    if base is not None:
        served = services.replicas.served()
        return await run_in_threadpool(_base, services, base, served)
    return adapter_json(await run_in_threadpool(services.models.adapter, project, model_id), project)


@router.delete("/v1/models/{model_id:path}")
async def delete_model(services: Using, project: Project, model_id: ModelId) -> ModelDeletedJson:
    """Delete an adapter or checkpoint everywhere. Requests in flight finish on it."""
    # Unknown first, so that nothing loads it again; then out of memory; then from the disk.
    adapter = await run_in_threadpool(services.models.delete, project, model_id)
    await services.replicas.unload(adapter.id)
    await run_in_threadpool(services.artifacts.remove, services.artifacts.adapter(adapter.id))
    return ModelDeletedJson(id=model_id)


def _base(services: Services, base: Base, served: list[str]) -> ModelJson:
    prepared = is_published(services.artifacts.base(base.id), "base")
    return base_json(base, served=base.id in served, prepared=prepared)
