"""A day of one installation, an hour at a time: what is deleted goes, and nothing grows with what was done."""

import gc
import os
import threading
import time

import pytest
import torch
from structlog.testing import capture_logs

from services.gateway.background.garbage_collector import GarbageCollector
from shared.jobs.spec import State
from tests.faults.scenarios import BODY
from tests.faults.world import PROJECT, Ground, World, quick

pytestmark = pytest.mark.slow
HOURS = 24


def test_after_a_day_of_jobs_there_is_no_more_than_after_an_hour(tmp_path_factory: pytest.TempPathFactory) -> None:
    ground = Ground(tmp_path_factory.mktemp("ground"))
    seen = []
    with pytest.MonkeyPatch.context() as patch, capture_logs():
        quick(patch)
        world = ground.world(lambda world: None)
        for hour in range(HOURS):
            one_hour(world, hour)
            # The first hours load libraries.
            if hour in (3, 13, HOURS - 1):
                seen.append(what_is_held(world))
        world.parts.close()
    assert seen[1:] == seen[:1] * 2


def one_hour(world: World, hour: int) -> None:
    """A job that is trained, one that is cancelled, and the end of everything that came of them."""
    parts = world.parts
    file = parts.upload(f"upload {hour}")
    body = BODY | {"training_file": file}
    trained, cancelled = parts.create(f"job {hour}", body), parts.create(f"cancelled {hour}", body)
    parts.request("cancel", cancelled)
    world.work()
    assert parts.job(trained).state is State.SUCCEEDED
    with parts.database.read() as tx:
        names = [adapter.name for adapter in parts.adapters.list(tx, PROJECT)]
    assert names
    for name in names:
        parts.delete_model(name)
    parts.delete_file(file)
    GarbageCollector(parts.database, parts.store, now=lambda: time.time() + 3600.0 * (hour + 2)).collect()


def what_is_held(world: World) -> dict[str, object]:
    gc.collect()
    root = world.parts.store.root
    return {
        "folders": sorted(
            f"{kind.name}/{one.name}" for kind in root.iterdir() if kind.is_dir() for one in kind.iterdir()
        ),
        "tensors": sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()),
        "threads": threading.active_count(),
        "open files": len(os.listdir("/proc/self/fd")),
    }
