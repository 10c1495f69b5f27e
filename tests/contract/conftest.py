"""Where the contract's tests find a server.

They run under any version of OpenAI's client, also in an environment that has nothing but that client and pytest: there
the server's address comes by `CONTRACT_URL`, `CONTRACT_KEY` and `CONTRACT_JOB`; otherwise a stack is started.
"""

import os
from collections.abc import Iterator
from typing import Any

import pytest

from tests.contract.server import Server, trained


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest) -> Server:
    if "CONTRACT_URL" in os.environ:
        return Server(os.environ["CONTRACT_URL"], os.environ["CONTRACT_KEY"], os.environ["CONTRACT_JOB"])
    stack: Any = request.getfixturevalue("tiny_stack")
    return Server(stack.url, stack.key, trained(stack))


@pytest.fixture
def client(server: Server) -> Iterator[Any]:
    """OpenAI's client, which here raises on any missing or mistyped field of an answer."""
    from openai import OpenAI

    with OpenAI(
        base_url=f"{server.url}/v1", api_key=server.key, max_retries=0, _strict_response_validation=True
    ) as made:
        yield made
