"""What is kept of responses is bounded in time and in size, on both databases."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from services.gateway.responses.store import ResponseStore
from shared.errors import NotFound
from shared.storage.database import Database, migrate
from tests.fresh_database import fresh_on_server


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.servers)])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path / 'tunesmith.db'}"
    else:
        url = fresh_on_server(request.getfixturevalue("postgres_url"))
    migrate(url)
    database = Database(url)
    yield database
    database.close()


def kept(store: ResponseStore, database: Database, ids: list[str]) -> list[str]:
    found = []
    for response in ids:
        with database.read() as tx:
            try:
                store.find(tx, "default", response, "id")
            except NotFound:
                continue
        found.append(response)
    return found


def test_the_oldest_go_once_all_are_too_large_together_or_their_time_is_over(database: Database) -> None:
    now = 1_000.0
    store = ResponseStore(100, lambda: now, bytes_together=3_000)
    ids = [f"resp_{number}" for number in range(5)]
    for response in ids:
        now += 1
        with database.write() as tx:
            store.keep(tx, "default", response, {response: {"text": "a" * 700}})
    with database.write() as tx:
        assert store.forget(tx) == 2
    assert kept(store, database, ids) == ids[2:]
    now += 99
    with database.write() as tx:
        assert store.forget(tx) == 1
    assert kept(store, database, ids) == ids[3:]
    now += 99
    with database.write() as tx:
        assert store.forget(tx) == 2
