"""A PostgreSQL that stands still while its machine goes on answering TCP: no call waits for it without end."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import make_url, text
from sqlalchemy.exc import OperationalError

from shared.storage.database import Database
from shared.storage.outages import is_away
from tests.chaos.proxy import WAYS, DarkProxy, Way
from tests.fresh_database import fresh_on_server

pytestmark = pytest.mark.servers


@pytest.fixture
def proxy(postgres_url: str) -> Iterator[DarkProxy]:
    folder = make_url(postgres_url).query["host"]
    proxy = DarkProxy(Path(str(folder)) / ".s.PGSQL.5432")
    yield proxy
    proxy.close()


@pytest.fixture
def database(postgres_url: str, proxy: DarkProxy) -> Iterator[Database]:
    url = make_url(fresh_on_server(postgres_url)).set(host="127.0.0.1", port=proxy.port, query={})
    database = Database(url.render_as_string(hide_password=False), answer_seconds=1.0)
    yield database
    database.close()


def ask(database: Database, statement: str = "SELECT 1") -> object:
    with database.write() as tx:
        return tx.execute(text(statement)).scalar()


def ask_in_the_dark(database: Database, proxy: DarkProxy, ways: tuple[Way, ...]) -> None:
    with database.write() as tx:
        assert tx.execute(text("SELECT 1")).scalar() == 1
        with proxy.dark(*ways):
            tx.execute(text("SELECT 2"))


@pytest.mark.parametrize("ways", [("to server",), ("to client",), WAYS])
def test_a_silent_server_counts_as_away_and_is_used_again_once_it_answers(
    database: Database, proxy: DarkProxy, ways: tuple[Way, ...]
) -> None:
    began = time.monotonic()
    with pytest.raises(OperationalError) as silent:
        ask_in_the_dark(database, proxy, ways)
    # Far below PostgreSQL's 30 s, which it would say itself, and TCP's.
    assert time.monotonic() - began < 15
    assert is_away(silent.value)
    assert "has not answered for 1 s" in str(silent.value)
    assert ask(database) == 1


def test_what_the_server_works_on_may_take_longer_in_pieces(database: Database) -> None:
    for _ in range(3):
        ask(database, "SELECT pg_sleep(0.7)")
    ask(database, "SELECT count(*) FROM generate_series(1, 100000)")
