"""Clients that leave, full queues, slow loads: slots come back, and everybody gets an answer."""

import asyncio
import json
import os
import socket
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import Message

from services.inference.connection import EventStream
from tests.services.inference.harness import Tiny
from tests.services.inference.server import Server, running

LONG: dict[str, Any] = {"max_new_tokens": 240, "ignore_eos_token": True}


@pytest.fixture(scope="module")
def narrow(tiny: Tiny) -> Iterator[Server]:
    """One sequence at a time, two may wait."""
    with running(tiny, slots=1, queue_requests=2) as server:
        yield server


def connect(server: Server, path: str, body: dict[str, Any]) -> socket.socket:
    """Send a request and return the open connection."""
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    content = json.dumps(body).encode()
    connection.sendall(
        f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        f"content-length: {len(content)}\r\n\r\n".encode()
        + content
    )
    return connection


def wait(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/v1/completions"])
def test_a_client_that_leaves_frees_its_row(narrow: Server, adapters: list[str], path: str) -> None:
    """While generating, while queued, streaming or not: the tokens that were still to come are never made."""
    engine = narrow.serving.engine
    if path == "/v1/completions":
        body = {"model": adapters[0], "prompt": "a", "max_tokens": 240, "ignore_eos": True}
    else:
        body = {"inputs": "a", "parameters": LONG | {"adapter_id": adapters[0]}}
    before = engine.stats().tokens
    for _ in range(3):
        running_one = connect(narrow, path, body)
        wait(lambda: engine.stats().running == 1)
        queued = connect(narrow, path, body)
        wait(lambda: engine.stats().waiting == 1)
        queued.close()
        wait(lambda: engine.stats().waiting == 0)
        running_one.close()
        narrow.wait_until_idle()
    assert engine.stats().tokens - before < 3 * 240
    assert narrow.generate(inputs="a", parameters={"max_new_tokens": 1}).status_code == 200


def test_a_full_queue_answers_429_at_once(narrow: Server) -> None:
    engine = narrow.serving.engine
    held = [connect(narrow, "/generate", {"inputs": "a", "parameters": LONG})]
    wait(lambda: engine.stats().running == 1)
    for waiting in (1, 2):
        held.append(connect(narrow, "/generate", {"inputs": "a", "parameters": LONG}))
        wait(lambda waiting=waiting: engine.stats().waiting == waiting)
    for path in ("/generate", "/generate_stream"):
        refused = narrow.http.post(path, json={"inputs": "a"})
        assert refused.status_code == 429
        assert refused.json()["error_type"] == "overloaded"
        assert int(refused.headers["retry-after"]) >= 1
    refused = narrow.http.post("/v1/completions", json={"prompt": "a"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
    for connection in held:
        connection.close()
    narrow.wait_until_idle()
    assert narrow.generate(inputs="a", parameters={"max_new_tokens": 1}).status_code == 200


def resident_bytes() -> int:
    """Memory this process holds; the server runs in it."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_thousand_at_once_are_answered_or_refused_and_nothing_leaks(tiny: Tiny, adapters: list[str]) -> None:
    """Two waves: the first makes the pools and buffers, the second must add nothing of note."""
    with running(tiny, slots=8, queue_requests=300, adapter_slots=2) as server:

        async def one(client: httpx.AsyncClient, number: int) -> int:
            parameters = {"max_new_tokens": 4, "adapter_id": [None, *adapters[:3]][number % 4]}
            path = ("/generate", "/generate_stream")[number % 2]
            answer = await client.post(path, json={"inputs": f"hello {number}", "parameters": parameters})
            return answer.status_code

        async def wave() -> list[int]:
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
                return await asyncio.gather(*(one(client, number) for number in range(1000)))

        held = []
        for _ in range(2):
            statuses = asyncio.run(wave())
            assert set(statuses) <= {200, 429}
            assert statuses.count(200) >= 300
            server.wait_until_idle()
            stats = server.serving.engine.stats()
            assert (stats.running, stats.waiting, stats.waiting_tokens) == (0, 0, 0)
            held.append(resident_bytes())
        assert held[1] - held[0] < 64 << 20
        assert server.generate(inputs="a", parameters={"max_new_tokens": 1}).status_code == 200


def test_a_slow_reader_holds_up_nobody(narrow: Server) -> None:
    slow = connect(narrow, "/generate_stream", {"inputs": "a", "parameters": LONG})
    assert narrow.generate(inputs="a", parameters={"max_new_tokens": 1}).status_code == 200
    received = b""
    while b"0\r\n\r\n" not in received[-7:]:
        received += slow.recv(65536)
    assert received.count(b"data:") == 240
    slow.close()


def test_a_request_before_its_load_ends_can_be_left(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(tiny) as server:
        adapter = tiny.adapter(seed=95)
        read = server.serving.adapters._read

        def slowly(folder: Any) -> Any:
            time.sleep(0.3)
            return read(folder)

        monkeypatch.setattr(server.serving.adapters, "_read", slowly)
        body = {"inputs": "a", "parameters": {"adapter_id": adapter}}
        leaving = connect(server, "/generate", body)
        wait(lambda: server.serving.adapters.entries())
        # Others do not wait for the load.
        assert server.generate(inputs="a", parameters={"max_new_tokens": 1}).status_code == 200
        assert server.serving.adapters.entries()[0].state == "loading"
        leaving.close()
        server.wait_until_idle()
        wait(lambda: server.serving.adapters.entries()[0].state == "resident")
        assert server.serving.adapters.entries()[0].references == 0


def test_a_silent_stream_says_that_it_lives() -> None:
    """Comment lines while nothing comes, which every reader of event streams skips; then the events, whole."""
    sent: list[bytes] = []
    closed: list[bool] = []

    async def events() -> AsyncIterator[str]:
        yield "one"
        await asyncio.sleep(0.1)
        yield "two"

    async def close() -> None:
        closed.append(True)

    async def send(message: Message) -> None:
        sent.append(message.get("body", b""))

    async def receive() -> Message:
        await asyncio.sleep(3600)
        raise AssertionError

    asyncio.run(EventStream(events(), close, {}, keep_alive=0.02)({"type": "http"}, receive, send))
    text = b"".join(sent)
    assert text.count(b": keep-alive\n\n") >= 2
    assert text.replace(b": keep-alive\n\n", b"") == b"data: one\n\ndata: two\n\n"
    assert closed == [True]
