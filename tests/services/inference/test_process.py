"""`python -m services.inference`: it prepares its base, serves, drains on SIGTERM and refuses to be open."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.stack_processes import free_port, keeps_an_idle_connection
from tests.tiny import write_catalogue, write_tiny_model

pytestmark = pytest.mark.servers

ROOT = Path(__file__).parents[3]


def environment(home: Path, **more: str) -> dict[str, str]:
    own = {key: value for key, value in os.environ.items() if not key.startswith("TUNESMITH_")}
    return own | {"TUNESMITH_HOME": str(home), "OMP_NUM_THREADS": "1"} | more


@contextmanager
def process(home: Path, log: Path, **more: str) -> Iterator["tuple[subprocess.Popen[bytes], httpx.Client]"]:
    port = free_port()
    variables = environment(home, TUNESMITH_INFERENCE_PORT=str(port), **more)
    with log.open("wb") as stderr:
        running = subprocess.Popen(
            [sys.executable, "-m", "services.inference"], cwd=ROOT, env=variables, stderr=stderr, stdout=stderr
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            deadline = time.monotonic() + 120
            while True:
                assert running.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                try:
                    if client.get("/health/ready").status_code == 200:
                        break
                except httpx.TransportError:
                    time.sleep(0.1)
            yield running, client
    finally:
        running.kill()
        running.wait(120)


def test_it_serves_and_drains(tmp_path: Path) -> None:
    catalogue = write_catalogue(tmp_path / "catalogue.toml", write_tiny_model(tmp_path / "model"))
    log = tmp_path / "log"
    settings = {"TUNESMITH_CATALOGUE": str(catalogue), "TUNESMITH_INFERENCE_SLOTS": "2"}
    with process(tmp_path / "home", log, **settings) as (running, client):
        info = client.get("/info").json()
        assert (info["base"], info["slots"]) == ("tiny", 2)
        keeps_an_idle_connection(str(client.base_url))
        answers: list[httpx.Response] = []
        body: dict[str, Any] = {"inputs": "a", "parameters": {"max_new_tokens": 500, "ignore_eos_token": True}}
        asking = threading.Thread(target=lambda: answers.append(client.post("/generate", json=body)))
        asking.start()
        while "tgi_batch_current_size 1.0" not in client.get("/metrics").text:
            assert asking.is_alive()
        running.send_signal(signal.SIGTERM)
        asking.join(60)
        # What was in flight was answered whole, then the process ended by itself.
        assert answers[0].status_code == 200
        assert answers[0].headers["x-generated-tokens"] == "500"
        assert running.wait(60) == 0
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert {"serving", "request"} <= {line["event"] for line in lines}
    assert all(line["service"] == "inference" for line in lines if line["event"] in ("serving", "request"))


def test_it_refuses_at_start_what_it_cannot_serve_and_says_why(tmp_path: Path) -> None:
    catalogue = write_catalogue(tmp_path / "catalogue.toml", tmp_path / "nowhere")
    for variables, words in [
        ({"TUNESMITH_INFERENCE_HOST": "0.0.0.0"}, "TUNESMITH_INTERNAL_TOKEN"),
        ({"TUNESMITH_CATALOGUE": str(catalogue), "TUNESMITH_INFERENCE_BASE": "another"}, "no base model 'another'"),
        (
            {
                "TUNESMITH_CATALOGUE": str(catalogue),
                "TUNESMITH_INFERENCE_PRECISION": "bf16w",
                "ONEDNN_MAX_CPU_ISA": "AVX2",
            },
            "precision bf16w does not run on this processor",
        ),
    ]:
        ended = subprocess.run(
            [sys.executable, "-m", "services.inference"],
            cwd=ROOT,
            env=environment(tmp_path / "home", TUNESMITH_INFERENCE_PORT=str(free_port()), **variables),
            capture_output=True,
            timeout=120,
        )
        assert ended.returncode not in (0, None)
        assert words in ended.stderr.decode()
        assert "Traceback" not in ended.stderr.decode()


def test_the_openapi_document_needs_no_torch(tmp_path: Path) -> None:
    script = (
        "import sys, json; from services.inference.app import openapi_document; document = openapi_document();"
        "assert not {'torch', 'transformers'} & set(sys.modules); print(json.dumps(document))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment(tmp_path), capture_output=True, timeout=60, check=True
    )
    document = json.loads(ended.stdout)
    assert {"/generate", "/generate_stream", "/", "/v1/chat/completions", "/adapters/{adapter_id}"} <= set(
        document["paths"]
    )
