"""`python -m tests.services.trainer.lose_device FOLDER`: a worker on a GPU whose context breaks in mid-step.

A process of its own: nothing on the device works in it afterwards. Exit status 0 if all went as it should.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch

from services.trainer.model.bases import WarmBases
from services.trainer.recipe import finetune as recipe
from services.trainer.worker.loop import DeviceLost
from shared.bases.catalogue import Catalogue
from shared.jobs.spec import State
from shared.logs import configure_logging
from shared.storage.database import Database, migrate
from tests.services.trainer.worker.test_loop import ROWS, Place
from tests.tiny import prepared_tiny

CUDA = torch.device("cuda")


def main() -> None:
    configure_logging("trainer")
    root = Path(sys.argv[1])
    artifacts, base, _ = prepared_tiny(root)
    url = f"sqlite:///{root / 'tunesmith.db'}"
    migrate(url)
    place = Place(artifacts, Catalogue((base,)), base.revision, Database(url))
    place.bases = WarmBases(place.catalogue, artifacts, CUDA)
    first, second = place.job(ROWS), place.job(ROWS)

    def beyond_the_table(*_: Any, **__: Any) -> Any:
        table = torch.zeros(4, 4, device=CUDA)
        return torch.nn.functional.embedding(torch.tensor([1 << 20], device=CUDA), table).cpu()

    setattr(recipe, "take_step", beyond_the_table)  # noqa: B010 -- mypy minds the plain way
    try:
        place.worker().drain_queue()
    except DeviceLost:
        pass
    else:
        raise AssertionError("the worker went on")
    assert place.state(first) is place.state(second) is State.QUEUED
    assert not any("Started" in line for line in place.messages(second))


if __name__ == "__main__":
    main()
    # Destructors would ask the device.
    os._exit(0)
