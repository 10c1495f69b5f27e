"""What a request costs: SQL statements, and hops to the thread pool that waits for SQL."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import anyio.to_thread
import pytest
from sqlalchemy import Engine, event

from tests.services.gateway.conftest import ROWS, Gateway

PATH = "/v1/fine_tuning/jobs"
BASE = "smollm2-135m-instruct"


@contextmanager
def statements_by(thread_prefix: str = "AnyIO worker") -> Iterator[list[str]]:
    """The SQL statements that requests send meanwhile; background threads send theirs from threads of other names."""
    import threading

    seen: list[str] = []

    def note(_: Any, __: Any, statement: str, *___: Any) -> None:
        if threading.current_thread().name.startswith(thread_prefix) and not statement.startswith("BEGIN"):
            seen.append(statement)

    event.listen(Engine, "before_cursor_execute", note)
    try:
        yield seen
    finally:
        event.remove(Engine, "before_cursor_execute", note)


@contextmanager
def thread_hops() -> Iterator[list[str]]:
    """What is sent to the thread pool meanwhile."""
    seen: list[str] = []
    real = anyio.to_thread.run_sync

    async def counted(function: Any, *arguments: Any, **options: Any) -> Any:
        seen.append(getattr(function, "__qualname__", repr(function)))
        return await real(function, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(anyio.to_thread, "run_sync", counted)
        yield seen


def queued(gateway: Gateway, count: int) -> list[str]:
    body = {"model": BASE, "training_file": gateway.uploaded(ROWS)}
    return [gateway.http.post(PATH, json=body).json()["id"] for _ in range(count)]


def test_a_status_poll_takes_two_hops(gateway: Gateway) -> None:
    (job,) = queued(gateway, 1)
    with thread_hops() as hops, statements_by() as statements:
        assert gateway.http.get(f"{PATH}/{job}").json()["progress"]["queue_position"] == 1
    assert len(hops) <= 2, hops
    assert len(statements) <= 3, statements


def test_a_page_of_a_hundred_queued_jobs_takes_three_statements(gateway: Gateway) -> None:
    jobs = queued(gateway, 205)
    with statements_by() as statements:
        page = gateway.http.get(PATH, params={"limit": 100}).json()["data"]
    assert [job["progress"]["queue_position"] for job in page] == list(range(205, 105, -1))
    assert len(statements) <= 3, statements
    with statements_by() as statements:
        page = gateway.http.get(PATH, params={"limit": 100, "after": page[-1]["id"]}).json()["data"]
    assert [job["id"] for job in page] == jobs[104:4:-1]
    assert len(statements) <= 3, statements
