"""What befalls machines, beside kills: processes that stand still, databases that crash, write nothing, are full or are
out of reach, another installation on the same folder, and a hasty garbage collector.

Runs with `--chaos-rounds N` only, on PostgreSQL. While the nemesis is there a client goes on asking; afterwards every
job that it was acknowledged has ended once with the right bytes, and no worker is blamed.
"""

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import pytest

from services.gateway.background.garbage_collector import GarbageCollector
from shared.jobs.spec import State
from shared.storage.database import migrate
from tests.chaos.proxy import WAYS, DarkProxy
from tests.chaos.stack import fill, small_disk
from tests.cluster import SHORT_LEASES, Cluster
from tests.deployment import LONG, SHORT, Deployment
from tests.stack_processes import Postgres, Processes, running_postgres

pytestmark = [pytest.mark.servers, pytest.mark.timeout(1000)]
# Longer than a lease and than a request of the client, shorter than what a checkpoint waits.
OUTAGE_SECONDS = 10.0
ASKED = 3


@dataclass
class Scene:
    cluster: Cluster
    deployment: Deployment
    postgres: Postgres
    proxy: DarkProxy
    disk: Path | None


@dataclass
class Client:
    """Sends each of its requests again, under the same key, until it is answered."""

    url: str
    key: str
    file: str
    created: list[str] = field(default_factory=list)
    unlike: list[str] = field(default_factory=list)

    def ask(self, name: str) -> None:
        body = {"model": "tiny", "training_file": self.file, "preset": "reference", "hyperparameters": SHORT}
        for number in range(ASKED):
            headers = {"authorization": f"Bearer {self.key}", "idempotency-key": f"{name} {number}".replace(" ", "-")}
            while not self._answered(headers, body):
                time.sleep(0.5)

    def _answered(self, headers: dict[str, str], body: Mapping[str, object]) -> bool:
        with suppress(httpx.HTTPError):
            answer = httpx.post(
                f"{self.url}/v1/fine_tuning/jobs", json=body, headers=headers, timeout=4, trust_env=False
            )
            if answer.status_code == 200:
                self.created.append(answer.json()["id"])
                return True
            # 409: the first sending is still being worked on.
            if answer.status_code not in (409, 503):
                self.unlike.append(f"{answer.status_code} {answer.text}")
                return True
        return False


def stand_still(*processes: psutil.Process) -> None:
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    time.sleep(OUTAGE_SECONDS)
    for process in reversed(processes):
        process.send_signal(signal.SIGCONT)


def gateway_stands_still(scene: Scene) -> None:
    stand_still(psutil.Process(scene.cluster.gateway.pid))


def redis_stands_still(scene: Scene) -> None:
    stand_still(psutil.Process(scene.cluster.redis.pid))


def database_stands_still(scene: Scene) -> None:
    leader = psutil.Process(int((scene.postgres.folder / "postmaster.pid").read_text().split()[0]))
    stand_still(leader, *leader.children())


def database_crashes(scene: Scene) -> None:
    scene.postgres.stop("immediate")
    time.sleep(OUTAGE_SECONDS / 2)
    scene.postgres.start()


def database_is_read_only(scene: Scene) -> None:
    scene.postgres.set(default_transaction_read_only="on")
    time.sleep(OUTAGE_SECONDS)
    scene.postgres.set(default_transaction_read_only="off")


def database_hears_nothing(scene: Scene) -> None:
    with scene.proxy.dark("to server"):
        time.sleep(OUTAGE_SECONDS)


def answers_are_lost(scene: Scene) -> None:
    with scene.proxy.dark("to client"):
        time.sleep(OUTAGE_SECONDS)
        scene.proxy.cut()


def network_is_dark(scene: Scene) -> None:
    with scene.proxy.dark(*WAYS):
        # Longer than the server lets a transaction be idle.
        time.sleep(2 * OUTAGE_SECONDS)
        scene.proxy.cut()


def disk_of_the_database_is_full(scene: Scene) -> None:
    assert scene.disk
    filler = scene.disk / "filler"
    fill(filler)
    time.sleep(OUTAGE_SECONDS)
    filler.unlink()


def collector_is_hasty(scene: Scene) -> None:
    """What is a second old and has no row is garbage."""
    collector = GarbageCollector(scene.deployment.database, scene.deployment.artifacts, untouched=1.0)
    until = time.monotonic() + OUTAGE_SECONDS
    while time.monotonic() < until:
        collector.collect()
        time.sleep(0.2)


def another_installation_on_the_folder(scene: Scene) -> None:
    url = scene.postgres.database()
    migrate(url)
    environment = scene.cluster.environment | {"TUNESMITH_DATABASE_URL": url, "TUNESMITH_PORT": "0"}
    intruder = scene.cluster.processes.start("intruder", [sys.executable, "-m", "services.gateway"], environment)
    scene.deployment.wait(lambda: not intruder.alive(), "the other gateway to give in")
    assert intruder.process.returncode != 0
    assert "tunesmith adopt" in intruder.log.read_text()


NEMESES: dict[str, Callable[[Scene], None]] = {
    nemesis.__name__.replace("_", " "): nemesis
    for nemesis in (
        gateway_stands_still,
        redis_stands_still,
        database_stands_still,
        database_crashes,
        database_is_read_only,
        database_hears_nothing,
        answers_are_lost,
        network_is_dark,
        disk_of_the_database_is_full,
        collector_is_hasty,
        another_installation_on_the_folder,
    )
}


@contextmanager
def scene_in(folder: Path) -> Iterator[Scene]:
    with ExitStack() as stack, Processes(folder) as processes:
        disk = stack.enter_context(small_disk(400))
        postgres = stack.enter_context(running_postgres(disk))
        direct = postgres.database()
        proxy = DarkProxy(Path(postgres.socket_folder) / ".s.PGSQL.5432")
        stack.callback(proxy.close)
        name = direct.partition("?")[0].rpartition("/")[2]
        proxied = f"postgresql://postgres@127.0.0.1:{proxy.port}/{name}"
        cluster = Cluster(folder, processes, proxied, settings=SHORT_LEASES)
        cluster.up("worker-1")
        deployment = Deployment(cluster.url, cluster.key, direct, folder / "artifacts", processes.tails)
        stack.callback(deployment.close)
        yield Scene(cluster, deployment, postgres, proxy, disk)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with scene_in(tmp_path_factory.mktemp("nemeses")) as scene:
        yield scene


@pytest.mark.parametrize("nemesis", NEMESES)
def test_nemesis(scene: Scene, nemesis: str, round_seed: int) -> None:
    if NEMESES[nemesis] is disk_of_the_database_is_full and scene.disk is None:
        pytest.skip("needs the right to mount a file system")
    deployment = scene.deployment
    deployment.uninterrupted(LONG), deployment.uninterrupted(SHORT)
    job = deployment.create(LONG)
    deployment.wait_for_steps(job)
    client = Client(scene.cluster.url, scene.cluster.key, deployment.file)
    asking = threading.Thread(target=client.ask, args=(f"{nemesis} {round_seed}",), daemon=True)
    asking.start()
    NEMESES[nemesis](scene)
    asking.join(120)
    assert not asking.is_alive()
    assert client.unlike == []
    assert len(set(client.created)) == ASKED
    for one, hyperparameters in [(job, LONG), *((created, SHORT) for created in client.created)]:
        messages = deployment.check_ended_once(one, hyperparameters)
        now = deployment.job(one)
        assert (now.attempt, now.worker_failures) == (1, 0), messages
    every = {one.id for one in deployment.jobs.list("default", limit=100).items}
    states = {one: deployment.job(one).state for one in every}
    assert set(states.values()) == {State.SUCCEEDED}, states
    deployment.check_nothing_half_written_is_visible()
    deployment.check_a_new_job_works()
