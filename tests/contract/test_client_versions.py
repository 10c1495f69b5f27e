"""The same contract under the client's older line, which is built on another HTTP library.

`make test-openai2` (and `make test`) makes the second environment, .venv-openai2.
"""

import os
import subprocess
from pathlib import Path

import openai
import pytest

from tests.contract.server import Server
from tests.stack_processes import clean_environment

ROOT = Path(__file__).parents[2]
OLDER = ROOT / ".venv-openai2" / "bin" / "python"


def test_this_environment_has_the_newest_line() -> None:
    assert int(openai.__version__.split(".")[0]) >= 3


@pytest.mark.skipif(not OLDER.exists(), reason="no .venv-openai2: make test-openai2")
def test_the_older_line(server: Server) -> None:
    variables = {
        "CONTRACT_URL": server.url,
        "CONTRACT_KEY": server.key,
        "CONTRACT_JOB": server.job,
        "PYTHONPATH": str(ROOT),
    }
    older = subprocess.run(
        [OLDER, "-c", "import openai; print(openai.__version__)"], capture_output=True, text=True, check=True
    )
    assert older.stdout.split(".")[0] in ("1", "2")
    done = subprocess.run(
        [
            *(str(OLDER), "-m", "pytest", "-q", "-c", os.devnull, "-p", "no:cacheprovider"),
            *("--rootdir=tests/contract", "--confcutdir=tests/contract", "tests/contract/test_openai_client.py"),
        ],
        cwd=ROOT,
        env=clean_environment() | variables,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
