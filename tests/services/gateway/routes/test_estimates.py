"""Estimates and previews against the tokenizer the trainer uses, and against what jobs have measured."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.bases.peak_memory import PROCESS_MB
from services.gateway.bases.tokenised import Row, tokenised_rows
from services.gateway.routes.estimates import Amount, Rate, count, estimate, largest_micro_batch, measured_rate
from services.trainer.data.layout import CPU_TOKEN_BUDGET, plan_layout
from shared.bases.base_model import prepare_base
from shared.datasets.tokens import Tokenizer, Tokens
from shared.errors import InvalidRequest
from shared.jobs.spec import Hyperparameters, JobSpec, TrainingReport
from shared.storage.artifacts import LocalArtifactStore
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
    rows = [row.tokens for row in tokenised_rows(data, tokenizer, Hyperparameters())]
    assert first["total_steps"] == 2 * 8
    assert first["tokens"] == 2 * sum(len(tokens.ids) for tokens in rows if tokens)
    assert first["supervised_tokens"] == 2 * sum(tokens.supervised_count for tokens in rows if tokens)
    assert gateway.http.get("/v1/fine_tuning/jobs").json()["data"] == []

    at_once = largest_micro_batch([len(tokens.ids) for tokens in rows if tokens], 8)
    finish(gateway, {"model": "tiny", "training_file": file}, 120.0, at_once)
    second = gateway.http.post(PATH, json=body).json()
    assert second["calibration"] == "calibrated"
    # Rows as those of the finished job, so the same peak; twice the tokens at once need a little more.
    assert (second["tokens_per_second"], second["peak_memory_mb"]) == (120.0, pytest.approx(900, abs=0.1))
    wider = body | {"hyperparameters": {"batch_size": 64}}
    assert gateway.http.post(PATH, json=wider).json()["peak_memory_mb"] > second["peak_memory_mb"]
    assert second["minutes"] == pytest.approx(second["tokens"] / 120 / 60, abs=0.01)
    other = gateway.http.post(PATH, json=body | {"base_precision": "fp32"}).json()
    assert other["calibration"] == "not calibrated"


def finish(gateway: Gateway, body: dict[str, Any], rate: float, tokens_at_once: int | None = None) -> None:
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
        tokens_at_once=tokens_at_once,
        grad_norm=1.0,
        quantized_layers=14,
        base_mb=1.0,
    )
    leases.succeed(lease, leases.reserve_adapter(lease), report)
    assert measured_rate(gateway.services.database, lease.job.spec) == Rate(rate, 900.0)


SPEC = JobSpec(base="tiny", base_revision="r", training_file="f", training_sha256="s")


def spec(**hyper: Any) -> JobSpec:
    return SPEC.model_copy(update={"hyperparameters": Hyperparameters(**hyper)})


def test_time_counts_every_evaluation_and_no_step_that_is_not_made() -> None:
    training, validation = Amount(80, 0, 8_000, 4_000), Amount(10, 0, 1_000, 500)
    rate = Rate(100.0, 1.0)
    whole = estimate(spec(n_epochs=2), training, validation, rate, [])
    # Before, and after each of two epochs; an evaluated token costs half a trained one.
    assert (whole.total_steps, whole.tokens, whole.minutes) == (20, 16_000, round((16_000 + 1_500) / 100 / 60, 2))
    short = estimate(spec(n_epochs=2, max_steps=5), training, None, rate, [])
    assert (short.total_steps, short.tokens, short.supervised_tokens) == (5, 4_000, 2_000)
    split = estimate(spec(n_epochs=1, validation_split=0.25), training, None, rate, [])
    assert (split.total_steps, split.tokens) == (8, 6_000)
    with pytest.raises(InvalidRequest, match="anything left"):
        estimate(spec(), Amount(0, 9, 0, 0), None, rate, [])


def test_a_large_file_is_taken_to_be_like_its_beginning() -> None:
    taught = Row(1, "instruction-v1", Tokens([1, 2, 3, 4], [False, False, True, True]))
    sample = [taught, Row(2, "instruction-v1", None), taught, taught]
    assert count(iter(sample), 4) == Amount(3, 1, 12, 6, (4, 4, 4))
    assert count(iter(sample), 4_000) == Amount(3_000, 1_000, 12_000, 6_000, (4, 4, 4))
    assert count(iter([]), 0) == Amount(0, 0, 0, 0)


@given(st.lists(st.integers(2, 700), min_size=1, max_size=60), st.integers(1, 20))
def test_the_largest_micro_batch_is_near_the_trainers_own(lengths: list[int], batch_size: int) -> None:
    hyper = Hyperparameters(batch_size=batch_size, n_epochs=3)
    layout = plan_layout(np.asarray(lengths), hyper, 42, "cpu")
    batches = [batch for step in range(layout.total_steps) for batch in layout.micro_batches(step)]
    actual = max(sum(lengths[row] for row in batch) for batch in batches)
    found = largest_micro_batch(lengths, batch_size)
    assert max(lengths) <= found <= max(CPU_TOKEN_BUDGET, max(lengths))
    # No step of any order is larger, and none smaller than its share.
    assert actual <= max(found, min(CPU_TOKEN_BUDGET, sum(sorted(lengths)[-batch_size:])))
    if len(set(lengths)) == 1 and sum(lengths[:batch_size]) <= CPU_TOKEN_BUDGET:
        assert found == actual


def test_a_preview_shows_what_is_learnt(gateway_with_tiny: Any) -> None:
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
    (learnt,) = gateway.http.get(path, params={"model": "tiny", "limit": 1, "train_on_prompt": True}).json()["data"]
    assert learnt["supervised_tokens"] == learnt["tokens"] - 1
    for wrong in ({"model": "nobody"}, {"model": "tiny", "limit": 0}, {}):
        assert gateway.http.get(path, params=wrong).status_code == 400
    assert gateway.http.get("/v1/files/file-0/preview", params={"model": "tiny"}).status_code == 404
