"""README and code agree: examples verbatim, every source file in the tree, every setting in the tables."""

import json
import re
from pathlib import Path

import pytest

from services.gateway.settings import GatewaySettings
from services.inference.settings import InferenceSettings
from services.trainer.settings import TrainerSettings
from shared.settings import Settings

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def tree() -> set[str]:
    """The files listed under "The tree", as paths."""
    section = README.split("## The tree")[1].split("```")[1]
    folder, files = "", set()
    for line in section.splitlines():
        if line and not line.startswith(" "):
            folder = line.split()[0]
        elif line.strip():
            files.add(folder + line.split()[0])
    return files


def sources() -> set[str]:
    """Every module but the empty `__init__.py` and the migrations."""
    found = set()
    for package in ("shared", "services", "tunesmith", "examples", "benchmarks"):
        for path in (ROOT / package).rglob("*.py"):
            if path.name != "__init__.py" and "versions" not in path.parts:
                found.add(path.relative_to(ROOT).as_posix())
    return found


def test_the_tree_lists_every_module_and_no_other() -> None:
    assert {file for file in tree() if file.endswith(".py")} == sources()


@pytest.mark.parametrize("example", ["quickstart.py", "quickstart.sh"])
def test_the_examples_are_printed_as_they_run(example: str) -> None:
    code = (ROOT / "examples" / example).read_text()
    # What comes before is the docstring, or how the script reports failures.
    body = code.split('"""')[2] if example.endswith(".py") else code.split("set -euo pipefail\n")[1]
    assert body.strip() in README


def test_every_setting_is_in_the_tables() -> None:
    documented = set(re.findall(r"`([A-Z_]+)`", README.split("## Configuration")[1].split("## The tree")[0]))
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
