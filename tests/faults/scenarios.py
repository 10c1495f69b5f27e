"""What happens while a fault strikes: one thing a client or a worker does, on ground prepared without faults."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from sqlalchemy.exc import SQLAlchemyError

from shared.jobs.spec import State
from tests.faults.world import Parts, World

SUCCEEDED = frozenset({State.SUCCEEDED})
# Of six rows: three steps, a checkpoint after each, of which two are kept.
BODY = {
    "model": "tiny",
    "base_precision": "fp32",
    "compute_dtype": "fp32",
    "keep_checkpoints": 2,
    "hyperparameters": {"n_epochs": 1, "batch_size": 2, "checkpoint_steps": 1},
    "lora": {"r": 2},
}


@dataclass(frozen=True, slots=True)
class Scenario:
    """Preparation, what is done under faults, and how jobs may end."""

    name: str
    prepare: Callable[[World], None]
    act: Callable[[World], None]
    ends: frozenset[State] = SUCCEEDED


def upload(world: World) -> None:
    world.plan("upload", lambda parts: parts.upload("upload-1"))
    world.send("upload")


def create(world: World) -> None:
    body = BODY | {"training_file": world.answer("upload")}
    world.plan("create", lambda parts: parts.create("create-1", body))
    world.send("create")


def queued(world: World) -> None:
    upload(world)
    create(world)


def trained(world: World) -> None:
    queued(world)
    world.work()


def train(world: World) -> None:
    world.work()


def cancel_while_training(world: World) -> None:
    _plan_actions(world, "cancel")
    world.work(lambda step: world.send("cancel") if step == 1 else None)


def pause_and_resume(world: World) -> None:
    _plan_actions(world, "pause", "resume")
    world.work(lambda step: world.send("pause") if step == 1 else None)
    world.send("resume")
    world.work()


def delete_both(world: World) -> None:
    adapter, file_id = str(world.parts.job(world.answer("create")).adapter), world.answer("upload")
    world.plan("delete model", lambda parts: parts.delete_model(adapter))
    world.plan("delete file", lambda parts: parts.delete_file(file_id))
    world.send("delete model")
    world.send("delete file")


def garbage(world: World) -> None:
    """What crashes leave, of every kind."""
    trained(world)
    store = world.parts.store
    # Ids that come first in a listing, whatever the others are.
    first = "0" * 24
    left = [store.adapter(f"adapter-{first}"), store.file(f"file-{first}"), store.checkpoints(f"ftjob-{first}")]
    left += [store.checkpoints(world.answer("create")), store.root / "staging" / "ab"]
    left += [store.cache("a" * 64, "b" * 64)]
    for folder in left:
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")


def collect(world: World) -> None:
    with suppress(OSError, SQLAlchemyError):
        # As its thread does: the next round sees.
        world.collect()


def _plan_actions(world: World, *actions: str) -> None:
    job_id = world.answer("create")
    for action in actions:
        world.plan(action, partial(Parts.request, action=action, job_id=job_id))


SCENARIOS = (
    Scenario("upload", lambda world: None, upload),
    Scenario("create", upload, create),
    Scenario("train", queued, train),
    Scenario("cancel", queued, cancel_while_training, frozenset({State.CANCELLED, State.SUCCEEDED})),
    Scenario("pause and resume", queued, pause_and_resume),
    Scenario("delete", trained, delete_both),
    Scenario("collect", garbage, collect),
)
