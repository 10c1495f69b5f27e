"""`pytest tests/chaos` runs each fault once, together; `--chaos-rounds N` adds every fault alone, N times each.

`--chaos-result FILE` writes what a run came to.
"""

import json
import math
from collections.abc import Generator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pytest

from shared.processor import this_processor

WITH_ROUNDS_ONLY = ("test_matrix.py", "test_nemeses.py", "test_recovery.py", "test_several_of_each.py")


@dataclass
class Figures:
    """What a run is summed up in.

    Attributes:
        recovery_seconds: from each SIGKILL to the next optimizer step.
        failed: the tests that failed, by id; they name their fault and their seed.
    """

    tests: int = 0
    failed: list[str] = field(default_factory=list)
    recovery_seconds: list[float] = field(default_factory=list)

    def recovery(self, percent: int) -> float:
        """A percentile by nearest rank: of few values, the 99th is the greatest."""
        ordered = sorted(self.recovery_seconds)
        return ordered[math.ceil(len(ordered) * percent / 100) - 1]


FIGURES = pytest.StashKey[Figures]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--chaos-rounds", type=int, default=0, help="how often the kill matrix is run")
    parser.addoption("--chaos-result", type=Path, help="where figures and failures are written, as JSON")
    parser.addoption("--chaos-seed", type=int, default=0, help="when faults strike; printed with every case")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if collection_path.name in WITH_ROUNDS_ONLY and not rounds(config) else None


@pytest.fixture(scope="session")
def figures(pytestconfig: pytest.Config) -> Figures:
    return pytestconfig.stash.setdefault(FIGURES, Figures())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    figures = item.config.stash.setdefault(FIGURES, Figures())
    figures.tests += report.when == "call"
    if report.failed:
        figures.failed.append(item.nodeid)
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    figures = session.config.stash.get(FIGURES, Figures())
    target: Path | None = session.config.getoption("--chaos-result", default=None)
    if target is None:
        return
    result = {"cpu": this_processor().name, **asdict(figures), "recovery_seconds": None}
    if figures.recovery_seconds:
        kills = {"kills": len(figures.recovery_seconds)}
        result["recovery_seconds"] = kills | {f"p{of}": round(figures.recovery(of), 1) for of in (50, 99)}
    target.write_text(json.dumps(result, indent=2) + "\n")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "round_seed" in metafunc.fixturenames:
        seed = metafunc.config.getoption("--chaos-seed", default=0) or 0
        metafunc.parametrize("round_seed", range(seed, seed + rounds(metafunc.config)))


def rounds(config: pytest.Config) -> int:
    # A run from the project's root reads this file too late to know the option.
    return config.getoption("--chaos-rounds", default=0) or 0
