"""Uploads: good ones are kept whole, bad ones leave nothing, and neither takes more than its limits."""

import hashlib
import json
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from itertools import cycle
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from services.gateway.files.upload import DatasetUpload, safe_filename
from services.gateway.settings import GatewaySettings
from shared.errors import InvalidRequest, PayloadTooLarge
from shared.storage.artifacts import sha256_of
from shared.storage.database import migrate
from tests.services.gateway.conftest import ROWS, Gateway, as_jsonl, eventually, running_gateway
from tests.stack_processes import Processes, answers, clean_environment, free_port, wait_until

DATA = as_jsonl(ROWS)
Settings = Callable[..., GatewaySettings]
FORM = {"content-type": "multipart/form-data; boundary=x"}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, redis_server: str) -> Iterator[Gateway]:
    settings = GatewaySettings.model_validate(
        {"home": tmp_path_factory.mktemp("home"), "redis_url": redis_server, "max_upload_bytes": 4 << 20}
    )
    with running_gateway(settings) as running:
        yield running


def kept(gateway: Gateway) -> set[str]:
    """Everything under the artifacts folder."""
    root = gateway.settings.artifacts_root
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.parent != root}


def part(name: str, content: bytes, disposition: str = "") -> bytes:
    return f'--x\r\nContent-Disposition: form-data; name="{name}"{disposition}\r\n\r\n'.encode() + content + b"\r\n"


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + b"--x--\r\n"


PURPOSE = part("purpose", b"fine-tune")
FILE = part("file", DATA, '; filename="data.jsonl"')


def test_a_dataset_is_kept_as_it_came(gateway: Gateway) -> None:
    made = gateway.upload(DATA).json()
    assert made["sha256"] == hashlib.sha256(DATA).hexdigest()
    assert made["dataset"]["format"] == "instruction"
    assert made["dataset"]["rows"] == len(ROWS)
    folder = gateway.settings.artifacts_root / "files" / made["id"]
    assert (folder / "data").read_bytes() == DATA
    content = gateway.http.get(f"/v1/files/{made['id']}/content")
    assert (content.content, content.headers["content-type"]) == (DATA, "application/octet-stream")
    assert gateway.http.delete(f"/v1/files/{made['id']}").json()["deleted"]
    assert not folder.exists()
    assert gateway.http.get(f"/v1/files/{made['id']}/content").status_code == 404


@pytest.mark.parametrize(
    ("data", "form"),
    [
        (json.dumps(ROWS, indent=2).encode(), "instruction"),
        (as_jsonl([{"prompt": f"{n}", "completion": " yes"} for n in range(60)]), "completion"),
        (as_jsonl([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]), "chat"),
    ],
)
def test_all_forms(gateway: Gateway, data: bytes, form: str) -> None:
    assert gateway.upload(data).json()["dataset"]["format"] == form


def test_bad_rows_are_named_and_nothing_is_stored(gateway: Gateway) -> None:
    before, listed = kept(gateway), gateway.http.get("/v1/files").json()
    rows: list[dict[str, Any]] = [
        *ROWS[:10],
        {"instruction": "no answer"},
        *ROWS[10:20],
        {"instruction": "a", "output": 1},
    ]
    answer = gateway.upload(rows)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["code"], error["type"], error["param"]) == ("invalid_dataset", "invalid_request_error", "file")
    assert [(bad["line"], bad["path"], bad["code"]) for bad in error["errors"]] == [
        (11, "output", "missing"),
        (22, "output", "wrong_type"),
    ]
    assert error["error_count"] == 2
    many = gateway.upload(b"{}\n" * 100_000).json()["error"]
    assert len(many["errors"]) == 100
    assert (kept(gateway), gateway.http.get("/v1/files").json()) == (before, listed)
    assert gateway.upload(DATA).is_success


BODIES: dict[str, tuple[bytes, dict[str, str], int, str]] = {
    "nothing": (b"", FORM, 400, "not_multipart"),
    "not multipart": (b"{}", {"content-type": "application/json"}, 400, "not_multipart"),
    "no content type": (b"{}", {}, 400, "not_multipart"),
    "no boundary": (form(PURPOSE, FILE), {"content-type": "multipart/form-data"}, 400, "not_multipart"),
    "boundary too long": (
        form(PURPOSE, FILE),
        {"content-type": "multipart/form-data; boundary=" + "y" * 1000},
        400,
        "not_multipart",
    ),
    "another boundary": (form(PURPOSE, FILE).replace(b"--x", b"--y"), FORM, 400, "not_multipart"),
    "no end": (PURPOSE + FILE, FORM, 400, "not_multipart"),
    "cut in the middle": (form(PURPOSE, FILE)[:-100], FORM, 400, "not_multipart"),
    "no purpose": (form(FILE), FORM, 400, "invalid_request"),
    "no file": (form(PURPOSE), FORM, 400, "invalid_request"),
    "another purpose": (form(part("purpose", b"assistants"), FILE), FORM, 400, "invalid_purpose"),
    "another purpose behind the file": (form(FILE, part("purpose", b"batch")), FORM, 400, "invalid_purpose"),
    "empty purpose": (form(part("purpose", b""), FILE), FORM, 400, "invalid_purpose"),
    "purpose twice": (form(PURPOSE, PURPOSE, FILE), FORM, 400, "invalid_request"),
    "file twice": (form(PURPOSE, FILE, FILE), FORM, 400, "invalid_request"),
    "unknown part": (form(PURPOSE, part("notify", b"me"), FILE), FORM, 400, "unknown_field"),
    "expiry": (form(PURPOSE, part("expires_after[anchor]", b"created_at"), FILE), FORM, 400, "invalid_request"),
    "nameless part": (b"--x\r\n\r\nabc\r\n--x--\r\n", FORM, 400, "unknown_field"),
    "purpose without end": (form(part("purpose", b"f" * 100_000), FILE), FORM, 413, "payload_too_large"),
    "too many parts": (form(PURPOSE, *[part(f"p{n}", b"") for n in range(20)]), FORM, 400, "unknown_field"),
    "endless part header": (
        b'--x\r\nContent-Disposition: form-data; name="' + b"n" * 100_000 + b'"\r\n\r\na\r\n--x--\r\n',
        FORM,
        400,
        "not_multipart",
    ),
    "too many part headers": (b"--x\r\n" + b"A: b\r\n" * 1000 + b"\r\na\r\n--x--\r\n", FORM, 400, "not_multipart"),
    "CSV without rows": (form(PURPOSE, part("file", b"a,b\n", '; filename="data.CSV"')), FORM, 400, "invalid_dataset"),
    "no parquet": (form(PURPOSE, part("file", b"PAR1", '; filename="d.parquet"')), FORM, 400, "invalid_dataset"),
    "spreadsheet": (form(PURPOSE, part("file", b"PK", '; filename="d.xlsx"')), FORM, 400, "unsupported_file_type"),
    "unknown word for bad rows": (form(PURPOSE, part("on_bad_rows", b"drop"), FILE), FORM, 400, "invalid_request"),
    "bad rows at the end": (form(PURPOSE, part("on_bad_rows", b"drop")), FORM, 400, "invalid_request"),
    "bad rows behind the file": (form(PURPOSE, FILE, part("on_bad_rows", b"skip")), FORM, 400, "invalid_request"),
    "bad rows twice": (form(*[part("on_bad_rows", b"skip")] * 2, PURPOSE, FILE), FORM, 400, "invalid_request"),
    "no good row": (
        form(PURPOSE, part("on_bad_rows", b"skip"), part("file", b"{}\n{}", '; filename="d.jsonl"')),
        FORM,
        400,
        "invalid_dataset",
    ),
    "archive": (form(PURPOSE, part("file", b"PK\x03\x04", '; filename="d.zip"')), FORM, 400, "unsupported_file_type"),
    "archive under a false name": (
        form(PURPOSE, part("file", b"PK\x03\x04\x00", '; filename="d.jsonl"')),
        FORM,
        400,
        "invalid_dataset",
    ),
    "empty file": (form(PURPOSE, part("file", b"", '; filename="d.jsonl"')), FORM, 400, "invalid_dataset"),
    "compressed body": (form(PURPOSE, FILE), FORM | {"content-encoding": "gzip"}, 415, "unsupported_media_type"),
    "file too large": (
        form(PURPOSE, part("file", DATA * 2000, '; filename="d.jsonl"')),
        FORM,
        413,
        "payload_too_large",
    ),
}


@pytest.mark.parametrize("name", BODIES)
def test_bodies_that_are_refused(gateway: Gateway, name: str) -> None:
    body, headers, status, code = BODIES[name]
    before = kept(gateway)
    for content in (body, iter([body])):
        # With a length, and in chunks without one.
        answer = gateway.http.post("/v1/files", content=content, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
    assert kept(gateway) == before


def test_a_file_may_come_before_its_purpose_and_without_a_name(gateway: Gateway) -> None:
    answer = gateway.http.post("/v1/files", content=form(part("file", DATA), PURPOSE), headers=FORM)
    assert answer.json()["filename"] == "file"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("data.jsonl", "data.jsonl"),
        ("../../etc/passwd", "passwd"),
        ("..\\..\\boot.ini", "boot.ini"),
        ("/", "file"),
        ("", "file"),
        ("a\x00\n\x1b[31mb\u202e\u200b", "a[31mb"),
        ("ü 你好 🎉.jsonl", "ü 你好 🎉.jsonl"),
        ("x" * 1000, "x" * 255),
        ("<img onerror=alert(1)>", "<img onerror=alert(1)>"),
    ],
)
def test_file_names_are_only_text(name: str, shown: str) -> None:
    assert safe_filename(name) == shown


def test_a_hostile_file_name_becomes_no_path(gateway: Gateway) -> None:
    disposition = '; filename="../../../../tmp/evil.jsonl"'
    answer = gateway.http.post("/v1/files", content=form(PURPOSE, part("file", DATA, disposition)), headers=FORM)
    assert answer.json()["filename"] == "evil.jsonl"
    assert set(kept(gateway)) >= {f"files/{answer.json()['id']}/data"}


@pytest.mark.parametrize(
    "file_id",
    ["file-0", "..", "../x", "%2e%2e%2f%2e%2e", "a%00b", "file-x/../../y", "x" * 5000, "%ff", "file-'--", "%20"],
)
def test_ids_that_are_none(gateway: Gateway, file_id: str) -> None:
    for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
        answer = gateway.http.request(method, f"/v1/files/{file_id}{path}")
        assert answer.status_code in (404, 405), answer.text
        assert "error" in answer.json()


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=-1", "limit=10001", "limit=a", "limit=1.5", "after=file-0", "after=a%00", "order=up"]
)
def test_page_parameters_are_bounded(gateway: Gateway, query: str) -> None:
    answer = gateway.http.get(f"/v1/files?{query}")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == query.split("=")[0]
    assert gateway.http.get("/v1/files?unknown=1").is_success


def test_a_file_in_use_stays(gateway: Gateway) -> None:
    file = gateway.uploaded(ROWS)
    body = {"model": "smollm2-135m-instruct", "training_file": gateway.uploaded(ROWS), "validation_file": file}
    job = gateway.http.post("/v1/fine_tuning/jobs", json=body).json()["id"]
    answer = gateway.http.delete(f"/v1/files/{file}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "file_in_use")
    assert gateway.http.get(f"/v1/files/{file}/content").is_success
    gateway.http.post(f"/v1/fine_tuning/jobs/{job}/cancel")
    assert gateway.http.delete(f"/v1/files/{file}").is_success


def test_many_uploads_at_once(gateway: Gateway) -> None:
    answers: list[httpx.Response] = []
    threads = [threading.Thread(target=lambda: answers.append(gateway.upload(DATA))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({answer.json()["id"] for answer in answers}) == 16


def test_an_upload_broken_off_leaves_nothing(gateway: Gateway) -> None:
    before = kept(gateway)
    port = int(gateway.url.rsplit(":", 1)[1])
    body = PURPOSE + FILE[: len(FILE) // 2]
    head = (
        f"POST /v1/files HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {gateway.key}\r\nContent-Length: 1000000\r\n"
        "Content-Type: multipart/form-data; boundary=x\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(head.encode() + body)
        eventually(lambda: kept(gateway) != before)
    eventually(lambda: kept(gateway) == before)
    assert gateway.upload(DATA).is_success


def test_a_full_disk_is_said_and_leaves_nothing(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    before = kept(gateway)

    def full(self: DatasetUpload, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(DatasetUpload, "_take", full)
    answer = gateway.upload(DATA)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "storage_full")
    monkeypatch.undo()
    assert kept(gateway) == before
    assert gateway.upload(DATA).is_success


def test_a_large_upload_streams_through(tmp_path: Path, redis_server: str) -> None:
    """320 MB in, through a real process, which does not grow with it."""
    row = json.dumps({"instruction": "What?", "output": "x" * 250_000}).encode() + b"\n"
    count = (320 << 20) // len(row)

    def body() -> Iterator[bytes]:
        yield PURPOSE
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="large.jsonl"\r\n\r\n'
        for _ in range(count):
            yield row
        yield b"\r\n--x--\r\n"

    settings = GatewaySettings.model_validate({"home": tmp_path, "redis_url": redis_server})
    migrate(settings.sql_url)
    port = free_port()
    environment = clean_environment() | {
        "TUNESMITH_HOME": str(tmp_path),
        "TUNESMITH_REDIS_URL": redis_server,
        "TUNESMITH_PORT": str(port),
    }
    with Processes(tmp_path) as processes:
        started = processes.start("gateway", [sys.executable, "-m", "services.gateway"], environment)
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: answers(f"{url}/health/ready"), "the gateway", logs=processes.tails)
        headers = FORM | {"authorization": f"Bearer {settings.key_path.read_text().strip()}"}
        with httpx.Client(base_url=url, headers=headers, timeout=120, trust_env=False) as http:
            small = http.post("/v1/files", content=form(PURPOSE, FILE))
            assert small.is_success, small.text
            process = psutil.Process(started.pid)
            before, most = process.memory_info().rss, 0
            done = threading.Event()

            def watch() -> None:
                nonlocal most
                while not done.wait(0.02):
                    most = max(most, process.memory_info().rss)

            watcher = threading.Thread(target=watch)
            watcher.start()
            answer = http.post("/v1/files", content=body())
            done.set()
            watcher.join()
            assert answer.json()["bytes"] == count * len(row) > 300_000_000
            assert most - before < 64 << 20
            assert http.delete(f"/v1/files/{answer.json()['id']}").is_success


@examples(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from([5000, 50, 5, 2, 1]), min_size=1, max_size=40), st.booleans())
def test_chunks_may_be_cut_anywhere(tmp_path: Path, sizes: list[int], purpose_first: bool) -> None:
    body = form(PURPOSE, FILE) if purpose_first else form(FILE, PURPOSE)
    upload = DatasetUpload("multipart/form-data; boundary=x", tmp_path, 1 << 20)
    for size in cycle(sizes):
        upload.feed(body[:size])
        body = body[size:]
        if not body:
            break
    new = upload.finish()
    assert (tmp_path / "data").read_bytes() == DATA
    assert (new.bytes, new.sha256) == (len(DATA), hashlib.sha256(DATA).hexdigest())


@given(st.lists(st.sampled_from([b"--x", b"--x--", b"\r\n", PURPOSE, FILE, b": ", b"\x00", b"--"]), max_size=10))
@examples(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_bytes_do_more_than_be_refused(tmp_path: Path, pieces: list[bytes]) -> None:
    upload = DatasetUpload("multipart/form-data; boundary=x", tmp_path, 1 << 20)
    with closing(upload), suppress(InvalidRequest, PayloadTooLarge):
        for piece in pieces:
            upload.feed(piece)
        assert upload.finish().sha256 == sha256_of(tmp_path / "data")


def test_a_wrong_type_is_no_dataset(gateway: Gateway) -> None:
    wrong: list[Any] = ["text", 1, None, []]
    assert gateway.upload(b"\n".join(json.dumps(item).encode() for item in wrong)).status_code == 400


def test_below_the_reserve_an_upload_is_refused_and_what_is_there_works(
    settings: Settings,
) -> None:
    with running_gateway(settings(reserve_bytes=1 << 60)) as gateway:
        refused = gateway.upload([{"prompt": "a", "completion": "b"}])
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "storage_full")
        assert "are kept free" in refused.json()["error"]["message"]
        assert gateway.http.get("/v1/files").status_code == 200


def test_the_tokens_of_a_file_go_with_the_last_file_of_those_bytes(gateway: Gateway) -> None:
    first, second = (gateway.upload([{"prompt": "a", "completion": "b"}], name).json()["id"] for name in ("a", "b"))
    with gateway.services.database.read() as tx:
        sha256 = gateway.services.files.get(tx, "default", first).sha256
    cached = gateway.services.artifacts.cache(sha256, "0" * 64)
    cached.mkdir(parents=True)
    assert gateway.http.delete(f"/v1/files/{first}").status_code == 200
    assert cached.is_dir()
    assert gateway.http.delete(f"/v1/files/{second}").status_code == 200
    assert not cached.parent.exists()
