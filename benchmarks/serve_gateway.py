"""What the gateway adds: the same request over HTTP, to inference directly and through the gateway, in turn."""

import time
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from tunesmith import stack

_WARM = 5


def measure(base: str, requests: int, home: Path) -> dict[str, Any]:
    """Start a whole stack in a home folder, whose artifacts may hold the prepared base, and compare one by one.

    Returns:
        Median milliseconds of a whole request and of the first streamed token, direct and through the gateway, and of
        the difference between neighbours.
    """
    connection = stack.up(home, port=0, base=base).connection
    try:
        inference = connection.as_json()["pids"]["inference"]
        with (
            httpx.Client(base_url=connection.inference_url, headers=_bearer(_token(inference)), timeout=60) as direct,
            httpx.Client(base_url=connection.url, headers=_bearer(connection.api_key), timeout=60) as gateway,
        ):
            return _compare(direct, gateway, requests)
    finally:
        stack.down(home)


def _token(pid: int) -> str:
    """The secret between gateway and inference, made anew at each start: read from our own child's environment."""
    for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
        name, _, value = entry.partition(b"=")
        if name == b"TUNESMITH_INTERNAL_TOKEN":
            return value.decode()
    return ""


def _bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def _compare(direct: httpx.Client, gateway: httpx.Client, requests: int) -> dict[str, Any]:
    whole: dict[str, list[float]] = {"direct": [], "gateway": []}
    first: dict[str, list[float]] = {"direct": [], "gateway": []}
    for number in range(_WARM + requests):
        for name, client in (("direct", direct), ("gateway", gateway)):
            asked, streamed = _whole_ms(client), _first_ms(client)
            if number >= _WARM:
                whole[name].append(asked)
                first[name].append(streamed)
    return {
        "whole_ms": {name: round(median(values), 2) for name, values in whole.items()},
        "first_token_ms": {name: round(median(values), 2) for name, values in first.items()},
        "overhead_ms": {
            "whole": round(median(_differences(whole)), 2),
            "first_token": round(median(_differences(first)), 2),
        },
        "requests": requests,
    }


def _differences(times: dict[str, list[float]]) -> list[float]:
    return [gateway - direct for gateway, direct in zip(times["gateway"], times["direct"], strict=True)]


_BODY = {"inputs": "def f(x):", "parameters": {"max_new_tokens": 4, "ignore_eos_token": True}}


def _whole_ms(client: httpx.Client) -> float:
    started = time.perf_counter()
    client.post("/generate", json=_BODY).raise_for_status()
    return (time.perf_counter() - started) * 1e3


def _first_ms(client: httpx.Client) -> float:
    started = time.perf_counter()
    with client.stream("POST", "/generate_stream", json=_BODY) as response:
        response.raise_for_status()
        lines = response.iter_lines()
        while not next(lines).startswith("data:"):
            continue
        elapsed = time.perf_counter() - started
        for _ in lines:
            continue
    return elapsed * 1e3
