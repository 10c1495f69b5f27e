"""Files whose rows are made of them: their own bytes stay what they were, and the rows live and die with them."""

import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest

from services.gateway.files import derived
from services.gateway.files.derived import DerivedRows
from services.gateway.files.upload import DatasetUpload
from services.gateway.settings import GatewaySettings
from shared.datasets.checker import read_examples
from shared.datasets.examples import Instruction
from shared.datasets.reader import MAX_ROW_BYTES, RowError
from shared.errors import PayloadTooLarge
from shared.storage.artifacts import LocalArtifactStore
from tests.services.gateway.conftest import ROWS, Gateway, as_jsonl, running_gateway

CSV = b"instruction,input,output\n" + b"".join(b"What is %d?,,%d\n" % (n, n) for n in range(60))


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, redis_server: str) -> Iterator[Gateway]:
    settings = GatewaySettings.model_validate(
        {"home": tmp_path_factory.mktemp("home"), "redis_url": redis_server, "max_upload_bytes": 4 << 20}
    )
    with running_gateway(settings) as running:
        yield running


def upload(gateway: Gateway, data: bytes, name: str, **fields: str) -> httpx.Response:
    form = {"purpose": "fine-tune"} | fields
    return gateway.http.post("/v1/files", data=form, files={"file": (name, data)})


def parquet(rows: dict[str, Any]) -> bytes:
    written = io.BytesIO()
    pq.write_table(pa.table(rows), written)
    return written.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "made_from"),
    [
        ("d.CSV", CSV, "csv"),
        ("d.tsv", CSV.replace(b",", b"\t"), "tsv"),
        (
            "d.parquet",
            parquet({"instruction": [f"What is {n}?" for n in range(60)], "output": [str(n) for n in range(60)]}),
            "parquet",
        ),
    ],
)
def test_a_table_keeps_its_bytes_and_is_learnt_from_as_rows(
    gateway: Gateway, name: str, data: bytes, made_from: str
) -> None:
    made = upload(gateway, data, name).json()
    assert (made["bytes"], made["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert gateway.http.get(f"/v1/files/{made['id']}/content").content == data
    assert gateway.http.get(f"/v1/files/{made['id']}").json() == made
    report = made["dataset"]
    assert (report["format"], report["rows"], report["skipped_rows"]) == ("instruction", 60, 0)
    store = LocalArtifactStore(gateway.settings.artifacts_root)
    rows = store.file_rows(made["id"])
    assert list(read_examples(rows))[7] == Instruction("What is 7?", "7")
    assert report["derived"] | {"how": ""} == {
        "made_from": made_from,
        "how": "",
        "bytes": rows.stat().st_size,
        "sha256": hashlib.sha256(rows.read_bytes()).hexdigest(),
    }
    assert report["derived"]["how"].endswith("became an object")
    assert sorted(path.name for path in rows.parent.iterdir()) == ["data", rows.name]
    assert gateway.http.delete(f"/v1/files/{made['id']}").is_success
    assert not rows.parent.exists()


def test_rows_with_empty_outputs_are_left_out_if_that_is_asked_for(gateway: Gateway) -> None:
    """28 rows of the public Alpaca file have an empty output."""
    rows: list[dict[str, Any]] = [{"instruction": f"q{n}", "output": "" if n % 19 == 3 else "a"} for n in range(528)]
    data = as_jsonl(rows)
    bad = [n + 1 for n, row in enumerate(rows) if not row["output"]]
    assert len(bad) == 28
    refused = upload(gateway, data, "alpaca.jsonl")
    assert [error["line"] for error in refused.json()["error"]["errors"]] == bad
    for form in (data, b"[" + data.strip().replace(b"\n", b",\n") + b"]"):
        made = upload(gateway, form, "alpaca.json", on_bad_rows="skip").json()
        report = made["dataset"]
        assert (report["rows"], report["skipped_rows"]) == (500, 28)
        assert [(entry["line"], entry["path"], entry["code"]) for entry in report["skipped"]] == [
            (line, "output", "blank") for line in bad
        ]
        assert report["warnings"][0].startswith("28 bad rows were skipped (lines 4, 23, ")
        assert (report["derived"]["made_from"], report["derived"]["how"]) == ("json", "bad rows were left out")
        assert gateway.http.get(f"/v1/files/{made['id']}/content").content == form
        store = LocalArtifactStore(gateway.settings.artifacts_root)
        assert sum(1 for _ in read_examples(store.file_rows(made["id"]))) == 500


def test_where_nothing_was_skipped_the_bytes_are_the_rows(gateway: Gateway) -> None:
    made = upload(gateway, as_jsonl(ROWS), "d.jsonl", on_bad_rows="skip").json()
    assert made["dataset"]["derived"] is None
    store = LocalArtifactStore(gateway.settings.artifacts_root)
    assert store.file_rows(made["id"]) == store.file_data(made["id"])
    assert [path.name for path in store.file(made["id"]).iterdir()] == ["data"]


def test_the_same_file_with_another_word_is_another_request(gateway: Gateway) -> None:
    data = as_jsonl([*ROWS, {"instruction": "a", "output": ""}])
    headers = {"idempotency-key": "one"}
    form = {"purpose": "fine-tune", "on_bad_rows": "skip"}

    def send(fields: dict[str, str], name: str = "d.jsonl") -> httpx.Response:
        return gateway.http.post("/v1/files", data=fields, files={"file": (name, data)}, headers=headers)

    first = send(form)
    assert send(form).json() == first.json()
    # Refused on its own account, and nothing of the first is answered.
    assert send(form | {"on_bad_rows": "refuse"}).json()["error"]["code"] == "invalid_dataset"


def test_rows_that_come_out_larger_than_a_file_may_be_are_refused(gateway: Gateway) -> None:
    many = pa.DictionaryArray.from_arrays(pa.array([0] * 100, pa.int32()), pa.array(["x" * 100_000]))
    answer = upload(gateway, parquet({"text": many}), "d.parquet")
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "payload_too_large")
    assert "as JSON Lines" in answer.json()["error"]["message"]
    assert upload(gateway, CSV, "d.csv").is_success


@pytest.mark.parametrize(
    ("row", "key", "pieces"),
    [
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}, "chat", None),
        ({"text": "### Human: a ### Assistant: b"}, "text", None),
    ],
)
def test_other_forms_of_json_need_no_other_bytes(gateway: Gateway, row: dict[str, Any], key: str, pieces: None) -> None:
    made = upload(gateway, as_jsonl([row] * 3), "d.jsonl").json()
    assert (made["dataset"]["format"], made["dataset"]["derived"]) == (key, None)


def test_unused_keys_are_named_once_in_the_files_report(gateway: Gateway) -> None:
    made = upload(gateway, as_jsonl([row | {"id": n} for n, row in enumerate(ROWS)]), "d.jsonl").json()
    assert made["dataset"]["warnings"][0] == "keys that are not learnt from: 'id' (60 rows)"


def test_derived_rows_are_rows_again(tmp_path: Path) -> None:
    rows = DerivedRows(tmp_path, 10 << 20, lambda: None)
    lone = {"instruction": "ä", "output": "b", "note": "\ud800"}
    rows.add({"instruction": "ä", "output": "b"})
    rows.add(lone)
    for bad, code in (({"x": float("inf")}, "invalid_number"), ({"x": "y" * MAX_ROW_BYTES}, "row_too_long")):
        with pytest.raises(RowError) as refused:
            rows.add(bad)
        assert refused.value.code == code
    rows.finish()
    (path,) = tmp_path.iterdir()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"instruction": "ä", "output": "b"}, lone]
    assert list(read_examples(path)) == [Instruction("ä", "b")] * 2


def test_a_full_disk_ends_the_deriving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(derived, "BYTES_BETWEEN_LOOKS", 1000)
    asked = 0

    def require_space() -> None:
        nonlocal asked
        asked += 1
        if asked > 3:
            raise OSError(28, "No space left on device")

    rows = DerivedRows(tmp_path, 1 << 20, require_space)
    for _ in range(30):
        rows.add({"text": "a" * 70})
    with pytest.raises(OSError, match="No space left"):
        rows.add({"text": "a" * 1000})
    assert rows.size < 5000
    rows.discard()
    assert list(tmp_path.iterdir()) == []
    small = DerivedRows(tmp_path, 100, lambda: None)
    with pytest.raises(PayloadTooLarge):
        small.add({"text": "a" * 100})
    small.close()


def test_an_upload_that_ends_early_closes_what_it_derives(tmp_path: Path) -> None:
    upload = DatasetUpload("multipart/form-data; boundary=x", tmp_path, 1 << 20)
    upload.feed(
        b'--x\r\nContent-Disposition: form-data; name="on_bad_rows"\r\n\r\nskip\r\n'
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="d.jsonl"\r\n\r\n{"text": "a"}\n'
    )
    upload.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "rows.part"]
