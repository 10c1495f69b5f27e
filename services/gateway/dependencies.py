"""What endpoints ask for by type, in one place."""

import re
from typing import Annotated

from fastapi import Depends, Query, Request

from services.gateway.services import Services
from shared.errors import NotFound

_ID = re.compile(r"[A-Za-z0-9_.:/@-]{1,255}")
CURSOR = r"^[A-Za-z0-9_.:/@-]{1,255}$"


def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


def _project(request: Request) -> str:
    project: str = request.state.project
    return project


def _file_id(file_id: str) -> str:
    return _known(file_id, "file")


def _job_id(job_id: str) -> str:
    return _known(job_id, "fine-tuning job")


def _model_id(model_id: str) -> str:
    return _known(model_id, "model")


def _known(value: str, kind: str) -> str:
    # What cannot be an id is not found, before a database is asked (PostgreSQL refuses NUL with an error).
    if not _ID.fullmatch(value):
        raise NotFound(f"no such {kind}")
    return value


Using = Annotated[Services, Depends(_services)]
# The project of the caller's key.
Project = Annotated[str, Depends(_project)]
FileId = Annotated[str, Depends(_file_id)]
JobId = Annotated[str, Depends(_job_id)]
ModelId = Annotated[str, Depends(_model_id)]
After = Annotated[str | None, Query(pattern=CURSOR, description="id of the last item of the page before")]
