"""`make test-clients`: programs written for other servers, with public clients unchanged, on a running stack.

Not in `make test`: each client wants an environment of its own, some of them heavy. What is held here is that the
client works through; what a field means is held where it is built.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.environments import Client, read_clients
from tests.cluster import Cluster, tiny_stack
from tests.contract.server import trained
from tests.stack_processes import free_port

pytestmark = [pytest.mark.servers, pytest.mark.timeout(3600)]
CLIENTS = read_clients()
# A prompt with what a client offers of tools is some thousand tokens of the tiny vocabulary.
POSITIONS = 4096


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with tiny_stack(tmp_path_factory.mktemp("stack"), positions=POSITIONS) as running:
        yield running


@pytest.fixture(scope="module")
def variables(stack: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What programs are told of the server."""
    job = trained(stack)
    with stack.client() as http:
        adapter = http.get(f"/v1/fine_tuning/jobs/{job}").json()["fine_tuned_model"]
    return {
        "URL": stack.url,
        "KEY": stack.key,
        "BASE": "tiny",
        "ADAPTER": adapter,
        "TOKENIZER": str(stack.model),
        # For a server of the program's own.
        "FREE_PORT": str(free_port()),
        # What programs keep of their own.
        "HOME": str(tmp_path_factory.mktemp("home")),
        "LLM_USER_PATH": str(tmp_path_factory.mktemp("llm")),
    }


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.name)
def test_client(client: Client, variables: dict[str, str]) -> None:
    client.install()
    done = client.run(variables)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"


def test_every_program_is_run() -> None:
    programs = {path.name for path in (Path(__file__).parent / "programs").iterdir() if path.suffix in (".py", ".mjs")}
    assert programs == {client.program for client in CLIENTS}
