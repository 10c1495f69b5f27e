"""`/v1/models`: bases, adapters and checkpoints under one list of names."""

from fastapi import APIRouter, Response
from starlette.concurrency import run_in_threadpool

from services.gateway.http.auth import AuthenticatedRoute
from services.gateway.models.schemas import ModelDeletedJson, ModelJson, ModelListJson, adapter_json, base_json
from services.gateway.models.store import ModelStore
from services.gateway.routes.dependencies import (
    ArtifactsDep,
    DatabaseDep,
    ModelId,
    ModelsDep,
    Project,
    ReplicasDep,
)
from services.gateway.routes.responses import NEEDS_KEY, OPENAI_ERRORS, json_response
from shared.adapters.store import Adapter
from shared.bases.catalogue import Base
from shared.storage.artifacts import LocalArtifactStore
from shared.storage.database import Database
from shared.storage.manifests import is_published

router = APIRouter(route_class=AuthenticatedRoute, tags=["models"], responses=OPENAI_ERRORS, dependencies=[NEEDS_KEY])


@router.get("/v1/models", response_model=ModelListJson)
def list_models(
    database: DatabaseDep, artifacts: ArtifactsDep, models: ModelsDep, replicas: ReplicasDep, project: Project
) -> Response:
    """The bases, then adapters and checkpoints, newest first."""
    served = replicas.served()
    bases = [_base(artifacts, base, served) for base in models.bases]
    with database.read() as tx:
        adapters = models.adapters(tx, project)
    return json_response(ModelListJson(data=bases + [adapter_json(adapter, project) for adapter in adapters]))


@router.get("/v1/models/{model_id:path}", response_model=ModelJson)
def retrieve_model(
    database: DatabaseDep,
    artifacts: ArtifactsDep,
    models: ModelsDep,
    replicas: ReplicasDep,
    project: Project,
    model_id: ModelId,
) -> Response:
    """One model, by any of its names."""
    base = models.base(model_id)
    if base is not None:
        return json_response(_base(artifacts, base, replicas.served()))
    with database.read() as tx:
        adapter = models.adapter(tx, project, model_id)
    return json_response(adapter_json(adapter, project))


@router.delete("/v1/models/{model_id:path}", response_model=ModelDeletedJson)
async def delete_model(
    database: DatabaseDep,
    artifacts: ArtifactsDep,
    models: ModelsDep,
    replicas: ReplicasDep,
    project: Project,
    model_id: ModelId,
) -> Response:
    """Delete an adapter or checkpoint everywhere. Requests in flight finish on it."""
    # Unknown first, so that nothing loads it again; then out of memory; then from the disk.
    adapter = await run_in_threadpool(_delete, database, models, project, model_id)
    await replicas.unload(adapter.id)
    freed = await run_in_threadpool(artifacts.remove, artifacts.adapter(adapter.id))
    return json_response(ModelDeletedJson(id=model_id, freed_bytes=freed))


def _delete(database: Database, models: ModelStore, project: str, name: str) -> Adapter:
    with database.write() as tx:
        return models.delete(tx, project, name)


def _base(artifacts: LocalArtifactStore, base: Base, served: list[str]) -> ModelJson:
    prepared = is_published(artifacts.base(base.id), "base")
    return base_json(base, served=base.id in served, prepared=prepared)
