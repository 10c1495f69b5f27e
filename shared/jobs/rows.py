"""Jobs, events and checkpoints as rows: read whole, and changed together with the event that tells it.

Everything here happens in the caller's transaction. Who may do what is `shared.jobs.store`'s affair for clients, and
`shared.jobs.leases`' for workers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from sqlalchemy import Connection, Row, Select, Table, and_, func, insert, or_, select, update

from shared.errors import InvalidRequest, NotFound
from shared.jobs.spec import JobFault, JobSpec, Phase, Progress, State, TrainingReport
from shared.storage.tables import adapters, checkpoints, events, jobs

T = TypeVar("T")
Nanoseconds = Callable[[], int]
"""A clock: since the epoch."""


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
        return seconds_of(self.created_ns)


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
                "created_at": seconds_of(now),
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
    return [Checkpoint(*row) for row in connection.execute(checkpoints_of(job_id))]


def read_job(connection: Connection, job_id: str) -> Job:
    """One job regardless of its project, for workers.

    Raises:
        NotFound: no such job.
    """
    row = connection.execute(select_jobs().where(jobs.c.id == job_id)).one_or_none()
    if row is None:
        raise NotFound(f"no fine-tuning job {job_id[:100]!r}")
    return job_of(connection, row)


def select_jobs() -> Select[Any]:
    """Job rows with the name of the adapter they have published, for `job_of`."""
    return select(jobs, adapters.c.name.label("adapter_name")).join(
        adapters, and_(adapters.c.id == jobs.c.adapter, adapters.c.state == "published"), isouter=True
    )


def checkpoints_of(job_id: str) -> Select[Any]:
    """Rows for `Checkpoint`, newest first."""
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


def job_of(connection: Connection, row: Row[Any]) -> Job:
    """A row of `select_jobs` as a job; one that waits is asked for its place in the queue."""
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


def seconds_of(now_ns: int) -> int:
    """Whole seconds of a moment in nanoseconds, as rows keep them."""
    return now_ns // 1_000_000_000
