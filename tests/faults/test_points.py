"""At the durable steps of what clients and workers do, a fault: afterwards every promise holds.

Here a fixed share of all steps and faults; `Runs.faults` lists every one.
"""

import pytest

from tests.faults.points import Fault
from tests.faults.runs import Runs
from tests.faults.scenarios import SCENARIOS, Scenario
from tests.faults.world import Ground

pytestmark = pytest.mark.slow
# Runs of one scenario.
MOST = 8


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(Ground(tmp_path_factory.mktemp("ground")))


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_every_promise_holds_after_a_fault(runs: Runs, scenario: Scenario) -> None:
    assert runs.run(scenario, None) == []
    names, faults = runs.faults(scenario)
    assert len(names) > 5
    found = {}
    for fault in _share(faults):
        if broken := runs.run(scenario, fault):
            found[f"{fault.kind} at {names[fault.at]} ({fault.at})"] = broken
    assert found == {}


def _share(faults: list[Fault]) -> list[Fault]:
    return faults[:: max(1, len(faults) // MOST)]
