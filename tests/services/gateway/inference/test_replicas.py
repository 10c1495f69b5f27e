"""Inference processes that hang, die and come back: nobody waits for them, and they are used again."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from services.gateway.inference import prober
from services.gateway.settings import GatewaySettings
from tests.services.gateway.conftest import Gateway, eventually, running_gateway
from tests.services.gateway.inference_stand_in import StandIn, standing_in

BASE = "smollm2-135m-instruct"
Settings = Callable[..., GatewaySettings]


class HungServer:
    """Accepts connections, reads what is sent and never answers.

    Attributes:
        requests: the head of each request, in lower case.
        left: how many connections the other side has closed.
    """

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.requests: list[str] = []
        self.left = 0
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                thread = threading.Thread(target=self._read, args=(connection,))
                self._threads.append(thread)
                thread.start()

    def _read(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            while received := connection.recv(65_536):
                self.requests.append(received.decode("latin-1").lower())
        self.left += 1

    def close(self) -> None:
        # Closing alone would leave the thread in `accept`.
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join()


@contextmanager
def hung_server() -> Iterator[HungServer]:
    server = HungServer()
    try:
        yield server
    finally:
        server.close()


@pytest.fixture
def quick_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prober, "TIMEOUT_SECONDS", 1.5)
    monkeypatch.setattr(prober, "PAUSE_WHILE_UP_SECONDS", 0.1)
    monkeypatch.setattr(prober, "PAUSE_WHILE_DOWN_SECONDS", 0.1)


def test_no_request_waits_for_a_hung_process(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """All are answered while the very first probe of the hung one still waits for its answer."""
    monkeypatch.setattr(prober, "TIMEOUT_SECONDS", 3600.0)
    # Stopped last: the gateway drops the probe.
    with hung_server() as hung, standing_in(BASE) as healthy:
        with running_gateway(settings(inference_urls=(hung.url, healthy.url))) as gateway:
            eventually(lambda: len(hung.requests) == 1)
            for _ in range(10):
                assert gateway.http.post("/generate", json={"inputs": "a"}).is_success
                assert gateway.http.get("/health/ready").json()["inference"][BASE]
                assert BASE in {model["id"] for model in gateway.http.get("/v1/models").json()["data"]}
                assert gateway.http.get("/info").json()["base"] == BASE
            assert [request.splitlines()[0] for request in hung.requests] == ["get /info http/1.1"]
            assert hung.left == 0
        assert len(healthy.sent) == 10


def test_a_process_is_probed_again_after_every_timeout(settings: Settings, quick_probes: None) -> None:
    with hung_server() as hung, running_gateway(settings(inference_urls=(hung.url,))) as gateway:
        eventually(lambda: hung.left >= 3)
        answer = gateway.http.post("/v1/completions", json={"model": BASE, "prompt": "a"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "base_not_served")
        # Each on a connection of its own: one that stayed open would be served by a process that is stopping.
        assert all(request.startswith("get /info ") for request in hung.requests)
        assert all("\r\nconnection: close\r\n" in request for request in hung.requests)


def test_a_process_that_hangs_is_passed_over_and_used_again_when_it_recovers(
    settings: Settings, quick_probes: None
) -> None:
    with (
        standing_in(BASE) as first,
        standing_in(BASE) as second,
        running_gateway(settings(inference_urls=(first.url, second.url))) as gateway,
    ):
        both_are_used(gateway, first, second)
        first.hanging = True
        # Until the next probe fails it is believed to be well: what was sent there in this time is taken to the other.
        for _ in range(20):
            assert gateway.http.post("/generate", json={"inputs": "a"}).is_success
        eventually(lambda: not gateway.services.replicas.all[0].base)
        assert first.closed == first.started
        first.hanging = False
        both_are_used(gateway, first, second)


def both_are_used(gateway: Gateway, first: StandIn, second: StandIn) -> None:
    first.sent.clear()
    second.sent.clear()

    def asked() -> bool:
        assert gateway.http.post("/generate", json={"inputs": "a"}).is_success
        return bool(first.sent and second.sent)

    eventually(asked)


def test_with_no_other_process_a_slow_one_is_waited_for(settings: Settings, quick_probes: None) -> None:
    with standing_in(BASE) as only, running_gateway(settings(inference_urls=(only.url,))) as gateway:
        only.unfinished = True
        with gateway.http.stream("POST", "/generate_stream", json={"inputs": "a"}) as running:
            only.slow = True
            answers: list[int] = []
            waiting = threading.Thread(
                target=lambda: answers.append(gateway.http.post("/generate", json={"inputs": "a"}).status_code)
            )
            waiting.start()
            eventually(lambda: only.started == ["/generate"])
            only.hanging = True
            eventually(lambda: gateway.services.replicas.served() == [])
            assert gateway.http.post("/generate", json={"inputs": "a"}).status_code == 503
            # What it began goes on, and what waits for it still waits.
            assert only.closed == []
            only.hanging = only.slow = only.unfinished = False
            assert "last" in running.read().decode()
        waiting.join()
        assert answers == [200]
        eventually(lambda: gateway.services.replicas.served() == [BASE])


def test_a_recovered_process_is_used_within_ten_seconds() -> None:
    """The longest way: it recovers just after a probe was sent to it, and that one gets no answer any more."""
    assert prober.TIMEOUT_SECONDS + prober.PAUSE_WHILE_DOWN_SECONDS < 10
