"""The official client, strict: it raises on any missing or mistyped field of an answer."""

import pytest
from openai import BadRequestError, NotFoundError

from shared.jobs.spec import TrainingReport
from tests.services.gateway.conftest import ROWS, Gateway, as_jsonl

REPORT = TrainingReport(
    trainable_params=460_800,
    total_params=134_975_808,
    trained_tokens=1000,
    total_tokens=3000,
    steps=24,
    rows=60,
    dropped_rows=0,
    train_loss=2.0,
    tokens_per_second=100.0,
    peak_memory_mb=900.0,
    grad_norm=0.5,
    quantized_layers=210,
    base_mb=163.0,
)


def test_files(gateway: Gateway) -> None:
    client = gateway.openai()
    data = as_jsonl(ROWS)
    made = client.files.create(file=("train.jsonl", data), purpose="fine-tune")
    assert (made.status, made.bytes, made.filename) == ("processed", len(data), "train.jsonl")
    assert made.model_extra is not None
    assert made.model_extra["dataset"]["rows"] == len(ROWS)
    assert client.files.retrieve(made.id) == made
    assert client.files.wait_for_processing(made.id) == made
    assert client.files.content(made.id).read() == data
    other = client.files.create(file=("more.jsonl", data), purpose="fine-tune")
    assert [file.id for file in client.files.list(limit=1)] == [other.id, made.id]
    assert [file.id for file in client.files.list(order="asc", limit=1)] == [made.id, other.id]
    assert client.files.delete(made.id).deleted
    with pytest.raises(NotFoundError):
        client.files.retrieve(made.id)


def test_a_job_from_creation_to_its_model(gateway: Gateway) -> None:
    client = gateway.openai()
    file = client.files.create(file=("train.jsonl", as_jsonl(ROWS)), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model="HuggingFaceTB/SmolLM2-135M-Instruct",
        training_file=file.id,
        validation_file=file.id,
        suffix="sums",
        seed=7,
        metadata={"team": "a"},
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": "auto"}}},
        extra_body={"preset": "reference", "lora": {"r": 4}, "base_precision": "fp32"},
    )
    assert (job.status, job.model, job.seed, job.error) == ("queued", "smollm2-135m-instruct", 7, None)
    assert (job.hyperparameters.n_epochs, job.hyperparameters.batch_size) == (2, 8)
    assert job.hyperparameters.learning_rate_multiplier == 1
    assert job.model_extra is not None
    assert job.model_extra["lora"]["r"] == 4
    assert job.model_extra["lora"]["alpha"] == 32
    assert job.model_extra["state"] == "queued"
    assert client.fine_tuning.jobs.retrieve(job.id) == job

    lease = gateway.leases.claim("worker-1")
    assert lease is not None
    running = client.fine_tuning.jobs.retrieve(job.id)
    assert running.status == "running"
    checkpoint = gateway.leases.reserve_adapter(lease)
    gateway.leases.commit_checkpoint(lease, 8, checkpoint, {"train_loss": 2.5})
    final = gateway.leases.reserve_adapter(lease)
    gateway.leases.succeed(lease, final, REPORT)

    done = client.fine_tuning.jobs.retrieve(job.id)
    assert (done.status, done.trained_tokens) == ("succeeded", 1000)
    assert done.fine_tuned_model is not None
    assert done.fine_tuned_model.startswith("ft:smollm2-135m-instruct:default:sums:")
    saved = list(client.fine_tuning.jobs.checkpoints.list(job.id))
    assert [(c.step_number, c.metrics.train_loss) for c in saved] == [(8, 2.5)]
    assert saved[0].fine_tuned_model_checkpoint == f"{done.fine_tuned_model}:ckpt-step-8"


def test_jobs_are_listed_paused_resumed_and_cancelled(gateway: Gateway) -> None:
    client = gateway.openai()
    file = gateway.uploaded(ROWS)
    jobs = [
        client.fine_tuning.jobs.create(
            model="smollm2-135m-instruct", training_file=file, metadata={"n": str(n), "parity": str(n % 2)}
        ).id
        for n in range(3)
    ]
    assert [job.id for job in client.fine_tuning.jobs.list(limit=2)] == jobs[::-1]
    assert [job.id for job in client.fine_tuning.jobs.list(metadata={"parity": "0"})] == [jobs[2], jobs[0]]
    paused = client.fine_tuning.jobs.pause(jobs[0])
    assert paused.model_extra is not None
    assert (paused.status, paused.model_extra["state"]) == ("queued", "paused")
    assert client.fine_tuning.jobs.resume(jobs[0]).status == "queued"
    for _ in range(2):
        assert client.fine_tuning.jobs.cancel(jobs[0]).status == "cancelled"
    with pytest.raises(BadRequestError) as refused:
        client.fine_tuning.jobs.resume(jobs[0])
    assert refused.value.code == "cannot_resume"


def test_events_page_through_without_gaps(gateway: Gateway) -> None:
    client = gateway.openai()
    job = client.fine_tuning.jobs.create(model="smollm2-135m-instruct", training_file=gateway.uploaded(ROWS))
    client.fine_tuning.jobs.pause(job.id)
    client.fine_tuning.jobs.resume(job.id)
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=2))
    assert len({event.id for event in events}) == len(events) > 4
    assert events[-1].message == f"Created fine-tuning job: {job.id}"
    assert events[0].message.startswith("Resumed")
    assert [event.id for event in client.fine_tuning.jobs.list_events(job.id, after=events[1].id)] == [
        event.id for event in events[2:]
    ]
