"""A worker's checkpoints in SQL: a row, a servable adapter and an event, in the caller's transaction."""

import secrets
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, insert, select, update

from shared.adapters.names import checkpoint_name
from shared.adapters.store import AdapterStore
from shared.clock import seconds_of
from shared.jobs.fencing import Lease, change_leased_job
from shared.jobs.publication import final_name, publish_adapter
from shared.jobs.rows import Checkpoint, NewEvent, select_checkpoints
from shared.storage.tables import checkpoints, jobs


def read_checkpoints(tx: Connection, job_id: str) -> list[Checkpoint]:
    """All checkpoints of a job, newest first."""
    return [Checkpoint(*row) for row in tx.execute(select_checkpoints(job_id).order_by(checkpoints.c.step.desc()))]


def commit_checkpoint(
    tx: Connection,
    lease: Lease,
    adapters: AdapterStore,
    *,
    step: int,
    adapter_id: str,
    metrics: Mapping[str, Any],
    now: int,
) -> str:
    """Make a written checkpoint count.

    A step that was committed before (its files turned out torn, so it was trained again) keeps its adapter, which has
    the same bytes; only the place of the resume state changes.

    Args:
        now: nanoseconds since the epoch.

    Returns:
        The id of the adapter that serves this step.

    Raises:
        LeaseLost: see `change_leased_job`.
    """
    same_step = (checkpoints.c.job == lease.job.id, checkpoints.c.step == step)
    earlier = tx.execute(select(checkpoints.c.adapter).where(*same_step)).scalar()
    if earlier == adapter_id:
        # Committed before, but the response was lost on its way.
        return adapter_id
    values = {}
    if step > _newest_step(tx, lease):
        # Progress was made since the last failure: a job that crawls forward is not poisoned.
        values = {"worker_failures": 0, "checkpoint_step": step}
    saved = NewEvent(f"Checkpoint saved at step {step}", data={"step": step})
    change_leased_job(tx, lease, values, [saved], now)
    if earlier is not None:
        tx.execute(update(checkpoints).where(*same_step).values(lease_token=lease.token))
        adapters.discard(tx, adapter_id)
        return str(earlier)
    publish_adapter(tx, lease, adapters, adapter_id, checkpoint_name(final_name(lease.job), step), step)
    row = {
        "id": "ftckpt-" + secrets.token_hex(12),
        "job": lease.job.id,
        "step": step,
        "lease_token": lease.token,
        "adapter": adapter_id,
        "metrics": dict(metrics),
        "created_at": seconds_of(now),
    }
    tx.execute(insert(checkpoints).values(row))
    return adapter_id


def _newest_step(tx: Connection, lease: Lease) -> int:
    return int(tx.execute(select(jobs.c.checkpoint_step).where(jobs.c.id == lease.job.id)).scalar_one())
