"""Health, metrics, and what goes on while a part is away."""

import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from services.gateway.settings import GatewaySettings
from shared.jobs.store import JobStore
from shared.jobs.worker_outages import WorkerOutages
from tests.services.gateway.conftest import ROWS, Gateway, eventually, running_gateway
from tests.stack_processes import clean_environment, free_port, keeps_an_idle_connection, running_redis

BASE = "smollm2-135m-instruct"
PATH = "/v1/fine_tuning/jobs"
Settings = Callable[..., GatewaySettings]


def samples(gateway: Gateway) -> dict[tuple[str, tuple[str, ...]], float]:
    text = gateway.http.get("/metrics").text
    return {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_count_requests_by_route_and_jobs_by_state(gateway: Gateway) -> None:
    file = gateway.uploaded(ROWS)
    for _ in range(2):
        assert gateway.http.post(PATH, json={"model": BASE, "training_file": file}).is_success
    gateway.http.get("/v1/files/file-none")
    gateway.http.get("/nothing/of/the/kind")
    gateway.http.request("BREW", "/v1/files")
    found = samples(gateway)
    count = "tunesmith_gateway_requests_total"
    assert found[count, ("POST", "/v1/files", "200")] == 1
    assert found[count, ("POST", PATH, "200")] == 2
    # Labels are routes, never paths that a client invents.
    assert found[count, ("GET", "/v1/files/{file_id}", "404")] == 1
    assert found[count, ("GET", "unmatched", "404")] == 1
    assert not any("BREW" in labels for _, labels in found)
    assert found["tunesmith_gateway_request_seconds_count", ("POST", PATH)] == 2
    assert found["tunesmith_jobs", ("queued",)] == 2
    assert found["tunesmith_jobs", ("running",)] == 0
    assert found["tunesmith_up", ("redis",)] == found["tunesmith_up", ("database",)] == 1
    # One more if jobs are counted just as the second is created: it wakes a worker that finds nothing.
    eventually(lambda: samples(gateway)["tunesmith_notifications_pending", ()] in (2, 3))
    assert samples(gateway)["tunesmith_doorbells_pending", ()] in (2, 3)


def test_health(gateway: Gateway) -> None:
    assert gateway.http.get("/health/live").json() == {"status": "live"}
    ready = gateway.http.get("/health/ready")
    assert ready.json() == {
        "status": "ready",
        "database": True,
        "redis": True,
        "inference": {"tinyllama-1.1b-chat": False, BASE: False},
        "workers_out_of_service": 0,
    }
    assert gateway.http.get("/health").json() == ready.json()
    unserved = gateway.http.get("/health/ready", params={"base": BASE})
    assert (unserved.status_code, unserved.json()["status"]) == (503, "not_ready")


def out_of_service(gateway: Gateway) -> set[tuple[str, ...]]:
    """The (base, worker) of each worker that is."""
    return {labels for name, labels in samples(gateway) if name == "tunesmith_worker_out_of_service"}


def test_workers_out_of_service_are_counted_for_everybody_and_named_for_key_holders(gateway: Gateway) -> None:
    outages = WorkerOutages(gateway.services.database)
    outages.begin("gpu-1", 300)
    outages.begin("gpu-2", 10, BASE)
    outages.begin("gpu-2", 10, "other")
    eventually(lambda: gateway.http.get("/health/ready").json()["workers_out_of_service"] == 2)
    assert gateway.http.get("/health/ready").json()["status"] == "ready"
    named = {("", "gpu-1"), (BASE, "gpu-2"), ("other", "gpu-2")}
    assert out_of_service(gateway) == named
    outages.end("gpu-2", [BASE, "other"])
    assert out_of_service(gateway) == {("", "gpu-1")}


def test_without_redis_a_job_is_taken_at_once_and_notified_of_later(settings: Settings, tmp_path: Path) -> None:
    port = free_port()
    with running_gateway(settings(redis_url=f"redis://127.0.0.1:{port}/0")) as gateway:
        assert gateway.http.get("/health/ready").json()["redis"] is False
        file = gateway.uploaded(ROWS)
        # Redis being away costs seconds per notification; none of them is the client's.
        for _ in range(5):
            answer = gateway.http.post(PATH, json={"model": BASE, "training_file": file}, timeout=10)
            assert answer.json()["status"] == "queued"
        assert gateway.services.notifications.pending() is None
        with running_redis(port):
            eventually(lambda: (gateway.services.notifications.pending() or 0) >= 5)


def test_a_database_that_is_away_is_503_until_it_is_back(settings: Settings) -> None:
    with running_gateway(settings()) as gateway:
        gateway.services.database.close()
        database = gateway.settings.home / "tunesmith.db"
        database.rename(database.with_suffix(".away"))
        database.mkdir()
        # It is asked at most once a second.
        eventually(lambda: gateway.http.get("/health/ready").status_code == 503)
        answer = gateway.http.get("/v1/files")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "database_unavailable")
        assert "sqlite" not in answer.text
        database.rmdir()
        database.with_suffix(".away").rename(database)
        eventually(lambda: gateway.http.get("/v1/files").is_success)


def test_what_nobody_expected_is_a_bare_500_with_an_id(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(JobStore, "get", fail)
    answer = gateway.http.get(f"{PATH}/ftjob-1", headers={"x-request-id": "req-mine"})
    assert answer.status_code == 500
    assert answer.json() == {
        "error": {"message": "internal error", "type": "server_error", "param": None, "code": "server_error"}
    }
    assert answer.headers.get_list("x-request-id") == ["req-mine"]


@contextmanager
def process(tmp_path: Path, redis_url: str, **environment: str) -> Iterator["subprocess.Popen[str]"]:
    kept = clean_environment()
    own = {"TUNESMITH_HOME": str(tmp_path), "TUNESMITH_REDIS_URL": redis_url, "TUNESMITH_PORT": "0"}
    with subprocess.Popen(
        [sys.executable, "-m", "services.gateway"],
        cwd=Path(__file__).parents[4],
        env=kept | own | environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as gateway:
        try:
            yield gateway
        finally:
            gateway.kill()


def test_without_a_schema_the_process_says_what_to_run(tmp_path: Path, redis_url: str) -> None:
    with process(tmp_path, redis_url) as gateway:
        _, errors = gateway.communicate(timeout=60)
    assert gateway.returncode == 1
    assert errors.strip() == (
        "the database's schema is missing, this version needs 0010: run `python -m shared.migrations`"
    )


def test_after_a_newer_version_has_migrated_the_process_ends_and_says_so(tmp_path: Path, redis_url: str) -> None:
    from sqlalchemy import text

    from shared.storage.database import Database, migrate

    url = f"sqlite:///{tmp_path / 'tunesmith.db'}"
    migrate(url)
    with process(tmp_path, redis_url) as gateway:
        assert gateway.stderr is not None
        while "Uvicorn running on" not in gateway.stderr.readline():
            assert gateway.poll() is None
        database = Database(url)
        with database.write() as tx:
            tx.execute(text("UPDATE alembic_version SET version_num = '9999'"))
        database.close()
        _, errors = gateway.communicate(timeout=60)
    assert gateway.returncode == 1
    assert errors.strip().splitlines()[-1] == (
        "the database's schema is 9999, this version needs 0010: it was migrated by a newer version: start that one"
    )


def test_a_missing_catalogue_is_said_in_a_sentence(tmp_path: Path, redis_url: str) -> None:
    with process(tmp_path, redis_url, TUNESMITH_CATALOGUE=str(tmp_path / "none.toml")) as gateway:
        _, errors = gateway.communicate(timeout=60)
    assert gateway.returncode == 1
    assert "none.toml" in errors
    assert "Traceback" not in errors


def test_the_process_serves_and_stops_when_told(settings: Settings, tmp_path: Path, redis_url: str) -> None:
    from shared.storage.database import migrate

    migrate(settings().sql_url)
    with process(tmp_path, redis_url) as gateway:
        assert gateway.stderr is not None
        url = ""
        for line in gateway.stderr:
            if "Uvicorn running on" in line:
                url = line.split("Uvicorn running on ")[1].split(" ")[0]
                break
        key = (tmp_path / "api_key").read_text().strip()
        assert httpx.get(f"{url}/v1/files", headers={"authorization": f"Bearer {key}"}).json()["data"] == []
        keeps_an_idle_connection(url)
        gateway.send_signal(signal.SIGTERM)
        rest = gateway.stderr.read()
        gateway.wait(timeout=120)
    assert gateway.returncode in (0, -signal.SIGTERM)
    assert '"path": "/v1/files"' in rest
    assert key not in rest


@pytest.mark.parametrize("url", ["", "a,b", " http://one:1/ , http://two:2 ,"])
def test_inference_urls_are_a_comma_separated_list(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_INFERENCE_URLS", url)
    expected = {"": (), "a,b": ("a", "b")}.get(url, ("http://one:1", "http://two:2"))
    assert GatewaySettings().inference_urls == expected


def test_the_documentations_page_needs_no_other_host(gateway: Gateway) -> None:
    page = gateway.http.get("/docs")
    assert page.status_code == 200
    places = re.findall(r"""(?:src|href)=["']([^"']+)["']|url: ["']([^"']+)["']""", page.text)
    found = [place or url for place, url in places]
    assert len(found) >= 4
    for place in found:
        assert gateway.http.get(place).status_code == 200, place
        assert place.startswith("/"), place
