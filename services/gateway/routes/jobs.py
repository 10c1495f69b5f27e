"""`/v1/fine_tuning/jobs`: OpenAI's fine-tuning API over the job store."""

import re
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import StreamingResponse
from sqlalchemy import Connection
from starlette.concurrency import run_in_threadpool

from services.gateway.files.store import require
from services.gateway.http.auth import AuthenticatedRoute
from services.gateway.http.idempotency import Answer, Answered
from services.gateway.jobs.event_stream import EventStream
from services.gateway.jobs.request_schema import JobRequest
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
from services.gateway.routes.dependencies import CURSOR, After, Attempts, JobId, Project, Using
from services.gateway.routes.job_spec import resolve
from services.gateway.routes.responses import NEEDS_KEY, OPENAI_ERRORS, answered
from shared.errors import InvalidRequest
from shared.jobs.rows import Job

router = APIRouter(
    route_class=AuthenticatedRoute, tags=["fine-tuning"], responses=OPENAI_ERRORS, dependencies=[NEEDS_KEY]
)
Limit = Annotated[int, Query(ge=1, le=100)]
EVENT_STREAM = "text/event-stream"


@router.post("/v1/fine_tuning/jobs", response_model=JobJson)
def create_fine_tuning_job(services: Using, project: Project, attempts: Attempts, body: JobRequest) -> Response:
    """Queue a job. Answers as soon as it is durable; everything effective is in the answer."""
    attempt = attempts(body.fingerprint())
    given = services.answers.find(attempt)
    if given is not None:
        return answered(given, again=True)
    resolved = resolve(services, project, body)
    used = [file for file in (resolved.spec.training_file, resolved.spec.validation_file) if file]

    def guard(connection: Connection) -> None:
        services.answers.begin(connection, attempt)
        # A file may have been deleted since it was looked at.
        require(connection, project, used)

    try:
        with services.answers.alone(attempt):
            job = services.jobs.create(
                project,
                resolved.spec,
                metadata=body.metadata,
                warnings=resolved.warnings,
                guard=guard,
                seal=lambda connection, job: services.answers.keep(connection, attempt, _answer(job)),
            )
    except Answered as twin:
        return answered(twin.answer, again=True)
    services.notifier.notify()
    return answered(_answer(job))


def _answer(job: Job) -> Answer:
    return Answer(job_json(job).model_dump_json())


@router.get("/v1/fine_tuning/jobs")
def list_fine_tuning_jobs(
    services: Using, project: Project, request: Request, after: After = None, limit: Limit = 20
) -> JobListJson:
    """Jobs, newest first; `metadata[key]=value` selects."""
    return job_list_json(services.jobs.list(project, after=after, limit=limit, metadata=_metadata(request)))


@router.get("/v1/fine_tuning/jobs/{job_id}")
def retrieve_fine_tuning_job(services: Using, project: Project, job_id: JobId) -> JobJson:
    """One job with its progress."""
    return job_json(services.jobs.get(project, job_id))


@router.post("/v1/fine_tuning/jobs/{job_id}/cancel")
def cancel_fine_tuning_job(services: Using, project: Project, job_id: JobId) -> JobJson:
    """Cancel: at once if it waits, within seconds if it runs. Checkpoints made so far stay. Repeating is harmless."""
    return job_json(services.jobs.cancel(project, job_id))


@router.post("/v1/fine_tuning/jobs/{job_id}/pause")
def pause_fine_tuning_job(services: Using, project: Project, job_id: JobId) -> JobJson:
    """Pause: the worker saves a checkpoint and takes the next job."""
    return job_json(services.jobs.pause(project, job_id))


@router.post("/v1/fine_tuning/jobs/{job_id}/resume")
def resume_fine_tuning_job(services: Using, project: Project, job_id: JobId) -> JobJson:
    """Queue a paused job again; it goes on from its newest checkpoint."""
    job = services.jobs.resume(project, job_id)
    services.notifier.notify()
    return job_json(job)


@router.get(
    "/v1/fine_tuning/jobs/{job_id}/events",
    response_model=EventListJson,
    responses={200: {"content": {EVENT_STREAM: {}}}, 204: {"description": "all of an ended job's events were seen"}},
)
async def list_fine_tuning_events(
    services: Using,
    project: Project,
    job_id: JobId,
    after: After = None,
    limit: Limit = 20,
    accept: Annotated[str, Header()] = "",
    last_event_id: Annotated[str | None, Header(pattern=CURSOR)] = None,
) -> Response | EventListJson:
    """Events, newest first; or, if `text/event-stream` is accepted, ascending and as they happen."""
    seen = None if after is None else event_number(job_id, after)
    if EVENT_STREAM not in accept:
        page = await run_in_threadpool(services.jobs.events, project, job_id, before=seen, limit=limit)
        return event_list_json(page)
    seen = event_number(job_id, last_event_id) if last_event_id else seen
    stream = EventStream(services.jobs, project, job_id, seen or 0)
    if await stream.is_over():
        # What tells a browser's EventSource not to come back.
        return Response(status_code=204)
    return StreamingResponse(stream, media_type=EVENT_STREAM, headers={"cache-control": "no-cache"})


@router.get("/v1/fine_tuning/jobs/{job_id}/checkpoints")
def list_fine_tuning_job_checkpoints(
    services: Using, project: Project, job_id: JobId, after: After = None, limit: Limit = 10
) -> CheckpointListJson:
    """Checkpoints, newest first; each can be served under its name."""
    return checkpoint_list_json(services.jobs.checkpoints(project, job_id, after=after, limit=limit))


def event_number(job_id: str, event: str) -> int:
    """The number in an event's id.

    Raises:
        InvalidRequest: it is no event of the job.
    """
    match = re.fullmatch(re.escape(f"ftevent-{job_id.removeprefix('ftjob-')}-") + r"(\d{1,18})", event)
    if match is None:
        raise InvalidRequest(f"no event {event[:100]!r} of this job", param="after")
    return int(match[1])


def _metadata(request: Request) -> dict[str, str]:
    # OpenAI's clients write nested parameters with brackets; FastAPI has no word for that.
    wanted = {}
    for name, value in request.query_params.multi_items():
        match = re.fullmatch(r'metadata\[([^"\\\x00-\x1f]{1,64})\]', name)
        if match and "\x00" not in value:
            wanted[match[1]] = value
        elif name.startswith("metadata") and not (name == "metadata" and value in ("", "null")):
            raise InvalidRequest("write metadata[key]=value", param="metadata")
    return wanted
