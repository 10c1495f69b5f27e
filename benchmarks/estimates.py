"""(`make bench-estimates`): what is estimated before a job and while it runs, beside what then happens

A stack of its own trains a real model. Before each job, and after a short job of the same base and precision, its
estimate is fetched; while it runs, its expected end is read after each share of its steps. Both are compared with the
end, and with the worker's memory as the operating system reports it. Writes `benchmarks/results/estimates.json`.
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.live_jobs import BASE, LiveStack, Watched, live_stack
from examples.stdlib_docstrings import Row, build_dataset

RESULT = Path(__file__).parent / "results" / "estimates.json"
SHARES = (0.05, 0.1, 0.25, 0.5)
CALIBRATION_ROWS = 16
Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Setting:
    """One kind of job; `hyper` on top of one epoch."""

    precision: str
    preset: str
    hyper: Json
    rows: Callable[[], Sequence[Row]]


def docstrings(count: int) -> list[Row]:
    """Rows of about 80 tokens, the longest 500."""
    return build_dataset(count, 0)[0]


def chapters(count: int) -> list[Row]:
    """Rows of some 200 to 1,500 tokens: several docstrings, one after the other."""
    rows, chapters = docstrings(count * 11), []
    for number in range(count):
        size = 3 + 5 * number % 13
        parts, rows = rows[:size], rows[size:]
        chapters.append(
            {
                "instruction": "; ".join(p["instruction"] for p in parts[:3]),
                "output": "\n\n".join(p["output"] for p in parts),
            }
        )
    return chapters


SETTINGS = {
    "int8, recommended": Setting("int8", "recommended", {"batch_size": 2}, lambda: docstrings(160)),
    "fp32, reference": Setting("fp32", "reference", {"batch_size": 2}, lambda: docstrings(160)),
    "int8, reference, long rows": Setting(
        "int8", "reference", {"batch_size": 1, "max_length": 1536}, lambda: chapters(24)
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=SETTINGS, metavar="NAME")
    parser.add_argument("--home", type=Path, help="folder of the stack, kept for the next run")
    arguments = parser.parse_args()
    known: Json = json.loads(RESULT.read_text()) if RESULT.is_file() else {"model": BASE, "settings": {}}
    with live_stack(arguments.home) as live:
        calibration = live.upload("calibration", docstrings(CALIBRATION_ROWS))
        for name in arguments.settings:
            known["settings"][name] = measure(live, SETTINGS[name], calibration)
            print(name, json.dumps(known["settings"][name]), flush=True)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(known, indent=2) + "\n")
    print(table(known["settings"]))
    print(f"written to {RESULT}")


def measure(live: LiveStack, setting: Setting, calibration: str) -> Json:
    """Calibrate, estimate, run and compare."""
    body = {
        "model": BASE,
        "base_precision": setting.precision,
        "preset": setting.preset,
        "hyperparameters": {"n_epochs": 1, "batch_size": 4},
    }
    live.run(body | {"training_file": calibration})
    body |= {"training_file": live.upload("training", setting.rows())}
    body |= {"hyperparameters": {"n_epochs": 1} | setting.hyper}
    estimate = live.client.estimate(body)
    watched = live.run(body)
    report = watched.job["report"]
    started = next(at for at, job in watched.seen if job["status"] == "running")
    return {
        "steps": report["steps"],
        "tokens": report["total_tokens"],
        "tokens_per_second": report["tokens_per_second"],
        "peak_memory_mb": compared(estimate["peak_memory_mb"], report["peak_memory_mb"]),
        "sampled_memory_mb": round(watched.largest_mb),
        "minutes": compared(estimate["minutes"], (watched.ended - started) / 60),
        "seconds_left": {f"{share:.0%}": left(watched, share) for share in SHARES},
    }


def left(watched: Watched, share: float) -> Json:
    """The time estimated to be left after a share of the steps, and the time it took."""
    steps = math.ceil(share * watched.job["report"]["steps"])
    at, job = next(
        (at, job)
        for at, job in watched.seen
        if job["progress"]["step"] >= steps and job["estimated_finish"] is not None
    )
    return {"step": job["progress"]["step"]} | compared(job["estimated_finish"] - at, watched.ended - at)


def compared(estimate: float, actual: float) -> Json:
    return {"estimate": round(estimate, 2), "actual": round(actual, 2), "error": round(estimate / actual - 1, 3)}


def table(settings: Json) -> str:
    """The results for people."""
    lines = [f"{'':28}{'steps':>6}{'peak MB est.':>14}{'actual':>7}{'':>8}{'s left after 5 %':>18}{'actual':>7}"]
    for name, found in settings.items():
        memory, time = found["peak_memory_mb"], found["seconds_left"]["5%"]
        lines.append(
            f"{name:28}{found['steps']:6}{memory['estimate']:14.0f}{memory['actual']:7.0f}{memory['error']:+8.1%}"
            f"{time['estimate']:18.1f}{time['actual']:7.1f}{time['error']:+8.1%}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
