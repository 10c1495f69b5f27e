"""What must hold once an installation has recovered, whatever had happened to it."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from sqlalchemy import Connection, select

from shared.adapters.state import AdapterState
from shared.errors import ArtifactCorrupt, NotFound
from shared.jobs.rows import Job, jobs_of, select_jobs
from shared.jobs.spec import State
from shared.storage.artifacts import ADAPTER_WEIGHTS, LocalArtifactStore, sha256_of
from shared.storage.database import Database
from shared.storage.tables import adapters, events, files, jobs

ENDED = "The job has successfully completed"
BLAME = ("could not go on", "hung")


class Kind(StrEnum):
    """Of what a broken promise is a case."""

    LOST = "lost"
    DOUBLED = "doubled"
    STUCK = "stuck"
    NOT_BIT_EXACT = "not_bit_exact"
    BLAMED = "blamed"
    # Not cleared away: nothing that anybody was promised, and there for ever.
    LEFT_BEHIND = "left_behind"


@dataclass(frozen=True, slots=True)
class Broken:
    """A broken promise, and what shows it."""

    kind: Kind
    what: str


def broken_promises(
    database: Database,
    store: LocalArtifactStore,
    *,
    ends: Mapping[str, frozenset[State]],
    reference: str | None,
    worker_died: bool,
) -> Iterator[Broken]:
    """Look at everything.

    Args:
        ends: the states that each acknowledged job may be in; there must be no other job.
        reference: SHA-256 of the weights that an uninterrupted run gives; None where nothing is trained.
        worker_died: only then may a job have lost its worker.
    """
    with database.read() as tx:
        found = jobs_of(tx, tx.execute(select_jobs()).all())
        file_rows = dict(tx.execute(select(files.c.id, files.c.sha256)).all())
        published = set(tx.scalars(select(adapters.c.id).where(adapters.c.state == AdapterState.PUBLISHED)))
        logs = {job.id: _messages(tx, job.id) for job in found}
        counts = dict(tx.execute(select(jobs.c.id, jobs.c.event_count)).all())
    for job in found:
        yield from _of_job(job, ends.get(job.id))
        yield from _of_log(job, logs[job.id], counts[job.id], worker_died=worker_died)
        if reference is not None and job.adapter in published:
            yield from _of_bytes(store.adapter(str(job.adapter)), reference)
    for job_id in ends.keys() - {job.id for job in found}:
        yield Broken(Kind.LOST, f"the acknowledged job {job_id} is gone")
    for file_id, sha256 in file_rows.items():
        data = store.file_data(file_id)
        if not data.is_file() or sha256_of(data) != sha256:
            yield Broken(Kind.LOST, f"the file {file_id} has a row and not its bytes")
    for adapter in published:
        try:
            store.verify(store.adapter(adapter), "adapter")
        except (NotFound, ArtifactCorrupt) as error:
            yield Broken(Kind.LOST, f"a published adapter does not verify: {error.message}")
    unfinished = {job.id for job in found if not job.state.final}
    yield from _of_folders(store, set(file_rows), published, unfinished, set(file_rows.values()))


def _of_job(job: Job, ends: frozenset[State] | None) -> Iterator[Broken]:
    if ends is None:
        yield Broken(Kind.DOUBLED, f"the job {job.id} was acknowledged to nobody")
    elif job.state not in ends:
        kind = Kind.LOST if job.state.final else Kind.STUCK
        yield Broken(kind, f"the job is {job.state.value}, not {' or '.join(sorted(ends))}")
    if job.fault is not None:
        yield Broken(Kind.LOST, f"the job failed for what was healed: {job.fault.code}: {job.fault.message}")


def _messages(tx: Connection, job_id: str) -> list[tuple[int, str, str]]:
    c = events.c
    rows = tx.execute(select(c.number, c.message, c.data).where(c.job == job_id).order_by(c.number))
    return [(row.number, row.message, str(row.data)) for row in rows]


def _of_log(job: Job, log: list[tuple[int, str, str]], count: int, *, worker_died: bool) -> Iterator[Broken]:
    if [number for number, _, _ in log] != list(range(1, count + 1)):
        yield Broken(Kind.LOST, f"the events have gaps: {[number for number, _, _ in log]} of {count}")
    told = [message for _, message, _ in log].count(ENDED)
    if told != (job.state is State.SUCCEEDED):
        kind = Kind.DOUBLED if told > 1 else Kind.LOST
        yield Broken(kind, f"the job is {job.state.value} and its end is told {told} times")
    claim: Counter[tuple[str, str]] = Counter()
    for _, message, data in log:
        if message.startswith("Started"):
            claim.clear()
        claim[message, data] += 1
        if claim[message, data] > 1:
            yield Broken(Kind.DOUBLED, f"told twice: {message} {data}")
        if any(word in message for word in BLAME) or ("was lost" in message and not worker_died):
            yield Broken(Kind.BLAMED, message)


def _of_bytes(folder: Path, reference: str) -> Iterator[Broken]:
    weights = folder / ADAPTER_WEIGHTS
    if not weights.is_file() or sha256_of(weights) != reference:
        yield Broken(Kind.NOT_BIT_EXACT, f"the adapter {folder.name} is not that of an uninterrupted run")


def _of_folders(
    store: LocalArtifactStore, file_ids: set[str], published: set[str], unfinished: set[str], hashes: set[str]
) -> Iterator[Broken]:
    for kind, names in (("files", file_ids), ("adapters", published), ("staging", set()), ("trash", set())):
        folder = store.root / kind
        there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        if there - names:
            yield Broken(Kind.LEFT_BEHIND, f"{kind}: {sorted(there - names)}")
        if names - there:
            yield Broken(Kind.LOST, f"{kind}: {sorted(names - there)}")
    for kind, most in (("jobs", unfinished), ("cache", hashes)):
        folder = store.root / kind
        there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        if there - most:
            yield Broken(Kind.LEFT_BEHIND, f"{kind}: {sorted(there - most)}")
