"""Clients that leave, full queues, slow loads: slots come back, and everybody gets an answer."""

import asyncio
import gc
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest

from services.inference.generation import Generation
from tests.services.inference.harness import Tiny
from tests.services.inference.server import Server, running

T = TypeVar("T")
LONG: dict[str, Any] = {"max_new_tokens": 240, "ignore_eos_token": True}


@pytest.fixture(scope="module")
def narrow(tiny: Tiny) -> Iterator[Server]:
    """One sequence at a time, two may wait."""
    with running(tiny, slots=1, queue_requests=2) as server:
        yield server


def connect(server: Server, path: str, body: dict[str, Any], *, window: int = 0) -> socket.socket:
    """Send a request and return the open connection.

    Args:
        window: bytes that the server may send unread, about; the system's choice if 0.
    """
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.socket()
    if window:
        # Before connecting: the window is agreed on then.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
    connection.connect((host, int(port)))
    content = json.dumps(body).encode()
    connection.sendall(
        f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        f"content-length: {len(content)}\r\n\r\n".encode()
        + content
    )
    return connection


def wait(condition: Any) -> None:
    deadline = time.monotonic() + 120
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
    narrow.wait_until_idle()
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


def bodies(adapter: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """A long request on every route, plain and streamed: name → (path, body)."""
    tgi = {"inputs": "a", "parameters": LONG | {"adapter_id": adapter}}
    openai = {"model": adapter, "max_tokens": 200, "ignore_eos": True}
    chat = openai | {"messages": [{"role": "user", "content": "a"}]}
    return {
        "generate": ("/generate", tgi),
        "generate, streamed": ("/generate_stream", tgi),
        "compat": ("/", tgi),
        "completion": ("/v1/completions", openai | {"prompt": "a"}),
        "completion, streamed": ("/v1/completions", openai | {"prompt": "a", "stream": True}),
        "chat": ("/v1/chat/completions", chat),
        "chat, streamed": ("/v1/chat/completions", chat | {"stream": True}),
    }


@pytest.mark.parametrize("kind", bodies(""))
def test_the_row_is_free_one_step_after_its_client_has_left(
    narrow: Server, adapters: list[str], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The engine's steps are let through one by one, so that it can be told how many came after the leaving."""
    engine: Any = narrow.serving.engine
    decode, steps = engine._runner.decode, threading.Semaphore(0)

    def one_by_one(*arguments: Any) -> Any:
        assert steps.acquire(timeout=120)
        return decode(*arguments)

    monkeypatch.setattr(engine._runner, "decode", one_by_one)
    # An answer is sent before its last token is counted.
    narrow.wait_until_idle()
    before = engine.stats().tokens
    leaving = connect(narrow, *bodies(adapters[0])[kind])
    # The prompt gives the first token; then three steps.
    wait(lambda: engine.stats().tokens == before + 1)
    steps.release(3)
    wait(lambda: engine.stats().tokens == before + 4)
    leaving.close()
    wait(lambda: engine._cancelling)
    # The step that had begun ends; the next one begins without the row.
    steps.release()
    narrow.wait_until_idle()
    assert engine.stats().tokens == before + 5


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
    """Memory this process holds; the server generations in it."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_many_at_once_are_answered_or_refused_and_nothing_leaks(
    tiny: Tiny, adapters: list[str], pytestconfig: pytest.Config
) -> None:
    """Two waves of requests: the first makes the pools and buffers, the second must add nothing of note."""
    at_once = 1000 if pytestconfig.getoption("--chaos-rounds", 0) else 300
    queue = at_once * 3 // 10
    with running(tiny, slots=8, queue_requests=queue, adapter_slots=2) as server:

        async def one(client: httpx.AsyncClient, number: int) -> int:
            parameters = {"max_new_tokens": 4, "adapter_id": [None, *adapters[:3]][number % 4]}
            path = ("/generate", "/generate_stream")[number % 2]
            answer = await client.post(path, json={"inputs": f"hello {number}", "parameters": parameters})
            return answer.status_code

        async def wave() -> list[int]:
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
                return await asyncio.gather(*(one(client, number) for number in range(at_once)))

        held = []
        for _ in range(2):
            statuses = asyncio.run(wave())
            assert set(statuses) <= {200, 429}
            assert statuses.count(200) >= queue
            server.wait_until_idle()
            stats = server.serving.engine.stats()
            assert (stats.running, stats.waiting, stats.waiting_tokens) == (0, 0, 0)
            held.append(resident_bytes())
        assert held[1] - held[0] < 64 << 20
        assert server.generate(inputs="a", parameters={"max_new_tokens": 1}).status_code == 200


@pytest.mark.parametrize("path", ["/generate_stream", "/v1/chat/completions"])
def test_a_reader_that_does_not_read_holds_nothing_but_its_own_answer(
    tiny: Tiny, adapters: list[str], path: str
) -> None:
    """Its row, its place and its adapter are free as soon as the engine is done; later it gets every byte."""
    if path == "/generate_stream":
        own = {"adapter_id": adapters[0], "top_n_tokens": 5}
        body: dict[str, Any] = {"inputs": "a", "parameters": LONG | own}
    else:
        messages = [{"role": "user", "content": "a"}]
        body = {"model": adapters[0], "messages": messages, "max_tokens": 200, "ignore_eos": True, "stream": True}
        body |= {"logprobs": True, "top_logprobs": 5, "temperature": 0}
    with running(tiny, send_buffer=2048, slots=1, adapter_slots=1) as server:
        whole = server.http.post(path, json=body).text
        assert len(whole) > 100_000

        def answered() -> bool:
            return f'route="{path}",status="200"}} 2.0' in server.http.get("/metrics").text

        stuck = connect(server, path, body, window=2048)
        wait(lambda: server.serving.adapters.loads and server.serving.engine.stats().running)
        server.wait_until_idle()
        # The only row and the only adapter slot serve the next ones, while most of the answer is still to be sent.
        for adapter in (adapters[1], None):
            assert server.generate(inputs="b", parameters={"adapter_id": adapter, "max_new_tokens": 3}).is_success
        assert {entry.id for entry in server.serving.adapters.entries()} == {adapters[1]}
        assert not answered()
        received = b""
        while b"0\r\n\r\n" not in received[-7:]:
            received += stuck.recv(65536)
        stuck.close()
        assert said(unchunked(received)) == said(whole)
        wait(answered)


@pytest.mark.slow
def test_many_readers_that_do_not_read_take_bounded_memory_and_leave_none_taken(tiny: Tiny) -> None:
    with running(tiny, send_buffer=2048, slots=8, queue_requests=300) as server:
        engine = server.serving.engine
        body = {"inputs": "a", "parameters": LONG | {"top_n_tokens": 5}}
        stuck = [connect(server, "/generate_stream", body, window=2048) for _ in range(60)]
        wait(lambda: engine.stats().tokens >= 60 * LONG["max_new_tokens"])
        server.wait_until_idle()
        assert server.generate(inputs="a", parameters={"max_new_tokens": 1}).is_success
        # The one that was answered goes a moment after its answer.
        wait(lambda: len(alive(Generation)) == 60)
        generations = alive(Generation)
        # What waits to be read is the rest of one answer each.
        unread = [each._events.qsize() for each in generations]
        assert 0 < max(unread) <= LONG["max_new_tokens"] + 2
        del generations
        for connection in stuck:
            connection.close()
        wait(lambda: not alive(Generation))


def alive(kind: type[T]) -> list[T]:
    gc.collect()
    return [each for each in gc.get_objects() if type(each) is kind]


def unchunked(response: bytes) -> str:
    """The body of an HTTP/1.1 response in chunks."""
    head, _, rest = response.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    body = b""
    while (size := int(rest.partition(b"\r\n")[0], 16)) > 0:
        rest = rest.partition(b"\r\n")[2]
        body, rest = body + rest[:size], rest[size + 2 :]
    return body.decode()


def said(stream: str) -> list[Any]:
    """What the events say of tokens; an OpenAI answer's id and time are its own."""
    events = [json.loads(line.removeprefix("data: ")) for line in stream.split("\n\n") if line[6:].startswith("{")]
    return [event.get("choices") or event for event in events]


def test_a_request_before_its_load_ends_can_be_left(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(tiny) as server:
        adapter = tiny.adapter(seed=95)
        read = server.serving.adapters._read

        go_on = threading.Event()

        def slowly(folder: Any) -> Any:
            assert go_on.wait(120)
            return read(folder)

        monkeypatch.setattr(server.serving.adapters, "_read", slowly)
        body = {"inputs": "a", "parameters": {"adapter_id": adapter}}
        leaving = connect(server, "/generate", body)
        wait(lambda: server.serving.adapters.entries())
        # Others do not wait for the load.
        assert server.generate(inputs="a", parameters={"max_new_tokens": 1}).status_code == 200
        assert server.serving.adapters.entries()[0].state == "loading"
        leaving.close()
        go_on.set()
        server.wait_until_idle()
        wait(lambda: server.serving.adapters.entries()[0].state == "resident")
        assert server.serving.adapters.entries()[0].references == 0
