"""Two workers on one queue, two inference processes behind one gateway: shared, split, and one of each dies.

Runs with `--chaos-rounds N` only.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import httpx
import pytest

from services.gateway.inference.replicas import rendezvous
from shared.jobs.spec import State
from tests.cluster import SHORT_LEASES, TOKEN, Cluster
from tests.deployment import ENDLESS, LONG, LONGER, SHORT, Deployment
from tests.stack_processes import Postgres, Processes, answers, running_postgres

pytestmark = pytest.mark.servers


@dataclass
class Scene:
    cluster: Cluster
    deployment: Deployment
    postgres: Postgres | None

    def loaded(self, url: str) -> set[str]:
        """Ids of the adapters in one inference process's memory."""
        headers = {"authorization": f"Bearer {TOKEN}"}
        return {entry["id"] for entry in httpx.get(f"{url}/adapters", headers=headers).json()["data"]}

    def both_workers(self) -> None:
        """Start again whoever an earlier test has ended."""
        for worker in self.cluster.trainers.values():
            if not worker.alive():
                worker.restart()

    def trained(self) -> None:
        """At least one job and its checkpoints are there."""
        if not self.adapters():
            self.deployment.uninterrupted(LONGER)

    def adapters(self) -> dict[str, str]:
        """Every model listed beside the base: name → adapter id."""
        extras = {model.id: model.model_extra or {} for model in self.deployment.openai.models.list()}
        return {name: extra["adapter"] for name, extra in extras.items() if extra["kind"] != "base"}


# Each database has a cluster of its own, and they need not wait for one another.
ON_POSTGRESQL = "postgresql"


@pytest.fixture(scope="module", params=["sqlite", ON_POSTGRESQL])
def scene(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("several")
    with ExitStack() as stack, Processes(folder) as processes:
        postgres = stack.enter_context(running_postgres()) if request.param == "postgresql" else None
        url = postgres.database() if postgres else f"sqlite:///{folder / 'tunesmith.db'}"
        cluster = Cluster(folder, processes, url, inferences=2 if postgres else 1, settings=SHORT_LEASES)
        cluster.up("worker-a", "worker-b")
        yield Scene(cluster, stack.enter_context(cluster.deployment()), postgres)


# What differs in nothing from one database to the other is looked at once.
on_postgresql = pytest.mark.parametrize("scene", [ON_POSTGRESQL], indirect=True, scope="module")


def test_two_workers_share_the_queue_and_one_dies(scene: Scene) -> None:
    deployment = scene.deployment
    scene.both_workers()
    # Whoever starts later must have made a checkpoint before the other is done.
    long_ones = [deployment.create(LONGER), deployment.create(LONGER)]
    short_ones = [deployment.create(SHORT) for _ in range(4)]
    deployment.wait(
        lambda: all(deployment.job(job).state is State.RUNNING for job in long_ones), "both workers to work at once"
    )
    for job in long_ones:
        deployment.wait_for_steps(job)
    starts = {line for job in long_ones for line in deployment.messages(job) if line.startswith("Started")}
    assert starts == {"Started on worker worker-a", "Started on worker worker-b"}
    victim, other = long_ones
    if "Started on worker worker-a" in deployment.messages(other):
        victim, other = other, victim
    # All of it, as when a machine is switched off.
    scene.cluster.trainers["worker-a"].end()
    deployment.measure_others_by(other, LONGER)
    for job in long_ones:
        messages = deployment.check_ended_once(job, LONGER)
        assert ("Worker worker-a was lost" in messages) == (job == victim)
        assert ("Started again (attempt 2) on worker worker-b" in messages) == (job == victim)
    for job in short_ones:
        deployment.check_ended_once(job, SHORT)
        assert deployment.job(job).attempt == 1
    deployment.check_nothing_half_written_is_visible()


@on_postgresql
def test_a_worker_that_comes_back_takes_part_again(scene: Scene) -> None:
    deployment = scene.deployment
    scene.cluster.trainers["worker-a"].kill()
    scene.both_workers()
    jobs = [deployment.create(ENDLESS), deployment.create(ENDLESS)]
    deployment.wait(
        lambda: all(deployment.job(job).state is State.RUNNING for job in jobs), "both workers to work at once"
    )
    for job in jobs:
        deployment.openai.fine_tuning.jobs.cancel(job)
    for job in jobs:
        deployment.wait_for_state(job, State.CANCELLED)


@on_postgresql
def test_two_inference_processes_split_the_adapters_and_one_dies(scene: Scene) -> None:
    deployment, urls = scene.deployment, scene.cluster.inference_urls
    scene.trained()
    adapters = dict(list(scene.adapters().items())[:16])
    assert len(adapters) >= 8
    before = {name: deployment.generate(name).json()["generated_text"] for name in adapters}
    loaded = [scene.loaded(url) for url in urls]
    assert loaded[0] | loaded[1] >= set(adapters.values())
    assert not loaded[0] & loaded[1]
    assert all(loaded)
    for adapter in adapters.values():
        best = max(urls, key=lambda url: rendezvous(adapter, url))
        assert adapter in scene.loaded(best)
    scene.cluster.inference[0].kill()
    assert {name: deployment.generate(name).json().get("generated_text") for name in adapters} == before
    assert scene.loaded(urls[1]) >= set(adapters.values())
    scene.cluster.inference[0].restart()

    def back() -> bool:
        return all(deployment.generate(name).status_code == 200 for name in adapters) and bool(scene.loaded(urls[0]))

    deployment.wait(lambda: answers(f"{urls[0]}/health/ready"), "the process to come back")
    deployment.wait(back, "adapters to go back where they belong")


@on_postgresql
def test_a_deleted_adapter_is_gone_from_every_process(scene: Scene) -> None:
    deployment = scene.deployment
    scene.trained()
    name, adapter = next(iter(scene.adapters().items()))
    assert deployment.generate(name).status_code == 200
    assert deployment.openai.models.delete(name).deleted
    assert deployment.generate(name).status_code == 404
    assert all(adapter not in scene.loaded(url) for url in scene.cluster.inference_urls)
    assert not deployment.artifacts.adapter(adapter).exists()


@on_postgresql
def test_a_database_that_restarts_costs_no_work(scene: Scene) -> None:
    deployment = scene.deployment
    job = deployment.create(LONG)
    deployment.wait_for_steps(job)
    assert scene.postgres
    scene.postgres.stop()
    assert deployment.http.get("/health/live").status_code == 200
    deployment.wait(lambda: deployment.http.get("/health/ready").status_code == 503, "the gateway to say so")
    assert deployment.http.get("/v1/fine_tuning/jobs").status_code == 503
    scene.postgres.start()
    messages = deployment.check_ended_once(job, LONG)
    assert (deployment.job(job).attempt, deployment.job(job).worker_failures) == (1, 0), messages
    deployment.check_a_new_job_works()
