"""How a worker's adapters become servable: reserved under its lease, then published, in the caller's transaction."""

from collections.abc import Sequence

from sqlalchemy import Connection

from shared.adapters.names import adapter_name
from shared.adapters.store import AdapterStore
from shared.clock import seconds_of
from shared.errors import LeaseLost
from shared.jobs.fencing import Lease, change_leased_job
from shared.jobs.rows import Job, NewEvent
from shared.jobs.spec import State, TrainingReport


def reserve_adapter(tx: Connection, lease: Lease, adapters: AdapterStore, *, now: int) -> str:
    """A fresh adapter id that belongs to the lease.

    Args:
        now: nanoseconds since the epoch.

    Raises:
        LeaseLost: see `change_leased_job`.
    """
    change_leased_job(tx, lease, {}, [], now)
    job = lease.job
    return adapters.reserve(tx, project=job.project, job=job.id, lease_token=lease.token, base=job.spec.base)


def publish_adapter(
    tx: Connection, lease: Lease, adapters: AdapterStore, adapter_id: str, name: str, step: int
) -> None:
    """Make a reserved adapter servable.

    Raises:
        LeaseLost: this lease has not reserved it.
    """
    if not adapters.publish(tx, adapter_id, lease_token=lease.token, name=name, step=step):
        raise LeaseLost(f"adapter {adapter_id} was not reserved by this lease")


def succeed(
    tx: Connection,
    lease: Lease,
    adapters: AdapterStore,
    *,
    adapter_id: str,
    report: TrainingReport,
    new_events: Sequence[NewEvent],
    now: int,
) -> None:
    """Publish the final adapter and end the job.

    Args:
        now: nanoseconds since the epoch.

    Raises:
        LeaseLost: see `change_leased_job`.
    """
    name = final_name(lease.job)
    values = {
        "state": State.SUCCEEDED,
        "adapter": adapter_id,
        "report": report.model_dump(mode="json"),
        "finished_at": seconds_of(now),
    }
    ended = [NewEvent(f"New fine-tuned model created: {name}"), NewEvent("The job has successfully completed")]
    change_leased_job(tx, lease, values, [*new_events, *ended], now)
    publish_adapter(tx, lease, adapters, adapter_id, name, report.steps)


def final_name(job: Job) -> str:
    """The public name of a job's final adapter."""
    return adapter_name(base=job.spec.base, project=job.project, suffix=job.spec.suffix, job_id=job.id)
