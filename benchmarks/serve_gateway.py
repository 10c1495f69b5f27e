"""What the gateway adds: the same request over HTTP, to inference directly and through the gateway, in turn."""

import time
from itertools import pairwise
from statistics import mean, median
from typing import Any

import httpx

_WARM = 5
_BODY = {"inputs": "def f(x):", "parameters": {"max_new_tokens": 8, "ignore_eos_token": True}}
Times = dict[str, list[float]]


def compare(endpoints: dict[str, tuple[str, str]], requests: int) -> dict[str, Any]:
    """One request after the other, by `direct` and `gateway` in turn.

    Args:
        endpoints: name → URL and bearer token.

    Returns:
        Median milliseconds of a whole request, of the first streamed token and between two tokens, by endpoint, and of
        the differences between neighbours.
    """
    clients = {
        name: httpx.Client(base_url=url, headers={"Authorization": f"Bearer {token}"}, timeout=60, trust_env=False)
        for name, (url, token) in endpoints.items()
    }
    whole, first, between = ({name: list[float]() for name in endpoints} for _ in range(3))
    for number in range(_WARM + requests):
        for name, client in clients.items():
            total = _whole_ms(client)
            start, gap = _streamed_ms(client)
            if number >= _WARM:
                whole[name].append(total)
                first[name].append(start)
                between[name].append(gap)
    for client in clients.values():
        client.close()
    return {
        "whole_ms": _medians(whole),
        "first_token_ms": _medians(first),
        "inter_token_ms": _medians(between),
        "overhead_ms": {"whole": _added(whole), "first_token": _added(first), "inter_token": _added(between)},
        "requests": requests,
    }


def _medians(times: Times) -> dict[str, float]:
    return {name: round(median(values), 2) for name, values in times.items()}


def _added(times: Times) -> float:
    pairs = zip(times["gateway"], times["direct"], strict=True)
    return round(median(gateway - direct for gateway, direct in pairs), 2)


def _whole_ms(client: httpx.Client) -> float:
    started = time.perf_counter()
    client.post("/generate", json=_BODY).raise_for_status()
    return (time.perf_counter() - started) * 1e3


def _streamed_ms(client: httpx.Client) -> tuple[float, float]:
    """Until the first token, and between two tokens on average."""
    moments = [time.perf_counter()]
    with client.stream("POST", "/generate_stream", json=_BODY) as response:
        response.raise_for_status()
        moments += [time.perf_counter() for line in response.iter_lines() if line.startswith("data:")]
    gaps = [(after - before) * 1e3 for before, after in pairwise(moments)]
    return gaps[0], mean(gaps[1:])
