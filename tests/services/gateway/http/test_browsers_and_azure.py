"""Pages in browsers, and clients made for Azure: who gets in, and by which paths."""

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from openai import AzureOpenAI, NotFoundError
from pydantic import ValidationError

from services.gateway.settings import GatewaySettings
from shared.inference_api.ignored import IGNORED_PARAMETERS
from tests.services.gateway.conftest import ROWS, Gateway, as_jsonl, running_gateway
from tests.services.gateway.inference_stand_in import StandIn, standing_in

BASE = "smollm2-135m-instruct"
Settings = Callable[..., GatewaySettings]
PAGE = "http://localhost:5173"
MESSAGES: list[Any] = [{"role": "user", "content": "a"}]


@pytest.fixture
def inference() -> Iterator[StandIn]:
    with standing_in(BASE) as stand_in:
        yield stand_in


@pytest.fixture
def gateway(settings: Settings, inference: StandIn) -> Iterator[Gateway]:
    origins = f"{PAGE}, https://chat.example/"
    with running_gateway(settings(inference_urls=(inference.url,), cors_origins=origins)) as running:
        yield running


def preflight(http: httpx.Client, path: str, origin: str = PAGE) -> httpx.Response:
    asks = {"origin": origin, "access-control-request-method": "POST"}
    return http.options(path, headers=asks | {"access-control-request-headers": "authorization,content-type"})


def test_a_page_of_a_listed_origin_may_call(gateway: Gateway) -> None:
    with httpx.Client(base_url=gateway.url) as browser:
        for path in ("/v1/chat/completions", "/v1/models", "/v1/files", "/generate", "/v1/fine_tuning/jobs/x/events"):
            # A browser asks without the key.
            allowed = preflight(browser, path)
            assert allowed.status_code == 200, allowed.text
            assert allowed.headers["access-control-allow-origin"] == PAGE
            assert "authorization" in allowed.headers["access-control-allow-headers"].lower()
            assert "DELETE" in allowed.headers["access-control-allow-methods"]
            assert "access-control-allow-credentials" not in allowed.headers
            assert preflight(browser, path, "https://evil.example").status_code == 400
        refused = browser.get("/v1/models", headers={"origin": PAGE})
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, PAGE)
    answer = gateway.http.post(
        "/v1/chat/completions",
        json={"model": BASE, "messages": MESSAGES, "store": True},
        headers={"origin": "https://chat.example"},
    )
    assert answer.is_success
    assert answer.headers["access-control-allow-origin"] == "https://chat.example"
    # What a script may read of the answer.
    assert answer.headers["access-control-expose-headers"] == "*"
    assert answer.headers[IGNORED_PARAMETERS] == "store"
    other = gateway.http.get("/v1/models", headers={"origin": "https://evil.example"})
    assert "access-control-allow-origin" not in other.headers


def test_without_the_setting_no_page_may_call(settings: Settings) -> None:
    with running_gateway(settings()) as gateway:
        answer = preflight(gateway.http, "/v1/models")
        assert answer.status_code == 405
        answer = gateway.http.get("/v1/models", headers={"origin": PAGE})
        assert answer.is_success
        assert not any(name.startswith("access-control") for name in answer.headers)


def test_every_page_may_call_if_that_is_what_is_set(settings: Settings) -> None:
    with running_gateway(settings(cors_origins="*")) as gateway:
        answer = gateway.http.get("/v1/models", headers={"origin": "https://anybody.example"})
        assert answer.headers["access-control-allow-origin"] == "*"
        assert "access-control-allow-credentials" not in answer.headers


@pytest.mark.parametrize(
    "origins", ["localhost:5173", "https://a.example/path", "https://*.example", "https://a.example,x"]
)
def test_what_is_no_origin_is_refused_at_start(origins: str) -> None:
    with pytest.raises(ValidationError, match="no origin"):
        GatewaySettings.model_validate({"cors_origins": origins})


@pytest.mark.parametrize("deployment", [None, BASE])
def test_azures_client(gateway: Gateway, inference: StandIn, deployment: str | None) -> None:
    """Unmodified: its own paths, its own header for the key."""
    given: dict[str, Any] = {"azure_deployment": deployment} if deployment else {}
    client = AzureOpenAI(
        azure_endpoint=gateway.url, api_version="2024-10-21", api_key=gateway.key, max_retries=0, **given
    )
    # With a deployment in the client it counts, whatever `model` says.
    model = "gpt-4o" if deployment else BASE
    answer = client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=3)
    assert answer.model == BASE
    assert inference.sent[-1][0] == "POST /v1/chat/completions"
    assert inference.sent[-1][1]["model"] == BASE
    made = client.files.create(file=("d.jsonl", as_jsonl(ROWS)), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model=BASE, training_file=made.id)
    assert client.fine_tuning.jobs.retrieve(job.id).id == job.id
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    assert BASE in [model.id for model in client.models.list()]
    assert client.files.delete(made.id).deleted


def test_azures_paths_by_hand(gateway: Gateway, inference: StandIn) -> None:
    with httpx.Client(base_url=gateway.url, headers={"api-key": gateway.key}) as http:
        body = {"messages": MESSAGES}
        for model, path in (
            (BASE, f"/openai/deployments/{BASE}/chat/completions?api-version=2024-06-01"),
            (
                "HuggingFaceTB/SmolLM2-135M-Instruct",
                "/openai/deployments/HuggingFaceTB/SmolLM2-135M-Instruct/chat/completions",
            ),
            (
                "HuggingFaceTB/SmolLM2-135M-Instruct",
                "/openai/deployments/HuggingFaceTB%2FSmolLM2-135M-Instruct/chat/completions",
            ),
        ):
            assert http.post(path, json=body).json()["model"] == model
        assert http.post("/openai/v1/chat/completions", json=body | {"model": BASE}).is_success
        assert http.get("/openai/models?api-version=1").json()["object"] == "list"
        assert http.get("/openai/v1/models").json()["object"] == "list"
        unknown = http.post("/openai/deployments/gpt-4o/chat/completions", json=body)
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
        unbuilt = http.post(f"/openai/deployments/{BASE}/embeddings", json={"input": "a"})
        assert (unbuilt.status_code, "embeddings are not built" in unbuilt.text) == (404, True)
        assert http.get("/openai/").status_code == http.get("/openai").status_code == 404


def test_one_key_by_one_header(gateway: Gateway) -> None:
    with httpx.Client(base_url=gateway.url) as http:
        assert http.get("/v1/models", headers={"api-key": gateway.key}).is_success
        for wrong in (
            {"api-key": "ts-wrong"},
            {"api-key": ""},
            {"api-key": gateway.key, "authorization": "Bearer ts-wrong"},
            {"api-key": gateway.key, "authorization": ""},
        ):
            assert http.get("/v1/models", headers=wrong).status_code == 401
        twice = [("api-key", gateway.key), ("api-key", gateway.key)]
        assert http.get("/v1/models", headers=twice).status_code == 401
        for path in ("/openai/models", f"/openai/deployments/{BASE}/chat/completions"):
            assert http.request("POST" if "chat" in path else "GET", path, json={}).status_code == 401


def test_a_file_that_is_to_expire_is_refused_by_name(gateway: Gateway) -> None:
    import openai

    expiry: Any = {"anchor": "created_at", "seconds": 3600}
    with pytest.raises(openai.BadRequestError, match="do not expire") as refused:
        gateway.openai().files.create(file=("d.jsonl", as_jsonl(ROWS)), purpose="fine-tune", expires_after=expiry)
    assert refused.value.param == "expires_after"


UNBUILT = [
    ("POST", "/chat/completions", "/v1"),
    ("POST", "/completions", "/v1"),
    ("GET", "/models", "/v1"),
    ("GET", "/models/x", "/v1"),
    ("POST", "/files", "/v1"),
    ("GET", "/fine_tuning/jobs", "/v1"),
    ("POST", "/responses", "/v1"),
    ("POST", "/v1/v1/chat/completions", "twice"),
    ("POST", "/v1/responses/resp_1/cancel", "/v1/responses"),
    ("POST", "/v1/messages", "/v1/chat/completions"),
    ("POST", "/v1/embeddings", "embedding"),
    ("POST", "/v1/moderations", "moderation"),
    ("POST", "/v1/images/generations", "text"),
    ("POST", "/v1/audio/transcriptions", "text"),
    ("POST", "/v1/batches", "batches"),
    ("POST", "/v1/assistants", "/v1/chat/completions"),
    ("POST", "/api/chat", "Ollama"),
    ("POST", "/completion", "/v1/completions"),
    ("POST", "/tokenize", "token ids"),
]


@pytest.mark.parametrize(("method", "path", "words"), UNBUILT)
def test_what_is_not_here_says_what_to_use_instead(gateway: Gateway, method: str, path: str, words: str) -> None:
    answer = gateway.http.request(method, path, json={})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["type"]) == (404, "not_found", "invalid_request_error")
    assert words in error["message"]


def test_openais_client_shows_what_a_forgotten_v1_means(gateway: Gateway) -> None:
    from openai import OpenAI

    client = OpenAI(base_url=gateway.url, api_key=gateway.key, max_retries=0)
    with pytest.raises(NotFoundError, match="base URL with /v1"):
        client.chat.completions.create(model=BASE, messages=MESSAGES)


def test_only_text_generation_inferences_own_paths_have_its_errors(gateway: Gateway) -> None:
    for path in ("/generate", "/generate_stream", "/"):
        assert set(gateway.http.post(path, json={}).json()) == {"error", "error_type"}
    for path in ("/nothing", "/v1", "/docs/x", "/chat/completions"):
        assert set(gateway.http.post(path, json={}).json()["error"]) == {"message", "type", "param", "code"}


def test_head_is_answered_wherever_get_is(gateway: Gateway) -> None:
    file = gateway.uploaded(ROWS)
    job = gateway.http.post("/v1/fine_tuning/jobs", json={"model": BASE, "training_file": file}).json()["id"]
    tried = 0
    for path, item in gateway.http.get("/openapi.json").json()["paths"].items():
        if "get" not in item:
            continue
        for key, value in {"file_id": file, "job_id": job, "model_id": BASE}.items():
            path = path.replace("{" + key + "}", value)
        whole, head = gateway.http.get(path), gateway.http.head(path)
        assert (head.status_code, head.content) == (whole.status_code, b""), path
        assert head.headers["content-type"] == whole.headers["content-type"], path
        tried += 1
    assert tried > 12
    with httpx.Client(base_url=gateway.url) as http:
        assert http.head("/health/live").status_code == 200
        assert http.head("/v1/models").status_code == 401
    # A stream of events, which would go on until the job ends.
    events = gateway.http.head(f"/v1/fine_tuning/jobs/{job}/events", headers={"accept": "text/event-stream"})
    assert (events.status_code, events.headers["x-accel-buffering"]) == (200, "no")


def test_no_proxy_holds_a_stream_back(gateway: Gateway) -> None:
    file = gateway.uploaded(ROWS)
    job = gateway.http.post("/v1/fine_tuning/jobs", json={"model": BASE, "training_file": file}).json()["id"]
    path = f"/v1/fine_tuning/jobs/{job}/events"
    with gateway.http.stream("GET", path, headers={"accept": "text/event-stream"}) as events:
        assert events.headers["content-type"].startswith("text/event-stream")
        assert events.headers["x-accel-buffering"] == "no"
        assert next(events.iter_lines()).startswith("id:")
