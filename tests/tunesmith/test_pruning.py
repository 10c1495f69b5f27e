"""`tunesmith models prune`: which checkpoints go, and what is said of those that cannot."""

import json
from typing import Any

from tests.tunesmith.fake_gateway import FakeGateway, error
from tests.tunesmith.test_cli import run

DONE, RUNNING = "ft:tiny:default:a:000000000001", "ft:tiny:default:b:000000000002"
CHECKPOINTS = [f"{DONE}:ckpt-step-2", f"{DONE}:ckpt-step-1", f"{RUNNING}:ckpt-step-1"]


def installation() -> FakeGateway:
    models: list[dict[str, Any]] = [{"id": "tiny", "kind": "base"}, {"id": DONE, "kind": "adapter"}]
    models += [{"id": name, "kind": "checkpoint"} for name in CHECKPOINTS]
    return FakeGateway({"GET /v1/models": (200, {"data": models})})


def deletion(name: str) -> str:
    return "DELETE /v1/models/" + name.replace(":", "%3A")


def test_nothing_is_deleted_until_it_is_meant() -> None:
    with installation() as gateway:
        code, out, err = run(gateway, "models", "prune")
        assert (code, out.split(), gateway.bodies) == (0, CHECKPOINTS[:2], [])
        assert err == "2 checkpoints would be deleted\nnext: tunesmith models prune --yes\n"


def test_a_checkpoint_in_use_stays_and_so_do_those_of_unfinished_models() -> None:
    with installation() as gateway:
        gateway.answers[deletion(CHECKPOINTS[0])] = error(400, "in use by ftjob-1", "model_in_use", "model")
        gateway.answers[deletion(CHECKPOINTS[1])] = (200, {"id": CHECKPOINTS[1], "freed_bytes": 2_500_000})
        code, out, err = run(gateway, "models", "prune", "--yes")
        assert (code, out.split()) == (0, CHECKPOINTS[1:2])
        assert err == "warning: in use by ftjob-1\n1 checkpoint deleted; 2.5 MB freed\n"
        assert [route for route, _ in gateway.bodies] == [deletion(name) for name in CHECKPOINTS[:2]]
        answer = json.loads(run(gateway, "models", "prune", "--yes", "--json")[1])
        assert answer == {"checkpoints": CHECKPOINTS[1:2], "deleted": True, "freed_bytes": 2_500_000}
        gateway.answers[deletion(CHECKPOINTS[0])] = error(503, "starting", "unavailable")
        assert run(gateway, "models", "prune", "--yes")[0] == 1


def test_with_none_there_is_nothing_to_do() -> None:
    with FakeGateway({}) as gateway:
        assert run(gateway, "models", "prune") == (0, "", "there is no checkpoint to delete\n")
