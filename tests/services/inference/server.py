"""The real application under uvicorn, in a thread of the test's process, on a free port."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import uvicorn

from services.inference.app import create_app
from services.inference.build import assemble, beside_vllm
from services.inference.serving import Serving
from services.inference.settings import InferenceSettings
from shared.http.web import IDLE_CONNECTION_SECONDS
from tests.services.inference.harness import Tiny


@dataclass
class Server:
    url: str
    http: httpx.Client
    serving: Serving
    settings: InferenceSettings
    tiny: Tiny

    def generate(self, **body: Any) -> httpx.Response:
        return self.http.post("/generate", json=body)

    def ids(self, **body: Any) -> list[int]:
        """Generated ids of a request that must succeed."""
        body["parameters"] = body.get("parameters", {}) | {"details": True}
        response = self.generate(**body)
        assert response.status_code == 200, response.text
        return [token["id"] for token in response.json()["details"]["tokens"]]

    def prompt(self, text: str) -> list[int]:
        return self.serving.tokenizer.encode(text, add_special_tokens=True)

    def wait_until_idle(self) -> None:
        deadline = time.monotonic() + 120
        while True:
            stats = self.serving.engine.stats()
            entries = self.serving.adapters.entries()
            held = sum(entry.references for entry in entries)
            leaving = any(entry.state == "draining" for entry in entries)
            if not (stats.running or stats.waiting or stats.waiting_tokens or held or leaving):
                return
            assert time.monotonic() < deadline, f"not idle: {stats}, {held} references"
            time.sleep(0.01)


@contextmanager
def running(tiny: Tiny, *, send_buffer: int = 0, **settings: Any) -> Iterator[Server]:
    """Serve the tiny base until the block ends.

    Args:
        send_buffer: bytes of an answer that the system takes before they are read, about; its own choice if 0.
    """
    chosen = InferenceSettings(**{"slots": 4, "context": 256, "prefill_chunk": 32} | settings)
    built: list[Serving] = []

    def build() -> Serving:
        if chosen.engine == "vllm":
            built.append(beside_vllm(tiny.base, chosen, tiny.store))
        else:
            built.append(assemble(tiny.load(), chosen, tiny.store))
        return built[0]

    # With the protocol named asyncio sets TCP_NODELAY, as it does for sockets it makes itself; without, every answer
    # waits 40 ms for a delayed acknowledgement.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        if send_buffer:
            # Connections inherit it.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        config = uvicorn.Config(
            create_app(chosen, build),
            log_config=None,
            access_log=False,
            timeout_keep_alive=IDLE_CONNECTION_SECONDS,
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive(), "the server did not start"
                time.sleep(0.01)
            with httpx.Client(base_url=url, timeout=60) as client:
                yield Server(url, client, built[0], chosen, tiny)
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive()
