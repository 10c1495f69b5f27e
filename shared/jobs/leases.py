"""Jobs as workers hold them: claim, renew, and writes that carry a fencing token. Clients: `shared.jobs.store`.

A lease is the pair (job, lease_token). Every claim raises the token, every write of a worker is conditional on it, and
a write whose token is gone raises LeaseLost: the holder must stop at once and write nothing more (Kleppmann, "How to do
distributed locking"). No clock is compared between machines: whoever watches a lease watches `renewals` stand still on
a clock of its own.
"""

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, delete, func, insert, select, update

from shared.errors import LeaseLost
from shared.jobs.rows import (
    Checkpoint,
    Job,
    Nanoseconds,
    NewEvent,
    change_job,
    read_job,
    seconds_of,
    select_checkpoints,
)
from shared.jobs.spec import LEASED, JobFault, Phase, Progress, RequestedAction, State, TrainingReport
from shared.storage.artifacts import new_id
from shared.storage.database import Database
from shared.storage.tables import adapters, checkpoints, jobs

MAX_LOSSES = 3
_REQUESTED_ACTIONS = {
    State.RUNNING: RequestedAction.NONE,
    State.PAUSING: RequestedAction.PAUSE,
    State.CANCELLING: RequestedAction.CANCEL,
}


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to work on one job; `job` is as it was when claimed."""

    job: Job
    token: int
    worker: str


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """What a reaper watches: a pair that does not change belongs to a lost worker."""

    job_id: str
    token: int
    renewals: int


class Leases:
    """Everything a worker, and the reaper, does with jobs.

    Args:
        now: nanoseconds since the epoch; only for what people read.
    """

    def __init__(self, database: Database, now: Nanoseconds = time.time_ns) -> None:
        self._database = database
        self._now = now

    def claim(self, worker: str) -> Lease | None:
        """Take the oldest queued job, or None if nothing waits. Two callers never get the same one."""
        oldest = (
            select(jobs.c.id)
            .where(jobs.c.state == State.QUEUED)
            .order_by(jobs.c.created_ns, jobs.c.id)
            .limit(1)
            .with_for_update(skip_locked=True)
        )
        with self._database.write() as connection:
            job_id = connection.execute(oldest).scalar()
            if job_id is None:
                return None
            now = self._now()
            values = {
                "state": State.RUNNING,
                "phase": Phase.PREPARING,
                "worker": worker,
                "attempt": jobs.c.attempt + 1,
                "lease_token": jobs.c.lease_token + 1,
                "renewals": 0,
                "started_at": func.coalesce(jobs.c.started_at, seconds_of(now)),
            }
            before = read_job(connection, job_id)
            started = "Started" if before.attempt == 0 else f"Started again (attempt {before.attempt + 1})"
            news = [NewEvent(f"{started} on worker {worker}")]
            if not change_job(connection, job_id, [jobs.c.state == State.QUEUED], values, news, now):
                return None
            job = read_job(connection, job_id)
            return Lease(job, job.lease_token, worker)

    def renew(self, lease: Lease) -> RequestedAction:
        """Show life, and learn what the job's owner wishes.

        Raises:
            LeaseLost: another worker owns the job, or it has ended.
        """
        statement = update(jobs).where(*_held(lease)).values(renewals=jobs.c.renewals + 1).returning(jobs.c.state)
        with self._database.write() as connection:
            state = connection.execute(statement).scalar()
        if state is None:
            raise LeaseLost(f"the lease on {lease.job.id} is gone")
        return _REQUESTED_ACTIONS[State(state)]

    def record(
        self,
        lease: Lease,
        news: Sequence[NewEvent] = (),
        *,
        phase: Phase | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Write events, phase and progress.

        Raises:
            LeaseLost: see `renew`.
        """
        values: dict[str, Any] = {}
        if phase is not None:
            values["phase"] = phase
        if progress is not None:
            values["progress"] = progress.model_dump(mode="json") | {"written_at": self._now() / 1e9}
        with self._database.write() as connection:
            self._change(connection, lease, values, news)

    def reserve_adapter(self, lease: Lease) -> str:
        """A fresh adapter id, written down before anything is staged under it, so that a sweeper knows its owner.

        Raises:
            LeaseLost: see `renew`.
        """
        adapter_id = new_id("adapter")
        row = {
            "id": adapter_id,
            "project": lease.job.project,
            "job": lease.job.id,
            "lease_token": lease.token,
            "state": "reserved",
            "base": lease.job.spec.base,
            "created_ns": self._now(),
        }
        with self._database.write() as connection:
            self._change(connection, lease, {}, [])
            connection.execute(insert(adapters).values(row))
        return adapter_id

    def checkpoints(self, lease: Lease) -> list[Checkpoint]:
        """All checkpoints of the job, newest first, for resuming."""
        with self._database.read() as connection:
            return select_checkpoints(connection, lease.job.id)

    def commit_checkpoint(self, lease: Lease, step: int, adapter_id: str, metrics: Mapping[str, Any]) -> str:
        """Make a written checkpoint count: its row, its servable adapter and the event, in one transaction.

        A step that was committed before (its files turned out torn, so it was trained again) keeps its adapter, which
        has the same bytes; only the place of the resume state changes.

        Returns:
            The id of the adapter that serves this step.

        Raises:
            LeaseLost: see `renew`.
        """
        same_step = (checkpoints.c.job == lease.job.id, checkpoints.c.step == step)
        with self._database.write() as connection:
            earlier = connection.execute(select(checkpoints.c.adapter).where(*same_step)).scalar()
            if earlier == adapter_id:
                # Committed before, but the answer was lost on its way.
                return adapter_id
            values = {}
            if step > self._newest_step(connection, lease):
                # Progress was made since the last loss: a job that crawls forward is not poisoned.
                values = {"losses": 0, "checkpoint_step": step}
            self._change(connection, lease, values, [NewEvent(f"Checkpoint saved at step {step}", data={"step": step})])
            if earlier is not None:
                connection.execute(update(checkpoints).where(*same_step).values(lease_token=lease.token))
                connection.execute(delete(adapters).where(adapters.c.id == adapter_id))
                return str(earlier)
            self._publish(connection, lease, adapter_id, step, f"{adapter_name(lease.job)}:ckpt-step-{step}")
            row = {
                "id": "ftckpt-" + secrets.token_hex(12),
                "job": lease.job.id,
                "step": step,
                "lease_token": lease.token,
                "adapter": adapter_id,
                "metrics": dict(metrics),
                "created_at": seconds_of(self._now()),
            }
            connection.execute(insert(checkpoints).values(row))
        return adapter_id

    def succeed(self, lease: Lease, adapter_id: str, report: TrainingReport, news: Sequence[NewEvent] = ()) -> None:
        """Publish the final adapter and end the job, in one transaction.

        Raises:
            LeaseLost: see `renew`.
        """
        name = adapter_name(lease.job)
        values = {
            "state": State.SUCCEEDED,
            "adapter": adapter_id,
            "report": report.model_dump(mode="json"),
            "finished_at": seconds_of(self._now()),
        }
        told = [
            *news,
            NewEvent(f"New fine-tuned model created: {name}"),
            NewEvent("The job has successfully completed"),
        ]
        with self._database.write() as connection:
            self._change(connection, lease, values, told)
            self._publish(connection, lease, adapter_id, report.steps, name)

    def fail(self, lease: Lease, fault: JobFault) -> None:
        """End the job as failed; it is not tried again.

        Raises:
            LeaseLost: see `renew`.
        """
        with self._database.write() as connection:
            self._change(connection, lease, *self._failure(fault))

    def release(self, lease: Lease, message: str) -> State:
        """Give the job back after saving: paused or cancelled if that was the wish, else queued for the next worker.

        Returns:
            The state it is in now.

        Raises:
            LeaseLost: see `renew`.
        """
        with self._database.write() as connection:
            state = connection.execute(select(jobs.c.state).where(*_held(lease)).with_for_update()).scalar()
            if state is None:
                raise LeaseLost(f"the lease on {lease.job.id} is gone")
            target = _WITHOUT_WORKER[State(state)]
            values = {"state": target} | ({"finished_at": seconds_of(self._now())} if target.final else {})
            self._change(connection, lease, values, [NewEvent(message)])
        return target

    def heartbeats(self) -> list[Heartbeat]:
        """One for every job a worker holds."""
        query = select(jobs.c.id, jobs.c.lease_token, jobs.c.renewals).where(jobs.c.state.in_(LEASED))
        with self._database.read() as connection:
            return [Heartbeat(*row) for row in connection.execute(query)]

    def check_writable(self) -> None:
        """Open a write transaction and end it without a change; what keeps workers from writing keeps it waiting too.

        Raises:
            SQLAlchemyError: the database takes no writes.
        """
        with self._database.write() as connection:
            connection.execute(update(jobs).where(jobs.c.id == "").values(renewals=0))

    def queued(self) -> int:
        """How many jobs wait for a worker."""
        with self._database.read() as connection:
            return connection.execute(select(func.count()).where(jobs.c.state == State.QUEUED)).scalar_one()

    def expire(self, seen: Heartbeat) -> bool:
        """Take a job from a worker that shows no life, unless it has shown some since `seen`.

        A wish that the worker did not live to fulfil is fulfilled here: nobody who asked for a cancel wants a new
        start. Otherwise the job is queued again, or failed after `MAX_LOSSES` losses without a new checkpoint.

        Returns:
            Whether the job was taken.
        """
        held = [jobs.c.id == seen.job_id, jobs.c.lease_token == seen.token, jobs.c.renewals == seen.renewals]
        with self._database.write() as connection:
            return self._requeue(connection, seen.job_id, held, "was lost")

    def requeue(self, lease: Lease, reason: str) -> None:
        """Give a job back after a fault of this system (disk full, a bug): it counts as a loss, and is tried again.

        Raises:
            LeaseLost: see `renew`.
        """
        with self._database.write() as connection:
            if not self._requeue(connection, lease.job.id, _held(lease), f"could not go on: {reason}"):
                raise LeaseLost(f"the lease on {lease.job.id} is gone")

    def _requeue(self, connection: Connection, job_id: str, held: Sequence[Any], what: str) -> bool:
        c = jobs.c
        query = select(c.state, c.losses, c.worker, c.checkpoint_step).where(*held, c.state.in_(LEASED))
        row = connection.execute(query.with_for_update()).one_or_none()
        if row is None:
            return False
        target = _WITHOUT_WORKER[State(row.state)]
        news = [NewEvent(f"Worker {row.worker} {what}", level="warn")]
        # The token rises, so that a worker that wakes up again cannot write.
        values: dict[str, Any] = {"lease_token": jobs.c.lease_token + 1, "losses": row.losses + 1}
        if target is State.QUEUED and row.losses + 1 >= MAX_LOSSES:
            message = f"tried {MAX_LOSSES} times without a new checkpoint; the last time the worker {what}"
            failure, ending = self._failure(JobFault(code="worker_lost", message=message))
            values, news = values | failure, news + ending
        else:
            values["state"] = target
            if target.final:
                values["finished_at"] = seconds_of(self._now())
            again = "go on from the newest checkpoint" if row.checkpoint_step else "start again"
            told = (
                f"Waiting for a worker to {again}" if target is State.QUEUED else f"The job is {target.value}, as asked"
            )
            news.append(NewEvent(told))
        return change_job(connection, job_id, held, values, news, self._now())

    def _failure(self, fault: JobFault) -> tuple[dict[str, Any], list[NewEvent]]:
        values = {
            "state": State.FAILED,
            "fault": fault.model_dump(mode="json"),
            "finished_at": seconds_of(self._now()),
        }
        return values, [NewEvent(f"The job failed: {fault.message}", level="error", data={"code": fault.code})]

    def _change(
        self, connection: Connection, lease: Lease, values: Mapping[str, Any], news: Sequence[NewEvent]
    ) -> None:
        if not change_job(connection, lease.job.id, _held(lease), values, news, self._now()):
            raise LeaseLost(f"the lease on {lease.job.id} is gone")

    def _newest_step(self, connection: Connection, lease: Lease) -> int:
        query = select(jobs.c.checkpoint_step).where(jobs.c.id == lease.job.id)
        return int(connection.execute(query).scalar_one())

    def _publish(self, connection: Connection, lease: Lease, adapter_id: str, step: int, name: str) -> None:
        reserved = (adapters.c.id == adapter_id, adapters.c.state == "reserved", adapters.c.lease_token == lease.token)
        values = {"state": "published", "name": name, "step": step, "created_ns": self._now()}
        if connection.execute(update(adapters).where(*reserved).values(values)).rowcount != 1:
            raise LeaseLost(f"adapter {adapter_id} was not reserved by this lease")


# What becomes of a leased job when its worker is gone or lets go.
_WITHOUT_WORKER = {
    State.RUNNING: State.QUEUED,
    State.PAUSING: State.PAUSED,
    State.CANCELLING: State.CANCELLED,
}


def adapter_name(job: Job) -> str:
    """The public name of a job's final adapter, in OpenAI's form `ft:<base>:<project>:<suffix>:<id>`."""
    return f"ft:{job.spec.base}:{job.project}:{job.spec.suffix or ''}:{job.id.removeprefix('ftjob-')[:12]}"


def _held(lease: Lease) -> list[Any]:
    return [jobs.c.id == lease.job.id, jobs.c.lease_token == lease.token, jobs.c.state.in_(LEASED)]
