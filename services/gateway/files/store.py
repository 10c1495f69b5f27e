"""Uploaded files in SQL, one row each, in the caller's transaction. The bytes are in the artifact store."""

import hashlib
import time
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sqlalchemy import Connection, delete, insert, or_, select

from shared.clock import Nanoseconds, seconds_of
from shared.datasets.checker import DatasetReport
from shared.errors import InvalidRequest, NotFound
from shared.jobs.spec import UNFINISHED
from shared.paging import Cursor, Page, keyset_page
from shared.storage.tables import files, further_training_files, jobs


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
        return seconds_of(self.created_ns)


@dataclass(frozen=True, slots=True)
class NewFile:
    """What was received and checked."""

    filename: str
    purpose: str
    bytes: int
    sha256: str
    report: DatasetReport
    on_bad_rows: str = "refuse"

    def fingerprint(self) -> str:
        """SHA-256 of what is to be stored."""
        requested = [self.sha256, self.purpose, self.filename]
        if self.on_bad_rows != "refuse":
            requested.append(self.on_bad_rows)
        return hashlib.sha256("\n".join(requested).encode()).hexdigest()


class FileStore:
    """The file rows of an installation. A file of another project is not found."""

    def __init__(self, now: Nanoseconds = time.time_ns) -> None:
        self._now = now

    def add(self, tx: Connection, project: str, file_id: str, new: NewFile) -> StoredFile:
        """Write the row of a file whose bytes are in place already: there is never a row without its bytes."""
        file = StoredFile(
            id=file_id,
            project=project,
            created_ns=self._now(),
            filename=new.filename,
            purpose=new.purpose,
            bytes=new.bytes,
            sha256=new.sha256,
            dataset=asdict(new.report),
        )
        tx.execute(insert(files).values(asdict(file)))
        return file

    def get(self, tx: Connection, project: str, file_id: str, *, lock: bool = False) -> StoredFile:
        """One file.

        Args:
            lock: keep the row until the transaction ends.

        Raises:
            NotFound: no such file.
        """
        query = select(files).where(files.c.id == file_id, files.c.project == project)
        row = tx.execute(query.with_for_update() if lock else query).one_or_none()
        if row is None:
            raise NotFound(f"no file {file_id[:100]!r}")
        return StoredFile(*row)

    def exists(self, tx: Connection, project: str, file_id: str) -> bool:
        """Whether the project has this file."""
        mine = select(files.c.id).where(files.c.id == file_id, files.c.project == project)
        return tx.execute(mine).first() is not None

    def list(
        self,
        tx: Connection,
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
        query = select(files).where(files.c.project == project)
        if purpose is not None:
            query = query.where(files.c.purpose == purpose)
        keys = (files.c.created_ns, files.c.id)
        cursor = Cursor(after, select(*keys).where(files.c.id == after, files.c.project == project)) if after else None
        page = keyset_page(tx, query, keys, limit=limit, after=cursor, descending=order == "desc")
        return page.map(lambda row: StoredFile(*row))

    def delete(self, tx: Connection, project: str, file_id: str) -> str | None:
        """Remove a file's row; the bytes are the caller's to remove once this is committed.

        Returns:
            The hash of bytes that no file has any more: what was computed from them goes too.

        Raises:
            NotFound: no such file.
            InvalidRequest: a job that has not ended needs it.
        """
        # Locked, so that no job can begin to use it between the question and the deletion.
        sha256 = self.get(tx, project, file_id, lock=True).sha256
        further = select(further_training_files.c.job).where(further_training_files.c.file == file_id)
        named = or_(jobs.c.training_file == file_id, jobs.c.validation_file == file_id, jobs.c.id.in_(further))
        users = select(jobs.c.id).where(named, jobs.c.state.in_(UNFINISHED))
        user = tx.execute(users.limit(1)).scalar()
        if user is not None:
            raise InvalidRequest(f"{file_id} is in use by {user}, which has not ended", code="file_in_use")
        tx.execute(delete(files).where(files.c.id == file_id))
        same = select(files.c.id).where(files.c.sha256 == sha256)
        return sha256 if tx.execute(same.limit(1)).first() is None else None
