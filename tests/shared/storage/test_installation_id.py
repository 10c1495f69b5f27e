"""An artifacts folder belongs to one database."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import insert, select

from services.inference.__main__ import check_installation
from shared.errors import TunesmithError
from shared.jobs.spec import JobSpec, TrainingFile
from shared.jobs.store import JobStore
from shared.storage.artifacts import LocalArtifactStore, new_id
from shared.storage.database import Database, migrate
from shared.storage.installation_id import adopt, require_own_folder
from shared.storage.tables import files, installation
from tests.stack_processes import clean_environment


@pytest.fixture
def store(tmp_path: Path) -> LocalArtifactStore:
    return LocalArtifactStore(tmp_path / "artifacts")


def require(database: Database, store: LocalArtifactStore) -> None:
    with database.read() as tx:
        require_own_folder(tx, store)


def own_id(database: Database) -> str:
    with database.read() as tx:
        own: str = tx.execute(select(installation.c.id)).scalar_one()
    return own


def add_file(database: Database, file_id: str) -> None:
    row = {"id": file_id, "project": "p", "created_ns": 1, "filename": "f", "purpose": "fine-tune", "bytes": 1}
    with database.write() as tx:
        tx.execute(insert(files).values(row | {"sha256": "0" * 64, "dataset": {}}))


def test_a_fresh_folder_is_marked_and_stays(database: Database, store: LocalArtifactStore) -> None:
    require(database, store)
    assert store.installation() == own_id(database)
    require(database, store)
    assert [path.name for path in store.root.iterdir()] == ["installation.json"]


def test_a_folder_of_before_the_mark_is_known_by_what_is_in_it(database: Database, store: LocalArtifactStore) -> None:
    known = new_id("file")
    store.file(known).mkdir(parents=True)
    store.file(new_id("file")).mkdir(parents=True)
    with pytest.raises(TunesmithError, match="2 folders that this database knows nothing of") as refused:
        require(database, store)
    assert refused.value.code == "installation"
    assert store.installation() is None
    add_file(database, known)
    require(database, store)
    assert store.installation() == own_id(database)


@pytest.mark.parametrize("several", [False, True])
def test_a_file_that_a_job_was_trained_on_is_known(
    database: Database, store: LocalArtifactStore, several: bool
) -> None:
    known, further = new_id("file"), new_id("file")
    store.file(further if several else known).mkdir(parents=True)
    spec = JobSpec(
        base="tiny",
        base_revision="r",
        training_file=known,
        training_sha256="0" * 64,
        further_training_files=(TrainingFile(id=further, sha256="1" * 64),) if several else (),
    )
    with database.write() as tx:
        JobStore().create(tx, "default", spec)
    require(database, store)
    assert store.installation() == own_id(database)


def test_an_empty_folder_is_no_folder_of_a_database_with_files(database: Database, store: LocalArtifactStore) -> None:
    add_file(database, new_id("file"))
    with pytest.raises(TunesmithError, match="is it mounted"):
        require(database, store)
    assert not store.root.exists()


def test_another_ones_folder_is_refused_until_it_is_adopted(database: Database, store: LocalArtifactStore) -> None:
    store.mark_installation("f" * 32)
    with pytest.raises(TunesmithError, match="belongs to installation ffffffff"):
        require(database, store)
    with database.read() as tx:
        adopt(tx, store)
    require(database, store)


def test_a_damaged_mark_is_told(database: Database, store: LocalArtifactStore) -> None:
    store.root.mkdir(parents=True)
    (store.root / "installation.json").write_text("[]")
    with pytest.raises(TunesmithError, match="is damaged"):
        require(database, store)


def test_inference_compares_with_its_setting(store: LocalArtifactStore) -> None:
    check_installation(store, "")
    with pytest.raises(TunesmithError, match="is the right one mounted"):
        check_installation(store, "a" * 32)
    store.mark_installation("a" * 32)
    check_installation(store, "a" * 32)


@pytest.mark.slow
def test_adopt_as_a_command(tmp_path: Path) -> None:
    environment = clean_environment()
    home, command = tmp_path / "home", [sys.executable, "-m", "tunesmith.cli", "adopt", "--home"]
    refused = subprocess.run([*command, str(home)], capture_output=True, text=True, env=environment, check=False)
    assert refused.returncode == 1
    assert "shared.migrations" in refused.stderr
    migrate(f"sqlite:///{home / 'tunesmith.db'}")
    done = subprocess.run([*command, str(home)], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.startswith(f"{home / 'artifacts'} belongs to installation ")
    assert (home / "artifacts" / "installation.json").is_file()
    assert os.listdir(home / "artifacts") == ["installation.json"]
