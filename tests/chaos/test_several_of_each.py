"""Two workers on one queue, two inference processes behind one gateway: shared, split, and one of each dies."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import httpx
import pytest

from services.gateway.inference.replicas import rendezvous
from shared.jobs.spec import State
from tests.cluster import Cluster
from tests.site import ENDLESS, LONG, LONGER, SHORT, Site
from tests.stack_processes import Postgres, Processes, answers, postgres_server


@dataclass
class Scene:
    cluster: Cluster
    site: Site
    postgres: Postgres | None

    def loaded(self, url: str) -> set[str]:
        """Ids of the adapters in one inference process's memory."""
        headers = {"authorization": "Bearer between-us"}
        return {entry["id"] for entry in httpx.get(f"{url}/adapters", headers=headers).json()["data"]}

    def adapters(self) -> dict[str, str]:
        """Every model listed beside the base: name → adapter id."""
        extras = {model.id: model.model_extra or {} for model in self.site.openai.models.list()}
        return {name: extra["adapter"] for name, extra in extras.items() if extra["kind"] != "base"}


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def scene(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("several")
    with ExitStack() as stack:
        postgres = stack.enter_context(postgres_server()) if request.param == "postgresql" else None
        url = postgres.database() if postgres else f"sqlite:///{folder / 'tunesmith.db'}"
        processes = stack.enter_context(Processes(folder))
        cluster = Cluster(folder, processes, url, inferences=2 if postgres else 1)
        site = cluster.up("worker-a", "worker-b")
        stack.callback(site.close)
        yield Scene(cluster, site, postgres)


# What differs in nothing from one database to the other is looked at once.
on_postgresql = pytest.mark.parametrize("scene", ["postgresql"], indirect=True, scope="module")


def test_two_workers_share_the_queue_and_one_dies(scene: Scene) -> None:
    site = scene.site
    # Whoever starts later must have made a checkpoint before the other is done.
    long_ones = [site.create(LONGER), site.create(LONGER)]
    short_ones = [site.create(SHORT) for _ in range(4)]
    site.wait(lambda: all(site.job(job).state is State.RUNNING for job in long_ones), "both workers to work at once")
    for job in long_ones:
        site.wait_for_steps(job)
    starts = {line for job in long_ones for line in site.story(job) if line.startswith("Started")}
    assert starts == {"Started on worker worker-a", "Started on worker worker-b"}
    victim, other = long_ones
    if "Started on worker worker-a" in site.story(other):
        victim, other = other, victim
    # All of it, as when a machine is switched off.
    scene.cluster.trainers["worker-a"].end()
    site.measure_others_by(other, LONGER)
    for job in long_ones:
        story = site.check_ended_once(job, LONGER)
        assert ("Worker worker-a was lost" in story) == (job == victim)
        assert ("Started again (attempt 2) on worker worker-b" in story) == (job == victim)
    for job in short_ones:
        site.check_ended_once(job, SHORT)
        assert site.job(job).attempt == 1
    site.check_nothing_half_written_is_visible()


@on_postgresql
def test_a_worker_that_comes_back_takes_part_again(scene: Scene) -> None:
    site = scene.site
    scene.cluster.trainers["worker-a"].restart()
    jobs = [site.create(ENDLESS), site.create(ENDLESS)]
    site.wait(lambda: all(site.job(job).state is State.RUNNING for job in jobs), "both workers to work at once")
    for job in jobs:
        site.openai.fine_tuning.jobs.cancel(job)
    for job in jobs:
        site.wait_for_state(job, State.CANCELLED)


@on_postgresql
def test_two_inference_processes_split_the_adapters_and_one_dies(scene: Scene) -> None:
    site, urls = scene.site, scene.cluster.inference_urls
    adapters = dict(list(scene.adapters().items())[:16])
    assert len(adapters) >= 8
    before = {name: site.generate(name).json()["generated_text"] for name in adapters}
    loaded = [scene.loaded(url) for url in urls]
    assert loaded[0] | loaded[1] >= set(adapters.values())
    assert not loaded[0] & loaded[1]
    assert all(loaded)
    for adapter in adapters.values():
        best = max(urls, key=lambda url: rendezvous(adapter, url))
        assert adapter in scene.loaded(best)
    scene.cluster.inference[0].kill()
    assert {name: site.generate(name).json().get("generated_text") for name in adapters} == before
    assert scene.loaded(urls[1]) >= set(adapters.values())
    scene.cluster.inference[0].restart()

    def back() -> bool:
        return all(site.generate(name).status_code == 200 for name in adapters) and bool(scene.loaded(urls[0]))

    site.wait(lambda: answers(f"{urls[0]}/health/ready"), "the process to come back")
    site.wait(back, "adapters to go back where they belong")


@on_postgresql
def test_a_deleted_adapter_is_gone_from_every_process(scene: Scene) -> None:
    site = scene.site
    name, adapter = next(iter(scene.adapters().items()))
    assert site.generate(name).status_code == 200
    assert site.openai.models.delete(name).deleted
    assert site.generate(name).status_code == 404
    assert all(adapter not in scene.loaded(url) for url in scene.cluster.inference_urls)
    assert not site.artifacts.adapter(adapter).exists()


@on_postgresql
def test_a_database_that_restarts_costs_no_work(scene: Scene) -> None:
    site = scene.site
    job = site.create(LONG)
    site.wait_for_steps(job)
    assert scene.postgres
    scene.postgres.stop()
    assert site.http.get("/health/live").status_code == 200
    site.wait(lambda: site.http.get("/health/ready").status_code == 503, "the gateway to say so")
    assert site.http.get("/v1/fine_tuning/jobs").status_code == 503
    scene.postgres.start()
    story = site.check_ended_once(job, LONG)
    assert (site.job(job).attempt, site.job(job).losses) == (1, 0), story
    site.check_a_new_job_works()
