"""How much tokenised data stays on disk: only that of files that exist, and of it the most recently used.

What an unfinished job trains on stays in any case: a worker on another machine may have it mapped into its memory.
"""

import contextlib
from pathlib import Path

from sqlalchemy import select

from shared.jobs.spec import UNFINISHED
from shared.storage.artifacts import LocalArtifactStore
from shared.storage.database import Database
from shared.storage.tables import files, further_training_files, jobs


def collect_cached_tokens(
    database: Database, store: LocalArtifactStore, *, most_bytes: int, untouched_since: float
) -> list[Path]:
    """Remove what need not stay. Returns what went.

    Args:
        most_bytes: of all that is cached.
        untouched_since: seconds since the epoch; what is newer may belong to a file whose row is still to come.
    """
    # Listed before SQL is read: what appears in between is not in the list.
    found = _by_age(store.root / "cache")
    existing, used = _hashes(database)
    gone = []
    total = sum(size for _, size, _ in found)
    for touched, size, folder in found:
        sha256 = folder.parent.name
        spare = total > most_bytes if sha256 in existing else touched < untouched_since
        if spare and sha256 not in used:
            store.remove(folder)
            gone.append(folder)
            total -= size
    for folder in (store.root / "cache").glob("*"):
        # One that still holds something is not removed; one just made is about to hold something.
        with contextlib.suppress(OSError):
            if folder.lstat().st_mtime < untouched_since:
                folder.rmdir()
    return gone


def _by_age(cache: Path) -> list[tuple[float, int, Path]]:
    """(last use, bytes, folder) of each entry, the least recently used first."""
    found = []
    for folder in cache.glob("*/*"):
        # Another gateway may remove it while we look.
        with contextlib.suppress(OSError):
            size = sum(path.lstat().st_size for path in (folder, *folder.rglob("*")))
            found.append((folder.lstat().st_mtime, size, folder))
    return sorted(found)


def _hashes(database: Database) -> tuple[set[str], set[str]]:
    """(hashes of all files, those of files that unfinished jobs train on)."""
    further = select(files.c.sha256).join(further_training_files, further_training_files.c.file == files.c.id)
    of_jobs = [
        *(select(files.c.sha256).join(jobs, files.c.id == c) for c in (jobs.c.training_file, jobs.c.validation_file)),
        further.join(jobs, jobs.c.id == further_training_files.c.job),
    ]
    in_use = [query.where(jobs.c.state.in_(UNFINISHED)) for query in of_jobs]
    with database.read() as tx:
        used = {sha256 for query in in_use for sha256 in tx.scalars(query)}
        return set(tx.scalars(select(files.c.sha256).distinct())), used
