"""The state of the queue as figures, for metrics: one read of SQL."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import func, select

from shared.clock import Nanoseconds
from shared.jobs.spec import State
from shared.storage.database import Database
from shared.storage.tables import job_attempts, jobs


@dataclass(frozen=True, slots=True)
class QueueFigures:
    """What was found.

    Attributes:
        jobs: how many there are by state; a state without jobs is left out.
        failed: how many have failed by the code of their fault.
        attempts: how many attempts have ended before their job did, by reason; it only grows.
        oldest_queued_seconds: age of the oldest job that waits; 0 if none does.
        tokens: that the jobs which succeeded have trained on.
        tokens_per_second: of all jobs that train now.
    """

    jobs: Mapping[str, int]
    failed: Mapping[str, int]
    attempts: Mapping[str, int]
    oldest_queued_seconds: float
    tokens: float
    tokens_per_second: float


class QueueState:
    """Reads them.

    Args:
        now: nanoseconds since the epoch.
    """

    def __init__(self, database: Database, now: Nanoseconds = time.time_ns) -> None:
        self._database = database
        self._now = now

    def read(self) -> QueueFigures:
        c = jobs.c
        counted = select(c.state, func.count().label("number"))
        code = c.fault["code"].as_string()
        with self._database.read() as tx:
            by_state = {row.state: row.number for row in tx.execute(counted.group_by(c.state))}
            failed = tx.execute(select(code, func.count()).where(c.state == State.FAILED).group_by(code))
            codes = {code or "unknown": count for code, count in failed}
            ended = tx.execute(select(job_attempts.c.reason, job_attempts.c.ended).order_by(job_attempts.c.reason))
            attempts = {row.reason: row.ended for row in ended}
            oldest = tx.execute(select(func.min(c.created_ns)).where(c.state == State.QUEUED)).scalar()
            tokens = tx.execute(select(func.sum(c.report["total_tokens"].as_float()))).scalar()
            rate = select(func.sum(c.progress["tokens_per_second"].as_float())).where(c.state == State.RUNNING)
            per_second = tx.execute(rate).scalar()
        age = 0.0 if oldest is None else max(0.0, (self._now() - oldest) / 1e9)
        return QueueFigures(by_state, codes, attempts, age, float(tokens or 0), float(per_second or 0))
