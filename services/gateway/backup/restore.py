"""Make a new installation of a backup, or put one in the place of what was backed up.

The order (all is unpacked and checked, then folders, then keys, then the database) is what lets a restore that broke
off be repeated. Until all is done the folder is marked as nobody's: no gateway or worker starts on half of it.
"""

import os
import secrets
import shutil
import time
from pathlib import Path

from sqlalchemy import Connection, select, update

from services.gateway.backup.contents import ARTIFACTS, CATALOGUE, DATABASE, FIRST_KEY, KEY_SECRET, Description, unpack
from services.gateway.backup.database_copy import load, require_empty
from services.gateway.settings import GatewaySettings
from shared.clock import seconds_of
from shared.errors import TunesmithError
from shared.jobs.rows import NewEvent, change_job
from shared.jobs.spec import UNFINISHED, State
from shared.storage.artifacts import LocalArtifactStore, fsync
from shared.storage.database import Database, migrate, require_known
from shared.storage.installation_id import adopt
from shared.storage.tables import installation, jobs

NOT_FINISHED = "restore-not-finished"


def restore_backup(settings: GatewaySettings, path: Path, *, replace: bool) -> Description:
    """Restore into an empty database and an artifacts folder that belongs to nobody.

    Args:
        replace: this takes the place of the installation that was backed up: it keeps its id, and its jobs go on. Else
            it is another one, and unfinished jobs are paused: they may still run where they came from.

    Returns:
        What the backup says of itself.

    Raises:
        TunesmithError: it is no whole backup, is of a newer version, or something is in the way.
        OSError: something cannot be read or written.
        SQLAlchemyError: the database does not answer.
    """
    store = LocalArtifactStore(settings.artifacts_root, settings.reserve_bytes)
    if store.installation() not in (None, NOT_FINISHED):
        raise TunesmithError(f"{store.root} belongs to an installation already: restore into another", code="restore")
    require_empty(settings.sql_url)
    with store.staged() as staged:
        description = unpack(path, staged)
        require_known(description.schema_revision)
        _check_kind(description, settings)
        store.mark_installation(NOT_FINISHED)
        _place_folders(store, staged / ARTIFACTS)
        _place_keys(settings, staged)
        load(staged / DATABASE, settings.sql_url)
    migrate(settings.sql_url)
    database = Database(settings.sql_url)
    try:
        with database.write() as tx:
            if not replace:
                tx.execute(update(installation).values(id=secrets.token_hex(16)))
                _pause_jobs(tx, time.time_ns())
            adopt(tx, store)
    finally:
        database.close()
    return description


def _check_kind(description: Description, settings: GatewaySettings) -> None:
    kind = "sqlite" if settings.sql_url.startswith("sqlite") else "postgresql"
    if description.database != kind:
        raise TunesmithError(
            f"the backup is of a {description.database} database, TUNESMITH_DATABASE_URL names a {kind} one",
            code="restore",
        )


def _place_folders(store: LocalArtifactStore, unpacked: Path) -> None:
    """Check what can be checked, and put every folder where it belongs; one that is there was put by an earlier try."""
    found = [*unpacked.glob("files/*"), *unpacked.glob("adapters/*"), *unpacked.glob("jobs/*/*/step-*")]
    for folder in found:
        if folder.parent.name == "adapters":
            store.verify(folder, "adapter")
    for folder in found:
        target = store.root / folder.relative_to(unpacked)
        if not target.exists():
            store.place(folder, target)


def _place_keys(settings: GatewaySettings, staged: Path) -> None:
    given = settings.key_secret.get_secret_value()
    if given and (staged / KEY_SECRET).exists() and (staged / KEY_SECRET).read_text().strip() != given:
        raise TunesmithError(
            "TUNESMITH_KEY_SECRET differs from the backup's: its API keys would be invalid", code="restore"
        )
    places = {KEY_SECRET: settings.key_secret_path, FIRST_KEY: settings.key_path, CATALOGUE: settings.home / CATALOGUE}
    for name, target in places.items():
        if not (staged / name).exists():
            continue
        if target.exists() and target.read_bytes() != (staged / name).read_bytes():
            raise TunesmithError(f"{target} exists already, and differs from the backup's", code="restore")
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.part")
        shutil.copyfile(staged / name, part)
        part.chmod(0o600)
        fsync(part)
        os.rename(part, target)


def _pause_jobs(tx: Connection, now: int) -> None:
    for job_id, state in tx.execute(select(jobs.c.id, jobs.c.state).where(jobs.c.state.in_(UNFINISHED))).all():
        target = State.CANCELLED if state == State.CANCELLING else State.PAUSED
        if state == target:
            continue
        # The token rises: a lease of before the backup is worth nothing here.
        values = {"state": target, "lease_token": jobs.c.lease_token + 1}
        values |= {"finished_at": seconds_of(now)} if target.final else {}
        told = NewEvent(f"Restored from a backup: {target.value}, since it may have gone on where the backup was taken")
        change_job(tx, job_id, [jobs.c.state == state], values, [told], now)
