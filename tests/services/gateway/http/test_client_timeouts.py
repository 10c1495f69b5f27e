"""Clients that never finish: they are let go, and nobody else notices."""

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from services.gateway.http.client_timeouts import TimeoutProtocol
from services.gateway.settings import GatewaySettings
from tests.services.gateway.conftest import ROWS, Gateway, as_jsonl, eventually, running_gateway


class QuickTimeouts(TimeoutProtocol):
    """Long enough for what a client sends at once, on a busy machine too."""

    head_seconds = 3.0
    body_seconds = 3.0


@pytest.fixture
def gateway(settings: Callable[..., GatewaySettings]) -> Iterator[Gateway]:
    with running_gateway(settings(), QuickTimeouts) as running:
        yield running


def connected(gateway: Gateway) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", int(gateway.url.rsplit(":", 1)[1])), timeout=120)
    connection.settimeout(120)
    return connection


@pytest.mark.parametrize(
    ("head", "status", "words"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 200_000, b"431", b"too long"),
        (b"GET /" + b"a" * 200_000, b"431", b"too long"),
        (b"what is this\r\n\r\n", b"400", b"no HTTP request"),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: what\r\n\r\n", b"400", b"no HTTP request"),
    ],
)
def test_a_head_that_cannot_be_read_is_refused_in_json(
    gateway: Gateway, head: bytes, status: bytes, words: bytes
) -> None:
    with connected(gateway) as connection:
        with suppress(ConnectionError):
            connection.sendall(head)
        answer = b""
        with suppress(ConnectionError):
            while piece := connection.recv(4096):
                answer += piece
    top, _, body = answer.partition(b"\r\n\r\n")
    assert top.startswith(b"HTTP/1.1 " + status)
    assert b"x-request-id: req-" in top.lower()
    error = json.loads(body)["error"]
    assert words.decode() in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


def trickled(connection: socket.socket, piece: bytes) -> bytes:
    """Send `piece` for ever, slowly; what the server said when it had enough."""
    answer = b""
    connection.settimeout(0.05)
    while True:
        try:
            connection.sendall(piece)
            answer += connection.recv(4096)
            return answer
        except TimeoutError:
            continue
        except OSError:
            return answer


def test_a_head_that_never_ends(gateway: Gateway) -> None:
    with connected(gateway) as connection:
        connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: a\r\n")
        answer = trickled(connection, b"X: y\r\n")
    assert answer.startswith(b"HTTP/1.1 408") or not answer


def test_a_connection_that_says_nothing(gateway: Gateway) -> None:
    with connected(gateway) as connection:
        assert connection.recv(1) == b""


def test_a_second_request_has_a_deadline_too(gateway: Gateway) -> None:
    with connected(gateway) as connection:
        connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: a\r\n\r\n")
        assert b" 200 " in connection.recv(4096)
        connection.sendall(b"GET /health/live HTTP/1.1\r\n")
        answer = trickled(connection, b"X: y\r\n")
    assert answer.startswith((b"HTTP/1.1 408", b"{")) or not answer


def test_a_body_that_trickles_leaves_nothing(gateway: Gateway) -> None:
    staging = gateway.settings.artifacts_root / "staging"
    head = b"POST /v1/files HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer %b\r\nContent-Length: 9000000\r\n"
    head += b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
    head += b'Content-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
    connections = [connected(gateway) for _ in range(10)]
    for connection in connections:
        connection.sendall(head % gateway.key.encode())
    # Others are served meanwhile.
    assert gateway.upload(ROWS).is_success
    for connection in connections:
        trickled(connection, b"\n")
        connection.close()
    eventually(lambda: not any(staging.iterdir()))


def test_a_slow_upload_that_makes_progress_is_received(gateway: Gateway) -> None:
    rows = as_jsonl([{"instruction": "a", "output": "b" * 6000}] * 14)

    def body() -> Iterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="slow.jsonl"\r\n\r\n'
        for row in rows.splitlines(keepends=True):
            time.sleep(0.3)
            yield row
        yield b"\r\n--x--\r\n"

    headers = {"content-type": "multipart/form-data; boundary=x"}
    assert gateway.http.post("/v1/files", content=body(), headers=headers).json()["bytes"] == len(rows)


def test_slow_answers_are_nobodys_fault(gateway: Gateway) -> None:
    """A stream of events outlives every deadline of requests."""
    body = {"model": "smollm2-135m-instruct", "training_file": gateway.uploaded(ROWS)}
    job = gateway.http.post("/v1/fine_tuning/jobs", json=body).json()["id"]
    events = f"/v1/fine_tuning/jobs/{job}/events"
    with gateway.http.stream("GET", events, headers={"accept": "text/event-stream"}) as answer:
        pieces = answer.iter_text()
        next(pieces)
        time.sleep(QuickTimeouts.body_seconds + 1)
        gateway.http.post(f"/v1/fine_tuning/jobs/{job}/cancel")
        assert "".join(pieces).endswith("[DONE]\n\n")
