"""Estimates and previews against the tokenizer the trainer uses, and against what jobs have measured."""

from pathlib import Path
from typing import Any

import pytest

from services.gateway.bases.tokenised import tokenised_rows
from services.gateway.jobs.calibration import Calibration, calibrate
from services.gateway.jobs.estimate import largest_micro_batch_tokens
from shared.bases.base_model import prepare_base
from shared.datasets.tokens import Tokenizer
from shared.jobs.spec import Hyperparameters, TrainingReport
from shared.storage.artifacts import LocalArtifactStore
from shared.training.memory import PROCESS_MB
from tests.services.gateway.conftest import ROWS, Gateway, running_gateway
from tests.tiny import tiny_catalogue, write_catalogue, write_tiny_model

PATH = "/v1/fine_tuning/estimates"


@pytest.fixture
def gateway_with_tiny(settings: Any, tmp_path: Path) -> Any:
    """A gateway whose catalogue holds the tiny base, and the store it is to be prepared in."""
    model = write_tiny_model(tmp_path / "tiny-model")
    configured = settings(catalogue=write_catalogue(tmp_path / "catalogue.toml", model))
    store = LocalArtifactStore(configured.artifacts_root)
    with running_gateway(configured) as gateway:
        yield gateway, store, tiny_catalogue(model).get("tiny")


def test_an_estimate_counts_the_rows_and_uses_what_was_measured(gateway_with_tiny: Any) -> None:
    gateway, store, base = gateway_with_tiny
    file = gateway.uploaded(ROWS)
    body = {"model": "tiny", "training_file": file, "hyperparameters": {"n_epochs": 2}}
    refused = gateway.http.post(PATH, json=body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "base_not_prepared")
    prepare_base(base, store)

    first = gateway.http.post(PATH, json=body).json()
    assert first["calibration"] == "not calibrated"
    assert first["minutes"] is first["tokens_per_second"] is None
    assert first["peak_memory_mb"] > PROCESS_MB
    tokenizer = Tokenizer(store.base("tiny"))
    data = store.file(file) / "data"
    rows = [row.tokens for row in tokenised_rows(data, tokenizer, Hyperparameters(), lambda: None)]
    assert (first["total_steps"], first["checkpoints"]) == (2 * 8, 2)
    assert first["tokens"] == 2 * sum(len(tokens.ids) for tokens in rows if tokens)
    assert first["supervised_tokens"] == 2 * sum(tokens.supervised_count for tokens in rows if tokens)
    assert gateway.http.get("/v1/fine_tuning/jobs").json()["data"] == []

    largest = largest_micro_batch_tokens([len(tokens.ids) for tokens in rows if tokens], 8)
    finish(gateway, {"model": "tiny", "training_file": file}, 120.0, largest)
    second = gateway.http.post(PATH, json=body).json()
    assert second["calibration"] == "calibrated"
    # Rows as those of the finished job, so the same peak; twice the tokens at once need a little more.
    assert (second["tokens_per_second"], second["peak_memory_mb"]) == (120.0, pytest.approx(900, abs=0.1))
    wider = body | {"hyperparameters": {"batch_size": 64}}
    assert gateway.http.post(PATH, json=wider).json()["peak_memory_mb"] > second["peak_memory_mb"]
    assert second["minutes"] == pytest.approx(second["tokens"] / 120 / 60, abs=0.01)
    other = gateway.http.post(PATH, json=body | {"base_precision": "fp32"}).json()
    assert other["calibration"] == "not calibrated"


def finish(gateway: Gateway, body: dict[str, Any], rate: float, largest_micro_batch: int | None = None) -> None:
    """A job that ends at once with a report, as a worker would write it."""
    assert gateway.http.post("/v1/fine_tuning/jobs", json=body).status_code == 200
    leases = gateway.leases
    lease = leases.claim("worker-1")
    assert lease is not None
    report = TrainingReport(
        trainable_params=1,
        total_params=2,
        trained_tokens=1,
        total_tokens=1,
        steps=1,
        rows=1,
        dropped_rows=0,
        train_loss=1.0,
        tokens_per_second=rate,
        peak_memory_mb=900.0,
        tokens_at_once=largest_micro_batch,
        grad_norm=1.0,
        quantized_layers=14,
        base_mb=1.0,
    )
    leases.succeed(lease, leases.reserve_adapter(lease), report)
    with gateway.services.database.read() as connection:
        assert calibrate(connection, lease.job.spec) == Calibration(rate, 900.0)


def test_a_preview_shows_what_is_supervised(gateway_with_tiny: Any) -> None:
    gateway, store, base = gateway_with_tiny
    file = gateway.uploaded([*ROWS[:2], {"instruction": "long " * 200, "output": "never seen"}])
    path = f"/v1/files/{file}/preview"
    assert gateway.http.get(path, params={"model": "tiny"}).json()["error"]["code"] == "base_not_prepared"
    prepare_base(base, store)
    shown = gateway.http.get(path, params={"model": "test/tiny-llama"}).json()
    assert shown["model"] == "tiny"
    first, _, last = shown["data"]
    prompt, response = first["pieces"]
    assert prompt == {"text": f"### Instruction:\n{ROWS[0]['instruction']}\n\n### Response:\n", "supervised": False}
    assert response == {"text": ROWS[0]["output"] + "<|im_end|>", "supervised": True}
    assert first["template"] == "instruction-v1"
    assert first["supervised_tokens"] < first["tokens"]
    assert (last["dropped"], last["pieces"]) == (True, [])
    assert len(gateway.http.get(path, params={"model": "tiny", "limit": 1}).json()["data"]) == 1
    (row,) = gateway.http.get(path, params={"model": "tiny", "limit": 1, "train_on_prompt": True}).json()["data"]
    assert row["supervised_tokens"] == row["tokens"] - 1
    for wrong in ({"model": "nobody"}, {"model": "tiny", "limit": 0}, {}):
        assert gateway.http.get(path, params=wrong).status_code == 400
    assert gateway.http.get("/v1/files/file-0/preview", params={"model": "tiny"}).status_code == 404
