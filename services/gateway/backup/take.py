"""Take a backup of a working installation: the database first, then every folder that its rows vouch for.

Nothing is removed while the database is copied and the folders are linked, which takes seconds; then they are written
to the file at leisure, while everything goes on.
"""

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from sqlalchemy import Connection, select

from services.gateway.backup.contents import (
    ARTIFACTS,
    CATALOGUE,
    DATABASE,
    DESCRIPTION,
    FIRST_KEY,
    KEY_SECRET,
    Description,
    pack,
    written_whole,
)
from services.gateway.backup.database_copy import copied
from services.gateway.settings import GatewaySettings
from shared.adapters.state import AdapterState
from shared.jobs.spec import UNFINISHED
from shared.storage.artifacts import LocalArtifactStore
from shared.storage.database import check_schema, schema_revision
from shared.storage.installation_id import own_id, require_own_folder_at
from shared.storage.tables import adapters, checkpoints, files, jobs


def take_backup(settings: GatewaySettings, path: Path, *, keys: bool) -> Description:
    """Write a backup to `path`, which only this user can read.

    Args:
        keys: with the API keys and the secret they are hashed with.

    Returns:
        What it says of itself.

    Raises:
        TunesmithError: the file exists, the folder is another installation's, or the database is not this version's.
        OSError: something cannot be read or written.
        SQLAlchemyError: the database does not answer.
    """
    store = LocalArtifactStore(settings.artifacts_root)
    check_schema(settings.sql_url)
    require_own_folder_at(settings.sql_url, store)
    with written_whole(path) as tar, store.staged() as staged:
        description = _snapshot(settings, store, staged, keys=keys)
        if keys:
            _copy_keys(settings, staged)
        _copy_catalogue(settings, staged)
        pack(staged, tar)
    return description


def _snapshot(settings: GatewaySettings, store: LocalArtifactStore, staged: Path, *, keys: bool) -> Description:
    with store.removals_held(), copied(settings.sql_url, staged / DATABASE, keys=keys) as tx:
        missing = _link_folders(store, staged / ARTIFACTS, tx)
        description = Description(
            database="sqlite" if tx.dialect.name == "sqlite" else "postgresql",
            installation=own_id(tx),
            schema_revision=str(schema_revision(tx)),
            created_at=int(time.time()),
            keys=keys,
            missing=tuple(missing),
        )
    (staged / DESCRIPTION).write_text(description.model_dump_json(indent=2) + "\n")
    return description


def _link_folders(store: LocalArtifactStore, target: Path, tx: Connection) -> list[str]:
    """Link what the rows vouch for. Returns what of it should be there and is not."""
    target.mkdir()
    missing = []
    for folder, needed in _wanted(store, tx):
        name = folder.relative_to(store.root)
        if folder.is_dir():
            shutil.copytree(folder, target / name, copy_function=_link)
        elif needed:
            missing.append(str(name))
    return missing


def _wanted(store: LocalArtifactStore, tx: Connection) -> Iterator[tuple[Path, bool]]:
    """(folder, whether it must be there)."""
    for file_id in tx.scalars(select(files.c.id)):
        yield store.file(file_id), True
    for adapter_id in tx.scalars(select(adapters.c.id).where(adapters.c.state == AdapterState.PUBLISHED)):
        yield store.adapter(adapter_id), True
    c = checkpoints.c
    states = select(c.job, c.lease_token, c.step).join(jobs, jobs.c.id == c.job).where(jobs.c.state.in_(UNFINISHED))
    for job_id, lease_token, step in tx.execute(states):
        # Only of the newest two is the resume state kept.
        yield store.checkpoint(job_id, lease_token, step), False


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:
        # A mount without hard links.
        shutil.copyfile(source, target)
    return target


def _copy_keys(settings: GatewaySettings, staged: Path) -> None:
    given = settings.key_secret.get_secret_value()
    if given:
        (staged / KEY_SECRET).write_text(given + "\n")
    elif settings.key_secret_path.exists():
        shutil.copyfile(settings.key_secret_path, staged / KEY_SECRET)
    if settings.key_path.exists():
        shutil.copyfile(settings.key_path, staged / FIRST_KEY)


def _copy_catalogue(settings: GatewaySettings, staged: Path) -> None:
    catalogue = settings.catalogue or settings.home / CATALOGUE
    if catalogue.exists():
        shutil.copyfile(catalogue, staged / CATALOGUE)
