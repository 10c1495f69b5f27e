"""The whole stack as processes, over public HTTP, with the official client and a real language model.

One journey, in the order of the file: upload, train in 8-bit, serve a checkpoint while training goes on, serve the
result, compare it with plain peft, take everything down.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import torch
from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob
from peft import PeftModel
from transformers import AutoModelForCausalLM

from examples.stdlib_docstrings import build_dataset
from shared.datasets.templates import InstructionTemplate
from shared.datasets.tokens import Tokenizer
from shared.storage.artifacts import LocalArtifactStore
from tunesmith.connection import Connection
from tunesmith.local_stack.stack import down, up

pytestmark = [pytest.mark.servers, pytest.mark.timeout(1000)]

BASE = "smollm2-135m-instruct"
TIMEOUT_SECONDS = 400
ROWS = 40
STEPS = 5
QUESTION = "What does `json.dumps` do in Python?"


@dataclass
class Journey:
    """A running stack and its clients."""

    home: Path
    connection: Connection

    def __post_init__(self) -> None:
        self.openai = OpenAI(
            base_url=self.connection.openai_base_url,
            api_key=self.connection.api_key,
            _strict_response_validation=True,
            max_retries=0,
        )
        headers = {"Authorization": f"Bearer {self.connection.api_key}"}
        self.http = httpx.Client(base_url=self.connection.url, headers=headers, timeout=120)
        self.artifacts = LocalArtifactStore(self.home / "artifacts")

    def generate(self, adapter: str | None, **parameters: Any) -> httpx.Response:
        body = {"instruction": QUESTION, "parameters": {"max_new_tokens": 12, "adapter_id": adapter} | parameters}
        return self.http.post("/generate", json=body)

    def text(self, adapter: str | None, **parameters: Any) -> str:
        response = self.generate(adapter, **parameters)
        assert response.status_code == 200, response.text
        return str(response.json()["generated_text"])

    def job(self, job_id: str) -> FineTuningJob:
        return self.openai.fine_tuning.jobs.retrieve(job_id)

    def wait(self, true: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not true():
            assert time.monotonic() < deadline, f"waited too long for {what}\n{self.logs()}"
            time.sleep(0.2)

    def wait_for_end(self, job_id: str) -> FineTuningJob:
        self.wait(lambda: self.job(job_id).status in ("succeeded", "failed", "cancelled"), "the job's end")
        return self.job(job_id)

    def first_step(self, job_id: str) -> dict[str, Any]:
        events = self.openai.fine_tuning.jobs.list_events(job_id, limit=100)
        (data,) = [event.data for event in events if "First optimizer step" in event.message]
        assert isinstance(data, dict)
        return data

    def adapter_folder(self, job_id: str, step: int) -> Path:
        """A servable folder of a job's step, found by its manifest as an operator would find it."""
        for folder in sorted((self.artifacts.root / "adapters").iterdir()):
            manifest = self.artifacts.verify(folder, "adapter")
            if (manifest.job, manifest.step) == (job_id, step):
                return folder
        raise AssertionError(f"no folder for step {step} of {job_id}")

    def logs(self) -> str:
        tails = [f"--- {log.name}\n{log.read_text()[-2000:]}" for log in sorted((self.home / "logs").glob("*.log"))]
        return "\n".join(tails)


@pytest.fixture(scope="module")
def journey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Journey]:
    home = tmp_path_factory.mktemp("journey")
    started = up(home, port=0, base=BASE)
    pids = started.connection.pids
    journey = Journey(home, started.connection)
    try:
        yield journey
    finally:
        journey.http.close()
        journey.openai.close()
        down(home)
    assert [name for name, pid in pids.items() if psutil.pid_exists(pid)] == []
    assert not (home / "connection.json").exists()


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    training, _ = build_dataset(training=ROWS, held_out=8)
    return training


@pytest.fixture(scope="module")
def trained(journey: Journey, rows: list[dict[str, str]]) -> FineTuningJob:
    """The journey's job, posted while inference already answers, and asked for a checkpoint while it still trains."""
    before = journey.text(None)
    assert before
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    file = journey.openai.files.create(file=("docstrings.jsonl", data), purpose="fine-tune")
    held_out = journey.openai.files.create(
        file=("held-out.jsonl", data[: data.index(b"\n", 600) + 1]), purpose="fine-tune"
    )
    assert (file.status, held_out.status) == ("processed", "processed")
    job = journey.openai.fine_tuning.jobs.create(
        model=BASE,
        training_file=file.id,
        validation_file=held_out.id,
        suffix="docs",
        extra_body={
            "base_precision": "int8",
            "preset": "reference",
            "hyperparameters": {"n_epochs": 1, "checkpoint_steps": 1, "max_length": 128},
        },
    )
    assert job.status in ("queued", "validating_files")
    journey.wait(
        lambda: bool(journey.openai.fine_tuning.jobs.checkpoints.list(job.id).data) or _ended(journey, job.id),
        "the first checkpoint",
    )
    checkpoint = journey.openai.fine_tuning.jobs.checkpoints.list(job.id).data[-1]
    served = journey.generate(checkpoint.fine_tuned_model_checkpoint)
    assert journey.job(job.id).status == "running", "the checkpoint was to be served while the job still trains"
    assert served.status_code == 200, served.text
    assert float(served.headers["x-adapter-load-ms"]) > 0
    ended = journey.wait_for_end(job.id)
    assert ended.status == "succeeded", (ended, journey.logs())
    return ended


def _ended(journey: Journey, job_id: str) -> bool:
    return journey.job(job_id).status in ("succeeded", "failed", "cancelled")


def test_the_job_says_exactly_what_was_trained(journey: Journey, trained: FineTuningJob) -> None:
    extra = trained.model_extra or {}
    assert (extra["report"]["trainable_params"], extra["report"]["total_params"]) == (460_800, 134_975_808)
    assert extra["base_precision"] == "int8"
    assert extra["report"]["quantized_layers"] == 210
    assert extra["report"]["eval_loss_after"] < extra["report"]["eval_loss_before"]
    assert extra["progress"]["step"] == STEPS
    assert (trained.trained_tokens or 0) > 0
    log = (journey.home / "logs" / "trainer.log").read_text()
    told = [json.loads(line) for line in log.splitlines() if '"base ready"' in line]
    assert (told[0]["quantized_layers"], told[0]["layer_class"]) == (210, "Linear8bitLt")
    assert 100 < told[0]["base_mb"] < 300


def test_the_manifest_says_int8(journey: Journey, trained: FineTuningJob) -> None:
    manifest = journey.artifacts.verify(journey.adapter_folder(trained.id, STEPS), "adapter")
    assert (manifest.precision, manifest.base, manifest.template) == ("int8", BASE, "instruction-v1")


def test_the_adapter_is_served_without_a_restart(journey: Journey, trained: FineTuningJob) -> None:
    assert psutil.pid_exists(journey.connection.pids["inference"])
    # Nobody has asked for it yet; the gateway has it loaded when the job has published it.
    loaded = 'tunesmith_gateway_prefetches_total{outcome="loaded"}'
    journey.wait(lambda: loaded in journey.http.get("/metrics").text, "the adapter to be loaded")
    first = journey.generate(trained.fine_tuned_model)
    again = journey.generate(trained.fine_tuned_model)
    for answer in (first, again):
        assert float(answer.headers["x-adapter-loaded-in-ms"]) > 0
        assert "x-adapter-load-ms" not in answer.headers
    assert first.json()["generated_text"] == again.json()["generated_text"]


def test_an_unknown_adapter_is_not_the_base(journey: Journey) -> None:
    for name in ("ft:smollm2-135m-instruct:default::doesnotexist", "adapter-0123456789abcdef01234567", "../bases"):
        assert journey.generate(name).status_code == 404


def test_a_flipped_byte_is_refused_and_the_next_request_works(journey: Journey, trained: FineTuningJob) -> None:
    good = journey.text(trained.fine_tuned_model)
    (torn,) = [c for c in journey.openai.fine_tuning.jobs.checkpoints.list(trained.id) if c.step_number == STEPS - 1]
    name = torn.fine_tuned_model_checkpoint
    weights = journey.adapter_folder(trained.id, STEPS - 1) / "adapter_model.safetensors"
    original = weights.read_bytes()
    weights.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    refused = journey.generate(name)
    assert 400 <= refused.status_code < 500, refused.text
    assert "error" in refused.json()
    assert journey.text(trained.fine_tuned_model) == good
    weights.write_bytes(original)
    assert journey.generate(name).status_code == 200


def test_plain_peft_says_the_same_as_generate(journey: Journey, trained: FineTuningJob) -> None:
    base = journey.artifacts.base(BASE)
    # The last checkpoint and the final adapter are the same weights under two ids.
    folder = journey.adapter_folder(trained.id, STEPS)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder)
    tokenizer = Tokenizer(base)
    prompt = tokenizer.encode_prompt(InstructionTemplate().instruction(QUESTION))
    with torch.inference_mode():
        ids = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=24, do_sample=False)[0]
    expected = tokenizer.decode(ids[len(prompt) :].tolist())
    assert journey.text(trained.fine_tuned_model, max_new_tokens=24) == expected


def test_the_second_job_finds_the_base_warm(
    journey: Journey, trained: FineTuningJob, rows: list[dict[str, str]]
) -> None:
    job = journey.openai.fine_tuning.jobs.create(
        model=BASE,
        training_file=trained.training_file,
        extra_body={"preset": "reference", "hyperparameters": {"max_steps": 1, "max_length": 64}},
    )
    assert journey.wait_for_end(job.id).status == "succeeded"
    cold, warm = journey.first_step(trained.id), journey.first_step(job.id)
    assert (cold["base_loaded"], warm["base_loaded"]) == (True, False)
    assert warm["claim_to_first_step_seconds"] < cold["claim_to_first_step_seconds"]


def test_bad_rows_are_refused_with_their_lines_and_nothing_is_kept(journey: Journey) -> None:
    before = {file.id for file in journey.openai.files.list()}
    data = b'{"instruction": "a", "output": "b"}\n{"instruction": "a"}\nnot json\n'
    with pytest.raises(openai.BadRequestError) as refused:
        journey.openai.files.create(file=("bad.jsonl", data), purpose="fine-tune")
    body = refused.value.body
    assert isinstance(body, dict)
    assert (body["code"], [error["line"] for error in body["errors"]]) == ("invalid_dataset", [2, 3])
    assert {file.id for file in journey.openai.files.list()} == before


def test_models_are_listed_and_a_deleted_one_is_gone(journey: Journey, trained: FineTuningJob) -> None:
    listed = {model.id for model in journey.openai.models.list()}
    checkpoints = journey.openai.fine_tuning.jobs.checkpoints.list(trained.id).data
    oldest = checkpoints[-1].fine_tuned_model_checkpoint
    assert {BASE, trained.fine_tuned_model, oldest} <= listed
    assert journey.generate(oldest).status_code == 200
    assert journey.openai.models.delete(oldest).deleted
    assert journey.generate(oldest).status_code == 404
    assert oldest not in {model.id for model in journey.openai.models.list()}


def test_nothing_listens_beyond_this_machine(journey: Journey) -> None:
    leaders = [psutil.Process(pid) for pid in journey.connection.pids.values()]
    processes = [process for leader in leaders for process in (leader, *leader.children(recursive=True))]
    listening = [c.laddr.ip for p in processes for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert listening
    assert set(listening) == {"127.0.0.1"}


def test_secrets_are_not_for_everybody(journey: Journey) -> None:
    for path in (journey.home / "connection.json", journey.home / "api_key"):
        assert os.stat(path).st_mode & 0o077 == 0
    written = [journey.home / "tunesmith.db", *(journey.home / "artifacts").rglob("*")]
    assert [path for path in written if os.lstat(path).st_mode & 0o077] == []
    logs = "\n".join(log.read_text() for log in (journey.home / "logs").glob("*.log"))
    assert journey.connection.api_key not in logs
    assert httpx.get(f"{journey.connection.url}/v1/models").status_code == 401
