"""Jobs, events and checkpoints as rows: read whole, and changed together with the event that reports the change.

Everything here happens in the caller's transaction. What clients may do is in `shared.jobs.store`, what workers may do
in `shared.jobs.leases`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, Select, and_, func, insert, literal, select, tuple_, update

from shared.adapters.state import AdapterState
from shared.clock import seconds_of
from shared.errors import NotFound, Unavailable
from shared.jobs.spec import UNFINISHED, JobFault, JobSpec, Phase, Progress, State, TrainingReport
from shared.storage.tables import adapters, checkpoints, events, jobs

_STATES = frozenset(State)


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
    worker_failures: int
    lease_token: int

    @property
    def created_at(self) -> int:
        return seconds_of(self.created_ns)


@dataclass(frozen=True, slots=True)
class Event:
    """One line of a job's event log; `number` counts from 1 per job without gaps."""

    job: str
    number: int
    created_at: int
    level: str
    type: str
    message: str
    data: dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One checkpoint: `lease_token` names the folder of its resume state, `adapter` is what serves this step."""

    id: str
    job: str
    step: int
    lease_token: int
    adapter: str
    adapter_name: str
    metrics: dict[str, Any]
    created_at: int


@dataclass(frozen=True, slots=True)
class NewEvent:
    """An event to be written; `type` is `message` or `metrics`, `level` info, warn or error.

    `created_ns` is for what happened before it is written: nanoseconds since the epoch.
    """

    message: str
    level: str = "info"
    type: str = "message"
    data: dict[str, Any] | None = None
    created_ns: int | None = None


def change_job(
    tx: Connection,
    job_id: str,
    conditions: Sequence[Any],
    values: Mapping[str, Any],
    new_events: Sequence[NewEvent],
    now: int,
) -> bool:
    """Change a job if `conditions` hold, and write `new_events` with the next numbers.

    Args:
        now: nanoseconds since the epoch.

    Returns:
        False if no row met the conditions; nothing was written then.
    """
    statement = (
        update(jobs)
        .where(jobs.c.id == job_id, *conditions)
        .values(**values, event_count=jobs.c.event_count + len(new_events))
        .returning(jobs.c.event_count)
    )
    count = tx.execute(statement).scalar()
    if count is None:
        return False
    if new_events:
        first = count - len(new_events) + 1
        rows = [
            {
                "job": job_id,
                "number": first + index,
                "created_at": seconds_of(event.created_ns or now),
                "level": event.level,
                "type": event.type,
                "message": event.message,
                "data": event.data,
            }
            for index, event in enumerate(new_events)
        ]
        tx.execute(insert(events), rows)
    return True


def read_job(tx: Connection, job_id: str, *, lock: bool = False) -> Job:
    """One job regardless of its project.

    Args:
        lock: keep the row as it is until the transaction ends, for what is decided by it.

    Raises:
        NotFound: no such job.
    """
    query = select_jobs().where(jobs.c.id == job_id)
    row = tx.execute(query.with_for_update(of=jobs) if lock else query).one_or_none()
    if row is None:
        raise NotFound(f"no fine-tuning job {job_id[:100]!r}")
    return jobs_of(tx, [row])[0]


def job_continuing(tx: Connection, adapter_id: str) -> str | None:
    """The id of a job that has not ended and starts from this adapter; None if there is none."""
    starts_from = jobs.c.spec["initial_adapter"].as_string()
    query = select(jobs.c.id).where(jobs.c.state.in_(UNFINISHED), starts_from == adapter_id)
    return tx.execute(query.limit(1)).scalar()


def select_jobs() -> Select[Any]:
    """Job rows with the name of the adapter they have published, for `jobs_of`."""
    published = and_(adapters.c.id == jobs.c.adapter, adapters.c.state == AdapterState.PUBLISHED)
    return select(jobs, adapters.c.name.label("adapter_name")).join(adapters, published, isouter=True)


def select_checkpoints(job_id: str) -> Select[Any]:
    """Rows for `Checkpoint`, in no order."""
    c = checkpoints.c
    return (
        select(c.id, c.job, c.step, c.lease_token, c.adapter, adapters.c.name, c.metrics, c.created_at)
        .join(adapters, adapters.c.id == c.adapter)
        .where(c.job == job_id)
    )


def jobs_of(tx: Connection, rows: Sequence[Row[Any]]) -> list[Job]:
    """Rows of `select_jobs` as jobs; at most one more statement, if some of them wait in the queue."""
    positions = _queue_positions(tx, [(row.created_ns, row.id) for row in rows if row.state == State.QUEUED])
    return [_job_of(row, positions.get(row.id)) for row in rows]


def _queue_positions(tx: Connection, queued: Sequence[tuple[int, str]]) -> dict[str, int]:
    """Which place queued jobs, given by time and id, have among all queued ones; the oldest has 1."""
    if not queued:
        return {}
    age = tuple_(jobs.c.created_ns, jobs.c.id)
    oldest, newest = (tuple_(*map(literal, end)) for end in (min(queued), max(queued)))
    waiting = jobs.c.state == State.QUEUED
    # Only those between the two are numbered: counting the ones before is an index's work and far cheaper.
    before = select(func.count()).where(waiting, age < oldest).scalar_subquery()
    place = func.row_number().over(order_by=(jobs.c.created_ns, jobs.c.id))
    found = tx.execute(
        select(jobs.c.id, (before + place).label("position")).where(waiting, age >= oldest, age <= newest)
    )
    return {row.id: row.position for row in found}


def _job_of(row: Row[Any], queue_position: int | None) -> Job:
    if row.state not in _STATES:
        raise Unavailable(f"job {row.id} is {row.state!r}: a newer version of Tunesmith wrote that", code="schema")
    state = State(row.state)
    progress = Progress.model_validate(row.progress or {})
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
        progress=progress.model_copy(update={"queue_position": queue_position}),
        fault=JobFault.model_validate(row.fault) if row.fault else None,
        report=TrainingReport.model_validate(row.report) if row.report else None,
        adapter=row.adapter,
        adapter_name=row.adapter_name,
        attempt=row.attempt,
        worker_failures=row.worker_failures,
        lease_token=row.lease_token,
    )
