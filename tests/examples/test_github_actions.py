"""The Actions example: its steps use commands, options and outputs that exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

EXAMPLE: dict[str, Any] = yaml.safe_load((Path(__file__).parents[2] / "examples" / "github-actions.yml").read_text())
STEPS: list[dict[str, Any]] = EXAMPLE["jobs"]["fine-tune"]["steps"]
COMMANDS = re.findall(r"tunesmith ((?:[a-z-]+ )*?[a-z]+) ([^\n]*)", "\n".join(step.get("run", "") for step in STEPS))


@pytest.mark.parametrize(("command", "rest"), COMMANDS)
def test_every_command_and_option_exists(command: str, rest: str) -> None:
    help = subprocess.run(
        [sys.executable, "-m", "tunesmith.cli", *shlex.split(command), "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    for option in re.findall(r" (--[a-z-]+)", " " + rest):
        assert option in help


def test_its_steps_read_what_earlier_ones_write() -> None:
    assert {command for command, _ in COMMANDS} == {"train", "wait", "generate"}
    named = {step["id"] for step in STEPS if "id" in step}
    used = set(re.findall(r"steps\.(\w+)\.outputs", str(STEPS)))
    assert used == named
    assert {"TUNESMITH_URL", "TUNESMITH_API_KEY"} == set(EXAMPLE["jobs"]["fine-tune"]["env"])
