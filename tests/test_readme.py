"""The README is short, prints the examples as they run, and names nothing that is not there."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "benchmarks" / "results"
MOST_LINES = 150


def test_a_stranger_can_read_it() -> None:
    assert len(README.splitlines()) <= MOST_LINES


@pytest.mark.parametrize("example", ["quickstart.py", "quickstart.sh"])
def test_the_examples_are_printed_as_they_run(example: str) -> None:
    code = (ROOT / "examples" / example).read_text()
    # What comes before is the docstring, or how the script reports failures.
    body = code.split('"""')[2] if example.endswith(".py") else code.split("set -euo pipefail\n")[1]
    assert body.strip() in README


def test_the_numbers_are_those_of_the_last_runs() -> None:
    train, serve, warm = (
        json.loads((RESULTS / f"{name}.json").read_text()) for name in ("train", "serve", "warm_start")
    )
    numbers = README.split("## Five numbers")[1]
    ratios = train["ratios"]["int8"]
    assert f"{train['peers']['ours_int8']['tokens_per_second']:.0f}: {ratios['vs_trl_padded']:.1f} times" in numbers
    assert f"{ratios['vs_trl_packed']:.1f} times TRL packed" in numbers
    assert f"begins {warm['warm']['training']:.2f} s after" in numbers
    assert f"{serve['flatness']:.2f} of one adapter's rate, {serve['ratios']['vs_peft_swap']:.1f} times" in numbers
    assert f"{serve['hot_load_ms']['p50']:.0f} ms (p50)" in numbers


def test_the_tree_in_the_docs_is_fresh() -> None:
    assert subprocess.run([sys.executable, "-m", "docs.tree", "--check"], cwd=ROOT, check=False).returncode == 0


def test_every_page_is_linked() -> None:
    linked = set(re.findall(r"\]\((docs/[^)]+)\)", README))
    pages = {str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("*.md")}
    assert pages | {"docs/adr/"} == linked
