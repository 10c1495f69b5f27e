"""Removes what crashes and deletions leave in the artifacts folder, and what is kept for a time only.

Idempotent; runs in every gateway.

A folder goes if no row in SQL refers to it and nothing in it was written for an hour: a folder is always written before
its row. A reserved adapter belongs to the worker that holds the lease it was reserved under, a staged folder to the
process that holds its lock. Prepared bases and caches stay.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

from sqlalchemy import Connection, and_, or_, select

from services.gateway.background.periodic import Periodic
from shared.adapters.state import AdapterState
from shared.jobs.spec import LEASED, UNFINISHED
from shared.logs import get_logger
from shared.storage.artifacts import LocalArtifactStore
from shared.storage.database import Database
from shared.storage.tables import adapters, files, jobs

UNTOUCHED_SECONDS = 3600.0
COLLECT_EVERY_SECONDS = 600.0


class GarbageCollector:
    """Collects the garbage of one artifacts folder.

    Args:
        forget: drops rows that have been kept long enough, in a transaction of its own.
        untouched: seconds since anything in a folder was last written before it may go.
        now: seconds since the epoch, as file times are.
    """

    def __init__(
        self,
        database: Database,
        store: LocalArtifactStore,
        forget: Callable[[Connection], object] = lambda _: None,
        *,
        untouched: float = UNTOUCHED_SECONDS,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._database = database
        self._store = store
        self._forget = forget
        self._untouched = untouched
        self._now = now
        self._thread = Periodic("garbage collector", self._work, COLLECT_EVERY_SECONDS)
        self._log = get_logger("garbage collector")

    def collect(self) -> list[Path]:
        """Remove everything unwanted. Returns what went."""
        # The folders are listed before SQL is read: what appears in between is not in the list.
        candidates = list(self._old_folders())
        wanted = self._wanted()
        gone = [folder for folder in candidates if folder.name not in wanted and self._remove(folder)]
        for folder in gone:
            self._log.info("garbage collected", folder=f"{folder.parent.name}/{folder.name}")
        return gone

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._thread.stop()

    def _work(self) -> None:
        self.collect()
        with self._database.write() as tx:
            self._forget(tx)

    def _remove(self, folder: Path) -> bool:
        if folder.parent.name == "staging":
            return self._store.remove_abandoned(folder)
        self._store.remove(folder)
        return True

    def _old_folders(self) -> Iterator[Path]:
        cutoff = self._now() - self._untouched
        for kind in ("staging", "adapters", "jobs", "files"):
            parent = self._store.root / kind
            if not parent.is_dir():
                continue
            for entry in parent.iterdir():
                # A lock without its folder: its process was killed after placing what it had staged.
                folder = entry.with_suffix("") if entry.suffix == ".lock" else entry
                try:
                    if (entry.is_dir() or not folder.exists()) and _last_touched(entry) < cutoff:
                        yield folder
                except FileNotFoundError:
                    # Placed elsewhere, or removed by another gateway, while we looked.
                    continue

    def _wanted(self) -> set[str]:
        held = and_(adapters.c.lease_token == jobs.c.lease_token, jobs.c.state.in_(LEASED))
        of_job = select(adapters.c.id).join(jobs, jobs.c.id == adapters.c.job)
        servable = of_job.where(
            or_(adapters.c.state == AdapterState.PUBLISHED, and_(adapters.c.state == AdapterState.RESERVED, held))
        )
        unfinished = select(jobs.c.id).where(jobs.c.state.in_(UNFINISHED))
        with self._database.read() as tx:
            return {name for query in (servable, unfinished, select(files.c.id)) for name in tx.scalars(query).all()}


def _last_touched(folder: Path) -> float:
    return max(path.lstat().st_mtime for path in (folder, *folder.rglob("*")))
