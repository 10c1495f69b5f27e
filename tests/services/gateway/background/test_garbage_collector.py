import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import insert, update

from services.gateway.background.garbage_collector import GarbageCollector
from shared.jobs.fencing import Lease
from shared.jobs.leases import Leases
from shared.jobs.spec import JobFault, JobSpec
from shared.storage.artifacts import LocalArtifactStore, new_id
from shared.storage.database import Database, migrate
from shared.storage.tables import adapters, files
from tests.jobs import Jobs


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    url = f"sqlite:///{tmp_path / 'tunesmith.db'}"
    migrate(url)
    database = Database(url)
    yield database
    database.close()


@pytest.fixture
def artifacts(tmp_path: Path) -> LocalArtifactStore:
    return LocalArtifactStore(tmp_path / "artifacts")


def collector(database: Database, artifacts: LocalArtifactStore, *, later: float = 3601) -> GarbageCollector:
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


def test_bases_and_caches_stay(database: Database, artifacts: LocalArtifactStore) -> None:
    kept = [folder(artifacts.base("tiny")), folder(artifacts.cache("ab" * 16))]
    assert collector(database, artifacts).collect() == []
    assert all(path.exists() for path in kept)


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
