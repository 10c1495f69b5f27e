"""`python -m benchmarks.serve_versions OTHER_CHECKOUT`: this checkout's engine beside another's, in turns.

Each version is a process of its own, with its weights in memory all the time; for every figure one after the other
answers, round by round. This checkout runs twice, so that the difference between a build and itself is seen too.
Writes nothing but a table.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

# (rows, adapters) of each figure.
FIGURES = ((1, 1), (8, 1), (16, 1), (16, 16), (32, 16))
HERE = Path(__file__).parents[1]
ROUNDS = 7


class Version:
    """One checkout's engine in a process.

    Args:
        checkout: the folder whose `services` and `benchmarks` are used.
        home: a folder for its base and adapters.
    """

    def __init__(self, checkout: Path, home: Path, precision: str) -> None:
        environment = os.environ | {"PYTHONPATH": str(checkout), "PYTHONSAFEPATH": "1"}
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("serve_one_version.py")), str(home), precision],
            cwd=checkout,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._answer() == "ready"

    def measure(self, rows: int, adapters: int) -> float:
        """Tokens per second of a batch."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps([rows, adapters]) + "\n")
        self._process.stdin.flush()
        return float(self._answer())

    def close(self) -> None:
        self._process.communicate(timeout=60)

    def _answer(self) -> str:
        assert self._process.stdout
        line = self._process.stdout.readline()
        assert line, f"the process ended with {self._process.wait()}"
        return line.strip()


def main() -> None:
    other, precision = Path(sys.argv[1]).absolute(), (sys.argv[2:] or ["auto"])[0]
    speeds: dict[tuple[int, int], dict[str, list[float]]] = {figure: defaultdict(list) for figure in FIGURES}
    with tempfile.TemporaryDirectory(prefix="tunesmith-bench-") as folder:
        checkouts = {"before": other, "now": HERE, "now again": HERE}
        versions = {
            name: Version(checkout, Path(folder) / name.replace(" ", "-"), precision)
            for name, checkout in checkouts.items()
        }
        for number in range(ROUNDS + 1):
            for figure in FIGURES:
                # Each goes first as often as the others.
                order = list(versions)[number % 3 :] + list(versions)[: number % 3]
                for name in order:
                    speed = versions[name].measure(*figure)
                    if number:
                        speeds[figure][name].append(speed)
            print(f"round {number} of {ROUNDS}", file=sys.stderr, flush=True)
        for version in versions.values():
            version.close()
    table = Table(title=f"tokens/s, medians of {ROUNDS} rounds, {precision}")
    for column in ("rows", "adapters", *versions, "now ÷ before", "now again ÷ now"):
        table.add_column(column, justify="right")
    for (rows, adapters), measured in speeds.items():
        medians = [f"{median(measured[name]):.1f}" for name in versions]
        ratios = [ratio(measured["now"], measured["before"]), ratio(measured["now again"], measured["now"])]
        table.add_row(str(rows), str(adapters), *medians, *(f"{each:.3f}" for each in ratios))
    Console().print(table)


def ratio(above: list[float], below: list[float]) -> float:
    """The median of the ratios within each round."""
    return median(a / b for a, b in zip(above, below, strict=True))


if __name__ == "__main__":
    main()
