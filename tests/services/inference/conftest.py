from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.services.inference.adapters_on_disk import EVERYTHING, Oracle
from tests.services.inference.harness import EngineUnderTest, Tiny
from tests.services.inference.server import Server, running
from tests.tiny import prepared_tiny


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A tiny model loses more to handing work to threads than it wins."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    root = tmp_path_factory.mktemp("inference")
    store, base, manifest = prepared_tiny(root)
    model = root / "tiny-model"
    return Tiny(store, base, manifest, model, Oracle(store, model))


@pytest.fixture(scope="session")
def adapters(tiny: Tiny) -> list[str]:
    """Adapters of different ranks, targets and scalings."""
    return [
        tiny.adapter(seed=1, r=8, alpha=32),
        tiny.adapter(seed=2, r=4, alpha=12, targets=("q_proj", "o_proj", "down_proj"), rslora=True),
        tiny.adapter(seed=3, r=16, alpha=16, targets=EVERYTHING, scale=0.2),
        tiny.adapter(seed=4, r=1, alpha=3, targets=("gate_proj",), scale=1.0),
    ]


@pytest.fixture(params=["own", "transformers"])
def engine(tiny: Tiny, request: pytest.FixtureRequest) -> Iterator[Callable[..., EngineUnderTest]]:
    """Makes engines and closes them; every test runs on our own forward pass and on transformers'."""
    made: list[EngineUnderTest] = []

    def make(**options: Any) -> EngineUnderTest:
        made.append(EngineUnderTest(tiny, **{"own": request.param == "own"} | options))
        return made[-1]

    yield make
    for each in made:
        each.engine.close()


@pytest.fixture(scope="session")
def server(tiny: Tiny) -> Iterator[Server]:
    """One server for the tests that leave no trace in it."""
    with running(tiny) as server:
        yield server
