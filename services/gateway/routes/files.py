"""`/v1/files`: OpenAI's files API for datasets. Rows are checked while they stream in; what is bad is never stored."""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import FileResponse
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from services.gateway.files.schemas import FileDeletedJson, FileJson, FileListJson, file_json, file_list_json
from services.gateway.files.store import NewFile, StoredFile
from services.gateway.files.upload import MAX_FORM_OVERHEAD, DatasetUpload
from services.gateway.http.auth import AuthenticatedRoute, StreamingRoute
from services.gateway.http.idempotency import Answer, Answered, Attempt
from services.gateway.routes.dependencies import After, Attempts, FileId, Project, Using
from services.gateway.routes.responses import NEEDS_KEY, OPENAI_ERRORS, answered
from services.gateway.services import Services
from shared.errors import InvalidRequest, Unavailable
from shared.http.bounded_route import check_declared_length

router = APIRouter(route_class=AuthenticatedRoute, tags=["files"], responses=OPENAI_ERRORS, dependencies=[NEEDS_KEY])
uploads = APIRouter(route_class=StreamingRoute, tags=["files"], responses=OPENAI_ERRORS, dependencies=[NEEDS_KEY])

_FORM = {
    "type": "object",
    "required": ["purpose", "file"],
    "additionalProperties": False,
    "properties": {
        "purpose": {"type": "string", "enum": ["fine-tune"]},
        "file": {"type": "string", "contentMediaType": "application/octet-stream"},
    },
}
_UPLOAD_BODY = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}}


@uploads.post("/v1/files", openapi_extra=_UPLOAD_BODY, response_model=FileJson)
async def create_file(request: Request, services: Using, project: Project, attempts: Attempts) -> Response:
    """Upload a dataset: JSON Lines or one JSON array of instruction, completion or chat rows."""
    try:
        return answered(_answer(await _receive(request, services, project, attempts)))
    except Answered as twin:
        return answered(twin.answer, again=True)
    except ClientDisconnect:
        # Nobody reads this.
        raise InvalidRequest("the upload was broken off") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise Unavailable("the disk is full; nothing was stored", code="storage_full") from error
        raise


async def _receive(
    request: Request, services: Services, project: str, attempts: Callable[[str], Attempt]
) -> StoredFile:
    """Raises Answered if the same was uploaded before under the request's key."""
    limit = services.settings.max_upload_bytes
    check_declared_length(request, limit + MAX_FORM_OVERHEAD)
    with services.artifacts.staged() as folder:
        upload = DatasetUpload(request.headers.get("content-type", ""), folder, limit)
        try:
            async for chunk in request.stream():
                await run_in_threadpool(upload.feed, chunk)
            new = await run_in_threadpool(upload.finish)
        finally:
            upload.close()
        return await run_in_threadpool(_add, services, project, new, folder, attempts(new.fingerprint()))


def _add(services: Services, project: str, new: NewFile, staged: Path, attempt: Attempt) -> StoredFile:
    with services.answers.alone(attempt):
        return services.files.add(
            project,
            new,
            staged,
            guard=lambda connection: services.answers.begin(connection, attempt),
            seal=lambda connection, file: services.answers.keep(connection, attempt, _answer(file)),
        )


def _answer(file: StoredFile) -> Answer:
    return Answer(file_json(file).model_dump_json())


@router.get("/v1/files")
def list_files(
    services: Using,
    project: Project,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    purpose: Annotated[str | None, Query(max_length=64, pattern=r"^[a-z_-]+$")] = None,
) -> FileListJson:
    """Files, newest first unless `order` says otherwise."""
    return file_list_json(services.files.list(project, after=after, limit=limit, order=order, purpose=purpose))


@router.get("/v1/files/{file_id}")
def retrieve_file(services: Using, project: Project, file_id: FileId) -> FileJson:
    """One file and the report on its rows."""
    return file_json(services.files.get(project, file_id))


@router.delete("/v1/files/{file_id}")
def delete_file(services: Using, project: Project, file_id: FileId) -> FileDeletedJson:
    """Delete a file that no unfinished job needs."""
    services.files.delete(project, file_id)
    return FileDeletedJson(id=file_id)


@router.get("/v1/files/{file_id}/content", response_class=FileResponse)
def retrieve_file_content(services: Using, project: Project, file_id: FileId) -> Response:
    """The very bytes that were uploaded."""
    file = services.files.get(project, file_id)
    return FileResponse(services.files.data(file), media_type="application/octet-stream", filename=file.filename)
