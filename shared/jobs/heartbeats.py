"""Leases as the reaper watches them. No clock is compared between machines.

Whoever watches a lease watches `renewals` stand still on a clock of its own.
"""

import time
from dataclasses import dataclass

from sqlalchemy import func, select, update

from shared.clock import Nanoseconds
from shared.jobs.requeue import AttemptEnd, requeue
from shared.jobs.spec import LEASED, State
from shared.storage.database import Database
from shared.storage.tables import jobs


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """A pair (token, renewals) that does not change belongs to a worker that was lost."""

    job_id: str
    token: int
    renewals: int


class Heartbeats:
    """Everything the reaper does with jobs; each method is one transaction.

    Args:
        now: nanoseconds since the epoch; only for what people read.
    """

    def __init__(self, database: Database, now: Nanoseconds = time.time_ns) -> None:
        self._database = database
        self._now = now

    def read(self) -> list[Heartbeat]:
        """One for every job a worker holds."""
        query = select(jobs.c.id, jobs.c.lease_token, jobs.c.renewals).where(jobs.c.state.in_(LEASED))
        with self._database.read() as tx:
            return [Heartbeat(*row) for row in tx.execute(query)]

    def expire(self, seen: Heartbeat) -> bool:
        """Take a job from a worker that shows no life, unless it has shown some since `seen`; see `requeue`.

        A lease that was never renewed is not counted against the job: its worker may not know that it has it, since the
        answer to its claim was lost.

        Returns:
            Whether the job was taken.
        """
        held = [jobs.c.id == seen.job_id, jobs.c.lease_token == seen.token, jobs.c.renewals == seen.renewals]
        begun = seen.renewals > 0
        reason = "was lost" if begun else "did not begin; the answer to its claim may have been lost"
        with self._database.write() as tx:
            end = AttemptEnd.WORKER_LOST if begun else AttemptEnd.NOT_BEGUN
            return requeue(tx, seen.job_id, held, reason, self._now(), end, counted=begun)

    def queued(self) -> int:
        """How many jobs wait for a worker."""
        with self._database.read() as tx:
            return tx.execute(select(func.count()).where(jobs.c.state == State.QUEUED)).scalar_one()

    def check_writable(self) -> None:
        """Open a write transaction and end it without a change; what keeps workers from writing keeps it waiting too.

        Raises:
            SQLAlchemyError: the database takes no writes.
        """
        with self._database.write() as tx:
            tx.execute(update(jobs).where(jobs.c.id == "").values(renewals=0))
