"""The series a job leaves behind."""

from typing import Any

from shared.jobs.rows import NewEvent
from tests.services.gateway.conftest import ROWS, Gateway

PATH = "/v1/fine_tuning/jobs"


def point(step: int, loss: float, **more: float) -> NewEvent:
    return NewEvent(f"Step {step}", type="metrics", data={"step": step, "train_loss": loss, **more})


def test_the_series_ascends_pages_and_takes_the_last_word_on_a_step(gateway: Gateway) -> None:
    body = {"model": "smollm2-135m-instruct", "training_file": gateway.uploaded(ROWS)}
    job = gateway.http.post(PATH, json=body).json()["id"]
    path = f"{PATH}/{job}/metrics"
    assert gateway.http.get(path).json() == {"object": "list", "data": [], "has_more": False}
    lease = gateway.leases.claim("worker-1")
    assert lease is not None
    # Step 10 is trained again, as after a lost worker.
    events = [point(5, 3.0), point(10, 2.8), NewEvent("not a point"), point(10, 2.5, valid_loss=2.9), point(15, 2.4)]
    gateway.leases.record(lease, events)

    def get(**params: Any) -> Any:
        return gateway.http.get(path, params=params).json()

    whole = get()
    assert [(point["step"], point["train_loss"]) for point in whole["data"]] == [(5, 3.0), (10, 2.5), (15, 2.4)]
    assert whole["data"][1] == {"step": 10, "train_loss": 2.5, "valid_loss": 2.9}
    assert whole["has_more"] is False
    assert [point["step"] for point in get(after_step=5)["data"]] == [10, 15]
    first = get(limit=1)
    assert ([point["step"] for point in first["data"]], first["has_more"]) == ([5], True)
    assert get(after_step=5, limit=1)["data"][0]["train_loss"] == 2.5


def test_what_is_wrong_is_named(gateway: Gateway) -> None:
    assert gateway.http.get(f"{PATH}/ftjob-0/metrics").status_code == 404
    body = {"model": "smollm2-135m-instruct", "training_file": gateway.uploaded(ROWS)}
    job = gateway.http.post(PATH, json=body).json()["id"]
    answer = gateway.http.get(f"{PATH}/{job}/metrics", params={"limit": 0})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "limit"
