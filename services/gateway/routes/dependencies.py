"""What endpoints ask for by type, in one place. All of it is `async`: FastAPI sends what is not to a thread."""

import re
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import Depends, Header, Query, Request

from services.gateway.background.notifier import Notifier
from services.gateway.bases.hub_access import HubAccess
from services.gateway.bases.metadata import BaseMetadataReader
from services.gateway.bases.tokenised import Tokenizers
from services.gateway.files.store import FileStore
from services.gateway.health import HealthCache
from services.gateway.http.idempotency import HEADER, Attempt, IdempotencyStore
from services.gateway.http.keys import Owner
from services.gateway.http.small_pool import SmallPool
from services.gateway.inference.forwarder import Forwarder
from services.gateway.inference.replicas import Replicas
from services.gateway.jobs.resolution import JobResolver
from services.gateway.jobs.sources import JobSources
from services.gateway.metrics import Metrics
from services.gateway.models.store import ModelStore
from services.gateway.responses.store import ResponseStore
from services.gateway.services import Services
from services.gateway.settings import GatewaySettings
from shared.bases.catalogue import Catalogue
from shared.errors import InvalidRequest, NotFound
from shared.jobs.store import JobStore
from shared.storage.artifacts import LocalArtifactStore
from shared.storage.database import Database

_ID = re.compile(r"[A-Za-z0-9_.:/@-]{1,255}")
CURSOR = r"^[A-Za-z0-9_.:/@-]{1,255}$"


def _part(get: Callable[[Services], object]) -> Any:
    async def part(request: Request) -> object:
        return get(request.app.state.services)

    return Depends(part)


ArtifactsDep = Annotated[LocalArtifactStore, _part(lambda services: services.artifacts)]
BasesDep = Annotated[BaseMetadataReader, _part(lambda services: services.bases)]
CatalogueDep = Annotated[Catalogue, _part(lambda services: services.catalogue)]
DatabaseDep = Annotated[Database, _part(lambda services: services.database)]
ForwarderDep = Annotated[Forwarder, _part(lambda services: services.forwarder)]
FilesDep = Annotated[FileStore, _part(lambda services: services.files)]
IdempotencyDep = Annotated[IdempotencyStore, _part(lambda services: services.idempotency)]
JobsDep = Annotated[JobStore, _part(lambda services: services.jobs)]
MetricsDep = Annotated[Metrics, _part(lambda services: services.metrics)]
ModelsDep = Annotated[ModelStore, _part(lambda services: services.models)]
NotifierDep = Annotated[Notifier, _part(lambda services: services.notifier)]
HubDep = Annotated[HubAccess, _part(lambda services: services.hub)]
HealthDep = Annotated[HealthCache, _part(lambda services: services.health)]
ReplicasDep = Annotated[Replicas, _part(lambda services: services.replicas)]
ResponsesDep = Annotated[ResponseStore, _part(lambda services: services.responses)]
ResolverDep = Annotated[JobResolver, _part(lambda services: services.resolver)]
SettingsDep = Annotated[GatewaySettings, _part(lambda services: services.settings)]
SmallPoolDep = Annotated[SmallPool, _part(lambda services: services.small_pool)]
SourcesDep = Annotated[JobSources, _part(lambda services: services.sources)]
TokenizersDep = Annotated[Tokenizers, _part(lambda services: services.tokenizers)]


async def _project(request: Request) -> str:
    owner: Owner = request.state.owner
    return owner.project


async def _attempts(
    request: Request,
    key: Annotated[
        str | None,
        Header(
            alias=HEADER,
            pattern=r"^[!-~]{1,255}$",
            description="The same key and body again: the first answer again, for a day at least",
        ),
    ] = None,
) -> Callable[[str], Attempt]:
    if len(request.headers.getlist(HEADER)) > 1:
        raise InvalidRequest(f"send one {HEADER}", param=HEADER)
    owner: Owner = request.state.owner
    # OpenAI's clients count their retries here, and send no key.
    count = re.fullmatch(r"[0-9]{1,4}", request.headers.get("x-stainless-retry-count", ""))
    retries = int(count[0]) if count else 0
    return lambda fingerprint: Attempt(owner.key_id, request.scope["path"], key, fingerprint, retries)


async def _file_id(file_id: str) -> str:
    return _known(file_id, "file")


async def _job_id(job_id: str) -> str:
    return _known(job_id, "fine-tuning job")


async def _model_id(model_id: str) -> str:
    return _known(model_id, "model")


async def _response_id(response_id: str) -> str:
    return _known(response_id, "response")


def _known(value: str, kind: str) -> str:
    # What cannot be an id is not found, before SQL is read (PostgreSQL refuses NUL with an error).
    if not _ID.fullmatch(value):
        raise NotFound(f"no such {kind}")
    return value


# The project of the caller's key.
Project = Annotated[str, Depends(_project)]
# Makes the attempt of a fingerprint.
Attempts = Annotated[Callable[[str], Attempt], Depends(_attempts)]
FileId = Annotated[str, Depends(_file_id)]
JobId = Annotated[str, Depends(_job_id)]
ModelId = Annotated[str, Depends(_model_id)]
ResponseId = Annotated[str, Depends(_response_id)]
After = Annotated[str | None, Query(pattern=CURSOR, description="id of the last item of the page before")]
