"""A worker's checkpoints in SQL: a row, a servable adapter and an event, in the caller's transaction.

Owns how many stay: the newest few and the best.
"""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, delete, insert, select, update

from shared.adapters.names import checkpoint_name
from shared.adapters.store import AdapterStore
from shared.clock import seconds_of
from shared.jobs.fencing import Lease, change_leased_job
from shared.jobs.publication import final_name, publish_adapter
from shared.jobs.rows import Checkpoint, NewEvent, job_continuing, select_checkpoints
from shared.storage.tables import checkpoints, jobs


@dataclass(frozen=True, slots=True)
class Committed:
    """What a commit has done.

    Attributes:
        adapter: the id of the adapter that serves the step.
        removed: ids of the adapters that were let go for it; their folders are the caller's to remove.
    """

    adapter: str
    removed: tuple[str, ...] = ()


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
) -> Committed:
    """Make a written checkpoint count, and let go of those beyond the job's `keep_checkpoints`.

    A step that was committed before (its files turned out torn, so it was trained again) keeps its adapter, which has
    the same bytes; only the place of the resume state changes.

    Args:
        now: nanoseconds since the epoch.

    Raises:
        LeaseLost: see `change_leased_job`.
    """
    same_step = (checkpoints.c.job == lease.job.id, checkpoints.c.step == step)
    earlier = tx.execute(select(checkpoints.c.adapter).where(*same_step)).scalar()
    if earlier == adapter_id:
        # Committed before, but the response was lost on its way.
        return Committed(adapter_id)
    values = {}
    if step > _newest_step(tx, lease):
        # Progress was made since the last failure: a job that crawls forward is not poisoned.
        values = {"worker_failures": 0, "checkpoint_step": step}
    saved = NewEvent(f"Checkpoint saved at step {step}", data={"step": step})
    change_leased_job(tx, lease, values, [saved], now)
    if earlier is not None:
        tx.execute(update(checkpoints).where(*same_step).values(lease_token=lease.token))
        adapters.discard(tx, adapter_id)
        return Committed(str(earlier))
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
    return Committed(adapter_id, _let_go(tx, lease, adapters, step))


def _beyond(known: Sequence[Checkpoint], keep: int) -> list[Checkpoint]:
    """Those that need not stay: not among the `keep` newest, nor the one of the lowest validation loss.

    Args:
        known: newest first.
    """
    evaluated = [c for c in known if c.metrics.get("valid_loss") is not None]
    # The first of equals, as early stopping has it.
    best = min(evaluated, key=lambda c: (c.metrics["valid_loss"], c.step), default=None)
    return [c for c in known[keep:] if c is not best]


def _let_go(tx: Connection, lease: Lease, adapters: AdapterStore, step: int) -> tuple[str, ...]:
    # Those of later steps could not be resumed from: training has come past them once, and will again.
    known = [checkpoint for checkpoint in read_checkpoints(tx, lease.job.id) if checkpoint.step <= step]
    gone = []
    for checkpoint in _beyond(known, lease.job.spec.keep_checkpoints):
        # Locked, so that no job can begin to continue it between the question and the deletion.
        adapters.lock(tx, checkpoint.adapter)
        if job_continuing(tx, checkpoint.adapter) is None:
            tx.execute(delete(checkpoints).where(checkpoints.c.id == checkpoint.id))
            adapters.withdraw(tx, checkpoint.adapter)
            gone.append(checkpoint.adapter)
    return tuple(gone)


def _newest_step(tx: Connection, lease: Lease) -> int:
    return int(tx.execute(select(jobs.c.checkpoint_step).where(jobs.c.id == lease.job.id)).scalar_one())
