"""One run: a scenario under one fault, recovery, and what was promised and is not so."""

import traceback
from contextlib import suppress

import pytest
from structlog.testing import capture_logs

from shared.jobs.spec import State
from shared.storage.artifacts import ADAPTER_WEIGHTS, sha256_of
from tests.faults.invariants import Broken, Kind, broken_promises
from tests.faults.points import Died, Fault, Steps
from tests.faults.scenarios import SCENARIOS, Scenario
from tests.faults.world import Ground, World, quick


class Runs:
    """Runs scenarios on one ground. Uninterrupted ones say how many steps there are, and which bytes are right."""

    def __init__(self, ground: Ground) -> None:
        self._ground = ground
        self.reference = self._weights_of_an_uninterrupted_run()

    def faults(self, scenario: Scenario) -> tuple[list[str], list[Fault]]:
        """(names of its steps, every fault of every step)."""
        with pytest.MonkeyPatch.context() as patch:
            quick(patch)
            world = self._ground.world(scenario.prepare)
            with world.steps.installed() as steps:
                scenario.act(world)
            world.parts.close()
        return steps.names, steps.faults()

    def run(self, scenario: Scenario, fault: Fault | None) -> list[Broken]:
        """Let a fault strike. Returns the promises that are broken afterwards."""
        # Tracebacks, printed in colour, take longer than everything else.
        with pytest.MonkeyPatch.context() as patch, capture_logs():
            quick(patch)
            world = self._ground.world(scenario.prepare, fault)
            try:
                with world.steps.installed() as steps:
                    act(scenario, world)
                world.recover()
                return [*self._unanswered(world), *self._broken(world, scenario, steps)]
            except Exception:
                # Nothing may need more than this to recover.
                return [Broken(Kind.STUCK, f"it does not come back: {traceback.format_exc()[-1500:]}")]
            finally:
                world.parts.close()

    def _unanswered(self, world: World) -> list[Broken]:
        names = [call.name for call in world.calls if not call.answered]
        return [Broken(Kind.STUCK, f"{name} is not answered though all is well again") for name in names]

    def _broken(self, world: World, scenario: Scenario, steps: Steps) -> list[Broken]:
        ends = {call.answer: scenario.ends for call in world.calls if call.name == "create"}
        parts = world.parts
        broken = broken_promises(
            parts.database, parts.store, ends=ends, reference=self.reference, worker_died=steps.dead
        )
        return list(broken)

    def _weights_of_an_uninterrupted_run(self) -> str:
        (train,) = [scenario for scenario in SCENARIOS if scenario.name == "train"]
        with pytest.MonkeyPatch.context() as patch:
            quick(patch)
            world = self._ground.world(train.prepare)
            train.act(world)
            job = world.parts.job(world.answer("create"))
            assert job.state is State.SUCCEEDED, job
            weights = sha256_of(world.parts.store.adapter(str(job.adapter)) / ADAPTER_WEIGHTS)
            world.parts.close()
        return weights


def act(scenario: Scenario, world: World) -> None:
    """Do what the scenario does, until it is done or the process is killed."""
    with suppress(Died):
        scenario.act(world)
