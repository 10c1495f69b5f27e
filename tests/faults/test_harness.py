"""The harness can fail: without what keeps a promise it finds that the promise is broken."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Select
from structlog.testing import capture_logs

from services.gateway.background import garbage_collector
from services.gateway.background.garbage_collector import GarbageCollector
from shared.errors import TunesmithError
from shared.jobs.fencing import Lease
from shared.jobs.spec import LEASED, State
from shared.storage.database import Database, migrate
from shared.storage.tables import jobs
from tests.faults.disk import Disk
from tests.faults.invariants import Kind, broken_promises
from tests.faults.pairs import Pairs
from tests.faults.runs import Runs
from tests.faults.scenarios import SCENARIOS, SUCCEEDED, trained
from tests.faults.world import Ground, World
from tests.fresh_database import fresh_on_server

pytestmark = pytest.mark.slow
(UPLOAD,) = [scenario for scenario in SCENARIOS if scenario.name == "upload"]


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return Ground(tmp_path_factory.mktemp("ground"))


@pytest.fixture(scope="module")
def pairs(postgres_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pairs]:
    pairs = Pairs(fresh_on_server(postgres_url), tmp_path_factory.mktemp("pairs"))
    yield pairs
    pairs.close()


def wrong(pairs: Pairs, state: State, first: str, second: str) -> list[str]:
    return [what for _, what in pairs.interleavings(state, first, second) if what]


def test_without_fencing_a_worker_that_lost_its_job_writes(pairs: Pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    assert wrong(pairs, State.QUEUED, "claim", "record") == []
    monkeypatch.setattr(Lease, "held", lambda lease: [jobs.c.id == lease.job.id, jobs.c.state.in_(LEASED)])
    assert wrong(pairs, State.QUEUED, "claim", "record") != []


@pytest.mark.parametrize(
    ("state", "first", "second"),
    [(State.RUNNING, "release", "pause"), (State.QUEUED, "delete model", "create"), (State.QUEUED, "cancel", "claim")],
)
def test_without_row_locks_answers_contradict_what_is_there(
    pairs: Pairs, monkeypatch: pytest.MonkeyPatch, state: State, first: str, second: str
) -> None:
    assert wrong(pairs, state, first, second) == []
    monkeypatch.setattr(Select, "with_for_update", lambda select, **_: select)
    assert wrong(pairs, state, first, second) != []


def test_without_fsync_a_power_cut_loses_an_acknowledged_file(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs(ground)
    _, faults = runs.faults(UPLOAD)
    last = [fault for fault in faults if fault.kind == "power cut"][-1]
    assert runs.run(UPLOAD, last) == []
    monkeypatch.setattr(Disk, "synced", lambda disk, path: None)
    assert Kind.LOST in {broken.kind for broken in runs.run(UPLOAD, last)}


def test_without_the_installation_id_another_databases_collector_takes_everything(
    ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = ground.world(trained)
    url = f"sqlite:///{tmp_path / 'another.db'}"
    migrate(url)
    another = Database(url)
    collector = GarbageCollector(another, world.parts.store, now=lambda: time.time() + 7200)
    with capture_logs():
        with pytest.raises(TunesmithError):
            collector.collect()
        assert lost(world) == set()
        monkeypatch.setattr(garbage_collector, "require_own_folder", lambda tx, store: None)
        collector.collect()
    assert Kind.LOST in lost(world)
    another.close()
    world.parts.close()


def lost(world: World) -> set[Kind]:
    ends = {world.answer("create"): SUCCEEDED}
    parts = world.parts
    return {
        broken.kind
        for broken in broken_promises(parts.database, parts.store, ends=ends, reference=None, worker_died=False)
    }
