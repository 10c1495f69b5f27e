"""OpenAI's own client, strict, against a running server: every method of the contract, and what is refused by name.

The same file runs under the newest client and under `openai<3` (test_client_versions.py).
"""

from typing import Annotated, Any, Literal

import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel, Field

from tests.contract.server import DATA, ROWS, Server

pytestmark = pytest.mark.filterwarnings("error")


def extra(model: Any) -> dict[str, Any]:
    """What a server says beyond OpenAI's own fields."""
    assert model.model_extra is not None
    return dict(model.model_extra)


@pytest.fixture
def file(client: OpenAI) -> str:
    return client.files.create(file=("train.jsonl", DATA), purpose="fine-tune").id


def test_files(client: OpenAI) -> None:
    made = client.files.create(file=("train.jsonl", DATA), purpose="fine-tune")
    assert (made.status, made.bytes, made.filename, made.purpose) == (
        "processed",
        len(DATA),
        "train.jsonl",
        "fine-tune",
    )
    assert extra(made)["dataset"]["rows"] == len(ROWS)
    assert client.files.retrieve(made.id) == made
    assert client.files.wait_for_processing(made.id) == made
    assert client.files.content(made.id).read() == DATA
    other = client.files.create(file=("more.jsonl", DATA), purpose="fine-tune")
    # Through all pages, newest first.
    listed = [found.id for found in client.files.list(limit=1, purpose="fine-tune")]
    assert listed[:2] == [other.id, made.id]
    assert [found.id for found in client.files.list(limit=2, order="asc")] == listed[::-1]
    for one in (made, other):
        assert client.files.delete(one.id).deleted
        with pytest.raises(openai.NotFoundError):
            client.files.retrieve(one.id)


def test_a_job_is_created_and_echoed(client: OpenAI, file: str) -> None:
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=file,
        validation_file=file,
        suffix="sums",
        seed=7,
        metadata={"team": "a"},
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": "auto"}}},
        extra_body={"preset": "reference", "lora": {"r": 4}, "base_precision": "fp32"},
    )
    assert (job.status, job.model, job.seed, job.error, job.fine_tuned_model) == ("queued", "tiny", 7, None, None)
    assert (job.training_file, job.validation_file, job.metadata) == (file, file, {"team": "a"})
    assert (job.hyperparameters.n_epochs, job.hyperparameters.batch_size) == (2, 8)
    assert job.method is not None
    assert job.method.type == "supervised"
    assert extra(job)["lora"]["r"] == 4
    assert client.fine_tuning.jobs.retrieve(job.id).id == job.id
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"


def test_a_job_on_several_files(client: OpenAI, file: str) -> None:
    other = client.files.create(file=("more.jsonl", DATA), purpose="fine-tune").id
    several = {"training_files": [file, other]}
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file, extra_body=several)
    assert (job.training_file, extra(job)["training_files"]) == (file, [file, other])
    with pytest.raises(openai.BadRequestError) as refused:
        client.fine_tuning.jobs.create(model="tiny", training_file=other, extra_body=several)
    assert refused.value.param == "training_file"
    with pytest.raises(openai.BadRequestError) as used:
        client.files.delete(other)
    assert used.value.code == "file_in_use"
    client.fine_tuning.jobs.cancel(job.id)


def test_jobs_are_listed_paused_resumed_and_cancelled(client: OpenAI, file: str) -> None:
    made = [
        client.fine_tuning.jobs.create(model="tiny", training_file=file, metadata={"of": file, "n": str(n)}).id
        for n in range(3)
    ]
    assert [job.id for job in client.fine_tuning.jobs.list(limit=2)][:3] == made[::-1]
    assert [job.id for job in client.fine_tuning.jobs.list(metadata={"of": file, "n": "1"})] == [made[1]]
    paused = client.fine_tuning.jobs.pause(made[0])
    assert (paused.status, extra(paused)["state"]) == ("queued", "paused")
    assert extra(client.fine_tuning.jobs.resume(made[0]))["state"] == "queued"
    for job in made:
        assert client.fine_tuning.jobs.cancel(job).status == "cancelled"
        assert client.fine_tuning.jobs.cancel(job).status == "cancelled"
    for verb in (client.fine_tuning.jobs.pause, client.fine_tuning.jobs.resume):
        # 400 and not 409, which clients send again.
        with pytest.raises(openai.BadRequestError):
            verb(made[0])


def test_a_jobs_end_events_and_checkpoints(client: OpenAI, server: Server) -> None:
    job = client.fine_tuning.jobs.retrieve(server.job)
    assert (job.status, job.error) == ("succeeded", None)
    assert job.fine_tuned_model
    assert job.trained_tokens
    # Of two files.
    first, _ = extra(job)["training_files"]
    assert (job.training_file, extra(job)["report"]["rows"]) == (first, len(ROWS))
    assert job.finished_at
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=3))
    assert len({event.id for event in events}) == len(events) > 6
    assert events[-1].message == f"Created fine-tuning job: {job.id}"
    assert [e.id for e in client.fine_tuning.jobs.list_events(job.id, after=events[1].id)] == [e.id for e in events[2:]]
    saved = list(client.fine_tuning.jobs.checkpoints.list(job.id, limit=2))
    assert [checkpoint.step_number for checkpoint in saved] == sorted(
        {checkpoint.step_number for checkpoint in saved}, reverse=True
    )
    assert len(saved) > 2
    assert saved[0].metrics.train_loss is not None
    assert saved[0].fine_tuned_model_checkpoint == f"{job.fine_tuned_model}:ckpt-step-{saved[0].step_number}"


def test_models(client: OpenAI, server: Server) -> None:
    tuned = client.fine_tuning.jobs.retrieve(server.job).fine_tuned_model
    assert tuned
    listed = {model.id: model for model in client.models.list()}
    assert {"tiny", tuned} <= set(listed)
    assert client.models.retrieve(tuned) == listed[tuned]
    assert extra(listed[tuned])["parent"] == "tiny"
    assert (extra(listed["tiny"])["state"], extra(listed["tiny"])["prepared"]) == ("served", True)
    oldest = [name for name in listed if name.startswith(f"{tuned}:ckpt-step-")][-1]
    answer = client.chat.completions.create(model=oldest, messages=[{"role": "user", "content": "Hi"}], max_tokens=3)
    assert answer.model == oldest
    assert client.models.delete(oldest).deleted
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve(oldest)
    with pytest.raises(openai.BadRequestError):
        client.models.delete("tiny")


def test_completions(client: OpenAI) -> None:
    whole = client.completions.create(model="tiny", prompt="2 + 2 =", max_tokens=4, temperature=0)
    assert whole.usage is not None
    assert whole.usage.completion_tokens <= 4
    pieces = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Hi"}], max_tokens=4, stream=True
    )
    assert [piece.choices[0].finish_reason for piece in pieces][-1] in ("stop", "length")


class Thing(BaseModel):
    """What an answer is parsed to."""

    colour: Literal["red", "blue"]
    sizes: Annotated[list[Annotated[int, Field(ge=0, le=9)]], Field(max_length=3)]
    inner: "Inner | None"


class Inner(BaseModel):
    """A part of it, which its schema refers to."""

    ok: bool


def test_answers_are_parsed(client: OpenAI, server: Server) -> None:
    """`.parse` sends the model's schema, strict, and the answer is an object of it; base and adapter, also streamed."""
    tuned = client.fine_tuning.jobs.retrieve(server.job).fine_tuned_model
    messages: list[Any] = [{"role": "user", "content": "Hi"}]
    for model in ("tiny", str(tuned)):
        asked: dict[str, Any] = {"model": model, "messages": messages, "max_tokens": 100, "seed": 3}
        answer = client.chat.completions.parse(**asked, response_format=Thing, n=2)
        values = [choice.message.parsed for choice in answer.choices]
        assert all(isinstance(value, Thing) for value in values)
        with client.chat.completions.stream(**asked, response_format=Thing) as stream:
            for _ in stream:
                pass
            assert stream.get_final_completion().choices[0].message.parsed == values[0]
    plain = client.chat.completions.create(**asked, response_format={"type": "json_object"})
    assert (plain.choices[0].message.content or "").startswith("{")
    bad: Any = {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": {"type": "strin"}}}
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**asked, response_format=bad)
    assert (refused.value.code, refused.value.param) == ("invalid_grammar", "response_format")


def test_several_prompts_choices_and_echo(client: OpenAI) -> None:
    several = client.completions.create(model="tiny", prompt=["a", "b"], max_tokens=2, n=2, seed=1)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    # The first token's null is OpenAI's own, and against its client's types.
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 0, "presence_penalty": 0.6, "logit_bias": {"50": 5}}
    with OpenAI(base_url=client.base_url, api_key=client.api_key, max_retries=0) as lenient:
        read = lenient.completions.create(**asked, prompt=[[5, 6, 7]], echo=True, logprobs=1)
    told = read.choices[0].logprobs
    assert told is not None
    assert told.token_logprobs is not None
    assert [value is None for value in told.token_logprobs] == [True, False, False]


def test_a_key_makes_a_creation_safe_to_repeat(client: OpenAI, file: str) -> None:
    sent: dict[str, Any] = {"model": "tiny", "training_file": file, "extra_headers": {"Idempotency-Key": f"key-{file}"}}
    first = client.fine_tuning.jobs.create(**sent)
    assert client.fine_tuning.jobs.create(**sent) == first
    with pytest.raises(openai.BadRequestError) as refused:
        client.fine_tuning.jobs.create(**sent, seed=5)
    assert (refused.value.code, refused.value.param) == ("idempotency_key_reused", "Idempotency-Key")
    client.fine_tuning.jobs.cancel(first.id)


@pytest.mark.parametrize(
    ("asked", "param", "word"),
    [
        ({"method": {"type": "dpo", "dpo": {}}}, "method.type", "dpo"),
        ({"method": {"type": "reinforcement"}}, "method.type", "reinforcement"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, "integrations", "wandb"),
        ({"extra_body": {"trust_remote_code": True}}, "trust_remote_code", "trust_remote_code"),
        ({"training_file": "file-none"}, "training_file", "file-none"),
        ({"model": "gpt-4o-mini"}, "model", "gpt-4o-mini"),
    ],
)
def test_what_is_not_built_or_not_there_is_refused_by_name(
    client: OpenAI, file: str, asked: dict[str, Any], param: str, word: str
) -> None:
    sent: dict[str, Any] = {"model": "tiny", "training_file": file} | asked
    with pytest.raises(openai.BadRequestError) as refused:
        client.fine_tuning.jobs.create(**sent)
    assert refused.value.param == param
    assert word in refused.value.message
    assert refused.value.request_id


def test_errors_have_openais_classes(client: OpenAI, server: Server) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.fine_tuning.jobs.retrieve("ftjob-none")
    assert missing.value.code == "not_found"
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="ft:none", messages=[{"role": "user", "content": "Hi"}])
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.files.create(file=("bad.jsonl", b'{"instruction": "a"}\n'), purpose="fine-tune")
    assert bad.value.code == "invalid_dataset"
    with pytest.raises(openai.BadRequestError) as purpose:
        client.files.create(file=("d.jsonl", DATA), purpose="assistants")
    assert purpose.value.param == "purpose"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="ts-wrong").models.list()
