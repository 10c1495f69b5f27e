"""A lease and its fencing token: the condition that every write of a worker carries.

A lease is the pair (job, token). Every claim raises the token, every write of a worker is conditional on it, and a
write whose token is gone raises LeaseLost: the holder must stop at once and write nothing more (Kleppmann, "How to do
distributed locking").
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection

from shared.errors import LeaseLost
from shared.jobs.rows import Job, NewEvent, change_job
from shared.jobs.spec import LEASED
from shared.storage.tables import jobs


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to work on one job; `job` is as it was when claimed."""

    job: Job
    token: int
    worker: str

    def held(self) -> list[ColumnElement[bool]]:
        """The conditions under which the job's row still belongs to this lease."""
        return [jobs.c.id == self.job.id, jobs.c.lease_token == self.token, jobs.c.state.in_(LEASED)]

    def lost(self) -> LeaseLost:
        """The error to raise when those conditions do not hold."""
        return LeaseLost(f"the lease on {self.job.id} is gone")


def change_leased_job(
    tx: Connection, lease: Lease, values: Mapping[str, Any], new_events: Sequence[NewEvent], now: int
) -> None:
    """Change the job of a lease, and write the events that report it.

    Args:
        now: nanoseconds since the epoch.

    Raises:
        LeaseLost: another worker owns the job, or it has ended.
    """
    if not change_job(tx, lease.job.id, lease.held(), values, new_events, now):
        raise lease.lost()
