"""The server that the contract is held against, and a job on it that was really trained.

Imports nothing that an environment with OpenAI's client and pytest alone does not have.
"""

import json
import time
from dataclasses import dataclass
from typing import Any

ROWS = [{"instruction": f"What is {n}?", "output": f"It is {n * 7}."} for n in range(60)]
DATA = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)


@dataclass(frozen=True)
class Server:
    """A gateway, and a job there that has succeeded."""

    url: str
    key: str
    job: str


def trained(stack: Any) -> str:
    """The id of a job, on two files, that a real worker has brought to its end."""
    with stack.client() as http:
        lines = DATA.splitlines(keepends=True)
        parts = [b"".join(lines[:20]), b"".join(lines[20:])]
        purpose = {"purpose": "fine-tune"}
        uploaded = [http.post("/v1/files", data=purpose, files={"file": ("d.jsonl", part)}).json() for part in parts]
        body = {
            "model": "tiny",
            "training_files": [file["id"] for file in uploaded],
            "base_precision": "fp32",
            "hyperparameters": {"n_epochs": 1, "checkpoint_steps": 2, "max_length": 64},
        }
        for waiting in http.get("/v1/fine_tuning/jobs", params={"limit": 100}).json()["data"]:
            if waiting["state"] == "queued":
                http.post(f"/v1/fine_tuning/jobs/{waiting['id']}/cancel")
        job: dict[str, Any] = http.post("/v1/fine_tuning/jobs", json=body).json()
        deadline = time.monotonic() + 120
        with stack.trainer():
            while job["status"] in ("queued", "running"):
                assert time.monotonic() < deadline, stack.processes.tails()
                time.sleep(0.1)
                job = http.get(f"/v1/fine_tuning/jobs/{job['id']}").json()
        assert job["status"] == "succeeded", (job, stack.processes.tails())
        return str(job["id"])
