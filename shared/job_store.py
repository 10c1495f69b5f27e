"""Jobs as clients see them: create, read, and wish (cancel, pause, resume). What a worker does is `shared.leases`.

SQL is the truth. Every change of a job and the event that tells it are one transaction, and the event's number is taken
in the same UPDATE as the job row, so numbers have no gaps and no order but theirs.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from sqlalchemy import Connection, Row, Select, Table, and_, func, insert, or_, select, update

from shared.artifacts import new_id
from shared.database import Database
from shared.errors import InvalidRequest, NotFound
from shared.jobs import JobFault, JobSpec, Phase, Progress, State, TrainingReport, may_become
from shared.tables import adapters, checkpoints, events, jobs

T = TypeVar("T")
Nanoseconds = Callable[[], int]


@dataclass(frozen=True, slots=True)
class Job:
    """One job, read whole."""

    id: str
    project: str
    created_ns: int
    started_at: int | None
    finished_at: int | None
    state: State
    phase: Phase | None
    spec: JobSpec
    metadata: dict[str, str] | None
    warnings: list[str]
    progress: Progress
    fault: JobFault | None
    report: TrainingReport | None
    adapter: str | None
    adapter_name: str | None
    attempt: int
    losses: int
    lease_token: int

    @property
    def created_at(self) -> int:
        return self.created_ns // 1_000_000_000


@dataclass(frozen=True, slots=True)
class Event:
    """One line of a job's story; `number` counts from 1 per job without gaps."""

    job: str
    number: int
    created_at: int
    level: str
    type: str
    message: str
    data: dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One checkpoint: its resume state lies under `lease_token`, its servable twin is `adapter`."""

    id: str
    job: str
    step: int
    lease_token: int
    adapter: str
    adapter_name: str
    metrics: dict[str, Any]
    created_at: int


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    items: list[T]
    has_more: bool


@dataclass(frozen=True, slots=True)
class NewEvent:
    """An event to be written; `type` is `message` or `metrics`, `level` info, warn or error."""

    message: str
    level: str = "info"
    type: str = "message"
    data: dict[str, Any] | None = None


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
        query = _select_jobs().where(jobs.c.project == project)
        for key, value in (metadata or {}).items():
            query = query.where(jobs.c.metadata[key].as_string() == value)
        with self._database.read() as connection:
            query = newest_first(connection, query, jobs, project, after)
            found = connection.execute(query.limit(limit + 1)).all()
            items = [_job(connection, row) for row in found[:limit]]
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
        query = _select_checkpoints(job_id)
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
                    values = {"state": target} | ({"finished_at": _seconds(self._now())} if target.final else {})
                    change_job(connection, job_id, [jobs.c.state == job.state], values, [event], self._now())
                    return _read(connection, project, job_id)
            raise _refused(verb, job)


def _refused(verb: str, job: Job) -> InvalidRequest:
    # 400, not 409: OpenAI's clients send a 409 three times.
    return InvalidRequest(f"cannot {verb} {job.id}: it is {job.state.value}", code=f"cannot_{verb}")


def change_job(
    connection: Connection,
    job_id: str,
    conditions: Sequence[Any],
    values: Mapping[str, Any],
    news: Sequence[NewEvent],
    now: int,
) -> bool:
    """Change a job if `conditions` hold, and write `news` with the next numbers, in the caller's transaction.

    Returns:
        False if no row met the conditions; nothing was written then.
    """
    statement = (
        update(jobs)
        .where(jobs.c.id == job_id, *conditions)
        .values(**values, event_count=jobs.c.event_count + len(news))
        .returning(jobs.c.event_count)
    )
    count = connection.execute(statement).scalar()
    if count is None:
        return False
    if news:
        first = count - len(news) + 1
        rows = [
            {
                "job": job_id,
                "number": first + index,
                "created_at": _seconds(now),
                "level": event.level,
                "type": event.type,
                "message": event.message,
                "data": event.data,
            }
            for index, event in enumerate(news)
        ]
        connection.execute(insert(events), rows)
    return True


def select_checkpoints(connection: Connection, job_id: str) -> list[Checkpoint]:
    """All checkpoints of a job, newest first."""
    return [Checkpoint(*row) for row in connection.execute(_select_checkpoints(job_id))]


def read_job(connection: Connection, job_id: str) -> Job:
    """One job regardless of its project, for workers.

    Raises:
        NotFound: no such job.
    """
    row = connection.execute(_select_jobs().where(jobs.c.id == job_id)).one_or_none()
    if row is None:
        raise NotFound(f"no fine-tuning job {job_id[:100]!r}")
    return _job(connection, row)


def _read(connection: Connection, project: str, job_id: str) -> Job:
    job = read_job(connection, job_id)
    if job.project != project:
        raise NotFound(f"no fine-tuning job {job_id[:100]!r}")
    return job


def _select_jobs() -> Select[Any]:
    return select(jobs, adapters.c.name.label("adapter_name")).join(
        adapters, and_(adapters.c.id == jobs.c.adapter, adapters.c.state == "published"), isouter=True
    )


def _select_checkpoints(job_id: str) -> Select[Any]:
    c = checkpoints.c
    return (
        select(c.id, c.job, c.step, c.lease_token, c.adapter, adapters.c.name, c.metrics, c.created_at)
        .join(adapters, adapters.c.id == c.adapter)
        .where(c.job == job_id)
        .order_by(c.step.desc())
    )


def newest_first(
    connection: Connection, query: Select[Any], table: Table, project: str, after: str | None
) -> Select[Any]:
    """Keyset paging on (created_ns, id)."""
    if after is not None:
        at = select(table.c.created_ns).where(table.c.id == after, table.c.project == project)
        created_ns = connection.execute(at).scalar()
        if created_ns is None:
            raise InvalidRequest(f"no item {after[:100]!r} to continue after", param="after")
        older = or_(table.c.created_ns < created_ns, and_(table.c.created_ns == created_ns, table.c.id < after))
        query = query.where(older)
    return query.order_by(table.c.created_ns.desc(), table.c.id.desc())


def _job(connection: Connection, row: Row[Any]) -> Job:
    state = State(row.state)
    progress = Progress.model_validate(row.progress or {})
    if state is State.QUEUED:
        ahead = select(func.count()).where(
            jobs.c.state == State.QUEUED,
            or_(
                jobs.c.created_ns < row.created_ns,
                and_(jobs.c.created_ns == row.created_ns, jobs.c.id < row.id),
            ),
        )
        progress = progress.model_copy(update={"queue_position": connection.execute(ahead).scalar_one() + 1})
    return Job(
        id=row.id,
        project=row.project,
        created_ns=row.created_ns,
        started_at=row.started_at,
        finished_at=row.finished_at,
        state=state,
        phase=Phase(row.phase) if row.phase and state.leased else None,
        spec=JobSpec.model_validate(row.spec),
        metadata=row.metadata,
        warnings=row.warnings,
        progress=progress,
        fault=JobFault.model_validate(row.fault) if row.fault else None,
        report=TrainingReport.model_validate(row.report) if row.report else None,
        adapter=row.adapter,
        adapter_name=row.adapter_name,
        attempt=row.attempt,
        losses=row.losses,
        lease_token=row.lease_token,
    )


def _seconds(now_ns: int) -> int:
    return now_ns // 1_000_000_000
