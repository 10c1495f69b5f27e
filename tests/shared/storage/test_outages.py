"""Outages as real databases tell them: each is recognised, and none of a caller's own mistakes is taken for one."""

import os
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import psycopg
import pytest
from sqlalchemy import insert, select, text, update
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from shared.storage import database as database_module
from shared.storage.database import Database, migrate
from shared.storage.outages import is_away, is_full
from shared.storage.tables import api_keys
from tests.fresh_database import fresh_on_server
from tests.stack_processes import wait_until

ROW = {"id": "k", "project": "p", "digest": "d", "created_at": 1}


def failure_of(call: Callable[[], object]) -> SQLAlchemyError:
    with pytest.raises(SQLAlchemyError) as caught:
        call()
    return caught.value


def write(database: Database, id: str = "k") -> None:
    with database.write() as tx:
        tx.execute(insert(api_keys).values(ROW | {"id": id, "digest": id}))


def run(database: Database, statement: str) -> None:
    with database.write() as tx:
        tx.execute(text(statement))


@pytest.mark.parametrize(
    "statement", ["SELECT * FROM no_such_table", "SELEKT 1", "INSERT INTO api_keys (id) VALUES ('k')"]
)
def test_what_the_database_objects_to_is_no_outage(database: Database, statement: str) -> None:
    assert not is_away(failure_of(lambda: run(database, statement)))


def test_a_duplicate_is_no_outage(database: Database) -> None:
    write(database)
    assert not is_away(failure_of(lambda: write(database)))
    assert not is_away(ValueError("no database at all"))


@pytest.fixture
def sqlite_file(tmp_path: Path) -> Path:
    migrate(f"sqlite:///{tmp_path / 'tunesmith.db'}")
    return tmp_path / "tunesmith.db"


@pytest.fixture
def on_sqlite(sqlite_file: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Database]:
    monkeypatch.setattr(database_module, "BUSY_TIMEOUT_MS", 50)
    database = Database(f"sqlite:///{sqlite_file}")
    yield database
    database.close()


def test_sqlite_held_by_another_writer(on_sqlite: Database, sqlite_file: Path) -> None:
    with closing(sqlite3.connect(sqlite_file, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert is_away(failure_of(lambda: write(on_sqlite)))
    write(on_sqlite)


def test_sqlite_that_may_not_be_written(on_sqlite: Database) -> None:
    with on_sqlite.write() as tx:
        tx.execute(text("PRAGMA query_only=ON"))
    assert is_away(failure_of(lambda: write(on_sqlite)))


def test_sqlite_that_is_full(on_sqlite: Database) -> None:
    with on_sqlite.write() as tx:
        tx.execute(text("PRAGMA max_page_count=1"))
        pages = tx.execute(text("PRAGMA page_count")).scalar_one()
        tx.execute(text(f"PRAGMA max_page_count={pages}"))

    def fill() -> None:
        for number in range(10_000):
            write(on_sqlite, f"{number:>1000}")

    assert is_away(failure_of(fill))


def test_a_sqlite_file_that_cannot_be_opened(tmp_path: Path) -> None:
    with closing(Database(f"sqlite:///{tmp_path}/none/tunesmith.db")) as database:
        assert is_away(failure_of(lambda: write(database)))


@pytest.fixture
def server_url(postgres_url: str) -> str:
    """A migrated database of its own on PostgreSQL."""
    url = fresh_on_server(postgres_url)
    migrate(url)
    return url


@pytest.fixture
def on_server(server_url: str) -> Iterator[Database]:
    database = Database(server_url)
    yield database
    database.close()


def test_a_server_that_refuses() -> None:
    with closing(Database("postgresql://nobody@127.0.0.1:1/none")) as database:
        assert is_away(failure_of(lambda: write(database)))


def test_a_server_that_takes_no_writes_any_more(on_server: Database, server_url: str) -> None:
    with psycopg.connect(server_url, autocommit=True) as admin:
        admin.execute(f"ALTER DATABASE {admin.info.dbname} SET default_transaction_read_only = on".encode())
    on_server.close()
    assert is_away(failure_of(lambda: write(on_server)))


def test_a_server_that_ends_its_sessions(on_server: Database, server_url: str) -> None:
    with psycopg.connect(server_url, autocommit=True) as admin:

        def cut() -> None:
            with on_server.write() as tx:
                pid = tx.execute(text("SELECT pg_backend_pid()")).scalar_one()
                admin.execute("SELECT pg_terminate_backend(%s)", [pid])
                while admin.execute("SELECT 1 FROM pg_stat_activity WHERE pid = %s", [pid]).fetchone():
                    time.sleep(0.01)
                tx.execute(select(api_keys.c.id))

        assert is_away(failure_of(cut))
    write(on_server)


@pytest.fixture
def short_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"lock_timeout": 500, "statement_timeout": 2000, "idle_in_transaction_session_timeout": 1500}
    monkeypatch.setattr(database_module, "_SESSION_LIMITS", limits)
    monkeypatch.setattr(database_module, "POOL_TIMEOUT_SECONDS", 0.2)


@pytest.mark.usefixtures("short_limits")
class TestLimits:
    def test_a_row_held_by_a_client_that_stands_still(self, on_server: Database, server_url: str) -> None:
        """A stopped process between UPDATE and COMMIT holds nobody for longer than the limits."""
        write(on_server)
        with closing(Database(server_url)) as stopped, suppress(DBAPIError), stopped.write() as held:
            held.execute(update(api_keys).values(project="q"))

            def change() -> None:
                with on_server.write() as tx:
                    tx.execute(update(api_keys).values(project="r"))

            assert is_away(failure_of(change))

            def changed() -> bool:
                with suppress(DBAPIError):
                    change()
                    return True
                return False

            # The server ends the transaction that stands still.
            wait_until(changed, "the row to be free")
        with on_server.read() as tx:
            assert tx.execute(select(api_keys.c.project)).scalar() == "r"

    def test_a_statement_that_never_ends(self, on_server: Database) -> None:
        assert is_away(failure_of(lambda: run(on_server, "SELECT pg_sleep(60)")))

    def test_a_pool_that_is_used_up(self, on_server: Database) -> None:
        held = [on_server._writer.connect() for _ in range(15)]
        try:
            assert is_away(failure_of(lambda: write(on_server)))
        finally:
            for connection in held:
                connection.close()

    def test_migrations_may_take_longer(self, server_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            database_module,
            "_SESSION_LIMITS",
            dict.fromkeys(database_module._SESSION_LIMITS, 1),
        )
        migrate(server_url, "0001")


def test_the_limits_are_the_servers(on_server: Database) -> None:
    with on_server.read() as tx:
        shown = {name: tx.execute(text(f"SHOW {name}")).scalar() for name in database_module._SESSION_LIMITS}
    assert shown == {"lock_timeout": "5s", "statement_timeout": "30s", "idle_in_transaction_session_timeout": "15s"}


class BlackHole:
    """TCP to a server's Unix socket, until it goes dark: then every byte is taken and none delivered."""

    def __init__(self, socket_path: str) -> None:
        self.dark = threading.Event()
        self._path = socket_path
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()
        for one in self._open:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.socket(socket.AF_UNIX)
                server.connect(self._path)
                self._open += [client, server]
                for source, target in ((client, server), (server, client)):
                    threading.Thread(target=self._pump, args=(source, target), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65_536):
                if not self.dark.is_set():
                    target.sendall(data)


def test_a_new_connection_into_a_black_hole_ends(server_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(database_module._SOCKET_LIMITS, "connect_timeout", 2)
    parts = urlsplit(server_url)
    folder = parse_qs(parts.query)["host"][0]
    with closing(BlackHole(os.path.join(folder, ".s.PGSQL.5432"))) as hole:
        with closing(Database(f"postgresql://postgres@127.0.0.1:{hole.port}{parts.path}")) as database:
            write(database)
        hole.dark.set()
        with closing(Database(f"postgresql://postgres@127.0.0.1:{hole.port}{parts.path}")) as database:
            assert is_away(failure_of(lambda: write(database, "l")))


def fill(database: Database) -> None:
    with database.write() as tx:
        tx.execute(text("PRAGMA max_page_count = 1"))
        for number in range(1000):
            tx.execute(insert(api_keys).values(ROW | {"id": f"{number}", "digest": f"{number:064}"}))


def test_a_full_disk_is_told_from_a_database_that_is_away(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'small.db'}")
    try:
        migrate(database.url)
        full = failure_of(lambda: fill(database))
        assert is_full(full)
        assert is_away(full)
        assert not is_full(failure_of(lambda: run(database, "SELECT * FROM no_such_table")))
        assert not is_full(OSError(28, "full"))
    finally:
        database.close()
