"""API keys: random, shown once, stored as HMAC-SHA256 under the installation's secret, belonging to a project.

Knows no HTTP. A slow hash buys nothing here: the keys are 256 random bits.
"""

import hashlib
import hmac
import os
import re
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import insert, select
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


@dataclass(frozen=True, slots=True)
class Owner:
    """Who sent a request: the id of the key that was used (not the key), and the project it belongs to."""

    key_id: str
    project: str


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
                    _write_private(path, key + "\n")
        except IntegrityError:
            return False
        return True

    def _digest(self, key: str) -> str:
        return hmac.new(self._secret, key.encode("utf-8", "replace"), hashlib.sha256).hexdigest()


def read_or_make_secret(path: Path) -> bytes:
    """The installation's secret, made on first use."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        staged = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
        _write_private(staged, secrets.token_hex(32) + "\n")
        try:
            # Unlike a rename, a link fails if another process was faster.
            os.link(staged, path)
            fsync(path.parent)
        except FileExistsError:
            pass
        finally:
            staged.unlink()
    return path.read_text().strip().encode()


def _write_private(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    # SQL must not know a key whose file a power cut takes away.
    fsync(path.parent)
