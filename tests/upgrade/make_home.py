"""Make a small home as a version of Tunesmith leaves it, to be stored here and taken over by `test_upgrade.py`.

    git worktree add /tmp/old 414ea9d
    python tests/upgrade/make_home.py /tmp/old tests/upgrade/414ea9d

writes `414ea9d.tar.xz`, the home after `tunesmith down`, and `414ea9d.json`, what clients were told while it was up.
Everything is done by that version's own commands and over its public HTTP API, so that this file can make a home of any
later version too. The secrets in a home made here are good for nothing else.
"""

import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx

# The catalogue of the home names a folder in it as the base's source, and jobs are pinned to that name; where the home
# is taken over the folder need not be there, since the base is in the artifacts.
WORK = Path("/tmp/tunesmith-stored-home")
LEFT_OUT = {"logs", "redis", "stack.lock", "connection.json"}
WAIT_SECONDS = 120.0
# How far the log probability of every token of a recorded text is above the next one's, some ten thousand times what
# processors may disagree by in fp32: then it is the text on every one of them.
MARGIN = 0.01
ROWS = {f"What is {n}?": f"It is {n * 7}." for n in range(200)}
LEARN = {"n_epochs": 2, "batch_size": 2, "learning_rate": 0.02}
# About ten milliseconds a step and a checkpoint at the end of an epoch: long enough to be interrupted after its first.
LONG = {"n_epochs": 2, "batch_size": 1, "learning_rate": 0.002}
# Resuming asks for the same dtype and threads as before, so neither may follow the processor.
EXACT = {"model": "tiny", "base_precision": "fp32", "compute_dtype": "fp32"}
THREADS = "1"

Json = dict[str, Any]


class Recorder:
    """A client that remembers what it sent and was told.

    Attributes:
        record: `posts` that carried an Idempotency-Key, `gets` whose answers must not change, `texts` generated,
            `jobs` by what became of them, `contents` (SHA-256) of the files and `deleted` models.
    """

    def __init__(self, http: httpx.Client) -> None:
        self._http = http
        self.record: Json = {"posts": [], "gets": {}, "texts": [], "jobs": {}, "contents": {}, "deleted": []}

    def get(self, path: str) -> Json:
        return _json(self._http.get(path))

    def post(self, path: str, body: Json | None = None) -> Json:
        return _json(self._http.post(path, json=body))

    def keep(self, *paths: str) -> None:
        for path in paths:
            self.record["gets"][path] = self.get(path)

    def delete(self, model: str) -> None:
        _json(self._http.delete(f"/v1/models/{model}"))
        self.record["deleted"].append(model)

    def upload(self, name: str, rows: Mapping[str, str], key: str) -> str:
        """The id of an uploaded file."""
        data = "".join(json.dumps({"instruction": q, "output": a}) + "\n" for q, a in rows.items())
        post = {"path": "/v1/files", "key": key, "file": [name, data]}
        answer = _json(send(self._http, post))
        self.record["posts"].append(post | {"answer": answer})
        self.record["contents"][answer["id"]] = hashlib.sha256(data.encode()).hexdigest()
        self.keep(f"/v1/files/{answer['id']}")
        return str(answer["id"])

    def train(self, role: str, body: Json, key: str) -> str:
        """The id of a new job."""
        post = {"path": "/v1/fine_tuning/jobs", "key": key, "body": body}
        answer = _json(send(self._http, post))
        self.record["posts"].append(post | {"answer": answer})
        self.record["jobs"][role] = answer["id"]
        return str(answer["id"])

    def wait(self, job: str, true: Callable[[Json], object]) -> Json:
        deadline = time.monotonic() + WAIT_SECONDS
        while not true(found := self.get(f"/v1/fine_tuning/jobs/{job}")):
            assert time.monotonic() < deadline, found
            time.sleep(0.02)
        return found

    def wait_for_checkpoint(self, job: str) -> None:
        self.wait(job, lambda _: self.get(f"/v1/fine_tuning/jobs/{job}/checkpoints")["data"])

    def generate(self, model: str, question: str) -> None:
        """Record a text, with nothing close to any of its tokens."""
        parameters = {"max_new_tokens": 8, "adapter_id": model}
        body = {"instruction": question, "parameters": parameters}
        answer = self.post("/generate", {**body, "parameters": parameters | {"details": True, "top_n_tokens": 2}})
        margins = [first["logprob"] - second["logprob"] for first, second in answer["details"]["top_tokens"]]
        assert min(margins) > MARGIN, margins
        self.record["texts"].append({"body": body, "text": answer["generated_text"]})


def send(http: httpx.Client, post: Json) -> httpx.Response:
    """Send a recorded POST, for the first time or again."""
    headers = {"idempotency-key": post["key"]}
    if "file" in post:
        name, data = post["file"]
        return http.post(post["path"], headers=headers, data={"purpose": "fine-tune"}, files={"file": (name, data)})
    return http.post(post["path"], headers=headers, json=post["body"])


def live(client: Recorder) -> None:
    """What happens in the home while it is up; a job is training when this returns."""
    few = client.upload("few.jsonl", dict(list(ROWS.items())[:16]), "upload-few")
    many = client.upload("many.jsonl", ROWS, "upload-many")
    learn = EXACT | {"training_file": many, "validation_file": few, "hyperparameters": LEARN, "suffix": "old"}
    learn |= {"metadata": {"team": "blue"}, "lora": {"target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]}}
    done = client.train("succeeded", learn, "train-succeeded")
    model = client.wait(done, lambda job: job["status"] not in ("queued", "running"))["fine_tuned_model"]
    assert model, client.get(f"/v1/fine_tuning/jobs/{done}/events")
    checkpoints = client.get(f"/v1/fine_tuning/jobs/{done}/checkpoints")["data"]
    newer, older = (each["fine_tuned_model_checkpoint"] for each in checkpoints[:2])
    for name in (model, newer):
        client.generate(name, next(iter(ROWS)))
    client.delete(older)
    job = f"/v1/fine_tuning/jobs/{done}"
    client.keep(job, f"{job}/events?limit=25", f"{job}/checkpoints", f"{job}/metrics", f"/v1/models/{model}")

    long = EXACT | {"training_file": many, "hyperparameters": LONG}
    paused = client.train("paused", long, "train-paused")
    client.wait_for_checkpoint(paused)
    client.post(f"/v1/fine_tuning/jobs/{paused}/pause")
    client.wait(paused, lambda job: job["state"] == "paused")
    client.keep(*(f"/v1/fine_tuning/jobs/{paused}{of}" for of in ("", "/events?limit=25", "/checkpoints")))

    interrupted = client.train("interrupted", long | {"seed": 7}, "train-interrupted")
    short = {"model": "tiny", "training_file": few, "hyperparameters": {"n_epochs": 1}}
    client.train("queued", short, "train-queued")
    waiting = client.train("paused in the queue", short | {"seed": 2}, "train-waiting")
    client.post(f"/v1/fine_tuning/jobs/{waiting}/pause")
    cancelled = client.train("cancelled", short | {"seed": 3}, "train-cancelled")
    client.post(f"/v1/fine_tuning/jobs/{cancelled}/cancel")
    client.keep(f"/v1/fine_tuning/jobs/{waiting}", f"/v1/fine_tuning/jobs/{cancelled}", "/v1/files")
    client.wait_for_checkpoint(interrupted)


def main() -> None:
    checkout, target = (Path(argument).absolute() for argument in sys.argv[1:])
    shutil.rmtree(WORK, ignore_errors=True)
    home = WORK / "home"
    home.mkdir(parents=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TUNESMITH_")}
    environment |= {"PYTHONPATH": str(checkout), "TUNESMITH_THREADS": THREADS, "OMP_NUM_THREADS": THREADS}
    environment["TUNESMITH_INFERENCE_PRECISION"] = "fp32"

    def run(*command: str) -> None:
        subprocess.run([sys.executable, *command], cwd=WORK, env=environment, check=True)

    tiny = "from pathlib import Path; from tests.tiny import write_catalogue, write_tiny_model"
    run("-c", f"{tiny}; write_catalogue(Path('home/catalogue.toml'), write_tiny_model(Path('model')))")
    run("-m", "tunesmith.cli", "up", "--home", str(home), "--port", "0", "--base", "tiny")
    try:
        connection = json.loads((home / "connection.json").read_text())
        headers = {"authorization": f"Bearer {connection['api_key']}"}
        with httpx.Client(base_url=connection["url"], headers=headers, timeout=60, trust_env=False) as http:
            client = Recorder(http)
            live(client)
    finally:
        run("-m", "tunesmith.cli", "down", "--home", str(home))
    _check_states(home / "tunesmith.db", client.record["jobs"])
    target.with_suffix(".json").write_text(json.dumps(client.record, indent=1, ensure_ascii=False) + "\n")
    with tarfile.open(target.with_suffix(".tar.xz"), "w:xz") as archive:
        for path in sorted(home.iterdir()):
            if path.name not in LEFT_OUT:
                archive.add(path, path.name, filter=_of_nobody)
    shutil.rmtree(WORK)


def _check_states(database: Path, jobs: Mapping[str, str]) -> None:
    with closing(sqlite3.connect(database)) as connection:
        states = dict(connection.execute("SELECT id, state FROM jobs"))
        steps = dict(connection.execute("SELECT id, checkpoint_step FROM jobs"))
    found = {role: (states[job], steps[job] > 0) for role, job in jobs.items()}
    assert found == {
        "succeeded": ("succeeded", True),
        "paused": ("paused", True),
        "interrupted": ("queued", True),
        "queued": ("queued", False),
        "paused in the queue": ("paused", False),
        "cancelled": ("cancelled", False),
    }, found


def _of_nobody(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


def _json(response: httpx.Response) -> Json:
    assert response.status_code == 200, response.text
    found: Json = response.json()
    return found


if __name__ == "__main__":
    main()
