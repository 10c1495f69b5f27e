"""Who gets in: every route of the API document, every way of not having a key, and nothing read before the answer."""

import json
import socket
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from sqlalchemy import insert, select, update

from services.gateway.app import create_app
from services.gateway.http.keys import Keys, Owner, read_or_make_secret
from services.gateway.settings import GatewaySettings
from shared.bases.catalogue import load_catalogue
from shared.errors import TunesmithError
from shared.storage.database import Database, migrate
from shared.storage.tables import api_keys
from tests.services.gateway.conftest import ROWS, Gateway, running_gateway
from tests.services.gateway.test_costs import statements

OPEN = {("GET", "/"), ("GET", "/health/live"), ("GET", "/health/ready")}
Settings = Callable[..., GatewaySettings]


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, redis_server: str) -> Iterator[Gateway]:
    """One for all: none of these requests leaves a trace."""
    settings = GatewaySettings.model_validate({"home": tmp_path_factory.mktemp("home"), "redis_url": redis_server})
    with running_gateway(settings) as running:
        yield running


def routes() -> list[tuple[str, str]]:
    paths = create_app(GatewaySettings(), load_catalogue()).openapi()["paths"]
    return [(method.upper(), path) for path, item in paths.items() for method in item]


def raw(gateway: Gateway, request: bytes, timeout: float = 10) -> bytes:
    """All that the server sends back until it closes or has answered once."""
    port = int(gateway.url.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port), timeout=timeout) as connection:
        connection.sendall(request)
        answer = b""
        while b"\r\n\r\n" not in answer:
            piece = connection.recv(65_536)
            if not piece:
                break
            answer += piece
        return answer


def test_every_route_but_health_needs_a_key(gateway: Gateway) -> None:
    found = routes()
    assert len(found) > 20
    wrong_headers: list[dict[str, str] | list[tuple[str, str]]] = [
        {},
        {"authorization": ""},
        {"authorization": "Bearer"},
        {"authorization": f"Bearer {gateway.key}x"},
        {"authorization": f"Bearer {gateway.key[:-1]}"},
        {"authorization": "Bearer " + "k" * 5000},
        {"authorization": f"Basic {gateway.key}"},
        {"authorization": gateway.key},
        {"x-api-key": gateway.key},
        [("authorization", f"Bearer {gateway.key}"), ("authorization", f"Bearer {gateway.key}")],
    ]
    with httpx.Client(base_url=gateway.url) as anonymous:
        for method, path in found:
            for headers in wrong_headers:
                answer = anonymous.request(method, path.replace("{", "").replace("}", ""), headers=headers)
                if (method, path) in OPEN:
                    assert answer.status_code == 200
                    continue
                assert answer.status_code == 401, (method, path, headers)
                assert answer.headers["www-authenticate"] == "Bearer"
                assert answer.headers["x-request-id"]
                body = answer.json()
                if path.startswith("/v1/"):
                    assert body["error"]["code"] == "invalid_api_key"
                else:
                    assert body["error_type"] == "authentication"
        assert anonymous.get("/openapi.json").status_code == anonymous.get("/docs").status_code == 200


@pytest.mark.parametrize(
    "host", [b"a/health/live", b"a/?", b"a/#", b"", b"127.0.0.1/docs?", b"[::1", b"a\r\nHost: b", b"x/health/ready?a="]
)
def test_no_host_header_opens_a_door(gateway: Gateway, host: bytes) -> None:
    for method, path in routes():
        if (method, path) in OPEN:
            continue
        where = path.replace("{", "").replace("}", "").encode()
        answer = raw(
            gateway,
            b"%b %b HTTP/1.1\r\nHost: %b\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            % (method.encode(), where, host),
        )
        assert answer.split(b" ", 2)[1] in (b"401", b"400"), (method, path, answer[:100])


@pytest.mark.parametrize(
    "target",
    [
        b"http://127.0.0.1/v1/files",
        b"/health/live/../../v1/files",
        b"/health/%2e%2e/v1/files",
        b"//v1/files",
        b"/v1/files/",
        b"/v1/files;a=/health/live",
        b"/V1/FILES",
        b"/v1/files?/health/live",
        b"/v1%2ffiles",
    ],
)
def test_no_spelling_of_a_path_opens_a_door(gateway: Gateway, target: bytes) -> None:
    answer = raw(gateway, b"GET %b HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n" % target)
    assert answer.split(b" ", 2)[1] in (b"401", b"404", b"400", b"307"), answer[:100]
    assert b'"data"' not in answer


def test_a_huge_upload_without_a_key_is_refused_before_it_is_read(gateway: Gateway) -> None:
    head = (
        b"POST /v1/files HTTP/1.1\r\nHost: a\r\nContent-Length: 1073741824\r\n"
        b"Content-Type: multipart/form-data; boundary=x\r\n\r\n"
    )
    # Not a byte of the body is sent; waiting for one would time out.
    answer = raw(gateway, head)
    assert answer.startswith(b"HTTP/1.1 401")
    assert b"connection: close" in answer.lower()

    # And what a client sends all the same is not received for long.
    port = int(gateway.url.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port), timeout=120) as connection:
        connection.sendall(head)
        sent = 0
        with pytest.raises(OSError):  # noqa: PT012
            while sent < 1 << 30:
                sent += connection.send(b"x" * 65_536)
    assert sent < 64 << 20


def test_a_waiting_client_is_not_told_to_go_on(gateway: Gateway) -> None:
    head = (
        b"POST /v1/files HTTP/1.1\r\nHost: a\r\nContent-Length: 1073741824\r\nExpect: 100-continue\r\n"
        b"Content-Type: multipart/form-data; boundary=x\r\n\r\n"
    )
    assert raw(gateway, head).startswith(b"HTTP/1.1 401")


def test_no_byte_of_a_body_is_asked_for_without_a_key(gateway: Gateway) -> None:
    """At the application's own door: `receive` is never called."""
    for method, path in routes():
        if method == "GET":
            continue
        answered: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            raise AssertionError("the body was read")

        async def send(message: Any, answered: list[dict[str, Any]] = answered) -> None:
            answered.append(message)

        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "scheme": "http",
            "query_string": b"",
            "headers": [(b"content-length", b"1073741824"), (b"content-type", b"application/json")],
            "server": ("127.0.0.1", 80),
            "client": ("127.0.0.1", 1),
        }
        coroutine = gateway.app(scope, receive, send)
        # No event loop is needed: nothing is waited for.
        with pytest.raises(StopIteration):
            coroutine.__await__().send(None)
        assert answered[0]["status"] == 401


def test_another_projects_things_are_not_found(settings: Settings) -> None:
    with running_gateway(settings()) as gateway:
        secret = read_or_make_secret(gateway.settings.key_secret_path)
        digest = Keys(gateway.services.database, secret)._digest("ts-" + "o" * 40)
        row = {"id": "key-other", "project": "other", "digest": digest, "created_at": 0}
        with gateway.services.database.write() as connection:
            connection.execute(insert(api_keys).values(row))
        file = gateway.uploaded(ROWS)
        body = {"model": "smollm2-135m-instruct", "training_file": file}
        job = gateway.http.post("/v1/fine_tuning/jobs", json=body).json()["id"]
        with httpx.Client(base_url=gateway.url, headers={"authorization": "Bearer ts-" + "o" * 40}) as other:
            for path in (f"/v1/files/{file}", f"/v1/files/{file}/content"):
                assert other.get(path).status_code == 404
            assert other.delete(f"/v1/files/{file}").status_code == 404
            for path in ("", "/events", "/checkpoints"):
                assert other.get(f"/v1/fine_tuning/jobs/{job}{path}").status_code == 404
            for verb in ("cancel", "pause", "resume"):
                assert other.post(f"/v1/fine_tuning/jobs/{job}/{verb}").status_code == 404
            stolen = other.post("/v1/fine_tuning/jobs", json=body)
            assert (stolen.status_code, stolen.json()["error"]["param"]) == (400, "training_file")
            assert other.get("/v1/files").json()["data"] == other.get("/v1/fine_tuning/jobs").json()["data"] == []
            assert other.get("/v1/files", params={"after": file}).status_code == 400
            with gateway.services.database.write() as connection:
                connection.execute(update(api_keys).where(api_keys.c.id == "key-other").values(revoked_at=1))
            assert other.get("/v1/files").status_code == 401


def test_the_first_key_is_made_once_kept_private_and_never_logged(
    settings: Settings, capfd: pytest.CaptureFixture[str]
) -> None:
    keys = []
    for _ in range(2):
        with running_gateway(settings()) as gateway:
            keys.append(gateway.key)
            assert gateway.http.get("/v1/files").is_success
            with gateway.services.database.read() as connection:
                rows = connection.execute(select(api_keys)).all()
            assert len(rows) == 1
            assert gateway.key not in json.dumps([list(row) for row in rows])
            assert gateway.settings.key_path.stat().st_mode & 0o777 == 0o600
            assert gateway.settings.key_secret_path.stat().st_mode & 0o777 == 0o600
    assert keys[0] == keys[1]
    assert keys[0].startswith("ts-")
    assert len(keys[0]) >= 43
    captured = capfd.readouterr()
    assert keys[0] not in captured.out + captured.err


def test_a_key_that_lies_there_is_taken_over(settings: Settings) -> None:
    made = settings()
    made.key_path.write_text("ts-chosen-by-the-operator\n")
    with running_gateway(made) as gateway:
        assert gateway.key == "ts-chosen-by-the-operator"
        assert gateway.http.get("/v1/files").is_success


@pytest.mark.parametrize("key", ["1234", "k" * 300, "ts-" + "ü" * 20, "ts-one key and another"])
def test_what_is_no_key_is_not_taken_over(settings: Settings, key: str) -> None:
    made = settings()
    migrate(made.sql_url)
    made.key_path.write_text(key)
    database = Database(made.sql_url)
    with pytest.raises(TunesmithError, match="printable ASCII"):
        Keys(database, b"secret").ensure_first(made.key_path)
    made.key_path.unlink()
    assert Keys(database, b"secret").ensure_first(made.key_path)
    database.close()


def test_two_first_starts_make_one_key(settings: Settings) -> None:
    with running_gateway(settings()) as gateway:
        keys = Keys(gateway.services.database, b"another secret")
        assert not keys.ensure_first(gateway.settings.home / "second_key")
        assert not (gateway.settings.home / "second_key").exists()


def test_known_and_unknown_keys_take_the_same_way(gateway: Gateway) -> None:
    """Both are one look-up by digest: neither is told apart by a prefix or by its length."""
    others = (gateway.key[:-1] + "x", gateway.key[:10], "ts-" + "a" * 43)
    assert gateway.services.keys.owner_of(gateway.key) == Owner("key-first", "default")
    assert [gateway.services.keys.owner_of(key) for key in others] == [None] * 3
    asked = []
    for key in (gateway.key, *others):
        with statements() as sent:
            assert gateway.http.get("/v1/files?limit=1", headers={"authorization": f"Bearer {key}"})
        asked.append(next(statement for statement in sent if "api_keys" in statement))
        assert sum("api_keys" in statement for statement in sent) == 1
    assert len(set(asked)) == 1
