"""`JobStore` for tests: the same calls, each in a transaction of its own."""

import time
from collections.abc import Mapping, Sequence

from shared.clock import Nanoseconds
from shared.jobs.rows import Checkpoint, Event, Job
from shared.jobs.spec import JobSpec, TrainingReport
from shared.jobs.store import JobStore
from shared.paging import Page
from shared.storage.database import Database

# What a job may have come to, where nobody looks at the numbers.
REPORT = TrainingReport(
    trainable_params=1,
    total_params=2,
    trained_tokens=3,
    total_tokens=4,
    steps=5,
    rows=6,
    dropped_rows=0,
    train_loss=1.0,
    tokens_per_second=7,
    peak_memory_mb=8,
    grad_norm=9,
    quantized_layers=0,
    base_mb=1,
)


class Jobs:
    """The jobs of one database, as a gateway changes and reads them."""

    def __init__(self, database: Database, now: Nanoseconds = time.time_ns) -> None:
        self.database = database
        self._store = JobStore(now)

    def create(
        self,
        project: str,
        spec: JobSpec,
        *,
        metadata: Mapping[str, str] | None = None,
        warnings: Sequence[str] = (),
    ) -> Job:
        with self.database.write() as tx:
            return self._store.create(tx, project, spec, metadata=metadata, warnings=warnings)

    def get(self, project: str, job_id: str) -> Job:
        with self.database.read() as tx:
            return self._store.get(tx, project, job_id)

    def list(
        self, project: str, *, after: str | None = None, limit: int = 20, metadata: Mapping[str, str] | None = None
    ) -> Page[Job]:
        with self.database.read() as tx:
            return self._store.list(tx, project, after=after, limit=limit, metadata=metadata)

    def events(
        self, project: str, job_id: str, *, before: int | None = None, after: int | None = None, limit: int = 20
    ) -> Page[Event]:
        with self.database.read() as tx:
            return self._store.events(tx, project, job_id, before=before, after=after, limit=limit)

    def checkpoints(self, project: str, job_id: str, *, after: str | None = None, limit: int = 10) -> Page[Checkpoint]:
        with self.database.read() as tx:
            return self._store.checkpoints(tx, project, job_id, after=after, limit=limit)

    def cancel(self, project: str, job_id: str) -> Job:
        with self.database.write() as tx:
            return self._store.cancel(tx, project, job_id)

    def pause(self, project: str, job_id: str) -> Job:
        with self.database.write() as tx:
            return self._store.pause(tx, project, job_id)

    def resume(self, project: str, job_id: str) -> Job:
        with self.database.write() as tx:
            return self._store.resume(tx, project, job_id)
