"""Gateway and inference as processes: what is published is warm, leaving frees a slot, and SIGTERM lets all finish."""

import json
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

import httpx
import pytest

from tests.cluster import TOKEN, Cluster, tiny_stack
from tests.contract.server import trained
from tests.stack_processes import answers, wait_until

pytestmark = pytest.mark.servers

LONG: dict[str, Any] = {"max_new_tokens": 240, "ignore_eos_token": True}
LOADS = "tunesmith_adapter_loads_total"
SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 1.5}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One of its own: inference is stopped and started here."""
    with tiny_stack(tmp_path_factory.mktemp("stack")) as running:
        yield running


@pytest.fixture
def http(stack: Cluster) -> Iterator[httpx.Client]:
    with stack.client() as client:
        yield client


def inference(stack: Cluster) -> httpx.Client:
    headers = {"authorization": f"Bearer {TOKEN}"}
    return httpx.Client(base_url=stack.inference_url, headers=headers, timeout=60, trust_env=False)


def metric(stack: Cluster, name: str) -> float:
    """One of inference's own counters or gauges without labels."""
    with inference(stack) as client:
        lines = client.get("/metrics").text.splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(f"{name} ")))


def entries(stack: Cluster) -> dict[str, dict[str, Any]]:
    """Adapters in inference's memory, by id."""
    with inference(stack) as client:
        return {entry["id"]: entry for entry in client.get("/adapters").json()["data"]}


def idle(stack: Cluster) -> bool:
    return metric(stack, "tgi_batch_current_size") == metric(stack, "tgi_queue_size") == 0


def streamed(stack: Cluster, client: httpx.Client, number: int, begun: list[int] | None = None) -> str:
    """The text of a long stream; `begun` learns when its first event is there."""
    body = {"inputs": f"prompt {number}", "parameters": LONG | (SAMPLED | {"seed": number} if number % 2 else {})}
    pieces, events = "", 0
    with client.stream("POST", "/generate_stream", json=body) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if line:
                event = json.loads(line.removeprefix("data:"))
                assert "error" not in event, event
                pieces += event["token"]["text"]
                events += 1
                if begun is not None and events == 1:
                    begun.append(number)
    assert event["generated_text"] == pieces
    assert events == LONG["max_new_tokens"]
    return pieces


def test_a_published_adapter_is_warm_before_anybody_asks(stack: Cluster, http: httpx.Client) -> None:
    before, loads, asked = set(entries(stack)), metric(stack, LOADS), metric(stack, "tgi_request_count_total")
    job = trained(stack)
    model = http.get(f"/v1/fine_tuning/jobs/{job}").json()["fine_tuned_model"]
    adapter = http.get(f"/v1/models/{model}").json()["adapter"]

    def state() -> object:
        return entries(stack).get(adapter, {}).get("state")

    wait_until(lambda: state() == "resident", "a prefetch", logs=stack.processes.tails)
    assert not entries(stack)[adapter]["in_flight"]
    # The final adapter alone: checkpoints are loaded by whoever asks for them.
    assert set(entries(stack)) - before == {adapter}
    assert metric(stack, "tgi_request_count_total") == asked
    assert metric(stack, LOADS) == loads + 1
    answer = http.post("/generate", json={"instruction": "What is 3?", "parameters": {"adapter_id": model}})
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-adapter-id"] == adapter
    assert "x-adapter-load-ms" not in answer.headers
    assert float(answer.headers["x-adapter-loaded-in-ms"]) > 0
    assert metric(stack, LOADS) == loads + 1
    wait_until(
        lambda: 'tunesmith_gateway_prefetches_total{outcome="loaded"} 1.0' in http.get("/metrics").text,
        "the gateway to count it",
    )
    log = (stack.folder / "logs" / "gateway.log").read_text()
    assert [json.loads(line)["adapter"] for line in log.splitlines() if '"adapter prefetched"' in line] == [adapter]


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_who_leaves_the_gateway_frees_the_slot(stack: Cluster, path: str) -> None:
    before, leaving = metric(stack, "tunesmith_engine_tokens_total"), 8

    def leave(number: int) -> None:
        host, port = stack.url.removeprefix("http://").split(":")
        content = json.dumps({"inputs": "a", "parameters": LONG}).encode()
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(
                f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
                f"authorization: Bearer {stack.key}\r\ncontent-length: {len(content)}\r\n\r\n".encode()
                + content
            )
            if path == "/generate_stream":
                assert connection.recv(1000).startswith(b"HTTP/1.1 200")

    with ThreadPoolExecutor(leaving) as pool:
        list(pool.map(leave, range(leaving)))
    wait_until(partial(idle, stack), "the slots", logs=stack.processes.tails)
    assert metric(stack, "tunesmith_engine_tokens_total") - before < leaving * LONG["max_new_tokens"]
    with stack.client() as client:
        assert client.post("/generate", json={"inputs": "a"}).status_code == 200


@pytest.fixture(scope="module")
def undisturbed(stack: Cluster) -> list[str]:
    """The texts of more streams than there are slots."""
    streams = 12
    with inference(stack) as client, ThreadPoolExecutor(streams) as pool:
        texts = list(pool.map(lambda number: streamed(stack, client, number), range(streams)))
    assert len(set(texts)) > streams // 2
    return texts


@pytest.mark.parametrize("way", ["direct", "gateway"])
def test_sigterm_lets_what_runs_and_what_waits_finish(
    stack: Cluster, http: httpx.Client, undisturbed: list[str], way: str
) -> None:
    """Some wait in the queue when the signal comes."""
    server, streams, begun = stack.inference[0], len(undisturbed), list[int]()
    with inference(stack) if way == "direct" else stack.client() as client, ThreadPoolExecutor(streams) as pool:
        futures = [pool.submit(streamed, stack, client, number, begun) for number in range(streams)]

        def everybody_is_in() -> bool:
            for future in futures:
                if future.done():
                    future.result()
            return bool(begun) and _everybody_is_in(stack, begun, streams)

        wait_until(everybody_is_in, "all of them", logs=stack.processes.tails)
        server.process.send_signal(signal.SIGTERM)
        wait_until(partial(_refused, stack), "inference to take no more", logs=stack.processes.tails)
        away = http.post("/generate", json={"inputs": "a"})
        assert (away.status_code, away.json()["error_type"]) == (503, "unavailable")
        assert not answers(f"{stack.inference_url}/health/ready")
        assert [future.result() for future in futures] == undisturbed
    assert server.process.wait(300) == 0
    log = [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]
    assert [line for line in log if line.get("level") in ("error", "critical")] == []
    server.restart()
    wait_until(partial(answers, f"{stack.inference_url}/health/ready"), "inference", logs=stack.processes.tails)
    wait_until(lambda: http.post("/generate", json={"inputs": "a"}).status_code == 200, "the gateway to see it")


def _everybody_is_in(stack: Cluster, begun: list[int], streams: int) -> bool:
    """Whether every stream has begun or is held by inference."""
    with suppress(httpx.TransportError):
        return len(begun) + metric(stack, "tgi_queue_size") >= streams
    return False


def _refused(stack: Cluster) -> bool:
    host, port = stack.inference_url.removeprefix("http://").split(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except ConnectionRefusedError:
        return True
    return False
