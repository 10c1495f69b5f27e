"""What becomes of a job whose worker failed: queued again, failed after too many attempts, or ended as requested."""

from collections.abc import Sequence
from enum import StrEnum
from typing import Any

from sqlalchemy import ColumnElement, Connection, select, update

from shared.clock import seconds_of
from shared.jobs.rows import NewEvent, change_job
from shared.jobs.spec import LEASED, JobFault, State
from shared.storage.tables import job_attempts, jobs

# So often a job's worker may fail in a row without a new checkpoint.
MAX_ATTEMPTS = 3
# The state of a leased job once it has no worker any more, whether that failed or released it.
STATE_WITHOUT_WORKER = {
    State.RUNNING: State.QUEUED,
    State.PAUSING: State.PAUSED,
    State.CANCELLING: State.CANCELLED,
}


class AttemptEnd(StrEnum):
    """Why an attempt ended before its job did. Each has a row in `job_attempts`, made by the migration."""

    FAILED = "failed"  # a fault that may be the job's own
    GIVEN_BACK = "given_back"  # a fault of the machine, or a base that cannot be had
    HANDED_OVER = "handed_over"  # the worker was told to end, or the job to pause
    NOT_BEGUN = "not_begun"
    WORKER_LOST = "worker_lost"


def count_attempt(tx: Connection, end: AttemptEnd) -> None:
    """Count an ended attempt, in the transaction of its end. An UPDATE alone: two that insert would collide."""
    counted = update(job_attempts).where(job_attempts.c.reason == end)
    tx.execute(counted.values(ended=job_attempts.c.ended + 1))


def requeue(
    tx: Connection,
    job_id: str,
    held: Sequence[ColumnElement[bool]],
    reason: str,
    now: int,
    end: AttemptEnd,
    *,
    counted: bool = True,
) -> bool:
    """Take a job from its worker, which failed.

    An action that the worker did not live to carry out is carried out here: nobody who requested a cancellation wants a
    new start. Otherwise the job is queued again, or failed after `MAX_ATTEMPTS` failures without a new checkpoint.

    Args:
        held: what the job's row must still say.
        reason: continues the sentence "Worker NAME …".
        now: nanoseconds since the epoch.
        end: counted for metrics.
        counted: whether the job may be at fault; else it is queued again however often that happens.

    Returns:
        False if the row says otherwise by now; nothing was written then.
    """
    c = jobs.c
    query = select(c.state, c.worker_failures, c.worker, c.checkpoint_step).where(*held, c.state.in_(LEASED))
    row = tx.execute(query.with_for_update()).one_or_none()
    if row is None:
        return False
    target = STATE_WITHOUT_WORKER[State(row.state)]
    failures = row.worker_failures + counted
    reports = [NewEvent(f"Worker {row.worker} {reason}", level="warn")]
    # The token rises, so that a worker that wakes up again cannot write.
    values: dict[str, Any] = {"lease_token": c.lease_token + 1, "worker_failures": failures}
    if target is State.QUEUED and counted and failures >= MAX_ATTEMPTS:
        message = f"tried {MAX_ATTEMPTS} times without a new checkpoint; the last time the worker {reason}"
        failed, report = failure(JobFault(code="worker_lost", message=message), now)
        values |= failed
        reports.append(report)
    elif target is State.QUEUED:
        values["state"] = target
        start = "go on from the newest checkpoint" if row.checkpoint_step else "start again"
        reports.append(NewEvent(f"Waiting for a worker to {start}"))
    else:
        values |= {"state": target} | ({"finished_at": seconds_of(now)} if target.final else {})
        reports.append(NewEvent(f"The job is {target.value}, as requested"))
    changed = change_job(tx, job_id, held, values, reports, now)
    if changed:
        count_attempt(tx, end)
    return changed


def failure(fault: JobFault, now: int) -> tuple[dict[str, Any], NewEvent]:
    """The columns of a job that has failed for good, and the event that reports it."""
    values = {"state": State.FAILED, "fault": fault.model_dump(mode="json"), "finished_at": seconds_of(now)}
    return values, NewEvent(f"The job failed: {fault.message}", level="error", data={"code": fault.code})
