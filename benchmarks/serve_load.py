"""A process that loads a server over HTTP and prints what its clients measured: `python -m benchmarks.serve_load`.

It is a process of its own, so that it shares no interpreter with what it measures, and has no torch, so that it starts
fast. In an open loop requests arrive whatever the server does: a slow response delays no other client, and the time to
the first token counts from when its request was due (Schroeder, Wierman & Harchol-Balter 2006).
"""

import argparse
import asyncio
import json
import os
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise

import httpx

TOKEN_VARIABLE = "BENCHMARK_TOKEN"
_SUBJECTS = sorted(name for name in sys.stdlib_module_names if not name.startswith("_"))


@dataclass
class Measurements:
    """What the clients measured; times in milliseconds.

    Attributes:
        first_ms: from when a request was due to its first token.
        gaps_ms: between two tokens of one stream.
        statuses: HTTP status → requests; `broken` for streams that ended early or with an error.
        seconds: from the first request to the last answer.
    """

    first_ms: list[float] = field(default_factory=list)
    gaps_ms: list[float] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0


class Load:
    """Streams of one length over some adapters, the base among them if one of the names is empty."""

    def __init__(self, client: httpx.AsyncClient, adapters: list[str], tokens: int) -> None:
        self._client, self._adapters, self._tokens = client, adapters, tokens
        self.measured = Measurements()

    async def open_loop(self, rate: float, seconds: float, seed: int) -> None:
        """Requests at `rate` per second with exponential pauses: a Poisson process, the same one for the same seed."""
        chance = random.Random(seed)
        started = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            due, number = started + chance.expovariate(rate), 0
            while due < started + seconds:
                await asyncio.sleep(due - time.perf_counter())
                group.create_task(self._ask(number, due))
                due, number = due + chance.expovariate(rate), number + 1
        self.measured.seconds = time.perf_counter() - started

    async def closed_loop(self, clients: int, seconds: float) -> None:
        """So many clients, each sending again as soon as it has its response."""
        started = time.perf_counter()

        async def client(number: int) -> None:
            while (now := time.perf_counter()) < started + seconds:
                await self._ask(number, now)
                number += clients

        await asyncio.gather(*(client(number) for number in range(clients)))
        self.measured.seconds = time.perf_counter() - started

    async def _ask(self, number: int, due: float) -> None:
        subject = _SUBJECTS[number % len(_SUBJECTS)]
        body = {
            "inputs": f"### Instruction:\nWhat does Python's module `{subject}` do?\n\n### Response:\n",
            "parameters": {
                "adapter_id": self._adapters[number % len(self._adapters)] or None,
                "max_new_tokens": self._tokens,
                "ignore_eos_token": True,
            },
        }
        moments = []
        try:
            async with self._client.stream("POST", "/generate_stream", json=body) as response:
                if response.status_code == 200:
                    async for line in response.aiter_lines():
                        if line.startswith("data:") and '"error"' not in line:
                            moments.append(time.perf_counter())
        except httpx.HTTPError:
            self.measured.statuses["broken"] += 1
            return
        if response.status_code == 200 and len(moments) != self._tokens:
            self.measured.statuses["broken"] += 1
            return
        self.measured.statuses[str(response.status_code)] += 1
        if moments:
            self.measured.first_ms.append((moments[0] - due) * 1e3)
            self.measured.gaps_ms += [(b - a) * 1e3 for a, b in pairwise(moments)]


async def run(options: argparse.Namespace) -> Measurements:
    headers = {"authorization": f"Bearer {os.environ.get(TOKEN_VARIABLE, '')}"}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=2)
    async with httpx.AsyncClient(
        base_url=options.url, headers=headers, timeout=120, limits=limits, trust_env=False
    ) as client:
        load = Load(client, options.adapters, options.tokens)
        if options.clients:
            await load.closed_loop(options.clients, options.seconds)
        else:
            await load.open_loop(options.rate, options.seconds, options.seed)
        return load.measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True)
    parser.add_argument("--adapters", nargs="+", default=[""], help="names; an empty one is the base")
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--clients", type=int, default=0, help="a closed loop of so many; 0 for an open one")
    parser.add_argument("--rate", type=float, default=1.0, help="requests per second of an open loop")
    parser.add_argument("--seed", type=int, default=0)
    json.dump(vars(asyncio.run(run(parser.parse_args()))), sys.stdout)


if __name__ == "__main__":
    main()
