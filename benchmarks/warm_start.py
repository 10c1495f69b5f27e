"""(`make bench-warm`): from a worker's claim of a job to its first optimizer step, on a cold and on a warm base

Jobs of one step run on a stack of its own, without a validation file and with one, whose loss before training is part
of that time. The worker's events hold the times. Writes `benchmarks/results/warm_start.json`.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.live_jobs import BASE, LiveStack, live_stack
from examples.stdlib_docstrings import build_dataset

RESULT = Path(__file__).parent / "results" / "warm_start.json"
Json = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--jobs", type=int, default=5, help="warm jobs of each kind")
    parser.add_argument("--home", type=Path, help="folder of the stack, kept for the next run")
    arguments = parser.parse_args()
    with live_stack(arguments.home) as live:
        found = measure(live, arguments.jobs)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))
    print(f"written to {RESULT}")


def measure(live: LiveStack, jobs: int) -> Json:
    """Seconds from the claim to the first step's beginning and to its end; the first job of each kind apart."""
    training, held_out = build_dataset(64, 20)
    body = {"model": BASE, "training_file": live.upload("training", training), "hyperparameters": {"max_steps": 1}}
    plain = [first_step(live, body) for _ in range(jobs + 1)]
    body["validation_file"] = live.upload("held-out", held_out)
    validated = [first_step(live, body) for _ in range(jobs + 1)]
    return {
        "model": BASE,
        "rows_a_step": 8,
        "cold": plain[0],
        "warm": medians(plain[1:]),
        "warm_first_with_this_validation_file": validated[0],
        "warm_with_validation_file": medians(validated[1:]),
    }


def first_step(live: LiveStack, body: Json) -> Json:
    times = live.event_data(live.run(body).job["id"], "claim_to_training_seconds")
    return {key: times[f"claim_to_{key}_seconds"] for key in ("training", "first_step")}


def medians(found: list[Json]) -> Json:
    return {key: statistics.median(one[key] for one in found) for key in found[0]} | {
        "training_all": [one["training"] for one in found]
    }


if __name__ == "__main__":
    main()
