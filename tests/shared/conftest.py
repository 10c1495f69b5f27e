"""One store, both databases: every test that asks for `database` runs on SQLite and on a real PostgreSQL."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.jobs.heartbeats import Heartbeats
from shared.jobs.leases import Leases
from shared.jobs.spec import JobSpec
from shared.storage.database import Database, migrate
from tests.fresh_database import fresh_on_server
from tests.jobs import Jobs

ON_POSTGRESQL = pytest.param("postgresql", marks=pytest.mark.servers)


@pytest.fixture(params=["sqlite", ON_POSTGRESQL])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a database of its own without a table."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'tunesmith.db'}"
    return fresh_on_server(request.getfixturevalue("postgres_url"))


@pytest.fixture
def database_url(empty_url: str) -> str:
    """The URL of an empty, migrated database of its own."""
    migrate(empty_url)
    return empty_url


@pytest.fixture
def empty_database(empty_url: str) -> Iterator[Database]:
    database = Database(empty_url)
    yield database
    database.close()


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    database = Database(database_url)
    yield database
    database.close()


@pytest.fixture
def store(database: Database) -> Jobs:
    return Jobs(database)


@pytest.fixture
def leases(database: Database) -> Leases:
    return Leases(database)


@pytest.fixture
def heartbeats(database: Database) -> Heartbeats:
    return Heartbeats(database)


@pytest.fixture
def spec() -> JobSpec:
    return JobSpec(base="tiny", base_revision="r1", training_file="file-1", training_sha256="0" * 64)
