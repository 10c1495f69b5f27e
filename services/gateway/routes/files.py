"""`/v1/files`: OpenAI's files API for datasets. Rows are checked while they stream in; what is bad is never stored."""

import errno
from collections.abc import Callable
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.concurrency import contextmanager_in_threadpool
from fastapi.responses import FileResponse
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from services.gateway.files.schemas import FileDeletedJson, FileJson, FileListJson, file_json, file_list_json
from services.gateway.files.store import FileStore
from services.gateway.files.upload import MAX_FORM_OVERHEAD, ON_BAD_ROWS, DatasetUpload, receiving
from services.gateway.http.auth import AuthenticatedRoute, StreamingRoute
from services.gateway.http.idempotency import Attempt, IdempotencyStore, StoredResponse
from services.gateway.routes.dependencies import (
    After,
    ArtifactsDep,
    Attempts,
    DatabaseDep,
    FileId,
    FilesDep,
    IdempotencyDep,
    Project,
    SettingsDep,
)
from services.gateway.routes.responses import NEEDS_KEY, OPENAI_ERRORS, json_response, stored_response
from shared.errors import InvalidRequest, Unavailable
from shared.http.bounded_route import check_declared_length
from shared.storage.artifacts import LocalArtifactStore, new_id
from shared.storage.database import Database

router = APIRouter(route_class=AuthenticatedRoute, tags=["files"], responses=OPENAI_ERRORS, dependencies=[NEEDS_KEY])
uploads = APIRouter(route_class=StreamingRoute, tags=["files"], responses=OPENAI_ERRORS, dependencies=[NEEDS_KEY])

_FORM = {
    "type": "object",
    "required": ["purpose", "file"],
    "additionalProperties": False,
    "properties": {
        "purpose": {"type": "string", "enum": ["fine-tune"]},
        "on_bad_rows": {"type": "string", "enum": list(ON_BAD_ROWS), "description": "before the file; else refuse"},
        "file": {"type": "string", "contentMediaType": "application/octet-stream"},
    },
}
_UPLOAD_BODY = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}}


@uploads.post("/v1/files", openapi_extra=_UPLOAD_BODY, response_model=FileJson)
async def create_file(
    request: Request,
    settings: SettingsDep,
    database: DatabaseDep,
    artifacts: ArtifactsDep,
    idempotency: IdempotencyDep,
    files: FilesDep,
    project: Project,
    attempts: Attempts,
) -> Response:
    """Upload a dataset, as JSON Lines, one JSON array, CSV or Parquet: instruction, completion, chat or text rows."""
    limit = settings.max_upload_bytes
    check_declared_length(request, limit + MAX_FORM_OVERHEAD)
    content_type = request.headers.get("content-type", "")
    try:
        async with contextmanager_in_threadpool(receiving(artifacts, content_type, limit)) as upload:
            async for chunk in request.stream():
                await run_in_threadpool(_take, artifacts, upload, chunk)
            return await run_in_threadpool(_keep, upload, database, artifacts, idempotency, files, project, attempts)
    except ClientDisconnect:
        # The client has left: this is for the access log.
        raise InvalidRequest("the upload was broken off") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise Unavailable(f"the disk is full, nothing was stored: {error.strerror}", code="storage_full") from error
        raise


def _take(artifacts: LocalArtifactStore, upload: DatasetUpload, chunk: bytes) -> None:
    artifacts.require_space()
    upload.feed(chunk)


def _keep(
    upload: DatasetUpload,
    database: Database,
    artifacts: LocalArtifactStore,
    idempotency: IdempotencyStore,
    files: FileStore,
    project: str,
    attempts: Callable[[str], Attempt],
) -> Response:
    """Store what was received, its row after its bytes: a crash between them leaves a folder that no row refers to."""
    new = upload.finish()
    attempt = attempts(new.fingerprint())
    file_id = new_id("file")
    with (
        idempotency.single_flight(attempt),
        artifacts.placed(upload.folder, artifacts.file(file_id)) as placed,
        database.write() as tx,
    ):
        earlier = idempotency.begin(tx, attempt)
        if earlier is not None and (attempt.key is not None or files.exists(tx, project, earlier.id)):
            return stored_response(earlier, replayed=True)
        file = files.add(tx, project, file_id, new)
        response = StoredResponse(file_json(file).model_dump_json())
        idempotency.keep(tx, attempt, response)
        # Once COMMIT is sent its answer may be lost and the row be there all the same: from here on the bytes stay, and
        # are garbage if no row came.
        placed.keep()
    return stored_response(response)


@router.get("/v1/files", response_model=FileListJson)
def list_files(
    database: DatabaseDep,
    files: FilesDep,
    project: Project,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    purpose: Annotated[str | None, Query(max_length=64, pattern=r"^[a-z_-]+$")] = None,
) -> Response:
    """Files, newest first unless `order` says otherwise."""
    with database.read() as tx:
        page = files.list(tx, project, after=after, limit=limit, order=order, purpose=purpose)
    return json_response(file_list_json(page))


@router.get("/v1/files/{file_id}", response_model=FileJson)
def retrieve_file(database: DatabaseDep, files: FilesDep, project: Project, file_id: FileId) -> Response:
    """One file and the report on its rows."""
    with database.read() as tx:
        file = files.get(tx, project, file_id)
    return json_response(file_json(file))


@router.delete("/v1/files/{file_id}", response_model=FileDeletedJson)
def delete_file(
    database: DatabaseDep, artifacts: ArtifactsDep, files: FilesDep, project: Project, file_id: FileId
) -> Response:
    """Delete a file that no unfinished job needs."""
    with database.write() as tx:
        gone = files.delete(tx, project, file_id)
    # The row went first: what a crash leaves behind is a folder that no row refers to.
    artifacts.remove(artifacts.file(file_id))
    if gone is not None:
        artifacts.remove(artifacts.cached(gone))
    return json_response(FileDeletedJson(id=file_id))


@router.get("/v1/files/{file_id}/content", response_class=FileResponse)
def retrieve_file_content(
    database: DatabaseDep, artifacts: ArtifactsDep, files: FilesDep, project: Project, file_id: FileId
) -> Response:
    """The very bytes that were uploaded."""
    with database.read() as tx:
        file = files.get(tx, project, file_id)
    path = artifacts.file_data(file.id)
    return FileResponse(path, media_type="application/octet-stream", filename=file.filename)
