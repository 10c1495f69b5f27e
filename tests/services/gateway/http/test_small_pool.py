"""Previews and estimates compute in a few threads of their own: nobody else waits for them."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from services.gateway.http.small_pool import AT_ONCE, MOST_WAITING
from services.gateway.routes import file_preview
from shared.datasets.tokens import Tokenizer
from tests.services.gateway.conftest import Gateway, eventually
from tests.tiny import write_tiny_model

CHAT: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": f"hi {n}"}, {"role": "assistant", "content": "hello"}]} for n in range(20)
]


class Slow:
    """Stands in for rows that take long: each waits until it is let go."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.running = 0
        self.ended: list[str] = []

    def __call__(self, *arguments: Any) -> Iterator[object]:
        check: Callable[[], None] = arguments[3]
        self.running += 1
        try:
            while not self.go.wait(0.02):
                check()
            self.ended.append("let go")
        except BaseException as error:
            self.ended.append(type(error).__name__)
            raise
        finally:
            self.running -= 1
        return iter(())


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Slow]:
    slow = Slow()
    monkeypatch.setattr(file_preview, "tokenised_rows", slow)
    yield slow
    slow.go.set()


@pytest.fixture
def preview(gateway: Gateway, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[float], httpx.Response]:
    # The base need not be prepared.
    tokenizer = Tokenizer(write_tiny_model(tmp_path / "model"))
    monkeypatch.setattr("services.gateway.bases.tokenised.Tokenizers.get", lambda *_: tokenizer)
    file = gateway.uploaded(CHAT)
    path = f"/v1/files/{file}/preview?model=smollm2-135m-instruct"
    return lambda timeout: gateway.http.get(path, timeout=timeout)


def test_others_are_answered_and_too_many_are_refused(
    gateway: Gateway, slow: Slow, preview: Callable[[float], httpx.Response]
) -> None:
    with ThreadPoolExecutor(AT_ONCE + MOST_WAITING) as pool:
        held = [pool.submit(preview, 60) for _ in range(AT_ONCE + MOST_WAITING)]
        refused: list[httpx.Response] = []

        def one_is_refused() -> bool:
            with ThreadPoolExecutor(1) as one:
                try:
                    refused.append(one.submit(preview, 1).result())
                except httpx.TimeoutException:
                    return False
            return refused[-1].status_code == 429

        eventually(one_is_refused)
        assert slow.running == AT_ONCE
        assert refused[-1].headers["retry-after"] == "2"
        assert gateway.http.get("/v1/files").status_code == 200
        slow.go.set()
        # One that came as the pool filled may have been refused in another's place.
        assert {future.result().status_code for future in held} <= {200, 429}
    assert preview(60).status_code == 200


def test_what_nobody_waits_for_ends(slow: Slow, preview: Callable[[float], httpx.Response]) -> None:
    with pytest.raises(httpx.TimeoutException):
        preview(0.5)
    eventually(lambda: slow.ended == ["ClientDisconnect"])
    slow.go.set()
    began = time.monotonic()
    assert preview(60).status_code == 200
    assert time.monotonic() - began < 30
