"""Two checkouts side by side: each version in a process of its own, asked for one figure after the other, in turns.

Knows how to start, ask and compare; what is measured is in the script that each process runs. This checkout runs twice,
so that the difference between a build and itself is seen too.
"""

import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parents[1]
Speeds = dict[str, list[float]]
"""Version → its speed in each round."""


class Version:
    """One checkout's process. It says `ready`, then answers each line of JSON with a number.

    Args:
        script: beside this file; run with the checkout's `services` and `benchmarks`.
        arguments: of the script.
    """

    def __init__(self, checkout: Path, script: str, arguments: Sequence[str]) -> None:
        environment = os.environ | {"PYTHONPATH": str(checkout), "PYTHONSAFEPATH": "1"}
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name(script)), *arguments],
            cwd=checkout,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._answer() == "ready"

    def measure(self, figure: Sequence[Any]) -> float:
        """What the script answers: tokens per second."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps(figure) + "\n")
        self._process.stdin.flush()
        return float(self._answer())

    def close(self) -> None:
        self._process.communicate(timeout=60)

    def _answer(self) -> str:
        assert self._process.stdout
        line = self._process.stdout.readline()
        assert line, f"the process ended with {self._process.wait()}"
        return line.strip()


def start(other: Path, folder: Path, script: str, *arguments: str) -> dict[str, Version]:
    """The other checkout and this one twice, each with a folder of its own as the script's first argument."""
    checkouts = {"before": other, "now": HERE, "now again": HERE}
    return {
        name: Version(checkout, script, [str(folder / name.replace(" ", "-")), *arguments])
        for name, checkout in checkouts.items()
    }


def take_turns(
    versions: Mapping[str, Version], figures: Sequence[tuple[Any, ...]], rounds: int
) -> dict[tuple[Any, ...], Speeds]:
    """Each figure's speeds by version; a round before the first warms up."""
    speeds: dict[tuple[Any, ...], Speeds] = {figure: defaultdict(list) for figure in figures}
    for number in range(rounds + 1):
        for figure in figures:
            # Each goes first as often as the others.
            order = list(versions)[number % 3 :] + list(versions)[: number % 3]
            for name in order:
                speed = versions[name].measure(figure)
                if number:
                    speeds[figure][name].append(speed)
        print(f"round {number} of {rounds}", file=sys.stderr, flush=True)
    for version in versions.values():
        version.close()
    return speeds


def show(title: str, columns: Sequence[str], speeds: Mapping[tuple[Any, ...], Speeds]) -> None:
    """A table of medians; the ratios are medians of those within each round."""
    table = Table(title=title)
    for column in (*columns, "before", "now", "now again", "now ÷ before", "now again ÷ now"):
        table.add_column(column, justify="right")
    for figure, measured in speeds.items():
        medians = [f"{median(measured[name]):.1f}" for name in ("before", "now", "now again")]
        ratios = [ratio(measured["now"], measured["before"]), ratio(measured["now again"], measured["now"])]
        table.add_row(*map(str, figure), *medians, *(f"{each:.3f}" for each in ratios))
    Console().print(table)


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median of the ratios within each round."""
    return median(a / b for a, b in zip(above, below, strict=True))
