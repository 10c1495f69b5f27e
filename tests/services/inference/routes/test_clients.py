"""Unmodified clients against the real application."""

from typing import Any

import openai
import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.errors import ValidationError as HubValidationError

from tests.services.inference.server import Server

PROMPT = "def f(x): return x"


def expected(server: Server, adapter: str | None, prompt: str, n: int) -> str:
    return server.serving.tokenizer.decode(server.tiny.oracle.ids(adapter, server.prompt(prompt), n))


@pytest.mark.parametrize("path", ["", "/generate"])
def test_huggingface_hub_text_generation(server: Server, adapters: list[str], path: str) -> None:
    client = InferenceClient(base_url=server.url + path)
    text = expected(server, adapters[0], PROMPT, 12)
    assert client.text_generation(PROMPT, adapter_id=adapters[0], max_new_tokens=12) == text
    detailed = client.text_generation(PROMPT, adapter_id=adapters[0], max_new_tokens=12, details=True)
    assert detailed.generated_text == text
    assert detailed.details is not None
    assert detailed.details.generated_tokens == 12
    pieces = client.text_generation(PROMPT, adapter_id=adapters[0], max_new_tokens=12, stream=True)
    assert "".join(pieces) == text
    events = list(client.text_generation(PROMPT, adapter_id=adapters[0], max_new_tokens=12, stream=True, details=True))
    assert events[-1].generated_text == text
    assert events[-1].details is not None
    assert events[-1].details.finish_reason == "length"
    hot: dict[str, Any] = {"max_new_tokens": 12, "temperature": 3.0, "seed": 4, "top_k": 50, "stop": ["\n\n\n"]}
    assert client.text_generation(PROMPT, **hot) == client.text_generation(PROMPT, **hot) != text


def test_huggingface_hub_errors_are_typed(server: Server) -> None:
    client = InferenceClient(base_url=server.url)
    with pytest.raises(HubValidationError, match="max_new_tokens"):
        client.text_generation(PROMPT, max_new_tokens=-1)
    with pytest.raises((HubValidationError, HfHubHTTPError), match="no adapter"):
        client.text_generation(PROMPT, adapter_id="adapter-none")


def test_huggingface_hub_chat_and_info(server: Server, adapters: list[str]) -> None:
    client = InferenceClient(base_url=server.url)
    answer = client.chat_completion([{"role": "user", "content": "hello"}], max_tokens=8, temperature=0)
    chat = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert answer.choices[0].message.content == expected(server, None, chat, 8)
    stream = client.chat_completion(
        [{"role": "user", "content": "hello"}], model=adapters[0], max_tokens=8, temperature=0, stream=True
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == expected(server, adapters[0], "### Instruction:\nhello\n\n### Response:\n", 8)
    operator = InferenceClient(model=server.url, provider="hf-inference")
    assert operator.get_endpoint_info()["model_id"] == "tiny"
    assert operator.health_check()


def test_openai(server: Server, adapters: list[str]) -> None:
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="unused", max_retries=0)
    completion = client.completions.create(model=adapters[1], prompt=PROMPT, max_tokens=10, temperature=0)
    assert completion.choices[0].text == expected(server, adapters[1], PROMPT, 10)
    chat = client.chat.completions.create(
        model=adapters[1],
        messages=[{"role": "system", "content": "s"}, {"role": "user", "content": "hello"}],
        max_completion_tokens=8,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    )
    text = expected(server, adapters[1], "### Instruction:\ns\n\nhello\n\n### Response:\n", 8)
    assert chat.choices[0].message.content == text
    assert chat.choices[0].logprobs is not None
    assert [len(entry.top_logprobs) for entry in chat.choices[0].logprobs.content or []] == [2] * 8
    assert chat.usage is not None
    assert chat.usage.completion_tokens == 8
    stream = client.chat.completions.create(
        model=adapters[1],
        messages=[{"role": "system", "content": "s"}, {"role": "user", "content": "hello"}],
        max_tokens=8,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert chunks[-1].usage == chat.usage
    pieces = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=10, temperature=0, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == expected(server, None, PROMPT, 10)
    assert "tiny" in [model.id for model in client.models.list()]
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="nobody", prompt=PROMPT)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="tiny", prompt=PROMPT, temperature=9)
