"""Alembic's entry: migrate the database named by `shared.storage.database.migrate`, one process at a time."""

from alembic import context
from sqlalchemy import create_engine, text

from shared.storage.database import connect_arguments
from shared.storage.tables import metadata

# Two services starting at once must not both create the tables; the number is arbitrary.
ADVISORY_LOCK = 7_461_093

url: str = context.config.attributes["url"]
# A migration may take long: of a connection's limits only those of the socket hold.
engine = create_engine(url, connect_args=connect_arguments(url))
with engine.connect() as connection:
    if connection.dialect.name == "sqlite":
        connection.connection.dbapi_connection.isolation_level = None  # type: ignore[union-attr]
        connection.exec_driver_sql("PRAGMA busy_timeout=30000")
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    context.configure(connection=connection, target_metadata=metadata, render_as_batch=True)
    with context.begin_transaction():
        if connection.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": ADVISORY_LOCK})
        context.run_migrations()
    connection.commit()
engine.dispose()
