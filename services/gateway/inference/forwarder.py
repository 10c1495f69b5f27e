"""Sends a checked generation to the process that should answer it, in the name of a project. Knows no FastAPI."""

import httpx
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from services.gateway.inference.project_tags import ProjectTags
from services.gateway.inference.replicas import Replicas
from services.gateway.models.store import ModelStore, Target
from shared.errors import NotFound, Unavailable
from shared.inference_api.headers import MODEL_NAME, PROJECT_TAG, REQUEST_ID
from shared.storage.database import Database


class Forwarder:
    """What the generate routes need.

    Args:
        default_base: id or alias of the base that answers a request naming no model; the first one served if empty.
    """

    def __init__(
        self, database: Database, models: ModelStore, replicas: Replicas, tags: ProjectTags, default_base: str
    ) -> None:
        self._database, self._models, self._replicas, self._tags = database, models, replicas, tags
        self._default_base = default_base

    async def target(self, project: str, name: str, param: str) -> Target:
        """What answers to a name, or to none.

        Args:
            param: the field that an error names.

        Raises:
            NotFound: there is no such model; never the base instead.
            Unavailable: code `base_not_served`; no name was given, and nothing is served.
        """
        if name:
            try:
                return await run_in_threadpool(self._resolve, project, name)
            except NotFound as error:
                error.param = param
                raise
        if self._default_base:
            base = self._models.base(self._default_base)
            if base is None:
                raise Unavailable("this gateway's TUNESMITH_DEFAULT_BASE is no base", code="base_not_served")
            return Target(base.id)
        served = self._replicas.served()
        if not served:
            raise Unavailable("no inference process answers", code="base_not_served")
        return Target(served[0])

    def _resolve(self, project: str, name: str) -> Target:
        with self._database.read() as tx:
            return self._models.resolve(tx, project, name)

    async def send(
        self, project: str, target: Target, path: str, body: BaseModel, *, name: str, accept: str, request_id: str
    ) -> httpx.Response:
        """Send a body of the contract; the response's own body is not read yet and must be closed.

        Args:
            name: what the client called the model; empty if it named none.

        Raises:
            Unavailable: see `Replicas.send`.
        """
        headers = {
            "content-type": "application/json",
            "accept": accept,
            REQUEST_ID: request_id,
            PROJECT_TAG: self._tags.tag(project),
        }
        if name:
            headers[MODEL_NAME] = name
        content = body.model_dump_json(exclude_unset=True).encode()
        return await self._replicas.send(target, path, content, headers)
