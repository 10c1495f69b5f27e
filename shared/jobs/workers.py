"""Which processes train: each says every few seconds that it is there, working or idle. Read for metrics.

Nothing depends on it: what a silent worker loses its job by are its leases (`shared.jobs.heartbeats`).
"""

import time

from sqlalchemy import delete, func, insert, select, update

from shared.clock import Nanoseconds, seconds_of
from shared.storage.database import Database
from shared.storage.tables import workers

SAY_EVERY_SECONDS = 10.0
# Clocks differ, and a worker may miss a turn or two.
PRESENT_SECONDS = 40
FORGET_SECONDS = 3600


class Workers:
    """The workers of one queue; each method is one transaction.

    Args:
        now: nanoseconds since the epoch.
    """

    def __init__(self, database: Database, now: Nanoseconds = time.time_ns) -> None:
        self._database = database
        self._now = now

    def seen(self, worker: str, pid: int) -> None:
        """The process is there now."""
        now = seconds_of(self._now())
        with self._database.write() as tx:
            tx.execute(delete(workers).where(workers.c.seen_at < now - FORGET_SECONDS))
            mine = (workers.c.worker == worker) & (workers.c.pid == pid)
            if tx.execute(update(workers).where(mine).values(seen_at=now)).rowcount == 0:
                tx.execute(insert(workers).values(worker=worker, pid=pid, seen_at=now))

    def gone(self, worker: str, pid: int) -> None:
        """The process ends."""
        with self._database.write() as tx:
            tx.execute(delete(workers).where(workers.c.worker == worker, workers.c.pid == pid))

    def count(self) -> int:
        """How many are there."""
        present = workers.c.seen_at >= seconds_of(self._now()) - PRESENT_SECONDS
        with self._database.read() as tx:
            return tx.execute(select(func.count()).where(present)).scalar_one()
