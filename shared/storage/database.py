"""Connections to the one source of truth: SQLite on one machine, PostgreSQL by URL. Knows no table.

No call waits for ever: connecting, waiting for a lock, a statement and an open transaction have limits, and so have the
waits for a free connection and for a server that says nothing. What fails by one of them is an outage
(`shared.storage.outages`).

SQLite's rules are here: WAL, full synchronisation, foreign keys, and writers that always open with BEGIN IMMEDIATE.
A deferred transaction that reads before it writes fails or loses updates under several processes (measured: four
writers, 600 read-then-update commits: SQLAlchemy's default left the counter at 150, BEGIN IMMEDIATE at 600).
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import SQLAlchemyError

from shared.errors import TunesmithError, Unavailable
from shared.storage.answer_limit import limited_connection

BUSY_TIMEOUT_MS = 5000
# How long a call waits for one of this process's connections.
POOL_TIMEOUT_SECONDS = 10
CONNECT_TIMEOUT_SECONDS = 5
# libpq's: a peer that acknowledges nothing for so long is gone, though no packet said so.
_SOCKET_LIMITS = {
    "connect_timeout": CONNECT_TIMEOUT_SECONDS,
    "tcp_user_timeout": 10_000,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 2,
}
# The server's, in milliseconds, set as each connection is made.
_SESSION_LIMITS = {
    "lock_timeout": 5_000,
    "statement_timeout": 30_000,
    "idle_in_transaction_session_timeout": 15_000,
}
# Longer than any of these: a server that works on it says which one it was.
ANSWER_SECONDS = 35.0


class Database:
    """A writer and a reader on one database.

    Args:
        url: SQLAlchemy URL, `sqlite:///…` or `postgresql://…` (psycopg 3 is used for the latter).
        answer_seconds: how long PostgreSQL may say nothing.
    """

    def __init__(self, url: str, *, answer_seconds: float = ANSWER_SECONDS) -> None:
        self.url = normalised(url)
        self.is_sqlite = self.url.startswith("sqlite")
        if self.is_sqlite:
            self._writer = _sqlite_engine(self.url, begin="BEGIN IMMEDIATE", query_only=False)
            self._reader = _sqlite_engine(self.url, begin="BEGIN", query_only=True)
        else:
            self._writer = _postgresql_engine(self.url, answer_seconds)
            self._reader = self._writer.execution_options(postgresql_readonly=True)

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """One read-write transaction, committed at the end, rolled back on any exception."""
        with self._writer.begin() as connection:
            yield connection

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """One read-only transaction: a consistent picture that never waits for a writer."""
        with self._reader.begin() as connection:
            yield connection

    def close(self) -> None:
        self._writer.dispose()
        self._reader.dispose()


def normalised(url: str) -> str:
    """The URL with psycopg 3 as PostgreSQL's driver; `postgres://` as hosts write it is accepted."""
    parsed = make_url(url.replace("postgres://", "postgresql://", 1))
    if parsed.drivername == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")
    return parsed.render_as_string(hide_password=False)


def connect_arguments(url: str) -> dict[str, Any]:
    """What to connect with to a URL as `normalised` gives it, so that connecting ends; the URL's own settings win."""
    target = make_url(url)
    if target.drivername.startswith("sqlite"):
        return {}
    return {name: value for name, value in _SOCKET_LIMITS.items() if name not in target.query}


def migrate(url: str, revision: str = "head") -> None:
    """Bring the schema of the database at `url` up to a revision, the newest if none is named; harmless if it is there.

    Raises:
        CommandError: a revision that this version does not know, such as a later version's.
    """
    target = normalised(url)
    if target.startswith("sqlite") and (path := make_url(target).database):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    config = _alembic()
    config.attributes["url"] = target
    command.upgrade(config, revision)


def check_schema(url: str) -> None:
    """Make sure that the database at `url` answers and has the schema this code was written for.

    Raises:
        Unavailable: the database does not answer.
        TunesmithError: the schema is missing or of another revision; the message says what to run.
    """
    target = normalised(url)
    path = make_url(target).database if target.startswith("sqlite") else None
    found = None
    # Connecting to a missing SQLite file would create it.
    if path is None or Path(path).exists():
        engine = create_engine(target, connect_args=connect_arguments(target))
        try:
            with engine.connect() as connection:
                found = schema_revision(connection)
        except SQLAlchemyError as error:
            raise Unavailable(f"the database does not answer: {error}") from error
        finally:
            engine.dispose()
    _require(found)


def check_revision(tx: Connection) -> None:
    """Make sure, in a transaction that goes on from here, that nobody has migrated the database since the start.

    Raises:
        TunesmithError: the schema is of another revision.
    """
    _require(schema_revision(tx))


def require_known(revision: str) -> None:
    """Make sure that this version can migrate a schema of a revision.

    Raises:
        TunesmithError: a newer version made it.
    """
    if revision not in _revisions()[1]:
        raise TunesmithError(
            f"the schema is {revision}, which this version does not know: use the newer one", code="schema"
        )


def _require(found: str | None) -> None:
    needed, known = _revisions()
    if found == needed:
        return
    advice = "run `python -m shared.migrations`"
    if found is not None and found not in known:
        advice = "it was migrated by a newer version: start that one"
    raise TunesmithError(
        f"the database's schema is {found or 'missing'}, this version needs {needed}: {advice}", code="schema"
    )


@cache
def _revisions() -> tuple[str | None, frozenset[str]]:
    """The newest revision that this version knows, and all of them."""
    scripts = ScriptDirectory.from_config(_alembic())
    return scripts.get_current_head(), frozenset(script.revision for script in scripts.walk_revisions())


def schema_revision(connection: Connection) -> str | None:
    """The revision of a database's schema; None if it has none."""
    return MigrationContext.configure(connection).get_current_revision()


def _alembic() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent.with_name("migrations")))
    return config


def _json(value: Any) -> str:
    # SQLite compares the keys of a path with the text as it was stored: escapes would hide every key beyond ASCII.
    return json.dumps(value, ensure_ascii=False)


def _postgresql_engine(url: str, answer_seconds: float) -> Engine:
    engine = create_engine(
        url,
        pool_pre_ping=True,
        pool_timeout=POOL_TIMEOUT_SECONDS,
        json_serializer=_json,
        connect_args=connect_arguments(url),
    )

    connection_class = limited_connection(answer_seconds)

    @event.listens_for(engine, "do_connect")
    def do_connect(dialect: Any, record: Any, arguments: Any, options: Any) -> Any:
        return connection_class.connect(*arguments, **options)

    @event.listens_for(engine, "connect")
    def on_connect(connection: Any, _: Any) -> None:
        # Not by libpq's `options`: poolers between here and the server refuse those.
        connection.autocommit = True
        for name, milliseconds in _SESSION_LIMITS.items():
            connection.execute(f"SET {name} = {milliseconds}")
        connection.autocommit = False

    return engine


def _sqlite_engine(url: str, *, begin: str, query_only: bool) -> Engine:
    engine = create_engine(url, connect_args={"timeout": BUSY_TIMEOUT_MS / 1000}, json_serializer=_json)

    @event.listens_for(engine, "connect")
    def on_connect(connection: Any, _: Any) -> None:
        # The driver must not open transactions of its own: `on_begin` says which kind.
        connection.isolation_level = None
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
        if query_only:
            cursor.execute("PRAGMA query_only=ON")
        cursor.close()

    @event.listens_for(engine, "begin")
    def on_begin(connection: Connection) -> None:
        connection.exec_driver_sql(begin)

    return engine
