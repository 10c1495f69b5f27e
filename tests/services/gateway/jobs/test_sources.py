"""A job whose `model` is an adapter continues it."""

from typing import Any

import pytest

from services.gateway.files.store import FileStore
from services.gateway.jobs.sources import JobSources
from shared.adapters.store import AdapterStore
from shared.errors import InvalidRequest
from shared.jobs.store import JobStore
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


def test_an_adapter_that_an_unfinished_job_continues_stays(gateway: Gateway) -> None:
    body: dict[str, Any] = {"model": "smollm2-135m-instruct", "training_file": gateway.uploaded(ROWS)}
    finish(gateway, body, rate=100.0)
    (job,) = gateway.http.get(PATH).json()["data"]
    name = job["fine_tuned_model"]
    continued = gateway.http.post(PATH, json=body | {"model": name}).json()
    for model in (name, continued["initial_adapter"]):
        answer = gateway.http.delete(f"/v1/models/{model}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "model_in_use")
        assert continued["id"] in answer.json()["error"]["message"]
    assert gateway.http.get(f"/v1/models/{name}").status_code == 200
    gateway.http.post(f"{PATH}/{continued['id']}/cancel")
    assert gateway.http.delete(f"/v1/models/{name}").status_code == 200

    # As if it had been deleted after the request was looked at.
    spec = gateway.jobs.get("default", continued["id"]).spec
    sources = JobSources(FileStore(), JobStore(), AdapterStore())
    with gateway.jobs.database.write() as tx, pytest.raises(InvalidRequest) as refused:
        sources.lock(tx, "default", spec)
    assert (refused.value.code, refused.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize("param", ["training_file", "validation_file"])
def test_a_file_that_was_deleted_meanwhile_is_named_by_its_field(gateway: Gateway, param: str) -> None:
    files = {"training_file": gateway.uploaded(ROWS), "validation_file": gateway.uploaded(ROWS)}
    job = gateway.http.post(PATH, json=files | {"model": "smollm2-135m-instruct"}).json()
    gateway.http.post(f"{PATH}/{job['id']}/cancel")
    spec = gateway.jobs.get("default", job["id"]).spec
    gateway.http.delete(f"/v1/files/{files[param]}")
    sources = JobSources(FileStore(), JobStore(), AdapterStore())
    with gateway.jobs.database.write() as tx, pytest.raises(InvalidRequest) as refused:
        sources.lock(tx, "default", spec)
    assert (refused.value.code, refused.value.param) == ("file_not_found", param)
