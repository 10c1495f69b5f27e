"""A gateway as its clients meet it: a real server on a free port, real SQLite, a real Redis-protocol server."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from openai import OpenAI
from redis import Redis
from uvicorn.protocols.http.h11_impl import H11Protocol

from services.gateway.app import create_app
from services.gateway.http.client_timeouts import TimeoutProtocol
from services.gateway.services import Services
from services.gateway.settings import GatewaySettings
from shared.bases.catalogue import load_catalogue
from shared.http.web import IDLE_CONNECTION_SECONDS
from shared.jobs.heartbeats import Heartbeats
from shared.jobs.leases import Leases
from shared.storage.database import migrate
from tests.jobs import Jobs
from tests.services.gateway.event_loop import blocking_calls
from tests.stack_processes import running_redis

ROWS = [{"instruction": f"What is {n} + {n}?", "output": f"{n + n}"} for n in range(60)]


@pytest.fixture(scope="session")
def redis_server() -> Iterator[str]:
    """The URL of a Redis-protocol server."""
    with running_redis() as url:
        yield url


@pytest.fixture
def redis_url(redis_server: str) -> str:
    """The same server, empty."""
    with Redis.from_url(redis_server) as client:
        client.flushall()
    return redis_server


@contextmanager
def served(app: FastAPI, protocol: type[H11Protocol] = TimeoutProtocol) -> Iterator[str]:
    """The base URL of `app` on a free port, under a real uvicorn."""
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            host="127.0.0.1",
            port=0,
            http=protocol,
            timeout_keep_alive=IDLE_CONNECTION_SECONDS,
            log_config=None,
            timeout_graceful_shutdown=2,
            server_header=False,
        )
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise RuntimeError("the server did not start")
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@dataclass(frozen=True)
class Gateway:
    """A running gateway and its first key's client."""

    url: str
    key: str
    app: FastAPI
    settings: GatewaySettings
    http: httpx.Client

    @property
    def services(self) -> Services:
        services: Services = self.app.state.services
        return services

    @property
    def jobs(self) -> Jobs:
        return Jobs(self.services.database)

    @property
    def leases(self) -> Leases:
        """What a worker on this gateway's database does."""
        return Leases(self.services.database)

    @property
    def heartbeats(self) -> Heartbeats:
        return Heartbeats(self.services.database)

    def openai(self) -> OpenAI:
        """OpenAI's own client, which refuses every answer that is not exactly in OpenAI's shape."""
        return OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0, _strict_response_validation=True)

    def upload(self, data: bytes | list[dict[str, Any]], filename: str = "data.jsonl") -> httpx.Response:
        content = data if isinstance(data, bytes) else as_jsonl(data)
        return self.http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": (filename, content)})

    def uploaded(self, data: bytes | list[dict[str, Any]]) -> str:
        answer = self.upload(data)
        assert answer.status_code == 200, answer.text
        file_id: str = answer.json()["id"]
        return file_id


def eventually(condition: Callable[[], bool]) -> None:
    """Wait for what another thread or process does."""
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.01)


def as_jsonl(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@contextmanager
def running_gateway(settings: GatewaySettings, protocol: type[H11Protocol] = TimeoutProtocol) -> Iterator[Gateway]:
    """A gateway from start to stop, whose event loop must do no SQL and no file call meanwhile."""
    migrate(settings.sql_url)
    app = create_app(settings, load_catalogue(settings.catalogue))
    with blocking_calls(settings.home) as seen:
        with served(app, protocol) as url:
            key = settings.key_path.read_text().strip()
            with httpx.Client(base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=120) as http:
                yield Gateway(url, key, app, settings, http)
        assert not seen, "on the event loop:\n" + "\n".join(seen)


@pytest.fixture
def settings(tmp_path: Path, redis_url: str) -> Callable[..., GatewaySettings]:
    """Makes settings of an installation in the test's own folder."""

    def make(**changes: Any) -> GatewaySettings:
        return GatewaySettings.model_validate({"home": tmp_path, "redis_url": redis_url} | changes)

    return make


@pytest.fixture
def gateway(settings: Callable[..., GatewaySettings]) -> Iterator[Gateway]:
    with running_gateway(settings()) as running:
        yield running
