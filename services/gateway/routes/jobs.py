"""`/v1/fine_tuning/jobs`: OpenAI's fine-tuning API over the job store."""

import re
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import StreamingResponse
from sqlalchemy import Connection
from starlette.concurrency import run_in_threadpool

from services.gateway.http.auth import AuthenticatedRoute
from services.gateway.http.idempotency import Attempt, StoredResponse
from services.gateway.jobs.event_ids import event_number
from services.gateway.jobs.event_stream import EventStream
from services.gateway.jobs.request_schema import MAX_METADATA_PAIRS, JobRequest
from services.gateway.jobs.response_schema import (
    CheckpointListJson,
    EventListJson,
    JobJson,
    JobListJson,
    checkpoint_list_json,
    event_list_json,
    job_json,
    job_list_json,
)
from services.gateway.routes.dependencies import (
    CURSOR,
    After,
    Attempts,
    DatabaseDep,
    HubDep,
    IdempotencyDep,
    JobId,
    JobsDep,
    NotifierDep,
    Project,
    ResolverDep,
    SourcesDep,
)
from services.gateway.routes.responses import NEEDS_KEY, OPENAI_ERRORS, json_response, stored_response
from shared.errors import InvalidRequest
from shared.http.event_stream import MEDIA_TYPE, UNBUFFERED
from shared.jobs.store import JobStore

router = APIRouter(
    route_class=AuthenticatedRoute, tags=["fine-tuning"], responses=OPENAI_ERRORS, dependencies=[NEEDS_KEY]
)
Limit = Annotated[int, Query(ge=1, le=100)]


@router.post("/v1/fine_tuning/jobs", response_model=JobJson)
def create_fine_tuning_job(
    database: DatabaseDep,
    idempotency: IdempotencyDep,
    sources: SourcesDep,
    resolver: ResolverDep,
    hub: HubDep,
    jobs: JobsDep,
    notifier: NotifierDep,
    project: Project,
    attempts: Attempts,
    body: JobRequest,
) -> Response:
    """Queue a job. Answers as soon as it is durable; everything effective is in the answer."""
    attempt = attempts(body.fingerprint())
    with database.read() as tx:
        # Before anything else: the files may be gone that the first sending named.
        earlier = _still_true(tx, jobs, project, attempt, idempotency.find(tx, attempt))
        if earlier is not None:
            return stored_response(earlier, replayed=True)
        resolver.check_base(body)
        named = sources.load(tx, project, body)
    resolved = resolver.resolve(body, named)
    spec = resolved.spec
    hub.check(spec.base)
    with idempotency.single_flight(attempt), database.write() as tx:
        earlier = _still_true(tx, jobs, project, attempt, idempotency.begin(tx, attempt))
        if earlier is not None:
            return stored_response(earlier, replayed=True)
        # A file or the adapter to continue may have been deleted since it was looked at.
        sources.lock(tx, project, spec)
        job = jobs.create(tx, project, spec, metadata=body.metadata, warnings=resolved.warnings)
        response = StoredResponse(job_json(job).model_dump_json())
        idempotency.keep(tx, attempt, response)
    notifier.notify()
    return stored_response(response)


@router.get("/v1/fine_tuning/jobs", response_model=JobListJson)
def list_fine_tuning_jobs(
    database: DatabaseDep,
    jobs: JobsDep,
    project: Project,
    request: Request,
    after: After = None,
    limit: Limit = 20,
) -> Response:
    """Jobs, newest first; `metadata[key]=value` selects."""
    metadata = _metadata(request)
    with database.read() as tx:
        page = jobs.list(tx, project, after=after, limit=limit, metadata=metadata)
    return json_response(job_list_json(page))


@router.get("/v1/fine_tuning/jobs/{job_id}", response_model=JobJson)
def retrieve_fine_tuning_job(database: DatabaseDep, jobs: JobsDep, project: Project, job_id: JobId) -> Response:
    """One job with its progress."""
    with database.read() as tx:
        job = jobs.get(tx, project, job_id)
    return json_response(job_json(job))


@router.post("/v1/fine_tuning/jobs/{job_id}/cancel", response_model=JobJson)
def cancel_fine_tuning_job(database: DatabaseDep, jobs: JobsDep, project: Project, job_id: JobId) -> Response:
    """Cancel: at once if it waits, within seconds if it runs. Checkpoints made so far stay. Repeating is harmless."""
    with database.write() as tx:
        job = jobs.cancel(tx, project, job_id)
    return json_response(job_json(job))


@router.post("/v1/fine_tuning/jobs/{job_id}/pause", response_model=JobJson)
def pause_fine_tuning_job(database: DatabaseDep, jobs: JobsDep, project: Project, job_id: JobId) -> Response:
    """Pause: the worker saves a checkpoint and takes the next job."""
    with database.write() as tx:
        job = jobs.pause(tx, project, job_id)
    return json_response(job_json(job))


@router.post("/v1/fine_tuning/jobs/{job_id}/resume", response_model=JobJson)
def resume_fine_tuning_job(
    database: DatabaseDep, jobs: JobsDep, notifier: NotifierDep, project: Project, job_id: JobId
) -> Response:
    """Queue a paused job again; it goes on from its newest checkpoint."""
    with database.write() as tx:
        job = jobs.resume(tx, project, job_id)
    notifier.notify()
    return json_response(job_json(job))


@router.get(
    "/v1/fine_tuning/jobs/{job_id}/events",
    response_model=EventListJson,
    responses={200: {"content": {MEDIA_TYPE: {}}}, 204: {"description": "all of an ended job's events were seen"}},
)
async def list_fine_tuning_events(
    database: DatabaseDep,
    jobs: JobsDep,
    project: Project,
    job_id: JobId,
    after: After = None,
    limit: Limit = 20,
    accept: Annotated[str, Header()] = "",
    last_event_id: Annotated[str | None, Header(pattern=CURSOR)] = None,
) -> Response:
    """Events, newest first; or, if `text/event-stream` is accepted, ascending and as they happen."""
    seen = None if after is None else event_number(job_id, after)
    if MEDIA_TYPE not in accept:

        def page() -> Response:
            with database.read() as tx:
                found = jobs.events(tx, project, job_id, before=seen, limit=limit)
            return json_response(event_list_json(found))

        return await run_in_threadpool(page)
    seen = event_number(job_id, last_event_id) if last_event_id else seen
    stream = EventStream(database, jobs, project, job_id, seen or 0)
    if await stream.is_over():
        # What tells a browser's EventSource not to come back.
        return Response(status_code=204)
    return StreamingResponse(stream, media_type=MEDIA_TYPE, headers=UNBUFFERED)


@router.get("/v1/fine_tuning/jobs/{job_id}/checkpoints", response_model=CheckpointListJson)
def list_fine_tuning_job_checkpoints(
    database: DatabaseDep, jobs: JobsDep, project: Project, job_id: JobId, after: After = None, limit: Limit = 10
) -> Response:
    """Checkpoints, newest first; each can be served under its name."""
    with database.read() as tx:
        page = jobs.checkpoints(tx, project, job_id, after=after, limit=limit)
    return json_response(checkpoint_list_json(page))


def _still_true(
    tx: Connection, jobs: JobStore, project: str, attempt: Attempt, earlier: StoredResponse | None
) -> StoredResponse | None:
    """What to answer instead of making a second job, if the request was answered before.

    A key means one answer for ever. Without one, a retry of an answer that was lost wants the job as it is now; if that
    has ended, the client cannot mean it: it is a new request for the same training.
    """
    if earlier is None or attempt.key is not None:
        return earlier
    job = jobs.get(tx, project, earlier.id)
    return None if job.state.final else StoredResponse(job_json(job).model_dump_json())


def _metadata(request: Request) -> dict[str, str]:
    # OpenAI's clients write nested parameters with brackets; FastAPI has no word for that.
    wanted = {}
    for name, value in request.query_params.multi_items():
        match = re.fullmatch(r'metadata\[([^"\\\x00-\x1f]{1,64})\]', name)
        if match and "\x00" not in value:
            wanted[match[1]] = value
        elif name.startswith("metadata") and not (name == "metadata" and value in ("", "null")):
            raise InvalidRequest("write metadata[key]=value", param="metadata")
    if len(wanted) > MAX_METADATA_PAIRS:
        raise InvalidRequest(f"a job has at most {MAX_METADATA_PAIRS} pairs: no more can match", param="metadata")
    return wanted
