"""`tunesmith up --engine vllm`: a job is trained, and vLLM serves its adapter."""

import json
import os
from pathlib import Path

import pytest
from openai import OpenAI

from tests.stack_processes import wait_until
from tests.vllm.test_vllm import BASE, PYTHON
from tunesmith.local_stack.stack import down, up

pytestmark = [pytest.mark.servers, pytest.mark.timeout(1200)]
ROWS = [{"instruction": f"What is {n}?", "output": f"It is the number {n * 7}."} for n in range(16)]


def test_a_job_is_trained_and_vllm_serves_its_adapter(tmp_path: Path) -> None:
    if not PYTHON.is_file():
        pytest.skip("needs .venv-vllm: make test-vllm makes it")
    home = tmp_path / "home"
    environ = os.environ | {
        "TUNESMITH_INFERENCE_PRECISION": "fp32",
        "TUNESMITH_INFERENCE_CONTEXT": "256",
        "TUNESMITH_INFERENCE_SLOTS": "4",
        "TUNESMITH_INFERENCE_ADAPTER_SLOTS": "2",
        "TUNESMITH_INFERENCE_MAX_RANK": "8",
        "TUNESMITH_VLLM_ARGUMENTS": "--enforce-eager",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    started = up(home, port=0, base=BASE, engine="vllm", environ=environ)
    try:
        assert set(started.connection.pids) == {"redis", "vllm", "inference", "trainer", "gateway"}
        with OpenAI(base_url=started.connection.openai_base_url, api_key=started.connection.api_key) as client:
            data = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
            file = client.files.create(file=("rows.jsonl", data), purpose="fine-tune")
            extra = {"base_precision": "fp32", "hyperparameters": {"max_steps": 2, "max_length": 64}}
            job = client.fine_tuning.jobs.create(model=BASE, training_file=file.id, extra_body=extra)
            final = ("succeeded", "failed", "cancelled")
            wait_until(lambda: client.fine_tuning.jobs.retrieve(job.id).status in final, "the job's end", every=1)
            done = client.fine_tuning.jobs.retrieve(job.id)
            assert (done.status, done.error and done.error.message) == ("succeeded", None)
            assert done.fine_tuned_model
            for model in (BASE, done.fine_tuned_model):
                answer = client.chat.completions.create(
                    model=model, messages=[{"role": "user", "content": "What is 7?"}], max_tokens=8, temperature=0
                )
                assert answer.usage is not None
                assert answer.usage.completion_tokens > 0
            assert "--max-lora-rank" in (home / "logs" / "vllm.log").read_text()
    finally:
        down(home)
