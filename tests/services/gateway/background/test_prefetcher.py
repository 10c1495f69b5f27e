"""What a job publishes is loaded before anybody asks: once, where requests will go, and never at a job's expense."""

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from sqlalchemy import update
from sqlalchemy.exc import OperationalError

from services.gateway.background.prefetcher import Prefetcher
from services.gateway.inference.prober import Prober
from services.gateway.inference.replicas import Replicas, rendezvous
from services.gateway.models.store import Target
from services.gateway.services import inference_client
from shared.jobs.fencing import Lease
from shared.jobs.leases import Leases
from shared.jobs.spec import JobFault, JobSpec
from shared.storage.database import Database, migrate
from shared.storage.tables import adapters
from tests.jobs import Jobs
from tests.services.gateway.conftest import ROWS, eventually, running_gateway
from tests.services.gateway.inference_stand_in import StandIn, standing_in
from tests.services.gateway.routes.test_generate import Settings
from tests.services.gateway.test_openai_client import REPORT

BASE = "tiny"
SPEC = JobSpec(base=BASE, base_revision="r1", training_file="file-1", training_sha256="0" * 64)
FULL_HOUSE, AWAY, BAD_ADAPTER = 429, 503, 422


@dataclass
class Scene:
    database: Database
    jobs: Jobs
    leases: Leases

    def claimed(self) -> Lease:
        self.jobs.create("default", SPEC)
        lease = self.leases.claim("worker-1")
        assert lease is not None
        return lease

    def succeed(self, lease: Lease) -> str:
        adapter = self.leases.reserve_adapter(lease)
        self.leases.succeed(lease, adapter, REPORT)
        return adapter

    def prefetch(self, target: Target, urls: Sequence[str], waits: Sequence[float] = (0,) * 5) -> str:
        async def do() -> str:
            async with inference_client(30) as client:
                replicas = Replicas(tuple(urls), client)
                for replica in replicas.all:
                    await Prober(replicas).probe(replica)
                return await Prefetcher(self.database, replicas, waits=waits).prefetch(target)

        return asyncio.run(do())


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    url = f"sqlite:///{tmp_path / 'tunesmith.db'}"
    migrate(url)
    database = Database(url)
    yield Scene(database, Jobs(database), Leases(database))
    database.close()


@pytest.fixture
def inference() -> Iterator[StandIn]:
    with standing_in(BASE) as stand_in:
        yield stand_in


def test_only_final_adapters_of_jobs_that_just_succeeded_are_seen(scene: Scene) -> None:
    watching = Prefetcher(scene.database, Replicas((), httpx.AsyncClient()))
    scene.succeed(scene.claimed())
    # What had ended before is not new.
    assert watching.published() == []
    first, second, failing, deleted = (scene.claimed() for _ in range(4))
    cancelled = scene.jobs.create("default", SPEC)
    assert watching.published() == []
    scene.leases.commit_checkpoint(first, 8, scene.leases.reserve_adapter(first), {})
    assert watching.published() == []
    expected = {Target(BASE, scene.succeed(first)), Target(BASE, scene.succeed(second))}
    scene.leases.fail(failing, JobFault(code="x", message="x"))
    scene.jobs.cancel("default", cancelled.id)
    gone = scene.succeed(deleted)
    with scene.database.write() as connection:
        connection.execute(update(adapters).where(adapters.c.id == gone).values(state="deleted"))
    assert set(watching.published()) == expected
    assert watching.published() == []


def test_a_database_that_is_away_hides_nothing(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    watching = Prefetcher(scene.database, Replicas((), httpx.AsyncClient()))
    lease = scene.claimed()
    watching.published()
    adapter = scene.succeed(lease)
    with monkeypatch.context() as patch:
        patch.setattr(scene.database, "_reader", Database("sqlite:////nowhere/at/all.db")._reader)
        with pytest.raises(OperationalError):
            watching.published()
    assert watching.published() == [Target(BASE, adapter)]


@pytest.mark.parametrize("statuses", [[], [FULL_HOUSE], [AWAY, AWAY, 404]])
def test_it_is_tried_until_inference_can(scene: Scene, inference: StandIn, statuses: list[int]) -> None:
    inference.load_statuses = list(statuses)
    assert scene.prefetch(Target(BASE, "adapter-1"), [inference.url]) == "loaded"
    assert inference.loaded == [("adapter-1", "protect_recent_seconds=600")] * (len(statuses) + 1)


def test_it_is_not_tried_for_ever(scene: Scene, inference: StandIn) -> None:
    inference.load_statuses = [AWAY] * 100
    assert scene.prefetch(Target(BASE, "adapter-1"), [inference.url], waits=(0, 0, 0)) == "given_up"
    assert len(inference.loaded) == 3
    for urls in ([], ["http://127.0.0.1:9"]):
        assert scene.prefetch(Target(BASE, "adapter-1"), urls, waits=(0, 0)) == "given_up"
    assert scene.prefetch(Target("another", "adapter-1"), [inference.url], waits=(0, 0)) == "given_up"
    assert len(inference.loaded) == 3


def test_what_inference_refuses_is_not_asked_for_again(scene: Scene, inference: StandIn) -> None:
    inference.load_statuses = [BAD_ADAPTER]
    assert scene.prefetch(Target(BASE, "adapter-1"), [inference.url]) == "refused"
    assert len(inference.loaded) == 1


def test_it_is_loaded_where_its_requests_will_go(scene: Scene, inference: StandIn) -> None:
    with standing_in(BASE) as other:
        urls = [inference.url, other.url]
        names = [f"adapter-{number}" for number in range(12)]
        for name in names:
            assert scene.prefetch(Target(BASE, name), urls) == "loaded"
        best = {name: max((rendezvous(name, url), url) for url in urls)[1] for name in names}
        for each in (inference, other):
            assert [name for name, _ in each.loaded] == [name for name in names if best[name] == each.url]
            assert each.loaded


def test_the_gateway_does_so_by_itself_and_counts_it(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    base = "smollm2-135m-instruct"
    look, seen = Prefetcher.published, set[str]()

    def watched(self: Prefetcher) -> list[Target]:
        found = look(self)
        seen.update(self._unfinished)
        return found

    monkeypatch.setattr(Prefetcher, "published", watched)
    with (
        standing_in(base) as inference,
        running_gateway(settings(inference_urls=(inference.url,))) as gateway,
    ):
        body = {"model": base, "training_file": gateway.uploaded(ROWS)}
        job = gateway.http.post("/v1/fine_tuning/jobs", json=body).json()["id"]
        eventually(lambda: job in seen)
        leases = gateway.leases
        lease = leases.claim("worker-1")
        assert lease is not None
        adapter = leases.reserve_adapter(lease)
        leases.succeed(lease, adapter, REPORT)
        eventually(lambda: inference.loaded == [(adapter, "protect_recent_seconds=600")])
        counted = 'tunesmith_gateway_prefetches_total{outcome="loaded"} 1.0'
        eventually(lambda: counted in gateway.http.get("/metrics").text)
        assert inference.sent == []
