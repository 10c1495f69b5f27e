"""Serving over HTTP, inference directly and through the gateway: one stream, and an open loop of many."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import insert

from benchmarks import serve_gateway
from benchmarks.serve_engine import percentile
from benchmarks.serve_load import TOKEN_VARIABLE
from shared.jobs.spec import JobSpec
from shared.jobs.store import JobStore
from shared.storage.database import Database
from shared.storage.tables import adapters
from tunesmith.connection import Connection
from tunesmith.local_stack import stack

CLIENTS, LOADED_SHARE, ROUNDS = 16, 0.6, 2
Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One of the two servers that a request can be sent to."""

    url: str
    token: str


def measure(home: Path, base: str, precision: str, names: list[str], *, requests: int, seconds: float) -> Json:
    """Start a whole stack in a home folder whose artifacts hold the prepared base and the adapters named.

    Args:
        names: adapter ids that the requests of the loops take in turn.
        requests: of the comparison on one stream.
        seconds: of each stretch of load.

    Returns:
        `gateway` (see `serve_gateway.compare`) and `http` (see `loops`).
    """
    with running_stack(home, base, precision) as connection:
        register_adapters(names, base, connection.database_url)
        endpoints = {
            "direct": Endpoint(connection.inference_url, _inference_token(connection)),
            "gateway": Endpoint(connection.url, connection.api_key),
        }
        pairs = {name: (endpoint.url, endpoint.token) for name, endpoint in endpoints.items()}
        return {"gateway": serve_gateway.compare(pairs, requests), "http": loops(endpoints, names, seconds)}


@contextmanager
def running_stack(home: Path, base: str, precision: str) -> Iterator[Connection]:
    environ = {**os.environ, "TUNESMITH_INFERENCE_PRECISION": precision}
    connection = stack.up(home, port=0, base=base, environ=environ).connection
    try:
        yield connection
    finally:
        stack.down(home)


def register_adapters(names: list[str], base: str, database_url: str) -> None:
    """Register adapters that no job trained with the gateway: as rows of a job that has ended."""
    database = Database(database_url)
    store = JobStore()
    spec = JobSpec(base=base, base_revision="", training_file="file-none", training_sha256="0" * 64)
    row = {"project": "default", "lease_token": 0, "state": "published", "base": base, "created_ns": 0}
    with database.write() as tx:
        job = store.create(tx, "default", spec).id
        store.cancel(tx, "default", job)
        tx.execute(insert(adapters), [row | {"id": name, "name": name, "job": job} for name in names])
    database.close()


def loops(endpoints: dict[str, Endpoint], names: list[str], seconds: float, *, tokens: int = 32) -> Json:
    """Inference at its limit, then both endpoints in turn at a share of that load.

    Returns:
        `closed_loop`: requests and tokens per second of clients that send again at once. `direct` and `gateway`: times
        to the first token (from when a request was due) and between tokens in milliseconds, and how many requests were
        answered, refused (429, 503) and broken, at `rate` requests per second.
    """
    work = ["--tokens", str(tokens), "--adapters", *names]
    # The first stretch loads the adapters and warms everything.
    for stretch in (seconds / 4, seconds):
        most = load(endpoints["direct"], *work, "--clients", str(CLIENTS), "--seconds", str(stretch))
    capacity = most["statuses"].get("200", 0) / most["seconds"]
    seen: dict[str, list[Json]] = {name: [] for name in endpoints}
    for number in range(ROUNDS):
        for name, endpoint in endpoints.items():
            arrivals = ["--rate", f"{LOADED_SHARE * capacity:.3f}", "--seed", str(number), "--seconds", str(seconds)]
            seen[name].append(load(endpoint, *work, *arrivals))
    return {
        "adapters": len(names),
        "new_tokens": tokens,
        "closed_loop": {
            "clients": CLIENTS,
            "requests_per_second": round(capacity, 2),
            "tokens_per_second": round(capacity * tokens, 1),
        },
        "rate": round(LOADED_SHARE * capacity, 3),
        **{name: _summary(rounds) for name, rounds in seen.items()},
    }


def load(endpoint: Endpoint, *arguments: str) -> Json:
    """The measurements of a load process."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.serve_load", "--url", endpoint.url, *arguments],
        env={**os.environ, TOKEN_VARIABLE: endpoint.token},
        stdout=subprocess.PIPE,
        check=True,
    )
    seen: Json = json.loads(done.stdout)
    return seen


def _summary(rounds: list[Json]) -> Json:
    statuses: Counter[str] = sum((Counter(each["statuses"]) for each in rounds), Counter())
    answered = statuses.pop("200", 0)
    refused = statuses.pop("429", 0) + statuses.pop("503", 0)
    return {
        "ttft_ms": _spread([value for each in rounds for value in each["first_ms"]]),
        "itl_ms": _spread([value for each in rounds for value in each["gaps_ms"]]),
        "answered": answered,
        "refused": refused,
        "broken": statuses.total(),
    }


def _spread(values: list[float]) -> Json:
    return {f"p{share:.0f}": round(percentile(values, share / 100), 2) for share in (50, 99)} if values else {}


def _inference_token(connection: Connection) -> str:
    """The secret between gateway and inference, new at each start: read from our own child's environment."""
    for entry in Path(f"/proc/{connection.pids['inference']}/environ").read_bytes().split(b"\0"):
        name, _, value = entry.partition(b"=")
        if name == b"TUNESMITH_INTERNAL_TOKEN":
            return value.decode()
    return ""
