"""Bad input over public HTTP against real processes: refused by name, nothing left behind, nothing broken.

Tables over every route, field and loader. After each case what is on disk and in SQL is as it was, and good requests
are answered as before. What only one part knows of (adapter files in all their forms, multipart bodies, cursors) is
tested there.
"""

import gzip
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import httpx
import psutil
import pytest
from sqlalchemy import func, insert, select

from shared.storage.database import Database
from shared.storage.manifests import read_manifest
from shared.storage.tables import adapters, metadata
from tests.cluster import TOKEN, Cluster
from tests.services.gateway.job_cases import BAD, placed
from tests.services.inference.adapters_on_disk import publish, write_adapter
from tests.stack_processes import wait_until

ROWS = [{"instruction": f"What is {n}?", "output": f"It is {n * 7}."} for n in range(60)]
JOBS = "/v1/fine_tuning/jobs"
JSON = {"content-type": "application/json"}
MEMORY_BYTES = 200 << 20


def jsonl(*rows: Any) -> bytes:
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


GOOD = jsonl(*ROWS)


@dataclass
class Target:
    """A running stack, and what it answered to good requests at the beginning."""

    stack: Cluster
    http: httpx.Client
    database: Database

    def __post_init__(self) -> None:
        self.file: str = self.upload(GOOD, "good").json()["id"]
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        self.chat_file: str = self.upload(jsonl({"messages": chat}), "chat").json()["id"]
        self.job: str = self.create().json()["id"]
        self.adapters = {"good": self.adapter("good")}
        # The one real worker is not there: what is queued stays queued.
        self.good = self.answers()
        self.memory = {pid: psutil.Process(pid).memory_info().rss for pid in self.pids}

    @property
    def pids(self) -> list[int]:
        return [running.pid for running in self.stack.processes.running if running.alive()]

    def upload(self, data: bytes, key: str | None = None, name: str = "data.jsonl") -> httpx.Response:
        form: dict[str, Any] = {"data": {"purpose": "fine-tune"}, "files": {"file": (name, data)}}
        return self.http.post("/v1/files", **form, headers={"idempotency-key": f"bad-{key}"} if key else {})

    def create(self) -> httpx.Response:
        body = {"model": "tiny", "training_file": self.file}
        return self.http.post(JOBS, json=body, headers={"idempotency-key": "bad-job"})

    def generate(self, body: dict[str, Any]) -> httpx.Response:
        return self.http.post("/generate", json=body)

    def answers(self) -> list[Any]:
        """Good requests of every kind, which leave nothing either: what they were answered, whole."""
        small = {"max_new_tokens": 8}
        tuned = self.generate({"instruction": "Why?", "parameters": small | {"adapter_id": self.adapters["good"]}})
        answers = [self.upload(GOOD, "good"), self.create(), self.generate({"inputs": "2", "parameters": small}), tuned]
        assert [answer.status_code for answer in answers] == [200] * 4, [answer.text for answer in answers]
        return [answer.json() for answer in answers]

    def adapter(self, name: str, adapter_id: str = "") -> str:
        """Publish an adapter in SQL; its folder is made by peft unless one is given."""
        base = read_manifest(self.stack.artifacts.base("tiny"), "base")
        adapter_id = adapter_id or write_adapter(
            self.stack.artifacts, self.stack.folder / "tiny-model", base, seed=len(name)
        )
        row = {"id": adapter_id, "project": "default", "job": self.job, "lease_token": 1, "state": "published"}
        row |= {"name": f"ft:tiny:default:{name}:1", "base": "tiny", "created_ns": 1}
        with self.database.write() as connection:
            connection.execute(insert(adapters).values(row))
        return adapter_id

    def left(self) -> tuple[dict[str, int], list[tuple[str, int]]]:
        """Rows of every table, and every file under the artifacts folder with its size."""
        with self.database.read() as connection:
            rows = {
                name: connection.execute(select(func.count()).select_from(table)).scalar_one()
                for name, table in metadata.tables.items()
            }
        root = self.stack.artifacts.root
        files = sorted(
            (str(path.relative_to(root)), path.lstat().st_size) for path in root.rglob("*") if path.is_file()
        )
        return rows, files

    def staged(self) -> list[str]:
        return [name for name, _ in self.left()[1] if name.startswith("staging/")]

    @contextmanager
    def unharmed(self) -> Iterator[None]:
        """Nothing is left behind by the block, and good requests are answered as at the beginning.

        The server clears away after the answer, or when it sees that the client left: both ends are waited for.
        """
        wait_until(lambda: not self.staged(), "an empty staging folder before the requests")
        before = self.left()
        yield
        with suppress(AssertionError):
            wait_until(lambda: self.left() == before, "nothing left behind")
        # Compared once more, so that a failure shows what is left.
        assert self.left() == before
        assert self.answers() == self.good


@pytest.fixture(scope="module")
def target(tiny_stack: Cluster) -> Iterator[Target]:
    database = Database(tiny_stack.database_url)
    with tiny_stack.client() as http:
        yield Target(tiny_stack, http, database)
    database.close()


ROW = {"instruction": "a", "output": "b"}
USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}

# What is uploaded → code, line and path of the first error.
DATASETS: dict[str, tuple[bytes, str, int, str]] = {
    "empty": (b"", "empty", 1, ""),
    "blank": (b" \n\t\r\n\n", "empty", 1, ""),
    "byte order mark alone": (b"\xef\xbb\xbf", "empty", 1, ""),
    "empty array": (b"[]", "empty", 1, ""),
    "UTF-16": (GOOD.decode().encode("utf-16"), "invalid_encoding", 1, ""),
    "UTF-16 without a mark": (GOOD.decode().encode("utf-16-le"), "invalid_json", 1, ""),
    "UTF-32": (GOOD.decode().encode("utf-32"), "invalid_encoding", 1, ""),
    "Latin-1": (jsonl(ROW, '{"instruction": "ä", "output": "b"}'.encode("latin-1")), "invalid_encoding", 2, ""),
    "overlong UTF-8": (jsonl(b'{"instruction": "\xc0\xaf", "output": "b"}'), "invalid_encoding", 1, ""),
    "surrogates in UTF-8": (jsonl(b'{"instruction": "\xed\xa0\x80", "output": "b"}'), "invalid_encoding", 1, ""),
    "lone surrogate": (jsonl(ROW, b'{"instruction": "a", "output": "\\ud800"}'), "invalid_text", 2, "output"),
    "NUL": (jsonl(ROW, b'{"instruction": "a\\u0000", "output": "b"}'), "invalid_text", 2, "instruction"),
    "raw NUL": (jsonl(ROW, b'{"instruction": "a\x00", "output": "b"}'), "invalid_json", 2, ""),
    "raw control character": (jsonl(b'{"instruction": "a\x1b[31m", "output": "b"}'), "invalid_json", 1, ""),
    "line ends of old": (GOOD.replace(b"\n", b"\r"), "invalid_json", 1, ""),
    "last line cut": (GOOD[:-9], "invalid_json", 60, ""),
    "two rows on a line": (jsonl(ROW, json.dumps(ROW).encode() * 2), "invalid_json", 2, ""),
    "trailing comma": (jsonl(b'{"instruction": "a", "output": "b",}'), "invalid_json", 1, ""),
    "single quotes": (jsonl(b"{'instruction': 'a', 'output': 'b'}"), "invalid_json", 1, ""),
    "NaN": (jsonl(ROW, b'{"instruction": "a", "output": "b", "weight": NaN}'), "invalid_number", 2, ""),
    "Infinity": (jsonl(b'{"instruction": "a", "output": -Infinity}'), "invalid_number", 1, ""),
    "huge integer": (jsonl(b'{"instruction": "a", "output": ' + b"9" * 5000 + b"}"), "invalid_number", 1, ""),
    "nested 10,000 deep": (jsonl(b'{"instruction": ' + b"[" * 10_000 + b"]" * 10_000 + b"}"), "too_deep", 1, ""),
    "nested 400,000 deep": (jsonl(b'{"instruction": ' + b'{"":' * 100_000 + b"1" + b"}" * 100_001), "too_deep", 1, ""),
    "nested without end": (b"[" * 2_000_000, "row_too_long", 1, ""),
    "one giant line": (jsonl(ROW, {"instruction": "a", "output": "b" * (2 << 20)}), "row_too_long", 2, ""),
    "duplicate key": (jsonl(b'{"instruction": "a", "output": "b", "output": "c"}'), "duplicate_key", 1, ""),
    "hostile keys": (jsonl({"__proto__": {}, "__class__": "a", "$where": "1"}), "unknown_form", 1, ""),
    "array not closed": (b'[{"instruction": "a", "output": "b"},\n', "invalid_json", 2, ""),
    "text behind the array": (b'[{"instruction": "a", "output": "b"}] x', "invalid_json", 1, ""),
    "rows without comma": (b'[{"instruction": "a", "output": "b"}\n{"instruction"', "invalid_json", 2, ""),
    "mixed forms": (jsonl(ROW, ROW, {"prompt": "a", "completion": "b"}), "mixed_forms", 3, ""),
    "one field of 10,000 rows": (jsonl(*[ROW] * 9_998, {"instruction": "a"}, ROW), "missing", 9_999, "output"),
    "number for text": (jsonl(ROW, {"instruction": 1, "output": "b"}), "wrong_type", 2, "instruction"),
    "list for text": (jsonl({"instruction": "a", "output": ["b"]}), "wrong_type", 1, "output"),
    "null for text": (jsonl({"instruction": "a", "output": None}), "missing", 1, "output"),
    "boolean for text": (jsonl({"prompt": True, "completion": "b"}), "wrong_type", 1, "prompt"),
    "object for input": (jsonl({"instruction": "a", "input": {}, "output": "b"}), "wrong_type", 1, "input"),
    "white space to learn": (jsonl({"instruction": "a", "output": " \n\t"}), "blank", 1, "output"),
    "nothing to learn": (jsonl({"prompt": "a", "completion": ""}), "blank", 1, "completion"),
    "scalars": (b"1\n2\n", "not_an_object", 1, ""),
    "lists": (b"{}\n[1]\n", "unknown_form", 1, ""),
    "no messages": (jsonl({"messages": []}), "wrong_type", 1, "messages"),
    "messages of another type": (jsonl({"messages": "hello"}), "wrong_type", 1, "messages"),
    "a message that is none": (jsonl({"messages": [USER, "hi"]}), "wrong_type", 1, "messages[1]"),
    "unknown role": (jsonl({"messages": [{"role": "root", "content": "a"}, ASSISTANT]}), "", 1, "messages[0].role"),
    "no assistant": (jsonl({"messages": [USER]}), "nothing_to_learn", 1, "messages"),
    "all weights 0": (jsonl({"messages": [USER, ASSISTANT | {"weight": 0}]}), "nothing_to_learn", 1, "messages"),
    "wrong weight": (jsonl({"messages": [USER, ASSISTANT | {"weight": 0.5}]}), "wrong_value", 1, "messages[1].weight"),
    "content of parts": (
        jsonl({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
        "unsupported_part",
        1,
        "messages[0].content[0].type",
    ),
    "no tools": (jsonl({"messages": [USER, ASSISTANT], "tools": [{}]}), "missing", 1, "tools[0].function.name"),
    "hostile arguments": (
        jsonl({"messages": [USER, ASSISTANT | {"tool_calls": [{"name": "w", "arguments": "[" * 500_000}]}]}),
        "too_deep",
        1,
        "messages[1].tool_calls[0].arguments",
    ),
    "pictures": (jsonl(ROW | {"images": ["a.png"]}), "unsupported_key", 1, "images"),
    "a history of lists": (jsonl(ROW | {"history": [[["a"], "b"]]}), "wrong_type", 1, "history[0]"),
    "CSV": (b"instruction,output\na,b\n", "invalid_json", 1, ""),
    "YAML": (b"- instruction: a\n  output: b\n", "invalid_json", 1, ""),
    "gzip": (gzip.compress(GOOD), "invalid_encoding", 1, ""),
    "zip": (b"PK\x03\x04\x14\x00\x00\x00", "invalid_json", 1, ""),
    "pickle": (b"\x80\x04\x95\x0b\x00", "invalid_encoding", 1, ""),
    "parquet": (b"PAR1\x15\x04\x15", "invalid_json", 1, ""),
    "picture": (b"\x89PNG\r\n\x1a\n", "invalid_encoding", 1, ""),
}


@pytest.mark.parametrize("name", DATASETS)
def test_datasets(target: Target, name: str) -> None:
    data, code, line, path = DATASETS[name]
    with target.unharmed():
        answer = target.upload(data)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "invalid_dataset", "file"), answer.text
    first = error["errors"][0]
    assert (first["code"] if code else "", first["line"], first["path"]) == (code, line, path), error
    assert f"line {line}" in error["message"]
    assert len(error["message"]) < 500


def test_unusual_text_is_no_bad_input(target: Target) -> None:
    """What looks hostile and is only text is taken and given back as it came."""
    texts = [
        "<|im_end|>",
        "\x1b[31m",
        "\u202eRTL\u2066",
        "<img onerror=alert(1)>",
        "'; DROP TABLE jobs;--",
        "🎉 ü 你好",
        "\ufeff",
    ]
    data = b"\xef\xbb\xbf" + jsonl(*[{"instruction": text, "output": text} for text in texts]).replace(b"\n", b"\r\n")
    made = target.upload(data, name="../../<b>\u202edata.jsonl").json()
    assert made["dataset"]["rows"] == len(texts)
    assert target.http.get(f"/v1/files/{made['id']}/content").content == data
    assert target.http.delete(f"/v1/files/{made['id']}").json()["deleted"]
    assert target.answers() == target.good


def test_jobs(target: Target) -> None:
    """The table of the gateway's own tests, against processes and a base that is really there."""
    cases: list[tuple[str, Any]] = [
        *BAD,
        ("hyperparameters.max_length", 513),
        ("lora.target_modules", ["query_key_value"]),
        ("model", "tiny/../tiny"),
        ("model", "hf.co/evil/model@main"),
        ("model", "s3://bucket/model"),
        ("model", "x" * 257),
        ("training_file", target.job),
        ("training_file", "/etc/passwd"),
        ("validation_file", target.chat_file),
        ("deepspeed", {"zero_optimization": {}}),
        ("resume_from_checkpoint", True),
        ("hyperparameters.learning_rate", 0.1 + 1e400),
    ]
    with target.unharmed():
        for field, value in cases:
            if (field, value) == ("validation_file", "file-chat"):
                continue
            body = {"model": "tiny", "training_file": target.file} | placed(field, value)
            answer = target.http.post(JOBS, content=json.dumps(body), headers=JSON)
            assert answer.status_code == 400, (field, value, answer.text)
            assert answer.json()["error"]["param"] == field, (field, value, answer.text)
    assert len(cases) > 250


# `parameters` of /generate, or whole bodies → the field that is named.
NAN, HUGE = float("nan"), 10**400
TEMPERATURES: list[Any] = [-1, 101, NAN, HUGE, float("inf"), "hot", [1], {}]
PATTERNS: list[Any] = ["((", "(?=a)b", {}, "a" * 70_000]
SCHEMAS: list[Any] = ["{", {"type": "strin"}, 5, {"$ref": "file:///etc"}]
SAMPLING: list[tuple[str, Any]] = [
    *[("temperature", value) for value in TEMPERATURES],
    *[("top_p", value) for value in (-0.1, 1.1, NAN, "a")],
    *[("top_k", value) for value in (-2, 2**40, 1.5, "a")],
    *[("repetition_penalty", value) for value in (0, 5e-324, -1, NAN, 1e9)],
    *[("max_new_tokens", value) for value in (0, -1, 2**63, 1.5, "many", NAN)],
    *[("seed", value) for value in (-1, 2**64, 1.5, "x")],
    *[("truncate", value) for value in (0, -1, 2**40)],
    *[("top_n_tokens", value) for value in (-1, 6, 10**9)],
    *[("stop", value) for value in ("a", [1], ["a"] * 257)],
    ("stop.0", ["x" * 2000]),
    ("best_of", 17),
    ("details", "maybe"),
    *[("grammar", {"type": "regex", "value": value}) for value in PATTERNS],
    *[("grammar", {"type": "json", "value": value}) for value in SCHEMAS],
    ("watermark", True),
    *[("typical_p", value) for value in (-0.1, 1.1, NAN, "a")],
    *[("frequency_penalty", value) for value in (-2.1, 2.1, NAN, "a")],
    ("logits_processor", "os.system"),
    ("adapter_source", "s3"),
    ("adapter_id", 5),
    ("api_token", "secret"),
]


def test_sampling_parameters(target: Target) -> None:
    with target.unharmed():
        for field, value in SAMPLING:
            body = {"inputs": "a", "parameters": {"max_new_tokens": 1} | {field.split(".")[0]: value}}
            for path in ("/generate", "/generate_stream", "/"):
                answer = target.http.post(path, content=json.dumps(body), headers=JSON)
                assert answer.status_code == 422, (field, value, answer.text)
                assert f"parameters.{field}" in answer.json()["error"], (field, value, answer.text)
                assert answer.json()["error_type"] == "validation"


PROMPTS: dict[str, tuple[dict[str, Any], str]] = {
    "none": ({}, "exactly one"),
    "two": ({"inputs": "a", "instruction": "b"}, "exactly one"),
    "null": ({"inputs": None}, "exactly one"),
    "number": ({"inputs": 5}, "inputs"),
    "list": ({"inputs": ["a"]}, "inputs"),
    "too long": ({"inputs": "a" * 300_000}, "inputs"),
    "over the context": ({"inputs": "zq " * 3000}, "tokens"),
    "input alone": ({"input": "a"}, "exactly one"),
    "messages empty": ({"messages": []}, "messages"),
    "message of unknown role": ({"messages": [{"role": "root", "content": "a"}]}, "messages.0.role"),
    "message without content": ({"messages": [{"role": "user"}]}, "messages.0.content"),
    "unknown key": ({"inputs": "a", "trust_remote_code": True}, "trust_remote_code"),
    "parameters no object": ({"inputs": "a", "parameters": [1]}, "parameters"),
    "stream no boolean": ({"inputs": "a", "stream": "maybe"}, "stream"),
    "lone surrogate": ({"inputs": "\ud800"}, "inputs"),
    "surrogate in a message": ({"messages": [{"role": "user", "content": "\udfff"}]}, "content"),
    "surrogate in a stop": ({"inputs": "a", "parameters": {"stop": ["\ud800"]}}, "stop"),
    "surrogate in a key": ({"inputs": "a", "\ud800": 1}, ""),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts(target: Target, name: str) -> None:
    body, word = PROMPTS[name]
    with target.unharmed():
        for path in ("/generate", "/generate_stream", "/"):
            answer = target.http.post(path, content=json.dumps(body), headers=JSON)
            assert answer.status_code == 422, answer.text
            assert word in answer.json()["error"]
            assert len(answer.text) < 2000


OPENAI: list[tuple[str, Any, int]] = [
    ("messages", None, 400),
    ("messages", [], 400),
    ("messages", "hi", 400),
    ("messages.0.role", [{"role": "root", "content": "a"}], 400),
    ("messages.0.tool_calls", [{"role": "user", "content": "a", "tool_calls": [{"id": "c"}]}], 400),
    ("continue_final_message", True, 400),
    ("add_generation_prompt", False, 400),
    ("chat_template_kwargs", {"a": [1]}, 400),
    ("chat_template_kwargs", {"a\r\nb": 1}, 400),
    ("reasoning_effort", "some", 400),
    ("messages.0.content.str", [{"role": "user", "content": "\ud800"}], 400),
    ("messages", [{"role": "user", "content": "zq " * 3000}], 400),
    ("model", 5, 400),
    ("model", ["tiny"], 400),
    ("model", "gpt-4o", 404),
    ("model", "../../bases/tiny", 404),
    ("model", "tiny\x00", 404),
    ("model", "\ud800", 400),
    ("model", "x" * 100_000, 400),
    ("temperature", -0.1, 400),
    ("temperature", 2.1, 400),
    ("temperature", NAN, 400),
    ("top_p", -0.1, 400),
    ("repetition_penalty", 5e-324, 400),
    ("max_tokens", 0, 400),
    ("max_tokens", 2**70, 400),
    ("max_completion_tokens", -5, 400),
    ("n", 17, 400),
    ("n", 0, 400),
    ("stop", ["a"] * 257, 400),
    ("seed", 2**70, 400),
    ("tools", [{"type": "function"}], 400),
    ("response_format", {"type": "json_schema"}, 400),
    ("response_format.type", {"type": "xml"}, 400),
    ("response_format", {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "strin"}}}, 400),
    ("logit_bias", {"1": 101}, 400),
    ("logit_bias", {"x": 1}, 400),
    ("logit_bias", {"1": NAN}, 400),
    ("logit_bias", {str(10**6): 1}, 400),
    ("logit_bias", {str(token): 1 for token in range(301)}, 400),
    ("presence_penalty", 2.1, 400),
    ("frequency_penalty", NAN, 400),
    ("min_p", 1.1, 400),
    ("typical_p", "a", 400),
    ("top_logprobs", 21, 400),
    ("stream_options.x", {"x": 1}, 400),
    ("chat_template", "{{ ''.__class__.__mro__ }}", 400),
]


def test_chat_completions(target: Target) -> None:
    with target.unharmed():
        for field, value, status in OPENAI:
            body = {"model": "tiny", "messages": [USER], "max_tokens": 1} | {field.split(".")[0]: value}
            for stream in (False, True):
                sent = json.dumps(body | {"stream": stream})
                answer = target.http.post("/v1/chat/completions", content=sent, headers=JSON)
                assert answer.status_code == status, (field, answer.text)
                error = answer.json()["error"]
                assert (error["param"] or "").startswith(field.split(".")[0]), (field, error)


PROMPT_VALUES: list[Any] = [
    *[None, [], [[]], ["a"] * 65, ["a", [1]], [[1], "a"], [-1], [2**31], [1.5], {}, "zq " * 3000, [10**6]],
    *[["a", "zq " * 3000], [[1], [10**6]], "\ud800"],
]
COMPLETIONS: list[tuple[str, Any]] = [
    *[("prompt", value) for value in PROMPT_VALUES],
    *[("echo", "maybe"), ("suffix", "x"), ("best_of", 17), ("logprobs", 6), ("logprobs", NAN), ("max_tokens", -1)],
]


def test_completions(target: Target) -> None:
    with target.unharmed():
        for field, value in COMPLETIONS:
            body = {"model": "tiny", "prompt": "a", "max_tokens": 1} | {field: value}
            answer = target.http.post("/v1/completions", content=json.dumps(body), headers=JSON)
            assert answer.status_code == 400, (field, value, answer.text)
            assert (answer.json()["error"]["param"] or "").startswith(field), (field, value, answer.text)


def test_adapters_that_cannot_be_served(target: Target) -> None:
    """Published in SQL, but what lies on disk is not what was published: never the base instead."""
    artifacts = target.stack.artifacts
    manifest = read_manifest(artifacts.base("tiny"), "base")
    torn, bare, pickled = (target.adapter(name) for name in ("torn!", "bare!!", "pickled"))
    weights = artifacts.adapter(torn) / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    (artifacts.adapter(bare) / "manifest.json").unlink()
    (artifacts.adapter(pickled) / "adapter_model.safetensors").rename(artifacts.adapter(pickled) / "adapter_model.bin")
    gone = target.adapter("gone", "adapter-" + "0" * 24)
    foreign = "adapter-" + "1" * 24
    with artifacts.staged() as folder:
        for file in artifacts.adapter(target.adapters["good"]).glob("adapter_*"):
            (folder / file.name).write_bytes(file.read_bytes())
        other = manifest.model_copy(update={"base_sha256": "f" * 64})
        publish(artifacts, folder, foreign, other, template="instruction-v1")
    target.adapter("foreign", foreign)
    with target.unharmed():
        for adapter in (torn, bare, pickled, gone, foreign):
            tgi = target.generate({"inputs": "a", "parameters": {"adapter_id": adapter}})
            chat = target.http.post("/v1/chat/completions", json={"model": adapter, "messages": [USER]})
            assert (400 <= tgi.status_code < 500, 400 <= chat.status_code < 500) == (True, True), (tgi.text, chat.text)
            assert chat.json()["error"]["param"] == "model", chat.text


def test_a_deleted_adapter_is_gone(target: Target) -> None:
    deleted = target.adapter("deleted")
    body = {"inputs": "a", "parameters": {"adapter_id": deleted, "max_new_tokens": 1}}
    assert target.generate(body).status_code == 200
    assert target.http.delete(f"/v1/models/{deleted}").is_success
    with target.unharmed():
        assert target.generate(body).status_code == 404


def routes(target: Target) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, item in target.http.get("/openapi.json").json()["paths"].items():
        for method, operation in item.items():
            yield method.upper(), path, operation


HOSTILE_IDS = [
    *("..", "%2e%2e%2f%2e%2e%2fetc%2fpasswd", "..%5c..%5cboot.ini", "a%00b", "%ff", "%0d%0aset-cookie:%20a=b", "~root"),
    *("x" * 5000, "'%20OR%201=1--", "%F0%9F%8E%89", "file-%ED%A0%80", "-", "%20", "a;b", "$(id)", "%25%32%65"),
]


def test_ids_that_are_none_on_every_route(target: Target) -> None:
    with target.unharmed():
        seen = 0
        for method, path, _ in routes(target):
            if "{" not in path:
                continue
            for hostile in HOSTILE_IDS:
                where = path[: path.index("{")] + hostile + path[path.index("}") + 1 :]
                answer = target.http.request(method, where)
                assert answer.status_code in (404, 405, 400), (method, where, answer.text)
                assert "error" in answer.json()
                assert "set-cookie" not in answer.headers
                seen += 1
        assert seen > 150


def test_methods_that_are_none_on_every_route(target: Target) -> None:
    """405 names every method that the path has."""
    with target.unharmed():
        known: dict[str, set[str]] = {}
        for method, path, _ in routes(target):
            known.setdefault(path, set()).add(method)
        for path, methods in known.items():
            for method in {"GET", "POST", "PUT", "PATCH", "DELETE", "TRACE", "PURGE"} - methods:
                answer = target.http.request(method, path.replace("{", "").replace("}", ""))
                assert answer.status_code == 405, (method, path)
                assert {word.strip() for word in answer.headers["allow"].split(",")} - {"HEAD"} == methods, path


def test_bodies_that_are_none_on_every_route(target: Target) -> None:
    with target.unharmed():
        for method, path, operation in routes(target):
            if "requestBody" not in operation or path == "/v1/files":
                continue
            for content in (b"", b"{", b"[]", b"null", b"\xff", b'"a"', b"[" * 50_000, b'{"a":' * 50_000, b"{} {}"):
                answer = target.http.request(method, path, content=content, headers=JSON)
                assert answer.status_code in (400, 422), (path, content[:20], answer.text)
            packed = JSON | {"content-encoding": "gzip"}
            assert target.http.request(method, path, content=gzip.compress(b"{}"), headers=packed).status_code == 415
            assert target.http.request(method, path, content=b" " * (5 << 20), headers=JSON).status_code == 413


AUTH = b"Authorization: Bearer %(key)s\r\n"
HEAD = b"POST /generate HTTP/1.1\r\nHost: a\r\n" + AUTH
BODY = b'{"inputs": "a", "parameters": {"max_new_tokens": 1}}'
RAW: dict[str, bytes] = {
    "no protocol": b"GET /\r\n\r\n",
    "garbage": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "another version": b"GET /v1/models HTTP/9.9\r\nHost: a\r\n\r\n",
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "no host": b"GET /v1/models HTTP/1.1\r\n\r\n",
    "two hosts": b"GET /v1/models HTTP/1.1\r\nHost: a\r\nHost: b\r\n" + AUTH + b"\r\n",
    "two lengths": HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n{}   ",
    "negative length": HEAD + b"Content-Length: -1\r\n\r\n",
    "length no number": HEAD + b"Content-Length: 0x10\r\n\r\n",
    "length and chunks": HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunk size no number": HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    "negative chunk size": HEAD + b"Transfer-Encoding: chunked\r\n\r\n-5\r\n{}\r\n0\r\n\r\n",
    "huge chunk size": HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 40 + b"\r\n{}\r\n",
    "unknown transfer coding": HEAD + b"Transfer-Encoding: gzip\r\n\r\n{}",
    "chunked twice": HEAD + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "huge header": b"GET /v1/models HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 200_000 + b"\r\n\r\n",
    "endless headers": b"GET /v1/models HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * 40_000 + b"\r\n",
    "huge target": b"GET /v1/files/" + b"x" * 200_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
    "space in the name of a header": b"GET /v1/models HTTP/1.1\r\nHost: a\r\nX Y: z\r\n" + AUTH + b"\r\n",
    "folded header": b"GET /v1/models HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer\r\n %(key)sx\r\n\r\n",
    "NUL in a header": b"GET /v1/models HTTP/1.1\r\nHost: a\r\nX: a\x00b\r\n" + AUTH + b"\r\n",
    "bare line feeds": b"GET /v1/models HTTP/1.1\nHost: a\nAuthorization: Bearer x\n\n",
    "two keys": b"GET /v1/models HTTP/1.1\r\nHost: a\r\n" + AUTH + AUTH + b"\r\n",
    "key in another scheme": b"GET /v1/models HTTP/1.1\r\nHost: a\r\nAuthorization: Basic %(key)s\r\n\r\n",
    "key in the query": b"GET /v1/models?api_key=%(key)s HTTP/1.1\r\nHost: a\r\n\r\n",
    "method of any name": b"%(key)s /v1/models HTTP/1.1\r\nHost: a\r\n" + AUTH + b"\r\n",
    "CONNECT": b"CONNECT 127.0.0.1:22 HTTP/1.1\r\nHost: a\r\n" + AUTH + b"\r\n",
    "asterisk": b"GET * HTTP/1.1\r\nHost: a\r\n" + AUTH + b"\r\n",
    "absolute target elsewhere": b"GET http://169.254.169.254/latest HTTP/1.1\r\nHost: a\r\n" + AUTH + b"\r\n",
    "form for JSON": HEAD + b"Content-Type: application/x-www-form-urlencoded\r\nContent-Length: 8\r\n\r\ninputs=a",
    "unknown charset": HEAD + b"Content-Type: application/json; charset=x\r\nContent-Length: 2\r\n\r\n\xff\xfe",
    "unknown content coding": HEAD + b"Content-Encoding: br\r\nContent-Length: 52\r\n\r\n" + BODY,
}


@pytest.mark.parametrize("name", RAW)
def test_http(target: Target, name: str) -> None:
    """Bytes that no client library would send: a 4xx, or the connection is closed without a word."""
    host, port = target.stack.url.removeprefix("http://").split(":")
    with target.unharmed(), socket.create_connection((host, int(port)), timeout=120) as connection:
        connection.settimeout(120)
        try:
            connection.sendall(RAW[name].replace(b"%(key)s", target.stack.key.encode()))
            connection.shutdown(socket.SHUT_WR)
            answer = connection.recv(65_536)
        except OSError as error:
            if isinstance(error, TimeoutError):
                raise
            # Closed or reset by the server.
            answer = b""
    assert not answer or answer.split(b" ")[1][:1] == b"4", answer[:200]
    assert target.stack.key.encode() not in answer


def test_a_reset_in_mid_upload_leaves_nothing(target: Target) -> None:
    host, port = target.stack.url.removeprefix("http://").split(":")
    head = b"POST /v1/files HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer %b\r\nContent-Length: 9000000\r\n"
    head += b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
    head += b'Content-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
    with target.unharmed():
        for _ in range(20):
            connection = socket.create_connection((host, int(port)))
            # A reset, not an orderly end.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
            connection.sendall(head % target.stack.key.encode() + GOOD)
            connection.close()
        # On a connection of its own, which is accepted after all of those.
        assert httpx.get(f"{target.stack.url}/health/live", trust_env=False).status_code == 200


def test_inference_itself_refuses_too(target: Target) -> None:
    """The private door: hostile ids and bodies get no further with the token than without."""
    bearer = {"authorization": f"Bearer {TOKEN}"}
    with target.unharmed(), httpx.Client(base_url=target.stack.inference_url, headers=bearer, trust_env=False) as inner:
        for hostile in HOSTILE_IDS:
            for method, path in (("PUT", ""), ("DELETE", ""), ("PUT", "/pin"), ("DELETE", "/pin")):
                answer = inner.request(method, f"/adapters/{hostile}{path}")
                unloads = method == "DELETE" and answer.status_code == 200 and answer.json().get("unloaded") is False
                assert 400 <= answer.status_code < 500 or unloads, (method, hostile, answer.text)
        for path in ("/generate", "/v1/chat/completions", "/v1/completions"):
            for content in (b"", b"{", b"[" * 50_000, b'{"inputs": "\\ud800"}', b'{"prompt": "\\ud800", "model": ""}'):
                answer = inner.post(path, content=content, headers=JSON)
                assert 400 <= answer.status_code < 500, (path, content[:20], answer.text)


def test_what_was_refused_costs_no_memory(target: Target) -> None:
    """Last: all of the above have been sent to these processes."""
    for pid, before in target.memory.items():
        assert psutil.Process(pid).memory_info().rss - before < MEMORY_BYTES
    assert target.answers() == target.good
    logs = target.stack.processes.tails(1 << 24)
    assert "Traceback" not in logs
    assert target.stack.key not in logs
