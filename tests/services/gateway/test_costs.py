"""What a request costs: SQL statements, and hops to the thread pool that waits for SQL."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import anyio.to_thread
import pytest
from sqlalchemy import Engine, event

from shared.jobs.spec import JobSpec
from shared.jobs.store import JobStore
from tests.services.gateway.conftest import Gateway

PATH = "/v1/fine_tuning/jobs"
BASE = "smollm2-135m-instruct"


@contextmanager
def statements() -> Iterator[list[str]]:
    """The SQL statements that requests send meanwhile; what runs in the background has threads of other names."""
    seen: list[str] = []

    def note(_: Any, __: Any, statement: str, *___: Any) -> None:
        if threading.current_thread().name.startswith("AnyIO worker") and not statement.startswith("BEGIN"):
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
    """Ids of new queued jobs, oldest first."""
    spec = JobSpec(base=BASE, base_revision="r", training_file="file-1", training_sha256="0" * 64)
    with gateway.services.database.write() as tx:
        return [JobStore().create(tx, "default", spec).id for _ in range(count)]


def test_a_status_poll_takes_two_hops(gateway: Gateway) -> None:
    (job,) = queued(gateway, 1)
    with thread_hops() as hops, statements() as sent:
        assert gateway.http.get(f"{PATH}/{job}").json()["progress"]["queue_position"] == 1
    assert len(hops) == 2, hops
    assert len(sent) == 3, sent


def test_an_event_page_takes_two_hops(gateway: Gateway) -> None:
    (job,) = queued(gateway, 1)
    with thread_hops() as hops, statements() as sent:
        assert len(gateway.http.get(f"{PATH}/{job}/events").json()["data"]) == 2
    assert len(hops) == 2, hops
    assert len(sent) == 3, sent


@pytest.mark.parametrize("path", ["/v1/files", "/v1/models", PATH])
def test_a_listing_takes_two_hops(gateway: Gateway, path: str) -> None:
    with thread_hops() as hops:
        assert gateway.http.get(path).is_success
    assert len(hops) == 2, hops


def test_a_page_of_a_hundred_queued_jobs_takes_three_statements(gateway: Gateway) -> None:
    """The key, the page, and the places in the queue; the next page too."""
    jobs = queued(gateway, 205)
    with statements() as sent:
        page = gateway.http.get(PATH, params={"limit": 100}).json()["data"]
    assert [job["progress"]["queue_position"] for job in page] == list(range(205, 105, -1))
    assert len(sent) == 3, sent
    with statements() as sent:
        page = gateway.http.get(PATH, params={"limit": 100, "after": page[-1]["id"]}).json()["data"]
    assert [job["id"] for job in page] == jobs[104:4:-1]
    assert len(sent) == 3, sent
