"""Backups of working installations on both databases, restored and checked row by row."""

import os
import random
import re
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
from sqlalchemy import select

from services.gateway.backup.restore import NOT_FINISHED, restore_backup
from services.gateway.backup.take import take_backup
from services.gateway.settings import GatewaySettings
from shared.adapters.state import AdapterState
from shared.errors import TunesmithError
from shared.jobs.fencing import Lease
from shared.jobs.leases import Leases
from shared.jobs.spec import JobSpec, State
from shared.storage import artifacts as artifacts_module
from shared.storage.artifacts import LocalArtifactStore, new_id, sha256_of
from shared.storage.database import Database, migrate
from shared.storage.installation_id import own_id
from shared.storage.manifests import Manifest
from shared.storage.tables import adapters, files, jobs
from tests.fresh_database import fresh_on_server
from tests.jobs import Jobs
from tests.services.gateway.conftest import ROWS, Gateway, eventually, running_gateway
from tests.stack_processes import ROOT, clean_environment

ON_POSTGRESQL = pytest.param("postgresql", marks=pytest.mark.servers)
Settings = Callable[..., GatewaySettings]


@dataclass
class Place:
    """Makes the settings of installations on one kind of database."""

    new_url: Callable[[Path], str]
    redis_url: str
    root: Path

    def settings(self, name: str, **changes: object) -> GatewaySettings:
        home = self.root / name
        given = {"home": home, "redis_url": self.redis_url, "database_url": self.new_url(home)}
        return GatewaySettings.model_validate(given | changes)

    def migrated(self, name: str) -> GatewaySettings:
        settings = self.settings(name)
        migrate(settings.sql_url)
        return settings


@pytest.fixture(params=["sqlite", ON_POSTGRESQL])
def place(request: pytest.FixtureRequest, tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Place:
    if request.param == "sqlite":
        return Place(lambda home: f"sqlite:///{home / 'tunesmith.db'}", redis_url, tmp_path)
    admin = request.getfixturevalue("postgres_url")
    found = find_spec("pgserver")
    assert found is not None
    assert found.origin is not None
    programs = Path(found.origin).parent / "pginstall" / "bin"
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    return Place(lambda _: fresh_on_server(admin), redis_url, tmp_path)


def publish(store: LocalArtifactStore, leases: Leases, lease: Lease, step: int) -> None:
    """A checkpoint as a worker makes one: its folders first, then its row, then what it lets go."""
    manifest = Manifest(kind="adapter", id="x", base="tiny", base_revision="r", base_sha256="0" * 64, files={})
    adapter = leases.reserve_adapter(lease)
    state = store.checkpoint(lease.job.id, lease.token, step)
    for target in (store.adapter(adapter), state):
        with store.staged() as staged:
            (staged / "adapter_model.safetensors").write_bytes(random.randbytes(5000))
            kind = "adapter" if target.parent.name == "adapters" else "checkpoint"
            store.publish(staged, target, manifest.model_copy(update={"kind": kind}))
    for gone in leases.commit_checkpoint(lease, step, adapter, {}).removed:
        store.remove(store.adapter(gone))


def job_on(database: Database, training_file: str, sha256: str) -> str:
    spec = JobSpec(
        base="tiny", base_revision="r", training_file=training_file, training_sha256=sha256, keep_checkpoints=2
    )
    return Jobs(database).create("default", spec).id


def check(settings: GatewaySettings) -> tuple[int, int]:
    """Every row has what it vouches for, and nothing else is there. Returns (files, adapters)."""
    store, database = LocalArtifactStore(settings.artifacts_root), Database(settings.sql_url)
    with database.read() as tx:
        rows = dict(tx.execute(select(files.c.id, files.c.sha256)).all())
        published = set(tx.scalars(select(adapters.c.id).where(adapters.c.state == AdapterState.PUBLISHED)))
        assert store.installation() == own_id(tx)
    database.close()
    assert {file_id: sha256_of(store.file_data(file_id)) for file_id in rows} == rows
    for adapter in published:
        store.verify(store.adapter(adapter), "adapter")
    for kind, names in (("files", set(rows)), ("adapters", published)):
        folder = store.root / kind
        assert {path.name for path in folder.iterdir()} == names if folder.exists() else not names
    return len(rows), len(published)


def test_a_backup_under_load_restores_into_a_working_installation(place: Place) -> None:
    settings = place.migrated("origin")
    stop = threading.Event()
    failures: list[BaseException] = []
    uploaded: list[str] = []
    published: list[int] = []

    with running_gateway(settings) as gateway:
        store, leases = gateway.services.artifacts, Leases(gateway.services.database)
        kept = gateway.uploaded(ROWS)
        with gateway.services.database.read() as tx:
            sha256 = gateway.services.files.get(tx, "default", kept).sha256
        job_id = job_on(gateway.services.database, kept, sha256)
        claimed = leases.claim("w")
        assert claimed is not None

        def upload_and_delete() -> None:
            mine: list[str] = []
            while not stop.is_set():
                uploaded.append(gateway.uploaded([{"prompt": f"{len(uploaded)}", "completion": "x" * 2000}]))
                mine.append(uploaded[-1])
                if len(mine) > 3:
                    assert gateway.http.delete(f"/v1/files/{mine.pop(0)}").status_code == 200

        def train() -> None:
            while not stop.is_set():
                publish(store, leases, claimed, len(published) + 1)
                published.append(len(published) + 1)

        def guarded(work: Callable[[], None]) -> Callable[[], None]:
            def run() -> None:
                try:
                    work()
                except BaseException as error:
                    failures.append(error)

            return run

        threads = [threading.Thread(target=guarded(work)) for work in (upload_and_delete, train)]
        for thread in threads:
            thread.start()
        eventually(lambda: bool(failures or (uploaded and len(published) >= 2)))
        taken = []
        for number in range(4):
            taken.append(place.root / f"backup-{number}.tar")
            description = take_backup(settings, taken[-1], keys=True)
            assert description.missing == ()
            time.sleep(0.2)
        stop.set()
        for thread in threads:
            thread.join()
        assert failures == []
        origin = description.installation

    counts = set()
    for number, path in enumerate(taken):
        assert path.stat().st_mode & 0o777 == 0o600
        restored = place.settings(f"restored-{number}")
        restore_backup(restored, path, replace=False)
        counts.add(check(restored))
    assert all(files > 1 and adapters >= 2 for files, adapters in counts)

    with running_gateway(restored) as again:
        # The same key, the same bytes; the job is paused, and goes on once it is told to.
        assert again.key == gateway.key
        assert again.http.get(f"/v1/files/{kept}/content").status_code == 200
        assert again.services.artifacts.installation() != origin
        job = again.jobs.get("default", job_id)
        assert job.state is State.PAUSED
        checkpoints = again.jobs.checkpoints("default", job_id).items
        states = [again.services.artifacts.checkpoint(job_id, c.lease_token, c.step) for c in checkpoints]
        assert len(states) >= 2
        for state in states:
            again.services.artifacts.verify(state, "checkpoint")
        assert again.http.post(f"/v1/fine_tuning/jobs/{job_id}/resume").status_code == 200
        assert again.leases.claim("v") is not None


@pytest.fixture
def origin(place: Place) -> Iterator[Gateway]:
    with running_gateway(place.migrated("origin")) as gateway:
        yield gateway


def test_in_the_place_of_the_old_one_jobs_go_on(place: Place, origin: Gateway) -> None:
    training = origin.uploaded(ROWS)
    names = ("running", "queued", "cancelling", "paused")
    ids = dict(zip(names, (job_on(origin.services.database, training, "0" * 64) for _ in names), strict=True))
    running = origin.leases.claim("w")
    assert running is not None
    assert running.job.id == ids["running"]
    origin.jobs.pause("default", ids["paused"])
    origin.jobs.pause("default", ids["queued"])
    cancelling = origin.leases.claim("w")
    assert cancelling is not None
    assert cancelling.job.id == ids["cancelling"]
    origin.jobs.cancel("default", ids["cancelling"])
    origin.jobs.resume("default", ids["queued"])
    backup = place.root / "b.tar"
    description = take_backup(origin.settings, backup, keys=True)

    def states(settings: GatewaySettings) -> tuple[str, dict[str, str]]:
        database = Database(settings.sql_url)
        with database.read() as tx:
            found = dict(tx.execute(select(jobs.c.id, jobs.c.state)).all())
            own = own_id(tx)
        database.close()
        return own, {name: found[job_id] for name, job_id in ids.items()}

    same, copy = place.settings("same"), place.settings("copy")
    restore_backup(same, backup, replace=True)
    restore_backup(copy, backup, replace=False)
    assert states(same) == (
        description.installation,
        {"running": "running", "queued": "queued", "cancelling": "cancelling", "paused": "paused"},
    )
    own, found = states(copy)
    assert own != description.installation
    assert found == {"running": "paused", "queued": "paused", "cancelling": "cancelled", "paused": "paused"}
    with running_gateway(copy) as gateway:
        told = [event.message for event in gateway.jobs.events("default", ids["running"], after=0, limit=50).items]
        assert told[-1].startswith("Restored from a backup: paused")
        # Its lease is worth nothing in the copy.
        (number,) = {gateway.jobs.get("default", ids["running"]).lease_token}
        assert number == running.token + 1


def test_without_keys_none_is_in_the_file(place: Place, origin: Gateway) -> None:
    origin.uploaded(ROWS)
    with_keys, without = place.root / "with.tar", place.root / "without.tar"
    take_backup(origin.settings, with_keys, keys=True)
    take_backup(origin.settings, without, keys=False)
    secret = origin.settings.key_secret_path.read_bytes().strip()
    with tarfile.open(with_keys) as one, tarfile.open(without) as other:
        assert set(one.getnames()) - set(other.getnames()) == {"api_key", "key_secret"}
    assert secret in with_keys.read_bytes()
    assert not any(text in without.read_bytes() for text in (secret, origin.key.encode(), b"key-first"))
    restored = place.settings("restored")
    restore_backup(restored, without, replace=False)
    assert check(restored) == (1, 0)
    with running_gateway(restored) as gateway:
        assert gateway.key != origin.key
        assert gateway.http.get("/v1/files").status_code == 200


def test_what_is_in_the_way_is_never_overwritten(place: Place, origin: Gateway) -> None:
    backup = place.root / "b.tar"
    take_backup(origin.settings, backup, keys=True)
    with pytest.raises(TunesmithError, match="exists already"):
        take_backup(origin.settings, backup, keys=True)
    for changes in ({}, {"artifacts": place.root / "elsewhere"}):
        with pytest.raises(TunesmithError, match="already") as refused:
            restore_backup(origin.settings.model_copy(update=changes), backup, replace=True)
        assert refused.value.code == "restore"
    own_key = place.settings("own-key")
    own_key.home.mkdir()
    own_key.key_path.write_text("ts-another-key-of-twenty-characters\n")
    with pytest.raises(TunesmithError, match="differs from the backup's"):
        restore_backup(own_key, backup, replace=False)
    # Nothing counts yet, and nothing starts on it: once it is out of the way, the restore can be repeated.
    assert LocalArtifactStore(own_key.artifacts_root).installation() == NOT_FINISHED
    own_key.key_path.unlink()
    restore_backup(own_key, backup, replace=False)
    check(own_key)


def test_another_secret_of_the_environment_is_refused(place: Place, origin: Gateway) -> None:
    backup = place.root / "b.tar"
    take_backup(origin.settings, backup, keys=True)
    with pytest.raises(TunesmithError, match="TUNESMITH_KEY_SECRET differs"):
        restore_backup(place.settings("other", key_secret="x" * 40), backup, replace=False)
    own = origin.settings.key_secret_path.read_text().strip()
    restore_backup(place.settings("same", key_secret=own), backup, replace=False)


def test_a_backup_that_is_not_whole_is_refused_and_leaves_nothing(place: Place, origin: Gateway) -> None:
    origin.uploaded(ROWS)
    backup = place.root / "b.tar"
    take_backup(origin.settings, backup, keys=True)
    good = backup.read_bytes()
    data = good.index(b'"instruction"') if b'"instruction"' in good else good.index(b'{"')
    cases = {
        "damaged": good[: data + 5] + bytes([good[data + 5] ^ 1]) + good[data + 6 :],
        "cut": good[: len(good) // 2],
        "empty": b"",
        "no tar": b"x" * 10_000,
    }
    for name, content in cases.items():
        backup.write_bytes(content)
        settings = place.settings(f"of {name}")
        with pytest.raises(TunesmithError, match="no whole backup"):
            restore_backup(settings, backup, replace=False)
        left = [path for path in settings.home.rglob("*") if path.is_file() and path.name != "removals.lock"]
        assert left == [], name
    backup.write_bytes(good)
    restore_backup(place.settings("good"), backup, replace=False)


def test_a_newer_versions_backup_is_refused(place: Place, origin: Gateway, tmp_path: Path) -> None:
    backup, newer = tmp_path / "b.tar", tmp_path / "newer.tar"
    take_backup(origin.settings, backup, keys=True)
    folder = tmp_path / "unpacked"
    subprocess.run(["tar", "-xf", backup, f"--one-top-level={folder}"], check=True)
    description = folder / "backup.json"
    description.write_text(re.sub('("schema_revision": *)"[0-9]{4}"', r'\1"9999"', description.read_text()))
    sums = folder / "checksums.json"
    old = next(line for line in sums.read_text().splitlines() if '"backup.json"' in line)
    sums.write_text(sums.read_text().replace(old.split('"')[3], sha256_of(description)))
    subprocess.run(["tar", "-cf", newer, "-C", folder, *os.listdir(folder)], check=True)
    with pytest.raises(TunesmithError, match="9999, which this version does not know"):
        restore_backup(place.settings("of newer"), newer, replace=False)


def test_names_that_lead_out_of_the_folder_are_refused(tmp_path: Path, redis_url: str) -> None:
    for number, name in enumerate(("../evil", "/etc/evil", "artifacts/../../evil", "other/evil")):
        path = tmp_path / f"{number}.tar"
        (tmp_path / "evil").write_text("x")
        with tarfile.open(path, "w") as tar:
            tar.add(tmp_path / "evil", name)
        (tmp_path / "evil").unlink()
        settings = GatewaySettings.model_validate({"home": tmp_path / f"home-{number}"})
        with pytest.raises(TunesmithError, match="no whole backup"):
            restore_backup(settings, path, replace=False)
        assert not (tmp_path / "evil").exists()


def test_nothing_is_removed_while_removals_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalArtifactStore(tmp_path / "artifacts")
    folder, other = store.file(new_id("file")), store.file(new_id("file"))
    for each in (folder, other):
        each.mkdir(parents=True)
    removing = threading.Thread(target=store.remove, args=(folder,))
    with LocalArtifactStore(store.root).removals_held():
        removing.start()
        removing.join(0.3)
        assert removing.is_alive()
        assert folder.exists()
        # Nobody waits for ever for a backup that hangs.
        monkeypatch.setattr(artifacts_module, "HOLD_SECONDS", 0.1)
        store.remove(other)
        assert other.exists()
        with pytest.raises(OSError, match="a backup holds it"):
            store.discard(other)
    removing.join()
    assert not folder.exists()


def test_from_the_command_line(tmp_path: Path) -> None:
    settings = GatewaySettings.model_validate({"home": tmp_path / "a"})
    migrate(settings.sql_url)
    run = [sys.executable, "-m", "tunesmith.cli"]

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = clean_environment() | {"PYTHONPATH": str(ROOT)}
        return subprocess.run([*run, *arguments], capture_output=True, text=True, cwd=tmp_path, env=environment)

    taken = command("backup", "b.tar", "--home", "a")
    assert (taken.returncode, "with keys" in taken.stdout) == (0, True), taken.stderr
    assert (tmp_path / "b.tar").stat().st_mode & 0o777 == 0o600
    assert "exists already" in command("backup", "b.tar", "--home", "a").stderr
    restored = command("restore", "b.tar", "--home", "b")
    assert (restored.returncode, "jobs are paused" in restored.stdout) == (0, True), restored.stderr
    assert (tmp_path / "b" / "tunesmith.db").stat().st_mode & 0o777 == 0o600
    assert command("restore", "b.tar", "--home", "b").returncode == 1
