"""Removes what crashes and deletions leave in the artifacts folder, and what is kept for a time only.

Idempotent; runs in every gateway.

A folder goes if no row in SQL refers to it and nothing in it was written for an hour: a folder is always written before
its row. A reserved adapter belongs to the worker that holds the lease it was reserved under, a staged folder to the
process that holds its lock. Prepared bases stay; tokenised data is `services.gateway.background.cached_tokens`'.

What SQL says is over (a deleted adapter, an ended job's private state) is removed. What SQL knows nothing of may be
somebody else's: it goes into the trash for a week, and stays where it is if that is most of what there is. An artifacts
folder that belongs to another installation is not touched at all.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from sqlalchemy import Connection, and_, or_, select

from services.gateway.background.cached_tokens import collect_cached_tokens
from services.gateway.background.periodic import Periodic
from services.gateway.settings import DEFAULT_CACHE_BYTES
from shared.adapters.state import AdapterState
from shared.jobs.spec import LEASED, UNFINISHED
from shared.logs import get_logger
from shared.storage.artifacts import LocalArtifactStore, staging_lock
from shared.storage.database import Database
from shared.storage.installation_id import OWNED, require_own_folder
from shared.storage.tables import adapters, files, jobs

UNTOUCHED_SECONDS = 3600.0
COLLECT_EVERY_SECONDS = 600.0
TRASH_SECONDS = 7 * 86400.0
# So many folders that SQL knows nothing of are a mistake, not garbage: a share of all, from a number on.
MOST_ORPHANS = 0.5
FEW_FOLDERS = 20
STAGING = "staging"


class GarbageCollector:
    """Collects the garbage of one artifacts folder.

    Args:
        forget: each drops rows that have been kept long enough, in a transaction of its own.
        cache_bytes: of tokenised data that may stay.
        untouched: seconds since anything in a folder was last written before it may go.
        now: seconds since the epoch, as file times are.
    """

    def __init__(
        self,
        database: Database,
        store: LocalArtifactStore,
        forget: Sequence[Callable[[Connection], object]] = (),
        *,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        untouched: float = UNTOUCHED_SECONDS,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._database = database
        self._store = store
        self._forget = forget
        self._cache_bytes = cache_bytes
        self._untouched = untouched
        self._now = now
        self._thread = Periodic("garbage collector", self._work, COLLECT_EVERY_SECONDS)
        self._log = get_logger("garbage collector")

    def collect(self) -> list[Path]:
        """Remove everything unwanted. Returns what went."""
        with self._database.read() as tx:
            require_own_folder(tx, self._store)
        # The folders are listed before SQL is read: what appears in between is not in the list.
        folders = list(self._folders())
        candidates = [folder for folder in folders if self._is_old(folder)]
        wanted, known = self._wanted()
        unwanted = [folder for folder in candidates if folder.name not in wanted]
        orphans = {folder for folder in unwanted if folder.parent.name != STAGING and folder.name not in known}
        if self._too_many(orphans, folders):
            unwanted = [folder for folder in unwanted if folder not in orphans]
        gone = [folder for folder in unwanted if self._remove(folder, orphan=folder in orphans)]
        untouched_since = self._now() - self._untouched
        gone += collect_cached_tokens(
            self._database, self._store, most_bytes=self._cache_bytes, untouched_since=untouched_since
        )
        for folder in gone:
            self._log.info(
                "garbage collected", folder=f"{folder.parent.name}/{folder.name}", to_trash=folder in orphans
            )
        self._store.empty_trash(self._now() - TRASH_SECONDS)
        return gone

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._thread.stop()

    def _work(self) -> None:
        # First: it needs no artifacts folder.
        for forget in self._forget:
            with self._database.write() as tx:
                forget(tx)
        self.collect()

    def _too_many(self, orphans: set[Path], folders: list[Path]) -> bool:
        total = sum(folder.parent.name != STAGING for folder in folders)
        if total < FEW_FOLDERS or len(orphans) <= MOST_ORPHANS * total:
            return False
        self._log.error(
            "most of the artifacts folder is unknown to the database; nothing of that is collected",
            unknown=len(orphans),
            folders=total,
        )
        return True

    def _remove(self, folder: Path, *, orphan: bool) -> bool:
        try:
            if folder.parent.name == STAGING:
                return self._store.remove_abandoned(folder)
            if orphan:
                self._store.discard(folder)
            else:
                self._store.remove(folder)
        except OSError as error:
            # Of this folder only: others can be collected.
            self._log.warning("not collected", folder=f"{folder.parent.name}/{folder.name}", error=str(error))
            return False
        return True

    def _folders(self) -> Iterator[Path]:
        for kind in (STAGING, *OWNED):
            parent = self._store.root / kind
            if not parent.is_dir():
                continue
            for entry in parent.iterdir():
                # A lock without its folder: its process was killed after placing what it had staged.
                folder = entry.with_suffix("") if entry.suffix == ".lock" else entry
                try:
                    if entry.is_dir() or not folder.exists():
                        yield folder
                except OSError as error:
                    self._log.warning("not looked at", folder=f"{kind}/{entry.name}", error=str(error))

    def _is_old(self, folder: Path) -> bool:
        try:
            entry = folder if folder.exists() else staging_lock(folder)
            return _last_touched(entry) < self._now() - self._untouched
        except FileNotFoundError:
            # Placed elsewhere, or removed by another gateway, while we looked.
            return False
        except OSError as error:
            self._log.warning("not looked at", folder=f"{folder.parent.name}/{folder.name}", error=str(error))
            return False

    def _wanted(self) -> tuple[set[str], set[str]]:
        """(names of the folders to keep, names that SQL knows at all)."""
        held = and_(adapters.c.lease_token == jobs.c.lease_token, jobs.c.state.in_(LEASED))
        of_job = select(adapters.c.id).join(jobs, jobs.c.id == adapters.c.job)
        servable = of_job.where(
            or_(adapters.c.state == AdapterState.PUBLISHED, and_(adapters.c.state == AdapterState.RESERVED, held))
        )
        unfinished = select(jobs.c.id).where(jobs.c.state.in_(UNFINISHED))
        with self._database.read() as tx:
            wanted = {name for query in (servable, unfinished, select(files.c.id)) for name in tx.scalars(query)}
            return wanted, wanted | {name for table in (adapters, jobs) for name in tx.scalars(select(table.c.id))}


def _last_touched(folder: Path) -> float:
    return max(path.lstat().st_mtime for path in (folder, *folder.rglob("*")))
