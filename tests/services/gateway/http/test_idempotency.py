"""Once, however often it is sent: by key, and by the official client's own retries."""

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import httpx2
import pytest
from openai import DefaultHttpxClient, OpenAI
from sqlalchemy import Connection, func, insert, select, update
from sqlalchemy.exc import OperationalError

from services.gateway.http import idempotency as idempotency_module
from services.gateway.http.idempotency import KEEP_SECONDS, RETRY_SECONDS, Attempt, IdempotencyStore, StoredResponse
from services.gateway.http.keys import Keys, read_or_make_secret
from services.gateway.settings import GatewaySettings
from shared.errors import Conflict
from shared.storage import tables
from shared.storage.database import Database, migrate
from tests.fresh_database import fresh_on_server
from tests.services.gateway.conftest import ROWS, Gateway, as_jsonl, running_gateway
from tests.stack_processes import Processes, answers, clean_environment, free_port, wait_until

PATH = "/v1/fine_tuning/jobs"
BASE = "smollm2-135m-instruct"


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, redis_server: str) -> Iterator[Gateway]:
    settings = GatewaySettings.model_validate({"home": tmp_path_factory.mktemp("home"), "redis_url": redis_server})
    with running_gateway(settings) as running:
        yield running


@pytest.fixture(scope="module")
def body(gateway: Gateway) -> dict[str, Any]:
    return {"model": BASE, "training_file": gateway.uploaded(ROWS), "seed": 3}


def create(gateway: Gateway, body: dict[str, Any], **headers: str) -> httpx.Response:
    return gateway.http.post(PATH, json=body, headers={name.replace("_", "-"): text for name, text in headers.items()})


def count(gateway: Gateway) -> int:
    with gateway.services.database.read() as connection:
        return connection.execute(select(func.count()).select_from(tables.jobs)).scalar_one()


def test_the_same_key_gives_the_first_answer_again(gateway: Gateway, body: dict[str, Any]) -> None:
    first = create(gateway, body, idempotency_key="k-1")
    jobs = count(gateway)
    # What was answered then, not what is true now; and however the same request is spelled.
    gateway.http.post(f"{PATH}/{first.json()['id']}/cancel")
    spelled = json.dumps(dict(reversed(body.items())), indent=3)
    again = gateway.http.post(
        PATH, content=spelled, headers={"idempotency-key": "k-1", "content-type": "application/json"}
    )
    assert (again.status_code, again.content) == (first.status_code, first.content)
    assert (again.headers["idempotent-replayed"], "idempotent-replayed" in first.headers) == ("true", False)
    assert again.headers["content-type"] == first.headers["content-type"]
    assert count(gateway) == jobs
    assert create(gateway, body, idempotency_key="k-2").json()["id"] != first.json()["id"]
    assert create(gateway, body).json()["id"] != create(gateway, body).json()["id"]


def test_an_answer_outlives_the_file_it_was_about_and_the_gateway(gateway: Gateway) -> None:
    body = {"model": BASE, "training_file": gateway.uploaded(ROWS)}
    first = create(gateway, body, idempotency_key="k-3")
    gateway.http.post(f"{PATH}/{first.json()['id']}/cancel")
    assert gateway.http.delete(f"/v1/files/{body['training_file']}").is_success
    with running_gateway(gateway.settings) as another:
        assert create(another, body, idempotency_key="k-3").content == first.content


def test_another_request_under_the_same_key_is_refused(gateway: Gateway, body: dict[str, Any]) -> None:
    first = create(gateway, body, idempotency_key="k-4")
    jobs = count(gateway)
    for other in (body | {"seed": 4}, body | {"suffix": "x"}):
        refused = create(gateway, other, idempotency_key="k-4")
        error = refused.json()["error"]
        assert (refused.status_code, error["param"], error["code"]) == (
            400,
            "Idempotency-Key",
            "idempotency_key_reused",
        )
    assert count(gateway) == jobs
    assert create(gateway, body, idempotency_key="k-4").content == first.content


def test_a_refusal_is_not_kept(gateway: Gateway, body: dict[str, Any]) -> None:
    assert create(gateway, body | {"training_file": "file-none"}, idempotency_key="k-5").status_code == 400
    assert create(gateway, body, idempotency_key="k-5").is_success


@pytest.mark.parametrize("key", ["", "a b", "k" * 256, "ü", "a\x01", "a\tb"])
def test_malformed_keys_are_refused(gateway: Gateway, body: dict[str, Any], key: str) -> None:
    jobs = count(gateway)
    headers = [(b"idempotency-key", key.encode())]
    upload = {"data": {"purpose": "fine-tune"}, "files": {"file": ("d.jsonl", as_jsonl(ROWS))}}
    for path, content in ((PATH, {"json": body}), ("/v1/files", upload)):
        refused = gateway.http.post(path, headers=headers, **content)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "Idempotency-Key"), refused.text
    assert count(gateway) == jobs


def test_two_keys_are_none(gateway: Gateway, body: dict[str, Any]) -> None:
    refused = gateway.http.post(PATH, json=body, headers=[("idempotency-key", "a"), ("idempotency-key", "a")])
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "Idempotency-Key")


def test_keys_belong_to_an_api_key_and_a_path(gateway: Gateway, body: dict[str, Any]) -> None:
    secret = read_or_make_secret(gateway.settings.key_secret_path)
    key = "ts-" + "p" * 40
    row = {"id": "key-second", "project": "default", "digest": Keys(gateway.services.database, secret)._digest(key)}
    with gateway.services.database.write() as connection:
        connection.execute(insert(tables.api_keys).values(row | {"created_at": 0}))
    first = create(gateway, body, idempotency_key="k-6")
    other = create(gateway, body | {"seed": 9}, idempotency_key="k-6", authorization=f"Bearer {key}")
    assert other.is_success
    assert other.json()["id"] != first.json()["id"]
    upload = gateway.http.post(
        "/v1/files",
        data={"purpose": "fine-tune"},
        files={"file": ("d.jsonl", as_jsonl(ROWS))},
        headers={"idempotency-key": "k-6"},
    )
    assert upload.json()["object"] == "file"


def test_an_upload_is_kept_once(gateway: Gateway) -> None:
    def upload(rows: list[dict[str, Any]], name: str = "d.jsonl", **headers: str) -> httpx.Response:
        form: dict[str, Any] = {"data": {"purpose": "fine-tune"}, "files": {"file": (name, as_jsonl(rows))}}
        return gateway.http.post("/v1/files", **form, headers=headers)

    def folders() -> int:
        return sum(1 for _ in (gateway.settings.artifacts_root / "files").glob("*"))

    first = upload(ROWS, **{"idempotency-key": "u-1"})
    kept = folders()
    assert upload(ROWS, **{"idempotency-key": "u-1"}).content == first.content
    for rows, name in ((ROWS[1:], "d.jsonl"), (ROWS, "e.jsonl")):
        refused = upload(rows, name, **{"idempotency-key": "u-1"})
        assert refused.json()["error"]["code"] == "idempotency_key_reused"
    assert folders() == kept
    unkeyed = upload(ROWS[2:])
    assert upload(ROWS[2:], **{"x-stainless-retry-count": "1"}).content == unkeyed.content
    assert folders() == kept + 1


def test_the_official_clients_retry_of_a_lost_answer_makes_no_second_job(
    gateway: Gateway, body: dict[str, Any]
) -> None:
    first = create(gateway, body | {"seed": 11})
    jobs = count(gateway)
    retries = [create(gateway, body | {"seed": 11}, x_stainless_retry_count=n) for n in ("1", "2")]
    assert [retry.content for retry in retries] == [first.content] * 2
    # Another request, a first sending, and nonsense in the header are no retries.
    assert create(gateway, body | {"seed": 12}, x_stainless_retry_count="1").json()["id"] != first.json()["id"]
    for header in ("0", "x", "-1", "1.5", "٣"):
        headers = [(b"x-stainless-retry-count", header.encode())]
        assert gateway.http.post(PATH, json=body | {"seed": 11}, headers=headers).json()["id"] != first.json()["id"]
    assert count(gateway) == jobs + 6
    with gateway.services.database.write() as connection:
        connection.execute(
            update(tables.idempotency_keys).values(created_at=tables.idempotency_keys.c.created_at - 7200)
        )
    assert create(gateway, body | {"seed": 11}, x_stainless_retry_count="1").json()["id"] != first.json()["id"]


def test_a_retry_is_told_the_job_as_it_is_now_and_never_one_that_has_ended(
    gateway: Gateway, body: dict[str, Any]
) -> None:
    first = create(gateway, body | {"seed": 21}).json()
    gateway.http.post(f"{PATH}/{first['id']}/pause")
    again = create(gateway, body | {"seed": 21}, x_stainless_retry_count="1").json()
    assert (again["id"], again["state"]) == (first["id"], "paused")
    gateway.http.post(f"{PATH}/{first['id']}/cancel")
    # The first sending never arrived: the job that ended before is another's.
    new = create(gateway, body | {"seed": 21}, x_stainless_retry_count="1").json()
    assert new["id"] != first["id"]
    assert new["state"] == "queued"


def test_a_retry_that_came_too_late_for_what_was_answered_is_new(gateway: Gateway, body: dict[str, Any]) -> None:
    first = create(gateway, body | {"seed": 22}).json()
    column = tables.idempotency_keys.c.created_at
    with gateway.services.database.write() as connection:
        connection.execute(update(tables.idempotency_keys).values(created_at=column - RETRY_SECONDS - 5))
    assert create(gateway, body | {"seed": 22}, x_stainless_retry_count="2").json()["id"] == first["id"]
    assert create(gateway, body | {"seed": 22}, x_stainless_retry_count="1").json()["id"] != first["id"]


def test_a_retried_upload_of_a_file_deleted_meanwhile_is_stored_again(gateway: Gateway) -> None:
    def upload(**headers: str) -> str:
        form: dict[str, Any] = {"data": {"purpose": "fine-tune"}, "files": {"file": ("r.jsonl", as_jsonl(ROWS[1:]))}}
        return str(gateway.http.post("/v1/files", **form, headers=headers).json()["id"])

    first = upload()
    assert upload(**{"x-stainless-retry-count": "1"}) == first
    gateway.http.delete(f"/v1/files/{first}")
    again = upload(**{"x-stainless-retry-count": "1"})
    assert again != first
    assert gateway.http.get(f"/v1/files/{again}/content").is_success


def test_a_connection_cut_before_the_answer_still_makes_one_job(gateway: Gateway, body: dict[str, Any]) -> None:
    """The official client itself, its first answer lost on the way."""

    class Lossy(httpx2.HTTPTransport):
        lost = 0

        def handle_request(self, request: httpx2.Request) -> httpx2.Response:
            response = super().handle_request(request)
            if not self.lost:
                self.lost += 1
                response.close()
                raise httpx2.ReadError("connection lost", request=request)
            return response

    jobs = count(gateway)
    lossy = Lossy()
    client = OpenAI(
        base_url=f"{gateway.url}/v1",
        api_key=gateway.key,
        max_retries=2,
        http_client=DefaultHttpxClient(transport=lossy),
        _strict_response_validation=True,
    )
    with client:
        job = client.fine_tuning.jobs.create(model=BASE, training_file=body["training_file"], seed=77)
    assert lossy.lost == 1
    assert job.seed == 77
    assert count(gateway) == jobs + 1


def test_responses_are_kept_for_a_day_and_no_longer(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'tunesmith.db'}"
    migrate(url)
    database = Database(url)
    clock = [1_000_000.0]
    kept = IdempotencyStore(now=lambda: clock[0])
    attempt = Attempt("key", PATH, "k", "f" * 64)
    with database.write() as tx:
        kept.keep(tx, attempt, StoredResponse("{}"))
        clock[0] += 24 * 3600
        assert kept.forget(tx) == 0
        assert kept.find(tx, attempt) == StoredResponse("{}")
        clock[0] += KEEP_SECONDS
        assert kept.forget(tx) == 1
        assert kept.find(tx, attempt) is None
    database.close()


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.servers)])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'tunesmith.db'}"
    return fresh_on_server(request.getfixturevalue("postgres_url"))


def test_two_hundred_at_once_over_two_gateways_make_one_job(
    tmp_path: Path, redis_server: str, database_url: str
) -> None:
    migrate(database_url)
    with Processes(tmp_path) as processes:
        urls = []
        for name in ("one", "two"):
            port = free_port()
            urls.append(f"http://127.0.0.1:{port}")
            environment = clean_environment() | {
                "TUNESMITH_HOME": str(tmp_path / "home"),
                "TUNESMITH_DATABASE_URL": database_url,
                "TUNESMITH_REDIS_URL": redis_server,
                "TUNESMITH_PORT": str(port),
            }
            processes.start(name, [sys.executable, "-m", "services.gateway"], environment)
            wait_until(lambda: answers(urls[-1] + "/health/ready"), "the gateway", logs=processes.tails)
        key = (tmp_path / "home" / "api_key").read_text().strip()
        headers = {"authorization": f"Bearer {key}"}
        limits = httpx.Limits(max_connections=None)
        with httpx.Client(headers=headers, timeout=60, limits=limits, trust_env=False) as http:
            form: dict[str, Any] = {"data": {"purpose": "fine-tune"}, "files": {"file": ("d.jsonl", as_jsonl(ROWS))}}
            body = {"model": BASE, "training_file": http.post(urls[0] + "/v1/files", **form).json()["id"]}
            ready = threading.Barrier(200)

            def send(number: int) -> httpx.Response:
                ready.wait()
                return http.post(urls[number % 2] + PATH, json=body, headers={"idempotency-key": "same"})

            with ThreadPoolExecutor(200) as pool:
                sent = list(pool.map(send, range(200)))
            assert {answer.status_code for answer in sent} == {200}, processes.tails()
            assert len({answer.content for answer in sent}) == 1
            assert sum("idempotent-replayed" not in answer.headers for answer in sent) == 1
            assert [job["id"] for job in http.get(urls[1] + PATH).json()["data"]] == [sent[0].json()["id"]]


@pytest.mark.parametrize("path", [PATH, "/v1/files"])
def test_while_the_first_is_in_flight_its_duplicate_is_409(
    tmp_path: Path, redis_server: str, database_url: str, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """The same on both databases: what is in flight is a real request that has not committed yet."""
    monkeypatch.setattr(idempotency_module, "WAIT_MS", 100)
    made = {"home": tmp_path / "home", "redis_url": redis_server, "database_url": database_url}
    with running_gateway(GatewaySettings.model_validate(made)) as gateway:
        job = {"json": {"model": BASE, "training_file": gateway.uploaded(ROWS)}}
        file = {"data": {"purpose": "fine-tune"}, "files": {"file": ("d.jsonl", as_jsonl(ROWS))}}
        arrived, go_on = threading.Event(), threading.Event()
        keep = gateway.services.idempotency.keep

        def keep_later(*arguments: Any) -> None:
            arrived.set()
            assert go_on.wait(120)
            keep(*arguments)

        def send(key: str) -> httpx.Response:
            sent: dict[str, Any] = job if path == PATH else file
            return gateway.http.post(path, headers={"idempotency-key": key}, **sent)

        monkeypatch.setattr(gateway.services.idempotency, "keep", keep_later)
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(send, "slow")
            assert arrived.wait(120)
            refused = [send("slow") for _ in range(2)]
            go_on.set()
            answer = first.result()
        assert [(duplicate.status_code, duplicate.json()["error"]["code"]) for duplicate in refused] == [
            (409, "idempotency_in_flight")
        ] * 2
        assert answer.is_success
        assert send("slow").content == answer.content
        assert send("another").json()["id"] != answer.json()["id"]
        assert len(gateway.http.get(path).json()["data"]) == (2 if path == PATH else 3)


def test_a_duplicate_waits_for_the_first_and_gets_its_response(gateway: Gateway, body: dict[str, Any]) -> None:
    """A first that ends in time: nobody is refused, though both were under way together."""
    arrived, keep = threading.Barrier(2), gateway.services.idempotency.keep

    def keep_once_the_duplicate_waits(*arguments: Any) -> None:
        arrived.wait(120)
        time.sleep(0.2)
        keep(*arguments)

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setattr(gateway.services.idempotency, "keep", keep_once_the_duplicate_waits)
        first = pool.submit(create, gateway, body, idempotency_key="k-7")
        arrived.wait(120)
        duplicate = pool.submit(create, gateway, body, idempotency_key="k-7")
        assert first.result().content == duplicate.result().content


def test_a_duplicate_at_another_gateway_is_409(
    tmp_path: Path, redis_server: str, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On PostgreSQL, where gateways of several machines share the database."""
    url = fresh_on_server(postgres_url)
    monkeypatch.setattr(idempotency_module, "WAIT_MS", 100)
    settings: Callable[..., GatewaySettings] = GatewaySettings.model_validate
    with running_gateway(settings({"home": tmp_path, "redis_url": redis_server, "database_url": url})) as gateway:
        body = {"model": BASE, "training_file": gateway.uploaded(ROWS)}
        attempt = Attempt("key-first", PATH, "slow", "0" * 64)
        with gateway.services.database.write() as connection:
            gateway.services.idempotency.begin(connection, attempt)
            refused = create(gateway, body, idempotency_key="slow")
            assert (refused.status_code, refused.json()["error"]["code"]) == (409, "idempotency_in_flight")
            assert create(gateway, body, idempotency_key="another").is_success
        assert create(gateway, body, idempotency_key="slow").is_success


def test_a_commit_whose_answer_is_lost_keeps_the_bytes_of_its_row(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What PostgreSQL's clients see when the server goes away between COMMIT and its answer."""
    database, real = gateway.services.database, gateway.services.database.write
    lost: list[int] = []

    @contextmanager
    def write() -> Iterator[Connection]:
        with real() as connection:
            yield connection
        if not lost:
            lost.append(1)
            raise OperationalError("COMMIT", {}, Exception("server closed the connection unexpectedly"))

    def send() -> httpx.Response:
        upload = {"file": ("lost.jsonl", as_jsonl(ROWS))}
        return gateway.http.post(
            "/v1/files", data={"purpose": "fine-tune"}, files=upload, headers={"Idempotency-Key": "lost-commit"}
        )

    monkeypatch.setattr(database, "write", write)
    assert send().status_code == 503
    again = send()
    assert (again.status_code, again.headers["idempotent-replayed"]) == (200, "true")
    content = gateway.http.get(f"/v1/files/{again.json()['id']}/content")
    assert (content.status_code, content.content) == (200, as_jsonl(ROWS))


def test_an_upload_refused_in_its_transaction_leaves_no_bytes(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = gateway.settings.artifacts_root / "files"
    before = set(folders.glob("*"))

    def refuse(*_: object) -> None:
        raise Conflict("the same request is still in flight; try again")

    monkeypatch.setattr(gateway.services.idempotency, "begin", refuse)
    assert gateway.upload(as_jsonl(ROWS)).status_code == 409
    assert set(folders.glob("*")) == before
