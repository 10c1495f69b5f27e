"""The bearer token and the body limit act before a body is read."""

import socket
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError

from services.inference.settings import InferenceSettings
from tests.services.inference.harness import Tiny
from tests.services.inference.server import Server, running

TOKEN = "a-secret-of-the-test"


@pytest.fixture(scope="module")
def guarded(tiny: Tiny) -> Iterator[Server]:
    with running(tiny, internal_token=TOKEN, body_bytes=4096) as server:
        yield server


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}x", "Bearer ä"]
)
def test_everything_but_health_needs_the_token(guarded: Server, header: str | None) -> None:
    headers: dict[str, Any] = {} if header is None else {"authorization": header.encode()}
    for method, path in [
        ("POST", "/generate"), ("POST", "/"), ("POST", "/generate_stream"), ("POST", "/v1/completions"),
        ("POST", "/v1/chat/completions"), ("GET", "/v1/models"), ("GET", "/adapters"), ("GET", "/info"),
        ("PUT", "/adapters/adapter-x"), ("DELETE", "/adapters/adapter-x"), ("PUT", "/adapters/adapter-x/pin"),
        ("DELETE", "/adapters/adapter-x/pin"), ("GET", "/metrics"),
    ]:  # fmt: skip
        answer = guarded.http.request(method, path, headers=headers)
        assert answer.status_code == 401, path
        assert TOKEN not in answer.text
    for path in ("/health", "/health/live", "/health/ready"):
        assert guarded.http.get(path, headers=headers).status_code == 200


def test_the_token_opens(guarded: Server) -> None:
    headers = {"authorization": f"Bearer {TOKEN}"}
    body = {"inputs": "a", "parameters": {"max_new_tokens": 1}}
    assert guarded.http.post("/generate", json=body, headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200), ("localhost", 200), ("LOCALHOST:1234", 200), ("[::1]:80", 200),
        ("evil.example", 401), ("127.0.0.1.evil.example", 401), ("localhost.", 401), ("evil.example:8100", 401),
    ],
)  # fmt: skip
def test_without_a_token_only_local_names_are_answered(server: Server, host: str, status: int) -> None:
    assert server.http.get("/info", headers={"host": host}).status_code == status
    assert server.http.get("/health/live", headers={"host": host}).status_code == 200
    assert server.http.get("/info").status_code == 200


def send(server: Server, headers: str, body: bytes) -> bytes:
    """The beginning of the answer to a raw request whose body is not sent in full."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.settimeout(120)
        connection.sendall(f"POST /generate HTTP/1.1\r\nhost: localhost\r\n{headers}\r\n".encode() + body)
        return connection.recv(4096)


def test_a_gigabyte_without_the_token_is_refused_unread(guarded: Server) -> None:
    assert b" 401 " in send(guarded, "content-length: 1000000000\r\n", b"{").splitlines()[0]


def test_bodies_are_bounded_whether_announced_or_not(guarded: Server) -> None:
    bearer = f"authorization: Bearer {TOKEN}\r\ncontent-type: application/json\r\n"
    announced = send(guarded, f"{bearer}content-length: 1000000000\r\n", b"{")
    assert b" 413 " in announced.splitlines()[0]
    chunk = b"1000\r\n" + b" " * 4096 + b"\r\n"
    assert b" 413 " in send(guarded, f"{bearer}transfer-encoding: chunked\r\n", chunk * 2).splitlines()[0]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.1", "example.org"])
def test_a_public_address_needs_a_token(host: str) -> None:
    with pytest.raises(ValidationError, match="TUNESMITH_INTERNAL_TOKEN"):
        InferenceSettings(host=host)
    assert InferenceSettings(host=host, internal_token=TOKEN).host == host


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_INFERENCE_PORT", "9000")
    monkeypatch.setenv("TUNESMITH_INFERENCE_BASE", "tiny")
    monkeypatch.setenv("TUNESMITH_INTERNAL_TOKEN", "t")
    settings = InferenceSettings()
    assert (settings.port, settings.base, settings.internal_token.get_secret_value()) == (9000, "tiny", "t")
    assert settings.host == "127.0.0.1"
    monkeypatch.setenv("TUNESMITH_INFERENCE_SLOTS", "0")
    with pytest.raises(ValidationError):
        InferenceSettings()
