"""What endpoints ask for by type, in one place."""

import re
from collections.abc import Callable
from typing import Annotated

from fastapi import Depends, Header, Query, Request

from services.gateway.http.idempotency import HEADER, Attempt
from services.gateway.http.keys import Owner
from services.gateway.services import Services
from shared.errors import InvalidRequest, NotFound

_ID = re.compile(r"[A-Za-z0-9_.:/@-]{1,255}")
CURSOR = r"^[A-Za-z0-9_.:/@-]{1,255}$"


def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


def _project(request: Request) -> str:
    owner: Owner = request.state.owner
    return owner.project


def _attempts(
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
    retried = bool(re.fullmatch(r"0*[1-9]\d{0,3}", request.headers.get("x-stainless-retry-count", "")))
    return lambda fingerprint: Attempt(owner.key_id, request.scope["path"], key, fingerprint, retried)


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
# Makes the attempt of a fingerprint.
Attempts = Annotated[Callable[[str], Attempt], Depends(_attempts)]
FileId = Annotated[str, Depends(_file_id)]
JobId = Annotated[str, Depends(_job_id)]
ModelId = Annotated[str, Depends(_model_id)]
After = Annotated[str | None, Query(pattern=CURSOR, description="id of the last item of the page before")]
