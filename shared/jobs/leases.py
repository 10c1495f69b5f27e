"""Jobs as workers hold them: claim, renew, report, release. What clients do is in `shared.jobs.store`."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import func, select, update

from shared.adapters.store import AdapterStore
from shared.clock import Nanoseconds, seconds_of
from shared.jobs.checkpoints import Committed, commit_checkpoint, read_checkpoints
from shared.jobs.fencing import Lease, change_leased_job
from shared.jobs.publication import reserve_adapter, succeed
from shared.jobs.requeue import STATE_WITHOUT_WORKER, AttemptEnd, count_attempt, failure, requeue
from shared.jobs.rows import Checkpoint, NewEvent, change_job, read_job
from shared.jobs.spec import DeviceKind, JobFault, Phase, Progress, RequestedAction, State, TrainingReport
from shared.storage.database import Database, check_revision
from shared.storage.tables import jobs

_REQUESTED_ACTIONS = {
    State.RUNNING: RequestedAction.NONE,
    State.PAUSING: RequestedAction.PAUSE,
    State.CANCELLING: RequestedAction.CANCEL,
}


class Leases:
    """Everything a worker does with jobs. Each method is one transaction, conditional on the lease's token.

    All but `claim` and `checkpoints` raise LeaseLost if another worker owns the job by now, or it has ended.

    Args:
        now: nanoseconds since the epoch; only for what people read.
    """

    def __init__(self, database: Database, now: Nanoseconds = time.time_ns) -> None:
        self._database = database
        self._adapters = AdapterStore(now)
        self._now = now

    def claim(
        self, worker: str, *, device: DeviceKind | None = None, without_bases: Sequence[str] = ()
    ) -> Lease | None:
        """Take the oldest queued job, or None if nothing waits. Two callers never get the same one.

        Args:
            device: what the worker computes on; the job's events say it.
            without_bases: bases whose jobs are passed over.

        Raises:
            TunesmithError: the schema is no longer this version's; what a newer one queues is not for this one.
        """
        oldest = (
            select(jobs.c.id)
            .where(jobs.c.state == State.QUEUED)
            .order_by(jobs.c.created_ns, jobs.c.id)
            .limit(1)
            .with_for_update(skip_locked=True)
        )
        if without_bases:
            oldest = oldest.where(jobs.c.spec["base"].as_string().not_in(without_bases))
        with self._database.write() as tx:
            job_id = tx.execute(oldest).scalar()
            if job_id is None:
                return None
            check_revision(tx)
            now = self._now()
            values = {
                "state": State.RUNNING,
                "phase": Phase.PREPARING,
                "worker": worker,
                "attempt": jobs.c.attempt + 1,
                "lease_token": jobs.c.lease_token + 1,
                "renewals": 0,
                "last_write": 0,
                "started_at": func.coalesce(jobs.c.started_at, seconds_of(now)),
            }
            before = read_job(tx, job_id)
            started = "Started" if before.attempt == 0 else f"Started again (attempt {before.attempt + 1})"
            claimed = [NewEvent(f"{started} on worker {worker}", data={"device": device} if device else None)]
            if not change_job(tx, job_id, [jobs.c.state == State.QUEUED], values, claimed, now):
                return None
            job = read_job(tx, job_id)
            return Lease(job, job.lease_token, worker)

    def renew(self, lease: Lease) -> RequestedAction:
        """Show life, and learn what the job's owner requests."""
        statement = update(jobs).where(*lease.held()).values(renewals=jobs.c.renewals + 1).returning(jobs.c.state)
        with self._database.write() as tx:
            state = tx.execute(statement).scalar()
        if state is None:
            raise lease.lost()
        return _REQUESTED_ACTIONS[State(state)]

    def record(
        self,
        lease: Lease,
        new_events: Sequence[NewEvent] = (),
        *,
        phase: Phase | None = None,
        progress: Progress | None = None,
        number: int | None = None,
    ) -> None:
        """Write events, phase and progress.

        Args:
            number: counts a lease's records from 1: one that is written already, though its answer was lost, is not
                written again.
        """
        values: dict[str, Any] = {} if number is None else {"last_write": number}
        conditions = [] if number is None else [jobs.c.last_write < number]
        if phase is not None:
            values["phase"] = phase
        if progress is not None:
            values["progress"] = progress.model_dump(mode="json") | {"written_at": self._now() / 1e9}
        with self._database.write() as tx:
            if change_job(tx, lease.job.id, [*lease.held(), *conditions], values, new_events, self._now()):
                return
            if tx.execute(select(jobs.c.id).where(*lease.held())).first() is None:
                raise lease.lost()

    def reserve_adapter(self, lease: Lease) -> str:
        """A fresh adapter id, written down before anything is staged under it."""
        with self._database.write() as tx:
            return reserve_adapter(tx, lease, self._adapters, now=self._now())

    def checkpoints(self, lease: Lease) -> list[Checkpoint]:
        """All checkpoints of the job, newest first, for resuming."""
        with self._database.read() as tx:
            return read_checkpoints(tx, lease.job.id)

    def commit_checkpoint(self, lease: Lease, step: int, adapter_id: str, metrics: Mapping[str, Any]) -> Committed:
        """Make a written checkpoint count; what serves its step may be an older adapter."""
        with self._database.write() as tx:
            return commit_checkpoint(
                tx, lease, self._adapters, step=step, adapter_id=adapter_id, metrics=metrics, now=self._now()
            )

    def succeed(
        self, lease: Lease, adapter_id: str, report: TrainingReport, new_events: Sequence[NewEvent] = ()
    ) -> None:
        """Publish the final adapter and end the job."""
        with self._database.write() as tx:
            succeed(
                tx,
                lease,
                self._adapters,
                adapter_id=adapter_id,
                report=report,
                new_events=new_events,
                now=self._now(),
            )

    def fail(self, lease: Lease, fault: JobFault) -> None:
        """End the job as failed; it is not tried again."""
        values, report = failure(fault, self._now())
        with self._database.write() as tx:
            change_leased_job(tx, lease, values, [report], self._now())

    def release(self, lease: Lease, message: str) -> State:
        """Give the job back after saving: paused or cancelled if that was requested, else queued for the next worker.

        Returns:
            The state it is in now.
        """
        with self._database.write() as tx:
            state = tx.execute(select(jobs.c.state).where(*lease.held()).with_for_update()).scalar()
            if state is None:
                raise lease.lost()
            target = STATE_WITHOUT_WORKER[State(state)]
            values = {"state": target} | ({"finished_at": seconds_of(self._now())} if target.final else {})
            reports = [NewEvent(message)]
            if target.final:
                reports.append(NewEvent(f"The job is {target.value}, as requested"))
            change_leased_job(tx, lease, values, reports, self._now())
            count_attempt(tx, AttemptEnd.HANDED_OVER)
        return target

    def requeue(self, lease: Lease, reason: str) -> None:
        """Give a job back after a failure that may be its own (a bug, a hang): counted, and tried again."""
        with self._database.write() as tx:
            if not requeue(
                tx, lease.job.id, lease.held(), f"could not go on: {reason}", self._now(), AttemptEnd.FAILED
            ):
                raise lease.lost()

    def hand_back(self, lease: Lease, reason: str) -> None:
        """Give a job back for what is no fault of its own (disk full, base away): not counted."""
        with self._database.write() as tx:
            told, end = f"gives it back: {reason}", AttemptEnd.GIVEN_BACK
            if not requeue(tx, lease.job.id, lease.held(), told, self._now(), end, counted=False):
                raise lease.lost()
