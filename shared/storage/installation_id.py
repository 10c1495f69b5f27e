"""Which database an artifacts folder belongs to: both carry the installation's id.

A gateway on another database would take everything in the folder for garbage, and a trainer without its mount would
find nothing. Owns who may mark a folder; `shared.storage.artifacts` writes the mark.
"""

from pathlib import Path

from sqlalchemy import Connection, func, select

from shared.adapters.state import AdapterState
from shared.errors import TunesmithError
from shared.storage.artifacts import LocalArtifactStore
from shared.storage.database import Database
from shared.storage.tables import adapters, files, further_training_files, installation, jobs

_ADVICE = (
    "check TUNESMITH_ARTIFACTS and TUNESMITH_DATABASE_URL, or run `tunesmith adopt` to give the folder to this database"
)
OWNED = ("files", "adapters", "jobs")


def require_own_folder(tx: Connection, store: LocalArtifactStore) -> None:
    """Make sure that the artifacts folder is that of this database. One without a mark is marked if it can only be.

    Raises:
        TunesmithError: it belongs to another installation, or may; the message says what to do.
        OSError: it cannot be read, or not be marked.
    """
    own, marked = own_id(tx), store.installation()
    if marked == own:
        return
    if marked is not None:
        raise _refused(
            f"the artifacts folder {store.root} belongs to installation {marked[:8]}, this database to {own[:8]}: "
            f"{_ADVICE}"
        )
    found = {entry.name for kind in OWNED for entry in _entries(store.root / kind)}
    if found and not found & _known_ids(tx):
        raise _refused(
            f"the artifacts folder {store.root} holds {len(found)} folders that this database knows nothing of: "
            f"{_ADVICE}"
        )
    expected = _expected(tx)
    if expected and not found:
        raise _refused(
            f"the artifacts folder {store.root} is empty, but this database knows of {expected} files and models: "
            "is it mounted? If they are lost, run `tunesmith adopt`"
        )
    store.mark_installation(own)


def require_own_folder_at(url: str, store: LocalArtifactStore) -> None:
    """`require_own_folder` for the migrated database at `url`."""
    database = Database(url)
    try:
        with database.read() as tx:
            require_own_folder(tx, store)
    finally:
        database.close()


def adopt(tx: Connection, store: LocalArtifactStore) -> str:
    """Make the artifacts folder this database's, whatever it says. Returns the installation's id."""
    own = own_id(tx)
    store.mark_installation(own)
    return own


def _refused(message: str) -> TunesmithError:
    return TunesmithError(message, code="installation")


def own_id(tx: Connection) -> str:
    """The id of this database's installation."""
    own: str = tx.execute(select(installation.c.id)).scalar_one()
    return own


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _known_ids(tx: Connection) -> set[str]:
    # A job remembers its files after they were deleted.
    of_jobs = (jobs.c.id, jobs.c.training_file, jobs.c.validation_file, further_training_files.c.file)
    names = (files.c.id, adapters.c.id, *of_jobs)
    return {name for column in names for name in tx.scalars(select(column))}


def _expected(tx: Connection) -> int:
    published = select(func.count()).where(adapters.c.state == AdapterState.PUBLISHED)
    return tx.execute(select(func.count()).select_from(files)).scalar_one() + tx.execute(published).scalar_one()
