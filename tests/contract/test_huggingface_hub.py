"""huggingface_hub's own client, unmodified, against the running stack: base, adapter, checkpoint, also streamed."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from huggingface_hub import ChatCompletionInputFunctionName, ChatCompletionInputToolChoiceClass, InferenceClient
from huggingface_hub.errors import HfHubHTTPError, UnknownError
from huggingface_hub.errors import ValidationError as HubValidationError

from tests.contract.server import Server

PROMPT = "### Instruction:\nWhat is 3?\n\n### Response:\n"
MESSAGES = [{"role": "user", "content": "What is 3?"}]


@pytest.fixture
def hub(server: Server) -> InferenceClient:
    return InferenceClient(base_url=server.url, api_key=server.key)


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    headers = {"authorization": f"Bearer {server.key}"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=60, trust_env=False) as client:
        yield client


@pytest.fixture(params=["base", "adapter", "checkpoint"])
def model(request: pytest.FixtureRequest, server: Server, http: httpx.Client) -> str | None:
    """What the client calls it; None for the base."""
    if request.param == "base":
        return None
    tuned: str = http.get(f"/v1/fine_tuning/jobs/{server.job}").json()["fine_tuned_model"]
    if request.param == "adapter":
        return tuned
    names: list[str] = [each["id"] for each in http.get("/v1/models").json()["data"]]
    return next(name for name in names if name.startswith(f"{tuned}:ckpt-step-"))


def test_text_generation(hub: InferenceClient, http: httpx.Client, model: str | None) -> None:
    parameters = {"adapter_id": model, "max_new_tokens": 12}
    text = http.post("/generate", json={"inputs": PROMPT, "parameters": parameters}).json()["generated_text"]
    assert text
    assert hub.text_generation(PROMPT, adapter_id=model, max_new_tokens=12) == text
    detailed = hub.text_generation(PROMPT, adapter_id=model, max_new_tokens=12, details=True)
    assert detailed.generated_text == text
    assert detailed.details is not None
    assert detailed.details.generated_tokens == len(detailed.details.tokens)
    pieces = hub.text_generation(PROMPT, adapter_id=model, max_new_tokens=12, stream=True)
    assert "".join(pieces) == text
    events = list(hub.text_generation(PROMPT, adapter_id=model, max_new_tokens=12, stream=True, details=True))
    assert [event.token.id for event in events] == [token.id for token in detailed.details.tokens]
    assert "".join(event.token.text for event in events) == events[-1].generated_text == text
    assert events[-1].details is not None
    assert events[-1].details.finish_reason == detailed.details.finish_reason


def test_chat_completion(hub: InferenceClient, model: str | None) -> None:
    whole = hub.chat_completion(MESSAGES, model=model, max_tokens=12, temperature=0)
    text = whole.choices[0].message.content
    assert text
    assert whole.usage.completion_tokens <= 12
    stream = list(hub.chat_completion(MESSAGES, model=model, max_tokens=12, temperature=0, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == text
    assert [chunk.choices[0].finish_reason for chunk in stream][-1] == whole.choices[0].finish_reason


def test_tools(hub: InferenceClient) -> None:
    """Its own class for the choice of a function has no type."""
    days = {"type": "object", "properties": {"days": {"enum": [1, 2]}}, "required": ["days"]}
    tool = {"type": "function", "function": {"name": "weather", "description": "", "parameters": days}}
    choice = ChatCompletionInputToolChoiceClass(function=ChatCompletionInputFunctionName(name="weather"))
    asked: dict[str, Any] = {"tools": [tool], "tool_choice": choice, "max_tokens": 150, "temperature": 0}
    message = hub.chat_completion(MESSAGES, **asked).choices[0].message
    assert message.tool_calls is not None
    [call] = message.tool_calls
    assert json.loads(call.function.arguments)["days"] in (1, 2)
    pieces = [piece.choices[0].delta for piece in hub.chat_completion(MESSAGES, stream=True, **asked)]
    written = "".join(part.function.arguments for piece in pieces for part in piece.tool_calls or [])
    assert written == call.function.arguments
    told = [*MESSAGES, message, {"role": "tool", "tool_call_id": call.id, "content": "4"}]
    assert hub.chat_completion(told, max_tokens=5).choices[0].message.role == "assistant"


def test_what_is_wrong_has_the_clients_own_errors(hub: InferenceClient, server: Server) -> None:
    with pytest.raises(HubValidationError, match="max_new_tokens"):
        hub.text_generation(PROMPT, max_new_tokens=-1)
    with pytest.raises((HubValidationError, HfHubHTTPError), match="no model"):
        hub.text_generation(PROMPT, adapter_id="ft:nobody")
    with pytest.raises(UnknownError, match="API key"):
        InferenceClient(base_url=server.url, api_key="ts-wrong").text_generation(PROMPT)


def test_info_and_health(server: Server) -> None:
    operator = InferenceClient(model=server.url, provider="hf-inference", token=server.key)
    assert operator.get_endpoint_info()["model_id"] == "tiny"
    assert operator.health_check()
