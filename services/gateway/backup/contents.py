"""What a backup consists of: a tar file of a description, the database, what its rows vouch for, and last all hashes.

Owns names and order. Prepared bases, cached tokens and what is half-written are not in it: they can be made again.
"""

import json
import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from shared.errors import TunesmithError
from shared.frozen import Frozen
from shared.storage.artifacts import fsync, sha256_of

DESCRIPTION = "backup.json"
DATABASE = "database"
ARTIFACTS = "artifacts"
CATALOGUE = "catalogue.toml"
KEY_SECRET = "key_secret"  # noqa: S105 (a file's name)
FIRST_KEY = "api_key"
# Last: SHA-256 by name of every other file. Without it the backup is not whole.
CHECKSUMS = "checksums.json"
TOP = (DESCRIPTION, DATABASE, ARTIFACTS, CATALOGUE, KEY_SECRET, FIRST_KEY, CHECKSUMS)


class Description(Frozen):
    """What a backup says of itself.

    Attributes:
        installation: the id of the installation that was backed up.
        schema_revision: of its database.
        created_at: seconds since the epoch, taken as the snapshot was.
        keys: whether API keys and the secret they are hashed with are in it.
        missing: folders that rows vouch for and that were not there.
    """

    format: Literal[1] = 1
    database: Literal["sqlite", "postgresql"]
    installation: str
    schema_revision: str
    created_at: int
    keys: bool
    missing: tuple[str, ...] = ()


@contextmanager
def written_whole(path: Path) -> Iterator[tarfile.TarFile]:
    """A tar file that appears at `path` once it is complete and durable; nobody else can read it.

    Raises:
        TunesmithError: something is there.
    """
    if path.exists():
        raise TunesmithError(f"{path} exists already", code="backup")
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    try:
        with (
            os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file,
            tarfile.open(fileobj=file, mode="w") as tar,
        ):
            yield tar
        fsync(part)
        os.rename(part, path)
        fsync(path.absolute().parent)
    finally:
        part.unlink(missing_ok=True)


def pack(folder: Path, tar: tarfile.TarFile) -> None:
    """Write all files of a folder, the description first."""
    sums = {}
    for file in sorted(
        (path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.name != DESCRIPTION
    ):
        name = str(file.relative_to(folder))
        sums[name] = sha256_of(file)
        tar.add(file, name, filter=_nobodys)
    (folder / CHECKSUMS).write_text(json.dumps(sums, indent=1))
    tar.add(folder / CHECKSUMS, CHECKSUMS, filter=_nobodys)


def unpack(path: Path, folder: Path) -> Description:
    """Unpack a backup into an empty folder. Returns what it says of itself.

    Raises:
        TunesmithError: it is no backup, damaged, or holds what none has.
        OSError: it cannot be read, or not be unpacked.
    """
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.split("/")[0] not in TOP or not member.isfile():
                    raise _no_backup(path, f"{member.name[:100]!r} does not belong there")
                tar.extract(member, folder, filter="data")
        sums = json.loads((folder / CHECKSUMS).read_bytes())
        for file in (path for path in folder.rglob("*") if path.is_file()):
            name = str(file.relative_to(folder))
            if name != CHECKSUMS and sha256_of(file) != sums.pop(name, None):
                raise _no_backup(path, f"{name} is damaged")
        if sums:
            raise _no_backup(path, f"{next(iter(sums))} is missing")
        return Description.model_validate_json((folder / DESCRIPTION).read_bytes())
    except (tarfile.TarError, EOFError, ValueError, AttributeError) as error:
        raise _no_backup(path, str(error)) from error
    except FileNotFoundError as error:
        if path.exists():
            raise _no_backup(path, "its end is missing") from error
        raise TunesmithError(f"there is no {path}", code="backup") from error


def _nobodys(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """A member without the names of this machine's users, for its owner's eyes only."""
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mode = 0o600
    return member


def _no_backup(path: Path, why: str) -> TunesmithError:
    return TunesmithError(f"{path} is no whole backup: {why}", code="backup")
