"""A job whose `model` is an adapter continues it."""

from typing import Any

from tests.services.gateway.conftest import ROWS, Gateway
from tests.services.gateway.routes.test_estimates import finish

PATH = "/v1/fine_tuning/jobs"


def test_an_adapter_is_continued_in_its_own_shape(gateway: Gateway) -> None:
    body: dict[str, Any] = {"model": "smollm2-135m-instruct", "training_file": gateway.uploaded(ROWS)}
    finish(gateway, body | {"lora": {"r": 4}}, rate=100.0)
    (job,) = gateway.http.get(PATH).json()["data"]
    assert job["initial_adapter"] is None
    name = job["fine_tuned_model"]

    continued = gateway.http.post(PATH, json=body | {"model": name, "preset": "recommended"}).json()
    spec = gateway.jobs.get("default", continued["id"]).spec
    assert (spec.base, spec.initial_adapter) == ("smollm2-135m-instruct", continued["initial_adapter"])
    assert continued["initial_adapter"] == gateway.jobs.get("default", job["id"]).adapter
    assert continued["lora"] == job["lora"]
    assert continued["lora"]["r"] == 4

    for wrong, param in ((body | {"model": name, "lora": {"r": 8}}, "lora"), (body | {"model": name + "x"}, "model")):
        answer = gateway.http.post(PATH, json=wrong)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
