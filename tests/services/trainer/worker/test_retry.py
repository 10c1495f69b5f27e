"""Writes while the database is away; a stand-in for the write fails as psycopg does."""

from collections.abc import Callable

import pytest
from sqlalchemy.exc import IntegrityError, OperationalError

from services.trainer.worker import retry
from services.trainer.worker.retry import with_retries


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "RETRY_EVERY_SECONDS", 0)


def away(times: int, error: type[Exception] = OperationalError) -> tuple[list[int], Callable[[], str]]:
    tries: list[int] = []

    def write() -> str:
        tries.append(1)
        if len(tries) <= times:
            raise error("UPDATE jobs", {}, Exception("server closed the connection unexpectedly"))
        return "written"

    return tries, write


def test_it_waits_until_the_database_is_back() -> None:
    tries, write = away(5)
    assert with_retries(write) == "written"
    assert len(tries) == 6


def test_what_the_database_objects_to_is_not_repeated() -> None:
    tries, write = away(5, IntegrityError)
    with pytest.raises(IntegrityError):
        with_retries(write)
    assert len(tries) == 1


def test_at_a_shutdown_there_is_no_time() -> None:
    tries, write = away(5)
    with pytest.raises(OperationalError):
        with_retries(write, abort=lambda: len(tries) == 2)
    assert len(tries) == 2


def test_retries_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "RETRY_FOR_SECONDS", -1)
    tries, write = away(5)
    with pytest.raises(OperationalError):
        with_retries(write)
    assert len(tries) == 1
