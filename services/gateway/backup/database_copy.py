"""A database as one file, and back: SQLite's own backup, or PostgreSQL's `pg_dump` and `pg_restore`."""

import os
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from sqlalchemy import Connection, create_engine, inspect, make_url, text

from shared.errors import TunesmithError
from shared.storage.artifacts import fsync
from shared.storage.database import Database, connect_arguments, normalised

# Keys, and what was answered under them: not in a backup without keys.
OF_KEYS = ("api_keys", "key_check", "idempotency_keys")


@contextmanager
def copied(url: str, target: Path, *, keys: bool) -> Iterator[Connection]:
    """Copy the database at `url` to a file, and give a transaction that sees exactly what was copied.

    Raises:
        TunesmithError: `pg_dump` is missing or fails.
        SQLAlchemyError: the database does not answer.
    """
    url = normalised(url)
    if url.startswith("sqlite"):
        _copy_sqlite(_sqlite_path(url), target, keys=keys)
        copy = Database(f"sqlite:///{target}")
        try:
            with copy.read() as tx:
                yield tx
        finally:
            copy.close()
            _one_file(target)
        return
    engine = create_engine(url, isolation_level="REPEATABLE READ", connect_args=connect_arguments(url))
    try:
        with engine.begin() as tx:
            snapshot = tx.execute(text("SELECT pg_export_snapshot()")).scalar_one()
            without = () if keys else tuple(f"--exclude-table-data={table}" for table in OF_KEYS)
            _postgresql("pg_dump", url, "--format=custom", f"--snapshot={snapshot}", f"--file={target}", *without)
            yield tx
    finally:
        engine.dispose()


def require_empty(url: str) -> None:
    """Make sure that a copy can be loaded into the database at `url`.

    Raises:
        TunesmithError: there are tables in it.
        SQLAlchemyError: it does not answer.
    """
    url = normalised(url)
    if url.startswith("sqlite"):
        if _sqlite_path(url).exists():
            raise TunesmithError(f"{_sqlite_path(url)} exists already: restore into an empty home", code="restore")
        return
    engine = create_engine(url, connect_args=connect_arguments(url))
    try:
        if inspect(engine).get_table_names():
            raise TunesmithError("the database has tables already: restore into an empty one", code="restore")
    finally:
        engine.dispose()


def load(copy: Path, url: str) -> None:
    """Make the empty database at `url` what was copied, whole or not at all.

    Raises:
        TunesmithError: `pg_restore` is missing or fails.
        OSError: the file cannot be written.
    """
    url = normalised(url)
    if url.startswith("sqlite"):
        target = _sqlite_path(url)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.part")
        shutil.copyfile(copy, part)
        fsync(part)
        os.rename(part, target)
        fsync(target.parent)
        return
    _postgresql("pg_restore", url, "--single-transaction", "--exit-on-error", str(copy))


def _copy_sqlite(source: Path, target: Path, *, keys: bool) -> None:
    with (
        closing(sqlite3.connect(f"{source.as_uri()}?mode=ro", uri=True)) as original,
        closing(sqlite3.connect(target, isolation_level=None)) as copy,
    ):
        original.backup(copy)
        if not keys:
            for table in OF_KEYS:
                copy.execute(f"DELETE FROM {table}")  # noqa: S608
            # The bytes of deleted rows, too.
            copy.execute("VACUUM")


def _one_file(copy: Path) -> None:
    with closing(sqlite3.connect(copy, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode=DELETE")


def _sqlite_path(url: str) -> Path:
    return Path(make_url(url).database or "").absolute()


def _postgresql(program: str, url: str, *arguments: str) -> None:
    """Run one of PostgreSQL's own programs on the database at `url`. Its password is on no command line."""
    parsed = make_url(url)
    target = parsed.set(drivername="postgresql", password=None).render_as_string()
    command = [program, "--no-owner", "--no-privileges", f"--dbname={target}", *arguments]
    password = {"PGPASSWORD": str(parsed.password)} if parsed.password else {}
    try:
        done = subprocess.run(command, env={**os.environ, **password}, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise TunesmithError(
            f"{program} is not installed: install PostgreSQL's client programs, of the server's version or a later one",
            code="backup",
        ) from error
    if done.returncode != 0:
        raise TunesmithError(f"{program} failed: {done.stderr.strip()[-1000:]}", code="backup")
