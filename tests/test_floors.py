"""The floors in pyproject.toml leave no module out, and docs/architecture.md shows them."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
FLOORS: dict[str, dict[str, Any]] = {
    contract["name"].removeprefix("floors of ").removeprefix("the "): contract
    for contract in CONTRACTS
    if contract["type"] == "layers"
}


def rooms(floor: str) -> list[str]:
    return floor.split(" | ")


def test_every_package_has_floors() -> None:
    assert set(FLOORS) == {"gateway", "trainer", "inference", "client", "shared"}
    # import-linter itself sees that no room of a container is left out.
    assert all(contract.get("exhaustive") for name, contract in FLOORS.items() if name != "shared")


def test_every_module_of_shared_is_on_a_floor() -> None:
    """Its floors name modules of its rooms, for which import-linter has no such check."""
    named = [room for floor in FLOORS["shared"]["layers"] for room in rooms(floor)]
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / "shared").rglob("*.py")
        if path.name != "__init__.py"
    ]
    assert [m for m in modules if not any(m == room or m.startswith(f"{room}.") for room in named)] == []


@pytest.mark.parametrize("name", FLOORS)
def test_the_page_shows_them(name: str) -> None:
    (row,) = re.findall(rf"^\| {name} \| (.+) \|$", (ROOT / "docs" / "architecture.md").read_text(), re.M)
    shown = [re.findall(r"`([\w.]+)`", floor) for floor in row.split(" → ")]
    assert shown == [[room.removeprefix("shared.") for room in rooms(floor)] for floor in FLOORS[name]["layers"]]
