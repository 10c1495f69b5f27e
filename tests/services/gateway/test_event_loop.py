"""Every test that runs a gateway fails if its event loop does SQL or a file call (`running_gateway`): so it is seen."""

import asyncio
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import text

from shared.storage.artifacts import LocalArtifactStore
from shared.storage.database import Database, migrate
from tests.services.gateway.conftest import ROWS, Gateway
from tests.services.gateway.event_loop import blocking_calls

JOBS = "/v1/fine_tuning/jobs"


def query(home: Path) -> None:
    with Database(f"sqlite:///{home / 'tunesmith.db'}").read() as tx:
        tx.execute(text("SELECT 1"))


def stage(home: Path) -> None:
    with LocalArtifactStore(home / "artifacts").staged() as folder:
        (folder / "data").write_bytes(b"x")


CALLS: list[Callable[[Path], object]] = [
    query,
    stage,
    lambda home: (home / "tunesmith.db").read_bytes(),
    lambda home: list(home.iterdir()),
    lambda home: shutil.rmtree(home / "none", ignore_errors=True),
    lambda home: os.rename(home / "tunesmith.db", home / "moved.db"),
]


@pytest.mark.parametrize("call", CALLS)
def test_what_blocks_the_event_loop_is_seen(tmp_path: Path, call: Callable[[Path], object]) -> None:
    async def on_the_loop() -> None:
        call(tmp_path)

    migrate(f"sqlite:///{tmp_path / 'tunesmith.db'}")
    with blocking_calls(tmp_path) as seen:
        asyncio.run(on_the_loop())
    assert seen


@pytest.mark.parametrize("call", CALLS)
def test_in_a_thread_the_same_is_no_fault(tmp_path: Path, call: Callable[[Path], object]) -> None:
    async def beside_the_loop() -> None:
        await asyncio.to_thread(call, tmp_path)

    migrate(f"sqlite:///{tmp_path / 'tunesmith.db'}")
    with blocking_calls(tmp_path) as seen:
        asyncio.run(beside_the_loop())
        thread = threading.Thread(target=stage, args=(tmp_path,))
        thread.start()
        thread.join()
    assert seen == []


def test_no_route_blocks_the_event_loop(gateway: Gateway) -> None:
    """One request at least to each route that reads or writes something; the gateway's fixture looks at the end."""
    file = gateway.uploaded(ROWS)
    job = gateway.http.post(JOBS, json={"model": "smollm2-135m-instruct", "training_file": file}).json()["id"]
    adapters = []
    lease = gateway.leases.claim("w")
    assert lease is not None
    for step in (1, 2):
        adapters.append(gateway.leases.reserve_adapter(lease))
        gateway.leases.commit_checkpoint(lease, step, adapters[-1], {})
    model = gateway.http.get("/v1/models").json()["data"][-1]["id"]
    body = {"model": "smollm2-135m-instruct", "training_file": file, "messages": [{"role": "user", "content": "x"}]}
    kept = {"input": "x", "previous_response_id": "resp_1"}
    sent = [
        (method, path.format(file=file, job=job, model=model))
        for method, path in (
            ("GET", "/health/live"),
            ("GET", "/health/ready"),
            ("GET", "/"),
            ("GET", "/metrics"),
            ("GET", "/metrics/inference"),
            ("GET", "/info"),
            ("GET", "/v1/files"),
            ("GET", "/v1/files/{file}"),
            ("GET", "/v1/files/{file}/content"),
            ("GET", "/v1/files/{file}/preview?model=smollm2-135m-instruct"),
            ("GET", JOBS),
            ("GET", JOBS + "/{job}"),
            ("GET", JOBS + "/{job}/events"),
            ("GET", JOBS + "/{job}/checkpoints"),
            ("GET", JOBS + "/{job}/metrics"),
            ("POST", JOBS + "/{job}/pause"),
            ("POST", JOBS + "/{job}/resume"),
            ("POST", JOBS + "/{job}/cancel"),
            ("POST", "/v1/fine_tuning/estimates"),
            ("POST", "/v1/chat/completions"),
            ("POST", "/v1/completions"),
            ("POST", "/v1/responses"),
            ("GET", "/v1/responses/resp_1"),
            ("DELETE", "/v1/responses/resp_1"),
            ("POST", "/generate"),
            ("GET", "/v1/models"),
            ("GET", "/v1/models/{model}"),
            ("DELETE", "/v1/models/{model}"),
            ("DELETE", "/v1/files/{file}"),
        )
    ]
    for method, path in sent:
        content = kept if path == "/v1/responses" else body
        gateway.http.request(method, path, json=content if method == "POST" else None)
    paths = {path for path in gateway.app.openapi()["paths"] if path.startswith("/v1/")}
    shapes = {path.partition("?")[0].replace(file, "{file_id}").replace(job, "{job_id}") for _, path in sent}
    shapes = {path.replace(model, "{model_id}").replace("resp_1", "{response_id}") for path in shapes}
    assert paths <= shapes, paths - shapes
    with gateway.http.stream("GET", f"{JOBS}/{job}/events", headers={"accept": "text/event-stream"}) as stream:
        assert next(stream.iter_lines()).startswith("id: ")
