"""A home that an older version left goes on working after this version's `tunesmith up`: nothing else is done to it.

`make_home.py` says what is in it. Commit 414ea9d is the last before the tables and folders were renamed.
"""

import hashlib
import json
import sqlite3
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from services.gateway.http.key_secret import mac_of
from tests.stack_processes import clean_environment, wait_until
from tests.upgrade.make_home import THREADS, send
from tunesmith import connection as connections

pytestmark = pytest.mark.servers
STORED = Path(__file__).with_name("414ea9d")
Json = dict[str, Any]


@dataclass
class Upgraded:
    """The old home, up again.

    Attributes:
        old: what the version that made the home told its clients.
    """

    home: Path
    http: httpx.Client
    old: Json

    def get(self, path: str) -> Json:
        response = self.http.get(path)
        assert response.status_code == 200, response.text
        found: Json = response.json()
        return found

    def post(self, path: str, body: Json | None = None) -> Json:
        response = self.http.post(path, json=body)
        assert response.status_code == 200, response.text
        found: Json = response.json()
        return found

    def job(self, role: str) -> str:
        """The path of the job that had this role in the old home."""
        return f"/v1/fine_tuning/jobs/{self.old['jobs'][role]}"

    def messages(self, role: str) -> list[str]:
        """The messages of a job, oldest first."""
        events = self.get(f"{self.job(role)}/events?limit=100")["data"]
        return [event["message"] for event in reversed(events) if event["type"] == "message"]

    def steps(self, role: str) -> list[int]:
        """The steps a job has checkpoints of."""
        return [found["step_number"] for found in self.get(f"{self.job(role)}/checkpoints")["data"]]

    def assert_kept(self, path: str) -> None:
        """A GET says all that it said to clients of the old version."""
        assert_kept(self.get(path), self.old["gets"][path], path)

    def wait(self, role: str, true: Callable[[Json], object]) -> Json:
        wait_until(lambda: true(self.get(self.job(role))), f"the {role} job", logs=self.logs)
        return self.get(self.job(role))

    def succeeds(self, role: str) -> Json:
        """Wait for a job's end; it succeeds, and its adapter is served."""
        job = self.wait(role, lambda job: job["status"] not in ("queued", "running"))
        assert job["status"] == "succeeded", (job, self.messages(role))
        said = self.generate(job["fine_tuned_model"], "What is 3?")
        assert said.status_code == 200, said.text
        return job

    def generate(self, model: str | None, question: str) -> httpx.Response:
        parameters = {"max_new_tokens": 8, "adapter_id": model}
        return self.http.post("/generate", json={"instruction": question, "parameters": parameters})

    def logs(self) -> str:
        return "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in sorted((self.home / "logs").iterdir()))


@pytest.fixture(scope="module")
def upgraded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Upgraded]:
    home = tmp_path_factory.mktemp("upgrade") / "home"
    home.mkdir()
    with tarfile.open(STORED.with_suffix(".tar.xz")) as archive:
        archive.extractall(home, filter="data")
    _made_just_now(home / "tunesmith.db")
    environment = clean_environment() | {
        "TUNESMITH_THREADS": THREADS,
        "TUNESMITH_INFERENCE_PRECISION": "fp32",
        "OMP_NUM_THREADS": THREADS,
    }

    def command(name: str, *arguments: str) -> None:
        argv = [sys.executable, "-m", "tunesmith.cli", name, "--home", str(home), *arguments]
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stderr

    command("up", "--port", "0", "--base", "tiny")
    try:
        connection = connections.read(home / "connection.json")
        headers = {"authorization": f"Bearer {(home / 'api_key').read_text().strip()}"}
        with httpx.Client(base_url=connection.url, headers=headers, timeout=60, trust_env=False) as http:
            yield Upgraded(home, http, json.loads(STORED.with_suffix(".json").read_text()))
    finally:
        command("down")


def _made_just_now(database: Path) -> None:
    """Idempotency keys are kept for a day, and the stored home is older than that."""
    with closing(sqlite3.connect(database)) as connection, connection:
        changed = connection.execute("UPDATE answers SET created_at = ?", (int(time.time()),)).rowcount
    assert changed > 0


def test_the_home_is_of_the_old_version() -> None:
    """What is stored must not be made anew by a later version under the old name."""
    with tarfile.open(STORED.with_suffix(".tar.xz")) as archive:
        found = archive.extractfile("tunesmith.db")
        assert found is not None
        content = found.read()
    assert b"CREATE TABLE answers" in content
    assert b"losses INTEGER" in content


def test_the_key_of_the_old_version_is_taken_and_its_secret_is_known_from_now_on(upgraded: Upgraded) -> None:
    with closing(sqlite3.connect(upgraded.home / "tunesmith.db")) as connection:
        ((kept,),) = connection.execute("SELECT mac FROM key_check").fetchall()
    assert kept == mac_of((upgraded.home / "key_secret").read_text().strip().encode())
    upgraded.get("/v1/models")


def test_answers_say_what_the_old_version_said(upgraded: Upgraded) -> None:
    """Keys may have come, none has gone or changed."""
    paused = (upgraded.job("paused"), upgraded.job("paused in the queue"))
    lasting = [path for path in upgraded.old["gets"] if not path.startswith(paused)]
    assert len(lasting) > 5
    for path in lasting:
        upgraded.assert_kept(path)


def test_files_have_the_same_bytes(upgraded: Upgraded) -> None:
    assert upgraded.old["contents"]
    for file, sha256 in upgraded.old["contents"].items():
        content = upgraded.http.get(f"/v1/files/{file}/content").content
        assert hashlib.sha256(content).hexdigest() == sha256


def test_adapters_say_what_they_said_and_deleted_ones_stay_deleted(upgraded: Upgraded) -> None:
    assert len(upgraded.old["texts"]) > 1
    for text in upgraded.old["texts"]:
        assert upgraded.post("/generate", text["body"])["generated_text"] == text["text"]
        base = upgraded.generate(None, text["body"]["instruction"])
        assert base.json()["generated_text"] != text["text"]
    listed = {model["id"] for model in upgraded.get("/v1/models")["data"]}
    assert {text["body"]["parameters"]["adapter_id"] for text in upgraded.old["texts"]} <= listed
    assert upgraded.old["deleted"]
    for model in upgraded.old["deleted"]:
        assert model not in listed
        assert upgraded.generate(model, "What is 3?").status_code == 404


def test_idempotency_keys_replay_their_answers(upgraded: Upgraded) -> None:
    before = [upgraded.get(path)["data"] for path in ("/v1/files", "/v1/fine_tuning/jobs")]
    for post in upgraded.old["posts"]:
        response = send(upgraded.http, post)
        assert (response.status_code, response.json()) == (200, post["answer"]), post["key"]
    assert ids([upgraded.get(path)["data"] for path in ("/v1/files", "/v1/fine_tuning/jobs")]) == ids(before)
    other = upgraded.old["posts"][-1]
    refused = send(upgraded.http, other | {"body": other["body"] | {"seed": 99}})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "idempotency_key_reused")


def test_the_queued_and_the_interrupted_job_train_to_their_ends(upgraded: Upgraded) -> None:
    upgraded.succeeds("interrupted")
    assert [line for line in upgraded.messages("interrupted") if line.startswith("Resumed from the checkpoint at step")]
    upgraded.succeeds("queued")
    assert upgraded.get(upgraded.job("cancelled"))["status"] == "cancelled"


def test_the_paused_job_goes_on_from_its_checkpoint(upgraded: Upgraded) -> None:
    job = upgraded.job("paused")
    for path in (job, f"{job}/events?limit=25", f"{job}/checkpoints"):
        upgraded.assert_kept(path)
    steps = upgraded.steps("paused")
    assert upgraded.post(f"{job}/resume")["state"] == "queued"
    upgraded.succeeds("paused")
    assert f"Resumed from the checkpoint at step {max(steps)}" in upgraded.messages("paused")
    assert set(steps) < set(upgraded.steps("paused"))


def test_the_job_paused_in_the_queue_trains_after_resuming(upgraded: Upgraded) -> None:
    job = upgraded.job("paused in the queue")
    upgraded.assert_kept(job)
    assert upgraded.post(f"{job}/resume")["state"] == "queued"
    upgraded.succeeds("paused in the queue")


def ids(pages: list[list[Json]]) -> list[list[str]]:
    return [[one["id"] for one in page] for page in pages]


def assert_kept(now: Any, then: Any, where: str) -> None:
    """`now` says all that `then` said; objects may say more."""
    if isinstance(then, dict):
        for key, value in then.items():
            assert key in now, f"{where}: {key} is gone"
            assert_kept(now[key], value, f"{where}.{key}")
    elif isinstance(then, list):
        assert len(now) == len(then), where
        for number, (one, other) in enumerate(zip(now, then, strict=True)):
            assert_kept(one, other, f"{where}[{number}]")
    else:
        assert now == then, where
