"""The beginner's path: the tutorial's three-row `train.json` is taken as it is, with advice instead of refusal."""

import json
from typing import Any

from tests.services.gateway.conftest import Gateway

# As the tutorial prints it: one JSON array, indented, with an `input` here and none there.
TRAIN_JSON = json.dumps(
    [
        {"instruction": "Summarize the text.", "input": "LoRA trains small matrices.", "output": "LoRA is cheap."},
        {"instruction": "Translate to French.", "input": "Good morning", "output": "Bonjour"},
        {"instruction": "What is the capital of France?", "output": "Paris"},
    ],
    indent=2,
).encode()


def test_three_rows_are_taken_with_the_tutorials_advice_on_the_file_and_on_the_job(gateway: Gateway) -> None:
    file = gateway.upload(TRAIN_JSON, "train.json").json()
    assert (file["filename"], file["status"]) == ("train.json", "processed")
    assert (file["dataset"]["format"], file["dataset"]["rows"]) == ("instruction", 3)
    advice = file["dataset"]["warnings"]
    for words in ("fewer than 50 rows; this file has 3", "try that first", "belong in retrieval, not in weights"):
        assert sum(words in text for text in advice) == 1
    body = {"model": "smollm2-135m-instruct", "training_file": file["id"]}
    job = gateway.http.post("/v1/fine_tuning/jobs", json=body).json()
    assert job["state"] == "queued"
    assert job["warnings"][: len(advice)] == advice
    # So many epochs are chosen for them that nothing more is to be said.
    assert job["warnings"] == advice
    assert (job["hyperparameters"]["n_epochs"], job["hyperparameters"]["batch_size"]) == (10, 1)
    # Advice is not an error, and is in the job's event log too.
    assert all(text in said(gateway, job) for text in advice)
    few = gateway.http.post("/v1/fine_tuning/jobs", json=body | {"preset": "reference"}).json()
    steps = "3 optimizer steps are few (100 is a sensible minimum): more rows or more epochs teach more"
    assert few["warnings"] == [*advice, steps, "a batch of 8 is more than all rows"]
    assert steps in said(gateway, few)


def said(gateway: Gateway, job: dict[str, Any]) -> str:
    events = gateway.http.get(f"/v1/fine_tuning/jobs/{job['id']}/events").json()["data"]
    return " ".join(event["message"] for event in events)
