"""README and code agree: examples verbatim, the tree fresh, every setting in the tables."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from services.gateway.settings import GatewaySettings
from services.inference.settings import InferenceSettings
from services.trainer.settings import TrainerSettings
from shared.settings import Settings

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_tree_in_the_docs_is_fresh() -> None:
    assert subprocess.run([sys.executable, "-m", "docs.tree", "--check"], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("example", ["quickstart.py", "quickstart.sh"])
def test_the_examples_are_printed_as_they_run(example: str) -> None:
    code = (ROOT / "examples" / example).read_text()
    # What comes before is the docstring, or how the script reports failures.
    body = code.split('"""')[2] if example.endswith(".py") else code.split("set -euo pipefail\n")[1]
    assert body.strip() in README


def test_every_setting_is_in_the_tables() -> None:
    documented = set(re.findall(r"`([A-Z_]+)`", README.split("## Configuration")[1].split("## Measured")[0]))
    plain = {*Settings.model_fields, *GatewaySettings.model_fields, *TrainerSettings.model_fields}
    expected = {f"TUNESMITH_{name.upper()}" for name in plain}
    expected |= {name.upper() for name in InferenceSettings.model_fields if name not in Settings.model_fields}
    assert expected - documented == set()


def test_every_make_target_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"`make ([a-z0-9-]+)", README)) | set(re.findall(r"^make ([a-z0-9-]+)", README, re.M))
    assert named <= set(re.findall(r"^([a-z0-9-]+):", makefile, re.M))


def test_every_route_is_documented() -> None:

    document = json.loads((ROOT / "openapi" / "gateway.json").read_text())
    routes = README.split("## Routes")[1].split("## Configuration")[0]
    for path in document["paths"]:
        last = [part for part in path.split("/") if part and not part.startswith("{")]
        assert not last or last[-1] in routes, path
