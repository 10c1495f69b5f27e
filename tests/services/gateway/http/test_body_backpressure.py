"""What the server receives, byte for byte, of a body that it has not asked for."""

import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import ClassVar

import httpx
import pytest

from services.gateway.http.client_timeouts import TimeoutProtocol
from services.gateway.settings import GatewaySettings
from tests.services.gateway.conftest import ROWS, Gateway, as_jsonl, running_gateway

GIGABYTE = 1 << 30
FORM = {"content-type": "multipart/form-data; boundary=x"}
WRONG_KEY = "Bearer ts-" + "w" * 43


class Counting(TimeoutProtocol):
    """Counts the bytes of every connection as they leave the socket."""

    received: ClassVar[list[int]] = []

    def data_received(self, data: bytes) -> None:
        self.received.append(len(data))
        super().data_received(data)


@pytest.fixture
def received() -> list[int]:
    Counting.received.clear()
    return Counting.received


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, redis_server: str) -> Iterator[Gateway]:
    settings = GatewaySettings.model_validate({"home": tmp_path_factory.mktemp("home"), "redis_url": redis_server})
    with running_gateway(settings, Counting) as running:
        yield running


@pytest.mark.parametrize("with_the_head", [0, 1 << 19])
@pytest.mark.parametrize("key", ["", f"Authorization: {WRONG_KEY}\r\n"])
@pytest.mark.parametrize("length", [f"Content-Length: {GIGABYTE}\r\n", "Transfer-Encoding: chunked\r\n"])
def test_a_gigabyte_without_a_key_is_refused_before_64_kilobytes_are_read(
    gateway: Gateway, received: list[int], length: str, key: str, with_the_head: int
) -> None:
    head = f"POST /v1/files HTTP/1.1\r\nHost: a\r\n{length}{key}Content-Type: {FORM['content-type']}\r\n\r\n"
    chunk = b"10000\r\n" + b"x" * 65_536 + b"\r\n" if "chunked" in length else b"x" * 65_536
    start = head.encode() + chunk * (with_the_head // 65_536)
    port = int(gateway.url.rsplit(":", 1)[1])
    ended = False
    with socket.create_connection(("127.0.0.1", port), timeout=120) as connection:
        with suppress(ConnectionError):
            connection.sendall(start)
            for _ in range(GIGABYTE // 65_536):
                connection.sendall(chunk)
        # The server has closed; its answer came first.
        with suppress(ConnectionError):
            answer = connection.recv(65_536)
            ended = True
    assert ended
    assert answer.startswith(b"HTTP/1.1 401")
    assert 0 < sum(received) < 64_000


@pytest.mark.parametrize("headers", [{}, {"authorization": WRONG_KEY}])
def test_a_client_that_sends_it_all_the_same_sees_why_it_was_refused(
    gateway: Gateway, received: list[int], headers: dict[str, str]
) -> None:
    def body() -> Iterator[bytes]:
        for _ in range(GIGABYTE // 65_536):
            yield b"x" * 65_536

    answer = httpx.post(gateway.url + "/v1/files", headers=FORM | headers, content=body(), trust_env=False)
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert sum(received) < 64_000


def test_what_is_asked_for_is_received_in_large_pieces(gateway: Gateway, received: list[int]) -> None:
    data = as_jsonl([{"instruction": f"{n}", "output": "b" * 9000} for n in range(2000)])
    answer = gateway.upload(data)
    assert answer.json()["bytes"] == len(data)
    assert sum(received) > len(data)
    assert max(received) > 64_000


def test_requests_follow_one_another_on_one_connection_read_or_not(gateway: Gateway, received: list[int]) -> None:
    """Small bodies, refused unread, read by no route, or read: the connection is kept and goes on."""
    with httpx.Client(base_url=gateway.url, trust_env=False) as http:
        mine = {"authorization": f"Bearer {gateway.key}"}
        sockets = set()
        for _ in range(5):
            for headers, body, status in (
                ({}, b"x" * 40_000, 401),
                (mine, b"x" * 40_000, 422),
                (mine, b'{"inputs": "a"}', 503),
            ):
                answer = http.post("/generate", content=body, headers=headers)
                assert answer.status_code == status, answer.text
                sockets.add(answer.extensions["network_stream"].get_extra_info("client_addr"))
            assert http.request("GET", "/health/live", content=b"x" * 40_000).status_code == 200
    assert len(sockets) == 1
    assert gateway.upload(ROWS).is_success


def test_a_body_of_tiny_chunks_holds_up_no_other_request(gateway: Gateway, received: list[int]) -> None:
    """Each chunk takes time whatever is in it: few of them are taken at once, and others are served in between."""
    chunks = 60_000
    host, port = gateway.url.removeprefix("http://").split(":")
    key = gateway.http.headers["authorization"]
    head = (
        f"POST /v1/fine_tuning/jobs HTTP/1.1\r\nHost: x\r\nAuthorization: {key}\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    others = 0
    with socket.create_connection((host, int(port))) as client, httpx.Client(base_url=gateway.url) as other:
        client.sendall(head.encode())
        sending = threading.Thread(target=client.sendall, args=(b"1\r\na\r\n" * chunks + b"0\r\n\r\n",))
        sending.start()
        answer = threading.Thread(target=client.recv, args=(1,))
        answer.start()
        while answer.is_alive():
            assert other.get("/health/live").status_code == 200
            others += 1
        sending.join()
    assert max(received) <= Counting.head_piece
    # In pieces of 256 KiB it would be two or three.
    assert others > 10
