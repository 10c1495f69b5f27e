"""API keys: random, shown once, stored as HMAC-SHA256 under the installation's secret, belonging to a project.

Knows no HTTP. A slow hash buys nothing here: the keys are 256 random bits.
"""

import hashlib
import hmac
import os
import re
import secrets
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from sqlalchemy import insert, select, update
from sqlalchemy.exc import IntegrityError

from shared.errors import TunesmithError
from shared.storage.artifacts import fsync
from shared.storage.database import Database
from shared.storage.tables import api_keys

PREFIX = "ts-"
FIRST_KEY = "key-first"
DEFAULT_PROJECT = "default"
MAX_KEY_CHARACTERS = 200
_KEY = re.compile(r"[!-~]{20,200}")
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,39}")


@dataclass(frozen=True, slots=True)
class Owner:
    """Who sent a request: the id of the key that was used (not the key), and the project it belongs to."""

    key_id: str
    project: str


@dataclass(frozen=True, slots=True)
class ListedKey:
    """A key as lists show it. Times are seconds since the epoch."""

    id: str
    project: str
    created_at: int
    revoked_at: int | None

    def as_json(self) -> dict[str, str | int | None]:
        return asdict(self)


class Keys:
    """The keys of one installation."""

    def __init__(self, database: Database, secret: bytes) -> None:
        self._database = database
        self._secret = secret

    def owner_of(self, key: str) -> Owner | None:
        """Whose a key is; None if the key is unknown or revoked."""
        digest = self._digest(key)
        query = select(api_keys.c.id, api_keys.c.digest, api_keys.c.project).where(
            api_keys.c.digest == digest, api_keys.c.revoked_at.is_(None)
        )
        with self._database.read() as connection:
            row = connection.execute(query).one_or_none()
        # What the index compared is keyed by the secret and tells an attacker nothing; this comparison is exact.
        return Owner(row.id, row.project) if row and hmac.compare_digest(row.digest, digest) else None

    def ensure_first(self, path: Path) -> bool:
        """Make the first key if there is none, and write it to `path`, its only copy. A key that lies there is kept.

        Returns:
            Whether a key was registered.

        Raises:
            TunesmithError: what lies at `path` is no key.
        """
        with self._database.read() as connection:
            if connection.execute(select(api_keys.c.id).limit(1)).first():
                return False
        try:
            with self._database.write() as connection:
                found = path.read_text().strip() if path.exists() else ""
                key = found or PREFIX + secrets.token_urlsafe(32)
                if not _KEY.fullmatch(key):
                    raise TunesmithError(f"{path}: a key has 20 to 200 printable ASCII characters and no spaces")
                # The row first: a second gateway starting now waits for this transaction and writes no file of its own.
                row = {"id": FIRST_KEY, "project": DEFAULT_PROJECT, "digest": self._digest(key)}
                connection.execute(insert(api_keys).values(row | {"created_at": int(time.time())}))
                if not found:
                    private_file(path, key + "\n")
        except IntegrityError:
            return False
        return True

    def all(self) -> list[ListedKey]:
        """Every key that was ever made, oldest first; not the keys themselves, which nobody has."""
        c = api_keys.c
        with self._database.read() as tx:
            rows = tx.execute(select(c.id, c.project, c.created_at, c.revoked_at).order_by(c.created_at, c.id))
            return [ListedKey(*row) for row in rows]

    def create(self, name: str, project: str = DEFAULT_PROJECT, *, numbered: bool = False) -> tuple[str, str]:
        """Make a key called `key-NAME`. Returns its id and the key itself, which is kept nowhere.

        Args:
            numbered: take `key-NAME-2`, `-3` … where the name is taken.

        Raises:
            TunesmithError: the name or project is none, or there is such a key already.
        """
        if not _NAME.fullmatch(name) or not _NAME.fullmatch(project):
            raise TunesmithError("names of keys and projects: 1 to 40 of a-z, 0-9, '.', '_' and '-', no mark first")
        key = PREFIX + secrets.token_urlsafe(32)
        with self._database.write() as tx:
            taken = set(tx.scalars(select(api_keys.c.id)))
            further = (f"key-{name}-{number}" for number in range(2, len(taken) + 3))
            ids = (f"key-{name}", *further) if numbered else (f"key-{name}",)
            id = next((id for id in ids if id not in taken), None)
            if id is None:
                raise TunesmithError(f"there is a key-{name} already, perhaps revoked: choose another name")
            row = {"id": id, "project": project, "digest": self._digest(key), "created_at": int(time.time())}
            tx.execute(insert(api_keys).values(row))
        return id, key

    def revoke(self, id: str) -> bool:
        """Refuse a key from now on, at once and for good. Returns whether it was valid until now.

        Raises:
            TunesmithError: there is no such key.
        """
        with self._database.write() as tx:
            if tx.execute(select(api_keys.c.id).where(api_keys.c.id == id)).first() is None:
                raise TunesmithError(f"no key {id!r}; `tunesmith keys list` shows them")
            live = (api_keys.c.id == id) & api_keys.c.revoked_at.is_(None)
            return tx.execute(update(api_keys).where(live).values(revoked_at=int(time.time()))).rowcount == 1

    @staticmethod
    def revoke_all(database: Database) -> int:
        """Refuse every key from now on. Returns how many were valid until now. Needs no secret: it may be lost."""
        with database.write() as tx:
            live = update(api_keys).where(api_keys.c.revoked_at.is_(None))
            return tx.execute(live.values(revoked_at=int(time.time()))).rowcount

    def _digest(self, key: str) -> str:
        return hmac.new(self._secret, key.encode("utf-8", "replace"), hashlib.sha256).hexdigest()


def read_or_make_secret(path: Path) -> bytes:
    """The installation's secret, made on first use."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        staged = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
        private_file(staged, secrets.token_hex(32) + "\n")
        try:
            # Unlike a rename, a link fails if another process was faster.
            os.link(staged, path)
            fsync(path.parent)
        except FileExistsError:
            pass
        finally:
            staged.unlink()
    return path.read_text().strip().encode()


def private_file(path: Path, text: str) -> None:
    """Write a file that only its owner can read, and that outlasts a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    # SQL must not know a key whose file a power cut takes away.
    fsync(path.parent)
