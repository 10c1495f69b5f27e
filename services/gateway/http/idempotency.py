"""POSTs that happen once however often they are sent: by `Idempotency-Key`, and by OpenAI's clients' own retries.

The response is stored in the transaction of what it responds to, so either both are there or neither is. Refusals are
not stored: nothing happened, and the same key may be tried again. Knows no route and not what the responses say.
"""

import hashlib
import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from psycopg.errors import LockNotAvailable
from sqlalchemy import Connection, delete, insert, select, text
from sqlalchemy.exc import OperationalError

from shared.errors import Conflict, InvalidRequest
from shared.storage.tables import idempotency_keys

HEADER = "Idempotency-Key"
# Counted by each gateway's own clock; an hour more than the promised day forgives clocks that differ.
KEEP_SECONDS = 25 * 3600
# OpenAI's clients wait 600 s for a response and a little before they send it again, but send no key of their own.
# What was answered before their first sending can have arrived is the answer to another request.
RETRY_SECONDS = 620
MAX_RETRIES = 10
# How long a request waits for a duplicate that is in flight.
WAIT_MS = 5000


@dataclass(frozen=True, slots=True)
class Attempt:
    """One POST as it was sent.

    Attributes:
        api_key: id of the API key.
        key: the client's Idempotency-Key, if it sent one.
        fingerprint: SHA-256 of the request.
        retries: how often the client says that it has sent this before.
    """

    api_key: str
    path: str
    key: str | None
    fingerprint: str
    retries: int = 0

    @property
    def name(self) -> str:
        """Equal for duplicates: attempts of which at most one may have an effect."""
        return "\n".join((self.api_key, self.path, self.key or self.fingerprint))


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """The response to a POST; `body` is JSON."""

    body: str
    status: int = 200

    @property
    def id(self) -> str:
        """The id of what it says was made."""
        return str(json.loads(self.body)["id"])


class IdempotencyStore:
    """The stored responses of an installation; all SQL happens in the caller's transaction.

    Args:
        now: seconds since the epoch.
    """

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._in_flight: set[str] = set()
        self._ended = threading.Condition()

    @contextmanager
    def single_flight(self, attempt: Attempt) -> Iterator[None]:
        """Around the transaction: duplicates in this process wait until it has ended.

        Raises:
            Conflict: a duplicate is still in flight.
        """
        with self._ended:
            if not self._ended.wait_for(lambda: attempt.name not in self._in_flight, WAIT_MS / 1000):
                raise _in_flight()
            self._in_flight.add(attempt.name)
        try:
            yield
        finally:
            with self._ended:
                self._in_flight.discard(attempt.name)
                self._ended.notify_all()

    def find(self, tx: Connection, attempt: Attempt) -> StoredResponse | None:
        """The response given before, if there was one.

        Raises:
            InvalidRequest: the key was used for another request.
        """
        return self._by_key(tx, attempt) if attempt.key is not None else self._by_retry(tx, attempt)

    def begin(self, tx: Connection, attempt: Attempt) -> StoredResponse | None:
        """As `find`, and until the transaction ends duplicates at other gateways wait.

        On SQLite they wait as all writers do: there is one at a time.

        Raises:
            InvalidRequest: the key was used for another request.
            Conflict: a duplicate is still in flight.
        """
        if tx.dialect.name == "postgresql":
            _lock(tx, attempt)
        return self.find(tx, attempt)

    def keep(self, tx: Connection, attempt: Attempt, response: StoredResponse) -> None:
        """Store the response."""
        row = {
            "id": secrets.token_hex(12),
            "api_key": attempt.api_key,
            "path": attempt.path,
            "key": attempt.key,
            "fingerprint": attempt.fingerprint,
            "status": response.status,
            "body": response.body,
            "created_at": int(self._now()),
        }
        tx.execute(insert(idempotency_keys).values(row))

    def forget(self, tx: Connection) -> int:
        """Drop what has been kept long enough. Returns how many."""
        old = idempotency_keys.c.created_at < int(self._now()) - KEEP_SECONDS
        return tx.execute(delete(idempotency_keys).where(old)).rowcount

    def _by_key(self, tx: Connection, attempt: Attempt) -> StoredResponse | None:
        c = idempotency_keys.c
        same = (c.api_key == attempt.api_key, c.path == attempt.path, c.key == attempt.key)
        row = tx.execute(select(c.body, c.status, c.fingerprint).where(*same)).one_or_none()
        if row is not None and row.fingerprint != attempt.fingerprint:
            raise InvalidRequest(
                f"this {HEADER} was sent before with another request; use a new key for a new request",
                param=HEADER,
                code="idempotency_key_reused",
            )
        return _response(row)

    def _by_retry(self, tx: Connection, attempt: Attempt) -> StoredResponse | None:
        """The newest response to the same request without a key, if the client says that it sends it again."""
        if not attempt.retries:
            return None
        since = self._now() - min(attempt.retries, MAX_RETRIES) * RETRY_SECONDS
        c = idempotency_keys.c
        same = (c.api_key == attempt.api_key, c.path == attempt.path, c.key.is_(None))
        recent = (c.fingerprint == attempt.fingerprint, c.created_at >= since)
        newest = select(c.body, c.status).where(*same, *recent).order_by(c.created_at.desc()).limit(1)
        return _response(tx.execute(newest).one_or_none())


def _response(row: Any) -> StoredResponse | None:
    return None if row is None else StoredResponse(row.body, row.status)


def _lock(tx: Connection, attempt: Attempt) -> None:
    number = int.from_bytes(hashlib.blake2b(attempt.name.encode(), digest_size=8).digest(), "big", signed=True)
    tx.execute(text("SELECT set_config('lock_timeout', :wait, true)"), {"wait": f"{WAIT_MS}ms"})
    try:
        # Held until the transaction ends.
        tx.execute(text("SELECT pg_advisory_xact_lock(:number)"), {"number": number})
    except OperationalError as error:
        if not isinstance(error.orig, LockNotAvailable):
            raise
        raise _in_flight() from error


def _in_flight() -> Conflict:
    return Conflict("the same request is still in flight; try again", param=HEADER, code="idempotency_in_flight")
