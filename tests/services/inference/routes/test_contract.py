"""Every answer has exactly the shape that `shared.inference_api` says, and the gateway's headers are understood."""

import json
from importlib.metadata import version
from typing import Any

import pytest
from pydantic import BaseModel

from services.inference.generation import PromptRequest
from shared.inference_api.administration import (
    InfoJson,
    ResidentAdapterJson,
    ResidentAdapterListJson,
    ServedModelListJson,
    UnloadedJson,
    adapter_path,
)
from shared.inference_api.headers import MODEL_NAME, PROJECT_TAG
from shared.inference_api.openai import ChatCompletionChunkJson, ChatCompletionJson, CompletionJson
from shared.inference_api.tgi import GenerateJson, GenerateListJson, TokenEventJson
from tests.services.inference.routes.test_http import events_of
from tests.services.inference.server import Server

MESSAGES = [{"role": "user", "content": "hello"}]
TGI: list[dict[str, Any]] = [
    {},
    {"details": True},
    {"details": True, "top_n_tokens": 2, "do_sample": True, "seed": 3, "return_full_text": True},
]
OPENAI: list[dict[str, Any]] = [{}, {"temperature": 0, "stream_options": {"include_usage": True}}]


def has_shape(model: type[BaseModel], content: Any) -> None:
    """The model knows every key, and misses none."""
    assert model.model_validate(content).model_dump(mode="json", exclude_unset=True) == content


@pytest.mark.parametrize("more", TGI)
def test_tgi_answers_are_the_contracts(server: Server, more: dict[str, Any]) -> None:
    body = {"inputs": "def f(x)", "parameters": {"max_new_tokens": 5} | more}
    has_shape(GenerateJson, server.http.post("/generate", json=body).json())
    has_shape(GenerateListJson, server.http.post("/", json=body).json())
    events = events_of(server.http.post("/generate_stream", json=body).text)
    assert len(events) == 5
    for event in events:
        has_shape(TokenEventJson, event)
    prefilled = body | {"parameters": {"max_new_tokens": 5, "decoder_input_details": True}}
    has_shape(GenerateJson, server.http.post("/generate", json=prefilled).json())


@pytest.mark.parametrize("more", OPENAI)
@pytest.mark.parametrize("logprobs", [False, True])
def test_openai_answers_are_the_contracts(server: Server, more: dict[str, Any], logprobs: bool) -> None:
    chat = {"messages": MESSAGES, "max_tokens": 5, **more} | ({"logprobs": True, "top_logprobs": 2} if logprobs else {})
    has_shape(ChatCompletionJson, server.http.post("/v1/chat/completions", json=chat).json())
    prompt = {"prompt": "def f(x)", "max_tokens": 5, **more} | ({"logprobs": 2} if logprobs else {})
    has_shape(CompletionJson, server.http.post("/v1/completions", json=prompt).json())
    for path, body, model in (
        ("/v1/chat/completions", chat, ChatCompletionChunkJson),
        ("/v1/completions", prompt, CompletionJson),
    ):
        text = server.http.post(path, json=body | {"stream": True}).text
        assert text.endswith("data: [DONE]\n\n")
        events = events_of(text)
        for event in events:
            has_shape(model, event)
        assert ("usage" in events[-1]) == ("stream_options" in more)


def test_administration_is_the_contracts(server: Server, adapters: list[str]) -> None:
    info = server.http.get("/info").json()
    has_shape(InfoJson, info)
    assert info["version"] == server.http.get("/openapi.json").json()["info"]["version"] == version("tunesmith")
    loaded = server.http.put(adapter_path(adapters[0], protect_recent_seconds=0.5))
    assert loaded.status_code == 200
    has_shape(ResidentAdapterJson, loaded.json())
    has_shape(ResidentAdapterListJson, server.http.get("/adapters").json())
    has_shape(ServedModelListJson, server.http.get("/v1/models").json())
    has_shape(UnloadedJson, server.http.delete(adapter_path("adapter-of nobody?")).json())


BODIES: dict[str, dict[str, Any]] = {
    "/generate": {"inputs": "a", "parameters": {"max_new_tokens": 1}},
    "/generate_stream": {"inputs": "a", "parameters": {"max_new_tokens": 1}},
    "/": {"inputs": "a", "parameters": {"max_new_tokens": 1}},
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 1},
    "/v1/completions": {"prompt": "a", "max_tokens": 1},
}


@pytest.mark.parametrize("path", BODIES)
def test_a_generation_carries_its_projects_tag(
    server: Server, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], path: str
) -> None:
    seen: list[PromptRequest] = []
    generate = server.serving.generate

    def watched(asked: PromptRequest) -> Any:
        seen.append(asked)
        return generate(asked)

    monkeypatch.setattr(server.serving, "generate", watched)
    for tag in ("tag-of_project-1", ""):
        headers = {PROJECT_TAG: tag} if tag else {}
        assert server.http.post(path, json=BODIES[path], headers=headers).status_code == 200
    assert [asked.project_tag for asked in seen] == ["tag-of_project-1", ""]
    lines = [line for line in capfd.readouterr().out.splitlines() if "project_tag=tag-of_project-1" in line]
    assert len(lines) == 1


@pytest.mark.parametrize("tag", ["x" * 65, "two words", "a;b", "\u00e4"])
def test_what_is_no_tag_is_refused(server: Server, tag: str) -> None:
    for path, status in (("/generate", 422), ("/v1/completions", 400)):
        answer = server.http.post(path, json=BODIES[path], headers={PROJECT_TAG.encode(): tag.encode("latin-1")})
        assert answer.status_code == status
        assert PROJECT_TAG in answer.text
    assert server.http.post("/v1/completions", json=BODIES[path], headers={MODEL_NAME: "x" * 257}).status_code == 400


def test_answers_that_were_not_asked_for_details_have_none(server: Server) -> None:
    whole = server.http.post("/generate", json=BODIES["/generate"]).json()
    assert set(whole) == {"generated_text"}
    [event] = events_of(server.http.post("/generate_stream", json=BODIES["/generate_stream"]).text)
    assert set(event) == {"index", "token", "generated_text", "details"}
    assert json.dumps(event["details"]) == "null"
