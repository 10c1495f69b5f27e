"""Which workers take no jobs for now, or none of one base: written by the workers, read for health and metrics.

A worker that dies meanwhile leaves its outage behind, so each has an end; one that goes on is written again. Knows no
jobs.
"""

import time
from collections.abc import Collection
from dataclasses import dataclass

from sqlalchemy import delete, insert, select

from shared.clock import Nanoseconds, seconds_of
from shared.storage.database import Database
from shared.storage.tables import worker_outages

# A worker needs a moment to try again, and its clock may differ.
GRACE_SECONDS = 60
ANY_BASE = ""


@dataclass(frozen=True, slots=True)
class WorkerOutage:
    """One worker that takes no job; none of `base` alone unless that is empty."""

    worker: str
    base: str


class WorkerOutages:
    """The outages of all workers; each method is one transaction.

    Args:
        now: nanoseconds since the epoch.
    """

    def __init__(self, database: Database, now: Nanoseconds = time.time_ns) -> None:
        self._database = database
        self._now = now

    def begin(self, worker: str, seconds: float, base: str = ANY_BASE) -> None:
        """The worker takes no job (of a base) for so many seconds."""
        now = seconds_of(self._now())
        mine = (worker_outages.c.worker == worker) & (worker_outages.c.base == base)
        with self._database.write() as tx:
            tx.execute(delete(worker_outages).where(mine | (worker_outages.c.until < now - GRACE_SECONDS)))
            tx.execute(insert(worker_outages).values(worker=worker, base=base, until=now + round(seconds)))

    def end(self, worker: str, bases: Collection[str]) -> None:
        """The worker takes jobs again: all, or those of bases, as `begin` named them."""
        with self._database.write() as tx:
            tx.execute(
                delete(worker_outages).where(worker_outages.c.worker == worker, worker_outages.c.base.in_(bases))
            )

    def read(self) -> list[WorkerOutage]:
        """All that last, by worker and base."""
        query = (
            select(worker_outages.c.worker, worker_outages.c.base)
            .where(worker_outages.c.until >= seconds_of(self._now()) - GRACE_SECONDS)
            .order_by(worker_outages.c.worker, worker_outages.c.base)
        )
        with self._database.read() as tx:
            return [WorkerOutage(*row) for row in tx.execute(query)]
