"""Migrations with rows in place: what an older version has written is still there, under the new names."""

import json
from typing import Any

from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import insert, select, text

from shared.jobs.leases import Leases
from shared.jobs.rows import read_job
from shared.jobs.spec import JobSpec, State
from shared.storage import database as database_module
from shared.storage.database import Database, migrate
from shared.storage.tables import adapters, events, idempotency_keys, metadata

JOB = {
    "project": "default",
    "created_ns": 1_700_000_000_000_000_000,
    "phase": None,
    "training_file": "file-1",
    "warnings": "[]",
    "lease_token": 4,
    "renewals": 9,
    "attempt": 2,
    "checkpoint_step": 5,
    "event_count": 1,
}
KEPT = {"api_key": "key-first", "path": "/v1/files", "fingerprint": "f" * 64, "status": 200, "created_at": 1}


def add(database: Database, table: str, row: dict[str, Any]) -> None:
    names = ", ".join(row)
    values = ", ".join(f":{name}" for name in row)
    with database.write() as tx:
        tx.execute(text(f"INSERT INTO {table} ({names}) VALUES ({values})"), row)


def test_rows_of_revision_2_keep_their_values_under_the_new_names(empty_database: Database, spec: JobSpec) -> None:
    database = empty_database
    migrate(database.url, "0002")
    written = json.dumps(spec.model_dump(mode="json"))
    for name, state, losses in (("ftjob-queued", "queued", 2), ("ftjob-paused", "paused", 1)):
        add(database, "jobs", JOB | {"id": name, "state": state, "losses": losses, "spec": written})
        row = {"id": f"adapter-{state}", "project": "default", "job": name, "lease_token": 1, "base": "tiny"}
        with database.write() as tx:
            tx.execute(insert(adapters).values(row | {"state": "published", "name": name, "created_ns": 1}))
            event = {"job": name, "number": 1, "created_at": 1, "level": "info", "type": "message", "message": "m"}
            tx.execute(insert(events).values(event))
    add(database, "answers", KEPT | {"id": "1", "key": "k", "body": '{"id": "file-ü"}'})
    add(database, "answers", KEPT | {"id": "2", "key": None, "body": "{}"})

    migrate(database.url)

    with database.read() as tx:
        assert compare_metadata(MigrationContext.configure(tx), metadata) == []
        assert [read_job(tx, name).worker_failures for name in ("ftjob-queued", "ftjob-paused")] == [2, 1]
        assert read_job(tx, "ftjob-paused").state is State.PAUSED
        kept = tx.execute(select(idempotency_keys).order_by(idempotency_keys.c.id)).mappings().all()
        assert [dict(row) for row in kept] == [
            KEPT | {"id": "1", "key": "k", "body": '{"id": "file-ü"}'},
            KEPT | {"id": "2", "key": None, "body": "{}"},
        ]
        assert len(tx.execute(select(adapters.c.id)).all()) == len(tx.execute(select(events.c.job)).all()) == 2
    # It goes on as any other job: the next failure is the third.
    leases = Leases(database)
    lease = leases.claim("w")
    assert lease is not None
    assert lease.token == 5
    leases.requeue(lease, "a fault")
    with database.read() as tx:
        assert read_job(tx, "ftjob-queued").state is State.FAILED


def test_the_renaming_can_be_undone(empty_database: Database) -> None:
    database = empty_database
    migrate(database.url)
    with database.write() as tx:
        tx.execute(insert(idempotency_keys).values(KEPT | {"id": "1", "key": "k", "body": "{}"}))
    config = database_module._alembic()
    config.attributes["url"] = database.url
    command.downgrade(config, "0002")
    with database.read() as tx:
        assert tx.execute(text("SELECT body FROM answers")).scalar() == "{}"
        assert tx.execute(text("SELECT losses FROM jobs")).all() == []
    migrate(database.url)
    with database.read() as tx:
        assert tx.execute(select(idempotency_keys.c.body)).scalar() == "{}"
