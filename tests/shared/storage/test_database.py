import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import insert, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError

from shared.storage.database import Database, migrate, normalised
from shared.storage.tables import api_keys, metadata


def test_the_migrations_make_exactly_the_tables_of_the_code(database: Database) -> None:
    with database.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_migrating_twice_changes_nothing(database: Database, database_url: str) -> None:
    with database.write() as connection:
        connection.execute(insert(api_keys).values(id="k", project="p", digest="d", created_at=1))
    migrate(database_url)
    with database.read() as connection:
        assert connection.execute(select(api_keys.c.id)).scalar() == "k"


def test_the_reader_cannot_write(database: Database) -> None:
    with pytest.raises(DBAPIError), database.read() as connection:
        connection.execute(insert(api_keys).values(id="k", project="p", digest="d", created_at=1))


def test_an_exception_rolls_everything_back(database: Database) -> None:
    row = {"id": "k", "project": "p", "digest": "d", "created_at": 1}
    with pytest.raises(IntegrityError), database.write() as connection:
        connection.execute(insert(api_keys), [row, row])
    with database.read() as connection:
        assert connection.execute(select(api_keys.c.id)).all() == []


def test_sqlite_is_durable_and_checks_foreign_keys(database: Database) -> None:
    if not database.is_sqlite:
        pytest.skip("SQLite only")
    with database.write() as connection:
        pragmas = [
            connection.execute(text(f"PRAGMA {name}")).scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys")
        ]
    assert pragmas == ["wal", 2, 1]


@pytest.mark.parametrize("url", ["postgres://u:p@h/d", "postgresql://u:p@h/d", "postgresql+psycopg://u:p@h/d"])
def test_postgresql_urls_mean_psycopg_3(url: str) -> None:
    assert normalised(url) == "postgresql+psycopg://u:p@h/d"
