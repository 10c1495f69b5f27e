from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--vllm-result", type=Path, help="where figures are written, as JSON")
    parser.addoption("--record", action="store_true", help="write what the server answers to vllm_recorded.json")
