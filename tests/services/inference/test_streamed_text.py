"""An adapter made to say characters of many bytes: peft's text, whole and in pieces, on every route."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from shared.datasets.templates import InstructionTemplate
from shared.datasets.tokens import Tokenizer
from tests.services.inference.adapters_on_disk import write_reciter
from tests.services.inference.harness import EngineUnderTest, Tiny
from tests.services.inference.server import Server

SAID = "🎉 你好 äöü 👩‍👩‍👧‍👦 🇩🇪🇫🇷 e\u0301 ok"
ASKED = "Say it"


@pytest.fixture(scope="module")
def tokenizer(tiny: Tiny) -> Tokenizer:
    return tiny.load().tokenizer


@pytest.fixture(scope="module")
def prompt(tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode(InstructionTemplate().instruction(ASKED).text, add_special_tokens=True)


@pytest.fixture(scope="module")
def length(tokenizer: Tokenizer) -> int:
    """How many tokens the words take: nearly one for each byte."""
    tokens = len(tokenizer.encode(SAID, add_special_tokens=False))
    assert tokens > len(SAID)
    return tokens


@pytest.fixture(scope="module")
def speaker(tiny: Tiny, tokenizer: Tokenizer, prompt: list[int], length: int) -> str:
    """The adapter's id. It says the text by heart, which peft confirms."""
    text = tokenizer.encode(SAID, add_special_tokens=False)
    adapter = write_reciter(tiny.store, tiny.model, tiny.manifest, prompt=prompt, text=text)
    assert tokenizer.decode(tiny.oracle.ids(adapter, prompt, length)) == SAID
    return adapter


def test_every_engine_lets_whole_characters_out(
    engine: Callable[..., EngineUnderTest],
    tiny: Tiny,
    speaker: str,
    adapters: list[str],
    prompt: list[int],
    length: int,
) -> None:
    """Among neighbours that come and go."""
    under_test = engine(rows=3)
    for adapter in (speaker, adapters[0]):
        under_test.load(adapter)
    others = [under_test.submit(prompt[:n], adapter=adapters[0], max_new_tokens=3 * n) for n in (2, 5, 9)]
    heard = [under_test.submit(prompt, adapter=speaker, max_new_tokens=length) for _ in range(3)]
    for each in heard:
        assert each.last
        assert each.ids == tiny.oracle.ids(speaker, prompt, length)
        assert each.text == SAID
        pieces = [token.text for token in each.tokens if token.text]
        assert len(pieces) > 15
        assert not any("\ufffd" in piece for piece in pieces)
    for each in others:
        assert each.last


def test_streamed_pieces_join_to_it_on_every_route(
    server: Server, tiny: Tiny, speaker: str, adapters: list[str], length: int
) -> None:
    tgi = {"instruction": ASKED, "parameters": {"adapter_id": speaker, "max_new_tokens": length, "details": True}}
    chat = {"model": speaker, "messages": [{"role": "user", "content": ASKED}], "max_tokens": length, "temperature": 0}
    text = InstructionTemplate().instruction(ASKED).text
    completion = {"model": speaker, "prompt": text, "max_tokens": length, "temperature": 0}
    routes: list[tuple[str, dict[str, Any], Callable[[Any], str]]] = [
        ("/generate_stream", tgi, lambda event: event["token"]["text"]),
        ("/generate", tgi | {"stream": True}, lambda event: event["token"]["text"]),
        ("/", tgi | {"stream": True}, lambda event: event["token"]["text"]),
        (
            "/v1/chat/completions",
            chat | {"stream": True},
            lambda event: event["choices"][0]["delta"].get("content", ""),
        ),
        ("/v1/completions", completion | {"stream": True}, lambda event: event["choices"][0]["text"]),
    ]

    def pieces(route: tuple[str, dict[str, Any], Callable[[Any], str]]) -> list[str]:
        path, body, piece = route
        with server.http.stream("POST", path, json=body) as response:
            assert response.status_code == 200, response.read()
            lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: {")]
        return [said for line in lines if (said := piece(json.loads(line)))]

    def neighbour(n: int) -> int:
        body = {"inputs": "a" * n, "parameters": {"adapter_id": adapters[n % 4], "max_new_tokens": 5 * n}}
        return server.http.post("/generate", json=body).status_code

    with ThreadPoolExecutor(12) as pool:
        crowd = [pool.submit(neighbour, n) for n in range(1, 8)]
        streams = list(pool.map(pieces, routes))
        assert {each.result() for each in crowd} == {200}
    for said in streams:
        assert "".join(said) == SAID
        assert not any("\ufffd" in piece for piece in said)
    whole = server.http.post("/generate", json=tgi).json()
    assert whole["generated_text"] == SAID
    assert server.http.post("/v1/chat/completions", json=chat).json()["choices"][0]["message"]["content"] == SAID
