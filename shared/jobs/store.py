"""Jobs as clients see them: create, read, and wish (cancel, pause, resume). What a worker does is `shared.jobs.leases`.

SQL is the truth. Every change of a job and the event that tells it are one transaction, and the event's number is taken
in the same UPDATE as the job row, so numbers have no gaps and no order but theirs.
"""

import time
from collections.abc import Callable, Mapping, Sequence

from sqlalchemy import Connection, insert, select

from shared.errors import InvalidRequest, NotFound
from shared.jobs.rows import (
    Checkpoint,
    Event,
    Job,
    Nanoseconds,
    NewEvent,
    Page,
    change_job,
    checkpoints_of,
    job_of,
    newest_first,
    read_job,
    seconds_of,
    select_jobs,
)
from shared.jobs.spec import JobSpec, State, may_become
from shared.storage.artifacts import new_id
from shared.storage.database import Database
from shared.storage.tables import checkpoints, events, jobs


class JobStore:
    """Everything a gateway does with jobs.

    Args:
        now: nanoseconds since the epoch.
    """

    def __init__(self, database: Database, now: Nanoseconds = time.time_ns) -> None:
        self._database = database
        self._now = now

    def create(
        self,
        project: str,
        spec: JobSpec,
        *,
        metadata: Mapping[str, str] | None = None,
        warnings: Sequence[str] = (),
        guard: Callable[[Connection], None] = lambda _: None,
        seal: Callable[[Connection, Job], None] = lambda _, job: None,
    ) -> Job:
        """Write a queued job and its first events in one transaction; durable when this returns.

        Args:
            guard: called first in the same transaction; what it raises refuses the job.
            seal: called last in it; what it writes is there exactly if the job is.
        """
        job_id = new_id("ftjob")
        now = self._now()
        row = {
            "id": job_id,
            "project": project,
            "created_ns": now,
            "state": State.QUEUED,
            "spec": spec.model_dump(mode="json"),
            "training_file": spec.training_file,
            "validation_file": spec.validation_file,
            "metadata": dict(metadata) if metadata is not None else None,
            "warnings": list(warnings),
        }
        news = [NewEvent(f"Created fine-tuning job: {job_id}"), *(NewEvent(text, level="warn") for text in warnings)]
        news.append(NewEvent("Waiting for a worker"))
        with self._database.write() as connection:
            guard(connection)
            connection.execute(insert(jobs).values(row))
            change_job(connection, job_id, [jobs.c.state == State.QUEUED], {}, news, now)
            job = _read(connection, project, job_id)
            seal(connection, job)
        return job

    def get(self, project: str, job_id: str) -> Job:
        """Raises NotFound; a job of another project is not found either."""
        with self._database.read() as connection:
            return _read(connection, project, job_id)

    def list(
        self, project: str, *, after: str | None = None, limit: int = 20, metadata: Mapping[str, str] | None = None
    ) -> Page[Job]:
        """Jobs newest first, after (not including) the job `after`; all of `metadata` must match.

        Raises:
            InvalidRequest: `after` is no job of the project.
        """
        query = select_jobs().where(jobs.c.project == project)
        for key, value in (metadata or {}).items():
            query = query.where(jobs.c.metadata[key].as_string() == value)
        with self._database.read() as connection:
            query = newest_first(connection, query, jobs, project, after)
            found = connection.execute(query.limit(limit + 1)).all()
            items = [job_of(connection, row) for row in found[:limit]]
        return Page(items, len(found) > limit)

    def events(
        self,
        project: str,
        job_id: str,
        *,
        before: int | None = None,
        after: int | None = None,
        limit: int = 20,
    ) -> Page[Event]:
        """Events newest first below number `before`; or, if `after` is given, ascending above it.

        Raises:
            NotFound: no such job.
        """
        query = select(events).where(events.c.job == job_id)
        if after is not None:
            query = query.where(events.c.number > after).order_by(events.c.number)
        else:
            query = query.order_by(events.c.number.desc())
            if before is not None:
                query = query.where(events.c.number < before)
        with self._database.read() as connection:
            _read(connection, project, job_id)
            found = connection.execute(query.limit(limit + 1)).all()
        return Page([Event(*row) for row in found[:limit]], len(found) > limit)

    def checkpoints(self, project: str, job_id: str, *, after: str | None = None, limit: int = 10) -> Page[Checkpoint]:
        """Checkpoints newest first.

        Raises:
            NotFound: no such job.
            InvalidRequest: `after` is no checkpoint of the job.
        """
        query = checkpoints_of(job_id)
        with self._database.read() as connection:
            _read(connection, project, job_id)
            if after is not None:
                at = select(checkpoints.c.step).where(checkpoints.c.id == after, checkpoints.c.job == job_id)
                step = connection.execute(at).scalar()
                if step is None:
                    raise InvalidRequest(f"no checkpoint {after[:100]!r}", param="after")
                query = query.where(checkpoints.c.step < step)
            found = connection.execute(query.limit(limit + 1)).all()
        return Page([Checkpoint(*row) for row in found[:limit]], len(found) > limit)

    def cancel(self, project: str, job_id: str) -> Job:
        """Cancel at once what waits; ask the worker of what runs. Asking again changes nothing.

        Raises:
            NotFound: no such job.
            InvalidRequest: it has succeeded or failed.
        """
        idle = NewEvent("Cancelled before it started")
        asked = NewEvent("Cancelling: the worker stops and keeps the checkpoints made so far")
        return self._wish(project, job_id, "cancel", State.CANCELLED, idle, State.CANCELLING, asked)

    def pause(self, project: str, job_id: str) -> Job:
        """Pause at once what waits; ask the worker of what runs to save a checkpoint and let go.

        Raises:
            NotFound: no such job.
            InvalidRequest: the job has ended or is being cancelled.
        """
        asked = NewEvent("Pausing: the worker saves a checkpoint and lets go")
        return self._wish(project, job_id, "pause", State.PAUSED, NewEvent("Paused"), State.PAUSING, asked)

    def resume(self, project: str, job_id: str) -> Job:
        """Queue a paused job again; what is queued or running already is left as it is.

        Raises:
            NotFound: no such job.
            InvalidRequest: the job has ended, or is pausing or being cancelled.
        """
        with self._database.write() as connection:
            job = _read(connection, project, job_id)
            if job.state in (State.QUEUED, State.RUNNING):
                return job
            if job.state is not State.PAUSED:
                raise _refused("resume", job)
            paused = [jobs.c.state == State.PAUSED]
            change_job(
                connection,
                job_id,
                paused,
                {"state": State.QUEUED},
                [NewEvent("Resumed: waiting for a worker")],
                self._now(),
            )
            return _read(connection, project, job_id)

    def _wish(
        self, project: str, job_id: str, verb: str, idle: State, done: NewEvent, leased: State, asked: NewEvent
    ) -> Job:
        with self._database.write() as connection:
            job = _read(connection, project, job_id)
            if job.state in (idle, leased):
                return job
            for target, event in ((idle, done), (leased, asked)):
                # An idle job ends here; a leased one only by its worker, which must write the end under its token.
                sources = [state for state in may_become(target) if state.leased == (target is leased)]
                if job.state in sources:
                    values = {"state": target} | ({"finished_at": seconds_of(self._now())} if target.final else {})
                    change_job(connection, job_id, [jobs.c.state == job.state], values, [event], self._now())
                    return _read(connection, project, job_id)
            raise _refused(verb, job)


def _refused(verb: str, job: Job) -> InvalidRequest:
    # 400, not 409: OpenAI's clients send a 409 three times.
    return InvalidRequest(f"cannot {verb} {job.id}: it is {job.state.value}", code=f"cannot_{verb}")


def _read(connection: Connection, project: str, job_id: str) -> Job:
    job = read_job(connection, job_id)
    if job.project != project:
        raise NotFound(f"no fine-tuning job {job_id[:100]!r}")
    return job
