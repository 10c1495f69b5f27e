"""Uploaded files: one SQL row each, and the bytes in the artifact store. Knows no HTTP and not how bytes arrive."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import Connection, and_, delete, insert, or_, select

from shared.datasets.examples import DatasetReport
from shared.errors import InvalidRequest, NotFound
from shared.jobs.rows import Nanoseconds, Page
from shared.jobs.spec import State
from shared.storage.artifacts import ArtifactStore, new_id
from shared.storage.database import Database
from shared.storage.tables import files, jobs

DATA = "data"
UNFINISHED = [state for state in State if not state.final]


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file, read whole; `dataset` is the checker's report."""

    id: str
    project: str
    created_ns: int
    filename: str
    purpose: str
    bytes: int
    sha256: str
    dataset: dict[str, Any]

    @property
    def created_at(self) -> int:
        return self.created_ns // 1_000_000_000


@dataclass(frozen=True, slots=True)
class NewFile:
    """What was received: the checked bytes lie in a staged folder under the name `data`."""

    filename: str
    purpose: str
    bytes: int
    sha256: str
    report: DatasetReport

    def fingerprint(self) -> str:
        """SHA-256 of what is to be stored."""
        return hashlib.sha256("\n".join((self.sha256, self.purpose, self.filename)).encode()).hexdigest()


class FileStore:
    """The files of an installation."""

    def __init__(self, database: Database, artifacts: ArtifactStore, now: Nanoseconds = time.time_ns) -> None:
        self._database = database
        self._artifacts = artifacts
        self._now = now

    def add(
        self,
        project: str,
        new: NewFile,
        staged: Path,
        *,
        guard: Callable[[Connection], None] = lambda _: None,
        seal: Callable[[Connection, StoredFile], None] = lambda _, file: None,
    ) -> StoredFile:
        """Keep a staged file; durable when this returns.

        The bytes come first and the row after them: a crash in between leaves a folder nobody refers to, never a row
        without its data.

        Args:
            guard: called first in the row's transaction; what it raises refuses the file.
            seal: called last in it; what it writes is there exactly if the file is.
        """
        file_id = new_id("file")
        self._artifacts.place(staged, self._artifacts.file(file_id))
        row: dict[str, Any] = {
            "id": file_id,
            "project": project,
            "created_ns": self._now(),
            "filename": new.filename,
            "purpose": new.purpose,
            "bytes": new.bytes,
            "sha256": new.sha256,
            "dataset": asdict(new.report),
        }
        file = StoredFile(**row)
        committing = False
        try:
            with self._database.write() as connection:
                guard(connection)
                connection.execute(insert(files).values(row))
                seal(connection, file)
                committing = True
        except BaseException:
            # Once COMMIT was sent its answer may be lost and the row be there all the same: the bytes stay, and the
            # sweeper removes them if no row came.
            if not committing:
                self._artifacts.remove(self._artifacts.file(file_id))
            raise
        return file

    def get(self, project: str, file_id: str) -> StoredFile:
        """Raises NotFound; a file of another project is not found either."""
        with self._database.read() as connection:
            return _read(connection, project, file_id)

    def list(
        self,
        project: str,
        *,
        after: str | None = None,
        limit: int = 10_000,
        order: Literal["asc", "desc"] = "desc",
        purpose: str | None = None,
    ) -> Page[StoredFile]:
        """Files by age, after (not including) the file `after`.

        Raises:
            InvalidRequest: `after` is no file of the project.
        """
        age, name = files.c.created_ns, files.c.id
        query = select(files).where(files.c.project == project)
        if purpose is not None:
            query = query.where(files.c.purpose == purpose)
        with self._database.read() as connection:
            if after is not None:
                at = select(age).where(name == after, files.c.project == project)
                created_ns = connection.execute(at).scalar()
                if created_ns is None:
                    raise InvalidRequest(f"no file {after[:100]!r} to continue after", param="after")
                beyond = (age < created_ns, name < after) if order == "desc" else (age > created_ns, name > after)
                query = query.where(or_(beyond[0], and_(age == created_ns, beyond[1])))
            by = (age.desc(), name.desc()) if order == "desc" else (age.asc(), name.asc())
            found = connection.execute(query.order_by(*by).limit(limit + 1)).all()
        return Page([StoredFile(*row) for row in found[:limit]], len(found) > limit)

    def delete(self, project: str, file_id: str) -> None:
        """Remove a file.

        Raises:
            NotFound: no such file.
            InvalidRequest: a job that has not ended needs it.
        """
        with self._database.write() as connection:
            # Locked, so that no job can begin to use it between the question and the deletion (`require`).
            _read(connection, project, file_id, lock=True)
            users = select(jobs.c.id).where(
                or_(jobs.c.training_file == file_id, jobs.c.validation_file == file_id), jobs.c.state.in_(UNFINISHED)
            )
            user = connection.execute(users.limit(1)).scalar()
            if user is not None:
                raise InvalidRequest(f"{file_id} is in use by {user}, which has not ended", code="file_in_use")
            connection.execute(delete(files).where(files.c.id == file_id))
        # The row went first: what a crash leaves behind is a folder nobody refers to.
        self._artifacts.remove(self._artifacts.file(file_id))

    def data(self, file: StoredFile) -> Path:
        """Where the bytes lie."""
        return self._artifacts.file(file.id) / DATA


def require(connection: Connection, project: str, file_ids: list[str]) -> None:
    """Make sure, in the caller's transaction, that files exist and stay until it has committed.

    Raises:
        NotFound: one is gone.
    """
    for file_id in file_ids:
        _read(connection, project, file_id, lock=True)


def _read(connection: Connection, project: str, file_id: str, *, lock: bool = False) -> StoredFile:
    query = select(files).where(files.c.id == file_id, files.c.project == project)
    row = connection.execute(query.with_for_update() if lock else query).one_or_none()
    if row is None:
        raise NotFound(f"no file {file_id[:100]!r}")
    return StoredFile(*row)
