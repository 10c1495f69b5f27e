"""Jobs through the front door: what is wrong is refused by name and leaves no job; actions requested in every state."""

import json
import threading
from collections.abc import Callable, Iterator

import httpx
import pytest

from services.gateway.settings import GatewaySettings
from tests.services.gateway.conftest import ROWS, Gateway, running_gateway
from tests.services.gateway.job_cases import BAD, placed

BASE = "smollm2-135m-instruct"
PATH = "/v1/fine_tuning/jobs"
Settings = Callable[..., GatewaySettings]


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, redis_server: str) -> Iterator[Gateway]:
    settings = GatewaySettings.model_validate({"home": tmp_path_factory.mktemp("home"), "redis_url": redis_server})
    with running_gateway(settings) as running:
        yield running


@pytest.fixture(scope="module")
def file(gateway: Gateway) -> str:
    return gateway.uploaded(ROWS)


def test_bad_bodies_over_http_name_the_field_and_leave_no_job(gateway: Gateway, file: str) -> None:
    for field, value in BAD:
        if field == "validation_file" and value == "file-chat":
            continue
        body = {"model": BASE, "training_file": file} | placed(field, value)
        answer = gateway.http.post(PATH, content=json.dumps(body), headers={"content-type": "application/json"})
        assert answer.status_code == 400, (field, value, answer.text)
        error = answer.json()["error"]
        assert error["param"] == field, (field, value, error)
        assert set(error) == {"message", "type", "param", "code"}
        assert len(error["message"]) < 1000
    assert gateway.http.get(PATH).json()["data"] == []
    assert gateway.http.post(PATH, json={"model": BASE, "training_file": file}).is_success


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b"", "application/json"),
        (b"{", "application/json"),
        (b"null", "application/json"),
        (b"[]", "application/json"),
        (b'"a"', "application/json"),
        (b"\xff\xfe{\x00}\x00", "application/json"),
        (b'{"model": "\xff"}', "application/json"),
        (b'{"model": "\\ud800", "training_file": "file-1"}', "application/json"),
        (b'{"model": "a", "training_file": "file-1", "\\ud800": 1}', "application/json"),
        (b'{"model": NaN}', "application/json"),
        (b"[" * 100_000, "application/json"),
        (b'{"metadata": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001, "application/json"),
        (b'{"model": ' + b"9" * 10_000 + b"}", "application/json"),
        (b"model=a&training_file=file-1", "application/x-www-form-urlencoded"),
        (b'{"model": "a"}', "text/plain"),
        (b'{"model": "a"}', ""),
        (b'{"model": "a"}', "application/json; charset=utf-16"),
    ],
)
def test_what_is_no_request_at_all(gateway: Gateway, body: bytes, content_type: str) -> None:
    answer = gateway.http.post(PATH, content=body, headers={"content-type": content_type})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"]
    assert "detail" not in answer.json()


def test_a_body_without_end_is_refused(gateway: Gateway) -> None:
    def endless() -> Iterator[bytes]:
        while True:
            yield b" " * 65_536

    for content in (endless(), b" " * (5 << 20)):
        answer = gateway.http.post(PATH, content=content, headers={"content-type": "application/json"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "payload_too_large")


def test_methods_and_paths_that_are_none(gateway: Gateway) -> None:
    for method, path, status in (
        ("PUT", PATH, 405),
        ("DELETE", PATH, 405),
        ("PATCH", "/v1/files", 405),
        ("GET", "/v1/nothing", 404),
        ("GET", "/generate", 405),
        ("GET", "/nothing", 404),
    ):
        answer = gateway.http.request(method, path)
        assert answer.status_code == status
        assert "error" in answer.json()
        assert answer.headers["x-request-id"]
    # Every method of the path, not only the first route's.
    for path, methods in (
        (PATH, "GET, HEAD, POST"),
        ("/v1/files/x", "DELETE, GET, HEAD"),
        ("/v1/models/a/b", "DELETE, GET, HEAD"),
    ):
        assert gateway.http.patch(path).headers["allow"] == methods


@pytest.mark.parametrize("job", ["ftjob-0", "..%2f..", "a%00b", "%ff", "x" * 3000, "ftjob-'; DROP TABLE jobs"])
def test_jobs_that_are_none(gateway: Gateway, job: str) -> None:
    for method, path in (
        ("GET", ""),
        ("GET", "/events"),
        ("GET", "/checkpoints"),
        ("POST", "/cancel"),
        ("POST", "/pause"),
        ("POST", "/resume"),
    ):
        answer = gateway.http.request(method, f"{PATH}/{job}{path}")
        assert answer.status_code == 404, answer.text


@pytest.mark.parametrize(
    "query",
    ["limit=0", "limit=101", "limit=x", "after=ftjob-0", "after=%00", "metadata[a=b", "metadata=a", 'metadata["]=b'],
)
def test_page_parameters(gateway: Gateway, query: str) -> None:
    answer = gateway.http.get(f"{PATH}?{query}")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == query.split("=")[0].split("[")[0]


def test_more_metadata_filters_than_a_job_has_pairs_are_refused(gateway: Gateway) -> None:
    most = {f"metadata[k{number}]": "v" for number in range(16)}
    assert gateway.http.get(PATH, params=most).json()["data"] == []
    answer = gateway.http.get(PATH, params=most | {"metadata[k16]": "v"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "metadata"


def test_metadata_with_any_key_is_found_again(gateway: Gateway, file: str) -> None:
    for key in ("a", "a.b", "$", "a b", "ü", "[0]", "'", "%"):
        body = {"model": BASE, "training_file": file, "metadata": {key: f"value of {key}"}}
        job = gateway.http.post(PATH, json=body).json()["id"]
        found = gateway.http.get(PATH, params={f"metadata[{key}]": f"value of {key}"}).json()["data"]
        assert [item["id"] for item in found] == [job], key
        assert gateway.http.get(PATH, params={f"metadata[{key}]": "another"}).json()["data"] == []
    assert len(gateway.http.get(PATH, params={"metadata": "null"}).json()["data"]) > 5


def test_what_may_be_requested_in_every_state(gateway: Gateway, file: str) -> None:
    leases = gateway.leases

    def request(job: str, verb: str) -> httpx.Response:
        return gateway.http.post(f"{PATH}/{job}/{verb}")

    def new() -> str:
        while gateway.heartbeats.queued():
            leases.claim("nobody")
        job: str = gateway.http.post(PATH, json={"model": BASE, "training_file": file}).json()["id"]
        return job

    running = new()
    lease = leases.claim("worker")
    assert lease is not None
    assert request(running, "pause").json()["state"] == "pausing"
    assert request(running, "pause").json()["status"] == "running"
    assert request(running, "resume").status_code == 400
    assert request(running, "cancel").json()["state"] == "cancelling"
    assert request(running, "pause").status_code == 400
    leases.release(lease, "Stopped")
    for verb, state in (("cancel", 200), ("pause", 400), ("resume", 400)):
        answer = request(running, verb)
        assert answer.status_code == state
        if state == 400:
            assert answer.json()["error"]["code"] == f"cannot_{verb}"


def test_a_file_cannot_vanish_while_a_job_takes_it(settings: Settings) -> None:
    """Create and delete race: either the job has its file, or there is no job."""
    with running_gateway(settings()) as gateway:
        for _ in range(8):
            file = gateway.uploaded(ROWS)
            outcomes: dict[str, httpx.Response] = {}

            def create(file: str = file, outcomes: dict[str, httpx.Response] = outcomes) -> None:
                outcomes["create"] = gateway.http.post(PATH, json={"model": BASE, "training_file": file})

            def delete(file: str = file, outcomes: dict[str, httpx.Response] = outcomes) -> None:
                outcomes["delete"] = gateway.http.delete(f"/v1/files/{file}")

            threads = [threading.Thread(target=create), threading.Thread(target=delete)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert outcomes["create"].is_success != outcomes["delete"].is_success, outcomes
