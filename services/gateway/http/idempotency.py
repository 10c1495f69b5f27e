"""POSTs that happen once however often they are sent: by `Idempotency-Key`, and by OpenAI's clients' own retries.

The answer is written in the transaction of what it answers for, so either both are there or neither is. Refusals are
not kept: nothing happened, and the same key may be tried again. Knows no route and not what the answers say.
"""

import hashlib
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, delete, insert, select, text
from sqlalchemy.exc import OperationalError

from shared.errors import Conflict, InvalidRequest
from shared.storage.database import Database
from shared.storage.tables import answers

HEADER = "Idempotency-Key"
# Counted by each gateway's own clock; an hour more than the promised day forgives clocks that differ.
KEEP_SECONDS = 25 * 3600
# OpenAI's clients wait 600 s for an answer and try twice more, but send no key of their own.
FOLD_SECONDS = 1800
# How long a request waits for its twin.
WAIT_MS = 5000


@dataclass(frozen=True, slots=True)
class Attempt:
    """One POST as it was sent.

    Attributes:
        api_key: id of the API key.
        key: the client's Idempotency-Key, if it sent one.
        fingerprint: SHA-256 of what is asked for.
        retried: whether the client says that it has sent this before.
    """

    api_key: str
    path: str
    key: str | None
    fingerprint: str
    retried: bool = False

    @property
    def name(self) -> str:
        """Equal for twins: attempts of which one at most may do what is asked for."""
        return "\n".join((self.api_key, self.path, self.key or self.fingerprint))


@dataclass(frozen=True, slots=True)
class Answer:
    """What a POST was answered; `body` is JSON."""

    body: str
    status: int = 200


class Answered(Exception):
    """The attempt has been answered before: raised to leave the transaction that would do it again."""

    def __init__(self, answer: Answer) -> None:
        super().__init__("answered before")
        self.answer = answer


class Answers:
    """The answers of an installation.

    Args:
        now: seconds since the epoch.
    """

    def __init__(self, database: Database, now: Callable[[], float] = time.time) -> None:
        self._database = database
        self._now = now
        self._flying: set[str] = set()
        self._landed = threading.Condition()

    def find(self, attempt: Attempt) -> Answer | None:
        """The answer given before, if there was one.

        Raises:
            InvalidRequest: the key was used for another request.
        """
        with self._database.read() as connection:
            return self._find(connection, attempt)

    @contextmanager
    def alone(self, attempt: Attempt) -> Iterator[None]:
        """Around the transaction: an attempt's twins in this process wait until it has ended.

        Raises:
            Conflict: a twin is still being answered.
        """
        with self._landed:
            if not self._landed.wait_for(lambda: attempt.name not in self._flying, WAIT_MS / 1000):
                raise _in_flight()
            self._flying.add(attempt.name)
        try:
            yield
        finally:
            with self._landed:
                self._flying.discard(attempt.name)
                self._landed.notify_all()

    def begin(self, connection: Connection, attempt: Attempt) -> None:
        """Make sure, in the caller's transaction, that the attempt is the first; twins elsewhere wait for its end.

        On SQLite they wait as all writers do: there is one at a time.

        Raises:
            Answered: it has been answered meanwhile.
            InvalidRequest: the key was used for another request.
            Conflict: a twin is still being answered.
        """
        if not self._database.is_sqlite:
            _wait_for_twins(connection, attempt)
        found = self._find(connection, attempt)
        if found is not None:
            raise Answered(found)

    def keep(self, connection: Connection, attempt: Attempt, answer: Answer) -> None:
        """Write the answer in the caller's transaction."""
        row = {
            "id": secrets.token_hex(12),
            "api_key": attempt.api_key,
            "path": attempt.path,
            "key": attempt.key,
            "fingerprint": attempt.fingerprint,
            "status": answer.status,
            "body": answer.body,
            "created_at": int(self._now()),
        }
        connection.execute(insert(answers).values(row))

    def forget(self) -> int:
        """Drop what has been kept long enough. Returns how many."""
        with self._database.write() as connection:
            old = answers.c.created_at < int(self._now()) - KEEP_SECONDS
            return connection.execute(delete(answers).where(old)).rowcount

    def _find(self, connection: Connection, attempt: Attempt) -> Answer | None:
        c = answers.c
        query = select(c.body, c.status, c.fingerprint).where(c.api_key == attempt.api_key, c.path == attempt.path)
        if attempt.key is not None:
            row = connection.execute(query.where(c.key == attempt.key)).one_or_none()
            if row is not None and row.fingerprint != attempt.fingerprint:
                raise InvalidRequest(
                    f"this {HEADER} was sent before with another request; use a new key for a new request",
                    param=HEADER,
                    code="idempotency_key_reused",
                )
            return _answer(row)
        if not attempt.retried:
            return None
        recent = (c.key.is_(None), c.fingerprint == attempt.fingerprint, c.created_at >= self._now() - FOLD_SECONDS)
        return _answer(connection.execute(query.where(*recent).order_by(c.created_at.desc()).limit(1)).one_or_none())


def _answer(row: Any) -> Answer | None:
    return None if row is None else Answer(row.body, row.status)


def _wait_for_twins(connection: Connection, attempt: Attempt) -> None:
    number = int.from_bytes(hashlib.blake2b(attempt.name.encode(), digest_size=8).digest(), "big", signed=True)
    connection.execute(text("SELECT set_config('lock_timeout', :wait, true)"), {"wait": f"{WAIT_MS}ms"})
    try:
        # Held until the transaction ends.
        connection.execute(text("SELECT pg_advisory_xact_lock(:number)"), {"number": number})
    except OperationalError as error:
        raise _in_flight() from error


def _in_flight() -> Conflict:
    return Conflict("the same request is still being answered; try again", param=HEADER, code="idempotency_in_flight")
