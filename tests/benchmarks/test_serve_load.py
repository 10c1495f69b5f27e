"""The load that the serving benchmark puts on a server: an open loop does not wait for answers, and nothing is lost."""

import asyncio
import json
import subprocess
import sys
import threading
import time

import httpx
import pytest

from benchmarks.serve_load import Load, Measurements
from tests.services.gateway.conftest import eventually
from tests.services.gateway.inference_stand_in import StandIn, standing_in
from tests.stack_processes import ROOT

TOKENS = 2  # Of the stand-in's responses.


def open_loop(server: StandIn, *, rate: float = 100, seconds: float = 0.5, seed: int = 1) -> Measurements:
    async def run() -> Measurements:
        async with httpx.AsyncClient(base_url=server.url, timeout=120, trust_env=False) as client:
            load = Load(client, ["adapter-1", ""], TOKENS)
            await load.open_loop(rate, seconds, seed)
            return load.measured

    return asyncio.run(run())


def test_one_seed_is_one_sequence_of_arrivals() -> None:
    with standing_in("tiny") as server:
        first, again, other = (open_loop(server, seed=seed) for seed in (1, 1, 2))
        assert first.statuses == again.statuses != other.statuses
        answered = first.statuses["200"]
        assert first.statuses.total() == answered
        assert 25 < answered < 100
        assert len(first.first_ms) == len(first.gaps_ms) == answered
        assert {sent["parameters"]["adapter_id"] for _, sent, _ in server.sent} == {"adapter-1", None}
        assert {sent["parameters"]["max_new_tokens"] for _, sent, _ in server.sent} == {TOKENS}


def test_an_open_loop_does_not_wait_for_answers() -> None:
    with standing_in("tiny", unfinished=True) as server:
        measured: list[Measurements] = []
        thread = threading.Thread(target=lambda: measured.append(open_loop(server)))
        thread.start()
        # No request has been answered, and they keep coming.
        eventually(lambda: len(server.sent) > 25)
        time.sleep(0.6)
        server.unfinished = False
        thread.join()
        assert measured[0].statuses["200"] == len(server.sent)
        # The second of two tokens was held back for all of them.
        assert max(measured[0].gaps_ms) > 500


def test_refused_and_broken_requests_are_counted_and_not_timed() -> None:
    with standing_in("tiny", status=429) as server:
        measured = open_loop(server)
        assert set(measured.statuses) == {"429"}
        assert measured.first_ms == []
    with standing_in("tiny", broken=True) as server:
        measured = open_loop(server)
        assert set(measured.statuses) == {"broken"}
        assert measured.first_ms == []


@pytest.mark.parametrize("arguments", [["--clients", "3"], ["--rate", "40", "--seed", "5"]])
def test_it_is_a_process_that_prints_what_it_measured(arguments: list[str]) -> None:
    with standing_in("tiny", token="between-us") as server:
        work = ["--url", server.url, "--tokens", str(TOKENS), "--seconds", "0.3", "--adapters", "a", "b"]
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.serve_load", *work, *arguments],
            cwd=ROOT,
            env={"BENCHMARK_TOKEN": "between-us"},
            capture_output=True,
            timeout=60,
            check=True,
        )
        measured = json.loads(done.stdout)
        assert measured["statuses"] == {"200": len(server.sent)}
        assert len(measured["first_ms"]) == len(server.sent) > 0
        assert measured["seconds"] > 0
