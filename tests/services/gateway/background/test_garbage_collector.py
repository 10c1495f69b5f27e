import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sqlalchemy import insert, update

from services.gateway.background.garbage_collector import GarbageCollector
from shared.errors import TunesmithError
from shared.jobs.fencing import Lease
from shared.jobs.leases import Leases
from shared.jobs.spec import JobFault, JobSpec, TrainingFile
from shared.jobs.store import JobStore
from shared.storage.artifacts import LocalArtifactStore, new_id, trashed
from shared.storage.database import Database, migrate
from shared.storage.installation_id import adopt
from shared.storage.tables import adapters, files
from tests.jobs import Jobs


@pytest.fixture
def artifacts(tmp_path: Path) -> LocalArtifactStore:
    return LocalArtifactStore(tmp_path / "artifacts")


def collector(database: Database, artifacts: LocalArtifactStore, *, later: float = 3601) -> GarbageCollector:
    with database.read() as tx:
        adopt(tx, artifacts)
    return GarbageCollector(database, artifacts, now=lambda: time.time() + later)


def claimed(database: Database) -> Lease:
    Jobs(database).create(
        "default", JobSpec(base="tiny", base_revision="r", training_file="f", training_sha256="0" * 64)
    )
    lease = Leases(database).claim("w")
    assert lease is not None
    return lease


def folder(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "manifest.json").write_text("{}")
    return path


def test_what_nobody_vouches_for_goes_after_an_hour(database: Database, artifacts: LocalArtifactStore) -> None:
    strays = {
        folder(artifacts.root / "staging" / "abandoned"),
        folder(artifacts.adapter(new_id("adapter"))),
        folder(artifacts.checkpoints(new_id("ftjob"))),
        folder(artifacts.file(new_id("file"))),
    }
    assert collector(database, artifacts, later=3500).collect() == []
    assert set(collector(database, artifacts).collect()) == strays
    assert not any(stray.exists() for stray in strays)
    # What SQL knows nothing of is kept for a week.
    kept = [trashed(stray) for stray in strays if stray.parent.name != "staging"]
    assert all((path / "manifest.json").exists() for path in kept)
    week = 7 * 86400
    assert collector(database, artifacts, later=week - 60).collect() == []
    assert all(path.exists() for path in kept)
    assert collector(database, artifacts, later=week + 60).collect() == []
    assert not any(path.exists() for path in kept)


def test_another_databases_folder_is_not_touched(
    database: Database, artifacts: LocalArtifactStore, tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path / 'other.db'}"
    migrate(url)
    other = Database(url)
    mine = [folder(artifacts.file(new_id("file"))) for _ in range(3)]
    # Neither before nor after it carries its own installation's mark.
    ours = GarbageCollector(other, artifacts, now=lambda: time.time() + 4000)
    with pytest.raises(TunesmithError, match="3 folders that this database knows nothing of"):
        ours.collect()
    with database.read() as tx:
        adopt(tx, artifacts)
    with pytest.raises(TunesmithError, match="tunesmith adopt"):
        ours.collect()
    assert all(path.exists() for path in mine)
    with other.read() as tx:
        adopt(tx, artifacts)
    assert set(ours.collect()) == set(mine)
    other.close()


def test_most_of_the_folder_is_never_garbage(database: Database, artifacts: LocalArtifactStore) -> None:
    """As after an old backup of the database was restored beside a newer folder."""
    strays = [folder(artifacts.file(new_id("file"))) for _ in range(20)]
    over = [folder(artifacts.checkpoints(claimed_and_failed(database)))]
    assert collector(database, artifacts).collect() == over
    assert all(stray.exists() for stray in strays)
    for stray in strays[:1]:
        artifacts.remove(stray)
    assert len(collector(database, artifacts).collect()) == 19


def claimed_and_failed(database: Database) -> str:
    lease = claimed(database)
    Leases(database).fail(lease, JobFault(code="x", message="x"))
    return lease.job.id


def test_one_unreadable_folder_ends_no_collection(
    database: Database, artifacts: LocalArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, good = (folder(artifacts.file(new_id("file"))) for _ in range(2))
    discard = artifacts.discard

    def failing(path: Path) -> None:
        if path == bad:
            raise OSError(errno.EIO, "Input/output error")
        discard(path)

    monkeypatch.setattr(artifacts, "discard", failing)
    assert collector(database, artifacts).collect() == [good]


def test_an_entry_whose_kind_cannot_be_told_ends_no_collection(
    database: Database, artifacts: LocalArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, good = (folder(artifacts.file(new_id("file"))) for _ in range(2))
    is_dir = Path.is_dir

    def failing(self: Path, **options: bool) -> bool:
        if self == bad:
            raise OSError(errno.EIO, "Input/output error")
        return is_dir(self, **options)

    monkeypatch.setattr(Path, "is_dir", failing)
    assert collector(database, artifacts).collect() == [good]


def test_a_folder_that_comes_again_is_kept_beside_the_first(database: Database, artifacts: LocalArtifactStore) -> None:
    stray = artifacts.file(new_id("file"))
    for _ in range(2):
        folder(stray)
        assert collector(database, artifacts).collect() == [stray]
    assert len(list((artifacts.root / "trash").iterdir())) == 2
    # Another gateway took it first.
    with pytest.raises(FileNotFoundError):
        artifacts.discard(stray)
    assert len(list((artifacts.root / "trash").iterdir())) == 2


def test_what_a_user_deletes_does_not_stay_in_the_trash(database: Database, artifacts: LocalArtifactStore) -> None:
    deleted = artifacts.file(new_id("file"))
    folder(deleted)
    # Between the row's removal and the folder's.
    assert collector(database, artifacts).collect() == [deleted]
    artifacts.remove(deleted)
    assert list((artifacts.root / "trash").iterdir()) == []


def test_bases_stay(database: Database, artifacts: LocalArtifactStore) -> None:
    kept = folder(artifacts.base("tiny"))
    assert collector(database, artifacts).collect() == []
    assert kept.exists()


def with_file(database: Database, sha256: str) -> str:
    file_id = new_id("file")
    row = {"id": file_id, "project": "p", "created_ns": 1, "filename": "f", "purpose": "fine-tune", "bytes": 1}
    with database.write() as tx:
        tx.execute(insert(files).values(row | {"sha256": sha256, "dataset": {}}))
    return file_id


def test_cached_tokens_stay_with_their_file(database: Database, artifacts: LocalArtifactStore) -> None:
    with_file(database, "a" * 64)
    kept, gone = (folder(artifacts.cache(sha256, "0" * 64)) for sha256 in ("a" * 64, "b" * 64))
    assert collector(database, artifacts, later=3500).collect() == []
    assert collector(database, artifacts).collect() == [gone]
    assert kept.exists()
    assert not gone.parent.exists()


def test_the_least_recently_used_tokens_go_first_and_never_those_of_a_job(
    database: Database, artifacts: LocalArtifactStore
) -> None:
    hashes = [digit * 64 for digit in "abcde"]
    first, *_, further = (with_file(database, sha256) for sha256 in hashes)
    spec = JobSpec(base="tiny", base_revision="r", training_file=first, training_sha256=hashes[0])
    more = (TrainingFile(id=further, sha256=hashes[4]),)
    Jobs(database).create("p", spec.model_copy(update={"further_training_files": more}))
    cached = [folder(artifacts.cache(sha256, "0" * 64)) for sha256 in hashes]
    for age, path in zip((400, 300, 100, 200, 500), cached, strict=True):
        (path / "rows").write_bytes(bytes(1 << 20))
        os.utime(path, (time.time() - age,) * 2)
    with database.read() as tx:
        adopt(tx, artifacts)
    small = GarbageCollector(database, artifacts, cache_bytes=7 << 19)
    assert small.collect() == [cached[1], cached[3]]
    assert small.collect() == []


def test_the_events_of_jobs_that_ended_long_ago_can_be_dropped(database: Database) -> None:
    ended = claimed_and_failed(database)
    running = claimed(database).job.id
    store = JobStore(now=lambda: time.time_ns() + 86400 * 10**9)
    jobs = Jobs(database)
    with database.write() as tx:
        assert store.forget_events(tx, after_seconds=2 * 86400) == 0
    had = len(jobs.events("default", ended, limit=50).items)
    with database.write() as tx:
        assert store.forget_events(tx, after_seconds=86400 - 60) == had > 0
    assert jobs.events("default", ended).items == []
    assert jobs.get("default", ended).fault is not None
    assert jobs.events("default", running).items


def test_a_file_stays_with_its_row(database: Database, artifacts: LocalArtifactStore) -> None:
    file_id = new_id("file")
    kept = folder(artifacts.file(file_id))
    row = {"id": file_id, "project": "p", "created_ns": 1, "filename": "f", "purpose": "fine-tune", "bytes": 1}
    with database.write() as connection:
        connection.execute(insert(files).values(row | {"sha256": "0" * 64, "dataset": {}}))
    collector(database, artifacts).collect()
    assert kept.exists()


def test_a_reserved_adapter_belongs_to_its_lease(database: Database, artifacts: LocalArtifactStore) -> None:
    leases = Leases(database)
    lease = claimed(database)
    kept = folder(artifacts.adapter(leases.reserve_adapter(lease)))
    state = folder(artifacts.checkpoints(lease.job.id))
    assert collector(database, artifacts).collect() == []
    leases.requeue(lease, "gone")
    assert collector(database, artifacts).collect() == [kept]
    assert state.exists()


def test_the_private_state_goes_with_the_job(database: Database, artifacts: LocalArtifactStore) -> None:
    lease = claimed(database)
    state = folder(artifacts.checkpoints(lease.job.id))
    Leases(database).fail(lease, JobFault(code="x", message="x"))
    assert collector(database, artifacts).collect() == [state]


def test_a_published_adapter_stays_until_it_is_deleted(database: Database, artifacts: LocalArtifactStore) -> None:
    leases = Leases(database)
    lease = claimed(database)
    adapter = leases.reserve_adapter(lease)
    kept = folder(artifacts.adapter(adapter))
    leases.commit_checkpoint(lease, 1, adapter, {})
    leases.fail(lease, JobFault(code="x", message="x"))
    assert collector(database, artifacts).collect() == []
    with database.write() as connection:
        connection.execute(update(adapters).values(state="deleted"))
    assert collector(database, artifacts).collect() == [kept]


def test_a_staged_folder_that_is_held_stays_however_old_it_is(
    database: Database, artifacts: LocalArtifactStore
) -> None:
    with artifacts.staged() as staged:
        assert collector(database, artifacts, later=100_000).collect() == []
        assert staged.is_dir()
    assert list((artifacts.root / "staging").iterdir()) == []


def test_what_a_killed_process_staged_goes_after_an_hour(database: Database, artifacts: LocalArtifactStore) -> None:
    script = "import os, sys; from pathlib import Path; from shared.storage.artifacts import LocalArtifactStore\n"
    script += "with LocalArtifactStore(Path(sys.argv[1])).staged() as folder:\n"
    script += "    (folder / 'data').write_text('x'); os.kill(os.getpid(), 9)\n"
    subprocess.run([sys.executable, "-c", script, str(artifacts.root)], check=False)
    (left,) = [path for path in (artifacts.root / "staging").iterdir() if path.is_dir()]
    assert collector(database, artifacts, later=3500).collect() == []
    assert collector(database, artifacts).collect() == [left]
    assert list((artifacts.root / "staging").iterdir()) == []


def test_a_lock_left_without_its_folder_goes_too(database: Database, artifacts: LocalArtifactStore) -> None:
    lock = artifacts.root / "staging" / "aa.lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    collector(database, artifacts).collect()
    assert not lock.exists()
