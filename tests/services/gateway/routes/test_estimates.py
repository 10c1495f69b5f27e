"""Estimates and previews against the tokenizer the trainer uses, and against what jobs have measured."""

from pathlib import Path
from typing import Any

import pytest

from services.gateway.bases.tokenised import tokenised_rows
from services.gateway.jobs.calibration import calibrate
from services.gateway.jobs.peak_memory import largest_micro_batch_tokens
from services.gateway.jobs.worker_device import newest_device
from shared.bases.base_model import prepare_base
from shared.datasets.tokens import Tokenizer
from shared.jobs.spec import DeviceKind, Hyperparameters, JobFault, JobSpec, TrainingReport
from shared.storage.artifacts import LocalArtifactStore
from shared.storage.tables import events, jobs
from shared.training.memory import PROCESS_MB
from shared.training.plan import CPU_TOKEN_BUDGET
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
    body = {"model": "tiny", "training_file": file, "preset": "reference", "hyperparameters": {"n_epochs": 2}}
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

    largest = largest_micro_batch_tokens([len(tokens.ids) for tokens in rows if tokens], 8, CPU_TOKEN_BUDGET)
    finish(gateway, {"model": "tiny", "training_file": file, "preset": "reference"}, 120.0, largest)
    second = gateway.http.post(PATH, json=body).json()
    assert second["calibration"] == "calibrated"
    # Rows as those of the finished job, so the same peak; twice the tokens at once need a little more.
    assert (second["tokens_per_second"], second["peak_memory_mb"]) == (120.0, pytest.approx(900, abs=0.1))
    wider = body | {"hyperparameters": {"batch_size": 64}}
    assert gateway.http.post(PATH, json=wider).json()["peak_memory_mb"] > second["peak_memory_mb"]
    assert second["minutes"] == pytest.approx(second["tokens"] / 120 / 60, abs=0.01)
    other = gateway.http.post(PATH, json=body | {"base_precision": "fp32"}).json()
    assert other["calibration"] == "not calibrated"


def finish(
    gateway: Gateway,
    body: dict[str, Any],
    rate: float,
    largest_micro_batch: int | None = None,
    device: DeviceKind | None = "cpu",
) -> None:
    """A job that ends at once with a report, as a worker would write it."""
    assert gateway.http.post("/v1/fine_tuning/jobs", json=body).status_code == 200
    leases = gateway.leases
    lease = leases.claim("worker-1", device=device)
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
        device=device,
        peak_memory_mb=900.0,
        tokens_at_once=largest_micro_batch,
        grad_norm=1.0,
        quantized_layers=14,
        base_mb=1.0,
    )
    leases.succeed(lease, leases.reserve_adapter(lease), report)


def test_an_estimate_reckons_with_the_device_of_the_newest_worker(gateway_with_tiny: Any) -> None:
    gateway, store, base = gateway_with_tiny
    prepare_base(base, store)
    body = {"model": "tiny", "training_file": gateway.uploaded(ROWS)}

    def estimated(**more: Any) -> dict[str, Any]:
        answer: dict[str, Any] = gateway.http.post(PATH, json=body | more).json()
        return answer

    def said(answer: dict[str, Any]) -> tuple[Any, ...]:
        return answer["device"], answer["calibration"], answer["tokens_per_second"], answer["peak_memory_mb"]

    first = estimated()
    assert first["device"] is None
    assert "reckoned for a CPU" in " ".join(first["warnings"])
    finish(gateway, body, 120.0)
    on_cpu = estimated()
    assert said(on_cpu)[:3] == ("cpu", "calibrated", 120.0)
    assert not any("reckoned" in warning for warning in on_cpu["warnings"])

    # A GPU takes its first job: what a CPU measured says nothing of it, as soon as the job is claimed.
    assert gateway.http.post("/v1/fine_tuning/jobs", json=body).status_code == 200
    lease = gateway.leases.claim("worker-2", device="cuda")
    assert said(estimated()) == ("cuda", "not calibrated", None, None)
    assert "has been trained on a GPU of this installation" in " ".join(estimated()["warnings"])
    assert lease is not None
    gateway.leases.fail(lease, JobFault(code="x", message="x"))

    # About the tokens of a step; far more of them at once are another question.
    finish(gateway, body, 9_000.0, first["tokens"] // first["total_steps"], "cuda")
    on_gpu = estimated()
    assert said(on_gpu)[:3] == ("cuda", "calibrated", 9_000.0)
    assert on_gpu["peak_memory_mb"] == pytest.approx(900, rel=0.2)
    assert not any("GPU" in warning for warning in on_gpu["warnings"])
    wider = estimated(hyperparameters={"batch_size": 60})
    assert said(wider)[:3] == ("cuda", "calibrated", 9_000.0)
    assert wider["peak_memory_mb"] is None
    assert "larger or smaller micro-batches" in " ".join(wider["warnings"])
    assert said(estimated(base_precision="fp32"))[1:] == ("not calibrated", None, None)

    finish(gateway, body, 130.0)
    assert said(estimated())[:3] == ("cpu", "calibrated", 125.0)
    # Once events are dropped, reports still say it.
    with gateway.services.database.write() as tx:
        tx.execute(events.delete())
        assert newest_device(tx) == "cpu"


def test_reports_that_name_no_device_count_on_a_cpu_until_others_do(gateway_with_tiny: Any) -> None:
    gateway, store, base = gateway_with_tiny
    prepare_base(base, store)
    body = {"model": "tiny", "training_file": gateway.uploaded(ROWS)}
    finish(gateway, body, 100.0, device=None)
    database = gateway.services.database

    def rate(device: DeviceKind | None) -> float | None:
        with database.read() as tx:
            (job, *_) = tx.execute(jobs.select()).all()
            found = calibrate(tx, JobSpec.model_validate(job.spec), device)
        return found.tokens_per_second if found else None

    assert (rate(None), rate("cpu"), rate("cuda")) == (100.0, 100.0, None)
    finish(gateway, body, 300.0, device="cpu")
    assert (rate("cpu"), rate("cuda")) == (300.0, None)
    # A report as the versions before wrote it.
    with database.write() as tx:
        (old, *_) = [row for row in tx.execute(jobs.select()) if row.report["device"] is None]
        report = {key: value for key, value in old.report.items() if key != "device"}
        tx.execute(jobs.update().where(jobs.c.id == old.id).values(report=report))
    assert (rate(None), rate("cpu"), rate("cuda")) == (100.0, 300.0, None)


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
