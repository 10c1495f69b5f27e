"""`python -m benchmarks.faults`: every fault at every durable step of what clients and workers do, and every pair of
operations at once with every place where the first can stand (tests/faults).

Nothing is sampled, and nothing is random: `--scenario NAME --at STEP` makes one step's faults again. Exits with 1
unless every promise held. Writes benchmarks/results/faults.json.
"""

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shared.jobs.spec import State
from shared.processor import this_processor
from tests.faults.invariants import Broken, Kind
from tests.faults.pairs import OPERATIONS, STATES, Pairs
from tests.faults.points import Fault
from tests.faults.runs import Runs
from tests.faults.scenarios import SCENARIOS, Scenario
from tests.faults.world import Ground
from tests.fresh_database import fresh_on_server
from tests.stack_processes import running_postgres

RESULT = Path(__file__).parent / "results" / "faults.json"
# Runs that one process makes at a time.
CHUNK = 32
MAX_FOUND = 100
_runs: Runs


@dataclass(frozen=True, slots=True)
class Found:
    """A fault after which a promise was broken."""

    scenario: str
    step: str
    fault: Fault
    broken: list[Broken]

    def row(self) -> dict[str, Any]:
        what = [f"{one.kind.value}: {one.what}" for one in self.broken]
        return {
            "scenario": self.scenario,
            "step": self.step,
            "at": self.fault.at,
            "kind": self.fault.kind,
            "what": what,
        }


def prepare(folder: str) -> None:
    """Once in each process."""
    global _runs
    torch.set_num_threads(1)
    _runs = Runs(Ground(Path(tempfile.mkdtemp(dir=folder))))


def counted(name: str) -> tuple[list[str], list[Fault]]:
    return _runs.faults(scenario(name))


def run(name: str, steps: list[str], faults: list[Fault]) -> list[Found]:
    """Those of the faults after which something was wrong."""
    done = ((fault, _runs.run(scenario(name), fault)) for fault in faults)
    return [Found(name, steps[fault.at], fault, broken) for fault, broken in done if broken]


def run_pairs(folder: str, server: str | None, state: State) -> tuple[int, list[dict[str, Any]]]:
    """(interleavings, those that came to what neither order comes to) of all pairs on a job in this state.

    Args:
        server: URL of a PostgreSQL server; SQLite without one.
    """
    torch.set_num_threads(1)
    place = Path(tempfile.mkdtemp(dir=folder))
    pairs = Pairs(fresh_on_server(server) if server else f"sqlite:///{place / 'tunesmith.db'}", place)
    count, found = 0, []
    for first, second in itertools.product(OPERATIONS, OPERATIONS):
        for at, wrong in pairs.interleavings(state, first, second):
            count += 1
            if wrong:
                found.append({"job": state.value, "first": first, "second": second, "at": at, "what": wrong})
    pairs.close()
    return count, found


def scenario(name: str) -> Scenario:
    (found,) = [scenario for scenario in SCENARIOS if scenario.name == name]
    return found


def chunks(faults: list[Fault]) -> Iterator[list[Fault]]:
    for start in range(0, len(faults), CHUNK):
        yield faults[start : start + CHUNK]


def report(faults: dict[str, int], found: list[Found]) -> dict[str, Any]:
    kinds = Counter(kind for one in found for kind in {broken.kind for broken in one.broken})
    return {
        "faults": faults,
        "runs": sum(faults.values()),
        **{kind.value: kinds[kind] for kind in Kind},
        "found": [one.row() for one in found[:MAX_FOUND]],
    }


def all_points(pool: Executor, names: Sequence[str], at: int | None) -> dict[str, Any]:
    points: dict[str, int] = {}
    faults: dict[str, int] = {}
    found: list[Found] = []
    for name in names:
        steps, counted_faults = pool.submit(counted, name).result()
        chosen = [fault for fault in counted_faults if at in (None, fault.at)]
        points[name], faults[name] = len(steps), len(chosen)
        waiting = [pool.submit(run, name, steps, chunk) for chunk in chunks(chosen)]
        wrong = [one for done in waiting for one in done.result()]
        found += wrong
        print(f"{name}: {len(chosen)} faults at {len(steps)} steps, {len(wrong)} broke a promise", flush=True)
    return {"points": points, **report(faults, found)}


def all_pairs(pool: Executor, folder: str) -> dict[str, Any]:
    with running_postgres() as postgres:
        postgres.set(fsync="off", deadlock_timeout="50ms")
        servers = {"postgresql": postgres.uri, "sqlite": None}
        tasks = [(name, pool.submit(run_pairs, folder, servers[name], state)) for name in servers for state in STATES]
        done = [(name, *task.result()) for name, task in tasks]
    counts = {name: sum(count for of, count, _ in done if of == name) for name in servers}
    found = [{"database": name, **one} for name, _, wrong in done for one in wrong]
    print(f"pairs: {counts} interleavings, {len(found)} came to what neither order comes to", flush=True)
    return {"interleavings": counts, "in_neither_order": len(found), "found_in_pairs": found[:MAX_FOUND]}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    names = [scenario.name for scenario in SCENARIOS]
    parser.add_argument("--scenario", choices=names, action="append", help="only this one, and no pairs; repeatable")
    parser.add_argument("--at", type=int, help="only the faults of this step")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--result", type=Path, help=f"where to write; {RESULT} if everything is run")
    asked = parser.parse_args(arguments)
    begun = time.monotonic()
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(asked.processes, initializer=prepare, initargs=(folder,)) as pool,
    ):
        result = {"cpu": this_processor().name, **all_points(pool, asked.scenario or names, asked.at)}
        result["seconds"] = round(time.monotonic() - begun)
        if not asked.scenario:
            result |= all_pairs(pool, folder)
            result["seconds_of_pairs"] = round(time.monotonic() - begun) - result["seconds"]
    text = json.dumps(result, indent=2) + "\n"
    if asked.result or not asked.scenario:
        (asked.result or RESULT).write_text(text)
    else:
        print(text)
    return 1 if result["found"] or result.get("found_in_pairs") else 0


if __name__ == "__main__":
    sys.exit(main())
