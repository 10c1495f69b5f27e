"""`pytest tests/chaos` runs each fault once, together; `--chaos-rounds N` adds every fault alone, N times each."""

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--chaos-rounds", type=int, default=0, help="how often the kill matrix is run")
    parser.addoption("--chaos-seed", type=int, default=0, help="when faults strike; printed with every case")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if collection_path.name == "test_matrix.py" and not rounds(config) else None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "round_seed" in metafunc.fixturenames:
        seed = metafunc.config.getoption("--chaos-seed", default=0) or 0
        metafunc.parametrize("round_seed", range(seed, seed + rounds(metafunc.config)))


def rounds(config: pytest.Config) -> int:
    # A run from the project's root reads this file too late to know the option.
    return config.getoption("--chaos-rounds", default=0) or 0
