"""Generation through the gateway: names, routing, and what is passed on untouched. Inference is a stand-in."""

import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import insert

from services.gateway.http.keys import Keys, read_or_make_secret
from services.gateway.inference.project_tags import ProjectTags
from services.gateway.settings import GatewaySettings
from shared.inference_api.headers import MODEL_NAME, PROJECT_TAG, PROJECT_TAG_PATTERN
from shared.jobs.spec import TrainingReport
from shared.storage.manifests import Manifest
from shared.storage.tables import api_keys
from tests.services.gateway.conftest import ROWS, Gateway, eventually, running_gateway
from tests.services.gateway.inference_stand_in import StandIn, standing_in
from tests.services.gateway.test_openai_client import REPORT

BASE = "smollm2-135m-instruct"
OTHER_BASE = "tinyllama-1.1b-chat"
Settings = Callable[..., GatewaySettings]
MESSAGES = [{"role": "user", "content": "a"}]
OTHER_KEY = "ts-" + "o" * 40
NO_NAMES: list[Any] = [5, True, ["x"], {"id": "x"}, 1.5, "\ud800", "x" * 257]


@pytest.fixture
def inference() -> Iterator[StandIn]:
    with standing_in(BASE, token="between-us") as stand_in:
        yield stand_in


@pytest.fixture
def gateway(settings: Settings, inference: StandIn) -> Iterator[Gateway]:
    with running_gateway(settings(inference_urls=(inference.url,), internal_token="between-us")) as running:
        yield running


def trained(gateway: Gateway, report: TrainingReport = REPORT) -> tuple[str, str, str]:
    """(final name, checkpoint name, final adapter id) of a job that has succeeded."""
    body = {"model": BASE, "training_file": gateway.uploaded(ROWS)}
    job = gateway.http.post("/v1/fine_tuning/jobs", json=body).json()["id"]
    leases = gateway.leases
    lease = leases.claim("worker-1")
    assert lease is not None
    leases.commit_checkpoint(lease, 8, leases.reserve_adapter(lease), {})
    final = leases.reserve_adapter(lease)
    leases.succeed(lease, final, report)
    name = gateway.http.get(f"/v1/fine_tuning/jobs/{job}").json()["fine_tuned_model"]
    return name, f"{name}:ckpt-step-8", final


def base_manifest(base: str) -> Manifest:
    return Manifest(kind="base", id=f"base-{base}", base=base, base_revision="r", base_sha256="0" * 64, files={})


@pytest.mark.parametrize("path", ["/generate", "/"])
def test_a_body_without_a_model_goes_on_as_it_came(gateway: Gateway, inference: StandIn, path: str) -> None:
    parameters = {"adapter_id": None, "seed": 2**62, "temperature": 0.1, "stop": ["\u2028"], "watermark": False}
    body = {"inputs": "2 + 2 = \x00\U0001f389", "parameters": parameters}
    headers = {"x-request-id": "req-mine", "cookie": "private=1", "content-type": "application/json"}
    answer = gateway.http.post(path, content=json.dumps(body), headers=headers)
    assert answer.status_code == 200
    assert answer.json() == ([{"generated_text": "4"}] if path == "/" else {"generated_text": "4"})
    [(where, sent, passed)] = inference.sent
    assert (where, sent) == (f"POST {path}", body)
    # The client's own key and cookies end here; the request id goes through, and comes back once.
    assert passed["authorization"] == "Bearer between-us"
    assert "cookie" not in passed
    assert passed["x-request-id"] == answer.headers["x-request-id"] == "req-mine"
    assert answer.headers["x-generated-tokens"] == "2"


def test_every_name_of_a_model_becomes_its_id(gateway: Gateway, inference: StandIn) -> None:
    final, checkpoint, adapter = trained(gateway)
    for name in (final, checkpoint, adapter, BASE, "HuggingFaceTB/SmolLM2-135M-Instruct"):
        body: dict[str, Any] = {"inputs": "a", "parameters": {"adapter_id": name, "top_k": 3}}
        assert gateway.http.post("/generate", json=body).status_code == 200
        chat = {"model": name, "messages": [{"role": "user", "content": "a"}]}
        assert gateway.http.post("/v1/chat/completions", json=chat).json()["model"] == name
    ids = [sent["parameters"]["adapter_id"] if "parameters" in sent else sent["model"] for _, sent, _ in inference.sent]
    at_step = gateway.http.get(f"/v1/models/{checkpoint}").json()["adapter"]
    assert ids[::2] == [adapter, at_step, adapter, None, None]
    assert ids[1::2] == [adapter, at_step, adapter, BASE, BASE]
    assert inference.sent[0][1]["parameters"]["top_k"] == 3


@pytest.mark.parametrize("name", ["ft:nobody", "adapter-000000000000000000000000", "../../x", "a\x00b", "ü", "x" * 256])
def test_an_unknown_model_is_404_and_never_the_base(gateway: Gateway, inference: StandIn, name: str) -> None:
    tgi = gateway.http.post("/generate", json={"inputs": "a", "parameters": {"adapter_id": name}})
    assert tgi.status_code == 404
    assert tgi.json()["error_type"] == "validation"
    openai = gateway.http.post("/v1/chat/completions", json={"model": name, "messages": MESSAGES})
    assert openai.status_code == 404
    assert openai.json()["error"]["code"] == "model_not_found"
    assert openai.json()["error"]["param"] == "model"
    assert inference.sent == []


@pytest.mark.parametrize("name", ["", "dummy", "tgi"])
def test_what_clients_send_for_no_model_in_particular_is_the_default(
    gateway: Gateway, inference: StandIn, name: str
) -> None:
    """huggingface_hub's chat completions say `dummy`; in `adapter_id` such a word is a name like any other."""
    body = {"model": name, "messages": [{"role": "user", "content": "a"}]}
    assert gateway.http.post("/v1/chat/completions", json=body).is_success
    [(_, sent, passed)] = inference.sent
    assert (sent["model"], passed.get("x-model-name")) == ("", None)
    answer = gateway.http.post("/generate", json={"inputs": "a", "parameters": {"adapter_id": name or None}})
    assert answer.status_code == (404 if name else 200)


BAD_BODIES: list[tuple[str, dict[str, Any], str]] = [
    *[("/generate", {"inputs": "a", "parameters": {"adapter_id": n}}, "parameters.adapter_id") for n in NO_NAMES],
    *[("/v1/completions", {"prompt": "a", "model": name}, "model") for name in NO_NAMES],
    ("/generate", {"inputs": "a", "surprise": 1}, "surprise"),
    ("/", {"inputs": "a", "parameters": {"top_k": -2}}, "parameters.top_k"),
    ("/generate_stream", {"messages": []}, "messages"),
    ("/generate_stream", {"inputs": "\ud800"}, "inputs"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "tools": [{}]}, "tools.0.type"),
    ("/v1/completions", {}, "prompt"),
]


@pytest.mark.parametrize(("path", "body", "field"), BAD_BODIES)
def test_bad_bodies_are_refused_here_with_the_field_named(
    gateway: Gateway, inference: StandIn, path: str, body: dict[str, Any], field: str
) -> None:
    """Taken out instead, the base would answer as if nothing had been asked for."""
    answer = gateway.http.post(path, content=json.dumps(body))
    assert answer.status_code == (400 if path.startswith("/v1") else 422)
    if path.startswith("/v1"):
        assert answer.json()["error"]["param"] == field
    else:
        assert answer.json()["error_type"] == "validation"
        assert field in answer.json()["error"]
    assert inference.sent == []


def test_inference_learns_of_the_project_by_an_opaque_tag_that_no_client_can_set(
    gateway: Gateway, inference: StandIn
) -> None:
    keys = Keys(gateway.services.database, read_or_make_secret(gateway.settings.key_secret_path))
    row = {"id": "key-other", "project": "other", "digest": keys._digest(OTHER_KEY), "created_at": 0}
    with gateway.services.database.write() as connection:
        connection.execute(insert(api_keys).values(row))
    for key in (gateway.key, OTHER_KEY):
        for path in ("/generate", "/generate_stream", "/", "/v1/chat/completions", "/v1/completions"):
            headers = {"authorization": f"Bearer {key}", PROJECT_TAG: "of-somebody-else", MODEL_NAME: "mine"}
            body = {"messages": MESSAGES} if path != "/v1/completions" else {"prompt": "a"}
            assert gateway.http.post(path, json=body, headers=headers).is_success
    tags = [headers[PROJECT_TAG] for _, _, headers in inference.sent]
    assert len(set(tags[:5])) == len(set(tags[5:])) == 1
    assert tags[0] != tags[5]
    for tag in tags:
        assert re.fullmatch(PROJECT_TAG_PATTERN, tag)
        assert not {"default", "other", "of-somebody-else"} & {tag}
    assert not any(MODEL_NAME in headers for _, _, headers in inference.sent)
    assert ProjectTags(b"another installation").tag("default") != tags[0]


@pytest.mark.parametrize("kind", [None, "application/x-www-form-urlencoded", "text/plain"])
def test_a_body_is_json_whatever_its_client_calls_it(gateway: Gateway, kind: str | None) -> None:
    """`curl -d` without a header calls it a form."""
    headers = {"content-type": kind} if kind else {}
    assert gateway.http.post("/generate", content=b'{"inputs": "a"}', headers=headers).is_success


def test_a_deleted_model_is_gone_everywhere(gateway: Gateway, inference: StandIn) -> None:
    final, checkpoint, adapter = trained(gateway)
    folder = gateway.services.artifacts.adapter(adapter)
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    client = gateway.openai()
    assert {model.id for model in client.models.list()} == {BASE, OTHER_BASE, final, checkpoint}
    assert client.models.retrieve(final).owned_by == "default"
    deleted = client.models.delete(final)
    assert (deleted.deleted, (deleted.model_extra or {})["freed_bytes"]) == (True, len(b"weights"))
    assert not folder.exists()
    assert [where for where, _, _ in inference.sent] == [f"DELETE /adapters/{adapter}"]
    for name in (final, adapter):
        assert gateway.http.get(f"/v1/models/{name}").status_code == 404
        assert gateway.http.delete(f"/v1/models/{name}").status_code == 404
        assert gateway.http.post("/generate", json={"inputs": "a", "parameters": {"adapter_id": name}}).is_client_error
    assert gateway.http.post("/generate", json={"inputs": "a", "parameters": {"adapter_id": checkpoint}}).is_success


def test_bases_say_whether_they_are_served_and_prepared_and_cannot_be_deleted(gateway: Gateway) -> None:
    def states() -> dict[str, tuple[str, bool]]:
        listed = gateway.http.get("/v1/models").json()["data"]
        return {model["id"]: (model["state"], model["prepared"]) for model in listed}

    assert states() == {BASE: ("served", False), OTHER_BASE: ("not_served", False)}
    artifacts = gateway.services.artifacts
    with artifacts.staged() as staged:
        artifacts.publish(staged, artifacts.base(OTHER_BASE), base_manifest(OTHER_BASE))
    assert states() == {BASE: ("served", False), OTHER_BASE: ("not_served", True)}
    (artifacts.base(OTHER_BASE) / "manifest.json").write_text("half")
    assert states()[OTHER_BASE] == ("not_served", False)
    by_alias = gateway.http.get("/v1/models/HuggingFaceTB%2FSmolLM2-135M-Instruct").json()
    assert (by_alias["id"], by_alias["kind"], by_alias["prepared"]) == (BASE, "base", False)
    final, _, _ = trained(gateway)
    assert gateway.http.get(f"/v1/models/{final}").json()["prepared"] is None
    assert gateway.http.delete(f"/v1/models/{BASE}").json()["error"]["code"] == "base_model"


def test_a_base_nobody_serves_is_503_and_says_what_is_served(gateway: Gateway) -> None:
    answer = gateway.http.post("/v1/completions", json={"model": OTHER_BASE, "prompt": "a"})
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "base_not_served"
    assert BASE in answer.json()["error"]["message"]
    assert gateway.http.get("/info", params={"model": OTHER_BASE}).status_code == 503
    assert gateway.http.get("/info").json()["base"] == BASE


def test_refusals_of_inference_pass_with_their_headers(gateway: Gateway, inference: StandIn) -> None:
    inference.status = 429
    answer = gateway.http.post("/v1/chat/completions", json={"model": BASE, "messages": MESSAGES})
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "7")
    assert answer.json()["error"]["message"] == "full"


def test_a_wrong_internal_token_is_not_the_clients_fault(settings: Settings, inference: StandIn) -> None:
    with running_gateway(settings(inference_urls=(inference.url,), internal_token="wrong")) as gateway:
        assert gateway.http.post("/generate", json={"inputs": "a"}).status_code == 503


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'"a"', b"\xff\xfe", b"[" * 100_000, b'{"a":' * 50_000])
def test_what_is_no_json_object_is_refused_here(gateway: Gateway, inference: StandIn, body: bytes) -> None:
    for path in ("/generate", "/generate_stream", "/", "/v1/chat/completions", "/v1/completions"):
        answer = gateway.http.post(path, content=body, headers={"content-type": "application/json"})
        assert answer.status_code == (400 if path.startswith("/v1") else 422), answer.text
        assert "detail" not in answer.json()
    assert inference.sent == []
    assert gateway.http.post("/generate", json={"inputs": "a"}).is_success


def test_a_stream_arrives_piece_by_piece(gateway: Gateway, inference: StandIn) -> None:
    inference.unfinished = True
    with gateway.http.stream("POST", "/generate_stream", json={"inputs": "a"}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = answer.iter_lines()
        # The second piece does not exist yet: nothing was held back.
        assert json.loads(next(lines).removeprefix("data: ")) == {"token": {"text": "first"}}
        inference.unfinished = False
        assert [json.loads(line.removeprefix("data: ")) for line in lines if line] == [{"token": {"text": "last"}}]


def test_when_the_client_goes_the_stream_behind_it_is_closed(gateway: Gateway, inference: StandIn) -> None:
    inference.unfinished = True
    with gateway.http.stream("POST", "/generate_stream", json={"inputs": "a"}) as answer:
        next(answer.iter_lines())
    eventually(lambda: inference.closed == ["/generate_stream"])


def test_a_client_that_does_not_read_fills_no_memory_and_holds_nobody_up(gateway: Gateway, inference: StandIn) -> None:
    """What the sockets between the two take is all that inference can say; it waits, and others are served."""
    inference.flooding = True
    with gateway.http.stream("POST", "/generate_stream", json={"inputs": "a"}) as answer:
        chunks = answer.iter_raw()
        next(chunks)
        taken = -1
        while taken != inference.flooded:
            taken = inference.flooded
            time.sleep(1)
        assert 0 < taken * (64 << 10) < 64 << 20
        assert gateway.http.post("/generate", json={"inputs": "a"}).is_success
        assert inference.closed == []
    # It leaves without having read a word of the rest.
    eventually(lambda: inference.closed == ["/generate_stream"])


def test_when_the_client_goes_before_the_answer_inference_learns_it(gateway: Gateway, inference: StandIn) -> None:
    inference.slow = True
    body = json.dumps({"inputs": "a"}).encode()
    head = f"POST /generate HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {gateway.key}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", int(gateway.url.rsplit(":", 1)[1]))) as leaving:
        leaving.sendall(head.encode() + body)
        eventually(lambda: inference.started == ["/generate"])
    eventually(lambda: inference.closed == ["/generate"])
    inference.slow = False
    assert gateway.http.post("/generate", json={"inputs": "a"}).is_success


@pytest.mark.parametrize(("path", "shape"), [("/generate_stream", "error_type"), ("/v1/chat/completions", "error")])
def test_a_stream_that_breaks_says_so(gateway: Gateway, inference: StandIn, path: str, shape: str) -> None:
    inference.broken = True
    answer = gateway.http.post(path, json={"messages": MESSAGES, "stream": True})
    last = json.loads(answer.text.strip().splitlines()[-1].removeprefix("data: "))
    assert shape in last


def test_adapters_keep_to_one_process_and_bases_use_all(settings: Settings) -> None:
    with standing_in(BASE) as first, standing_in(BASE) as second:
        urls = (first.url, second.url)
        with running_gateway(settings(inference_urls=urls)) as gateway:
            names = [trained(gateway)[2] for _ in range(8)]

            def ask() -> None:
                for name in names * 2:
                    answer = gateway.http.post("/generate", json={"inputs": "a", "parameters": {"adapter_id": name}})
                    assert answer.is_success, answer.text

            ask()
            seen = [{sent["parameters"]["adapter_id"] for _, sent, _ in one.sent} for one in (first, second)]
            assert not seen[0] & seen[1]
            assert seen[0] | seen[1] == set(names)
            for _ in range(20):
                assert gateway.http.post("/generate", json={"inputs": "base"}).is_success
            assert all(any(sent["inputs"] == "base" for _, sent, _ in one.sent) for one in (first, second))


def test_a_process_that_is_away_is_passed_over(settings: Settings) -> None:
    with (
        standing_in(BASE) as alive,
        standing_in(BASE) as dying,
        running_gateway(settings(inference_urls=(alive.url, dying.url))) as gateway,
    ):
        assert gateway.http.post("/generate", json={"inputs": "a"}).is_success
        replicas = gateway.services.replicas.all
        assert all(replica.base for replica in replicas)
        # As if it had died a moment ago: it is believed to serve, and nobody listens.
        replicas[1].url = "http://127.0.0.1:9"
        for _ in range(10):
            assert gateway.http.post("/generate", json={"inputs": "a"}).is_success


def test_without_inference_jobs_go_on_and_generation_says_what_is_missing(settings: Settings) -> None:
    with running_gateway(settings(inference_urls="http://127.0.0.1:9, http://127.0.0.1:10/")) as gateway:
        answer = gateway.http.post("/v1/chat/completions", json={"messages": MESSAGES})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "base_not_served")
        assert gateway.http.get("/health/ready").json()["inference"] == {BASE: False, OTHER_BASE: False}
        assert gateway.upload(ROWS).is_success
