from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.services.trainer.harness import TinyJob


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A tiny model loses more to handing work to threads than it wins."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny(tmp_path: Path) -> TinyJob:
    return TinyJob(tmp_path)
