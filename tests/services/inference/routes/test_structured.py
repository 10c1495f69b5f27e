"""Answers that must have a form: over every route, beside free answers, and with everything else one can ask."""

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from jsonschema_rs import validator_for

from tests.services.inference.routes.test_choices import chat, complete, texts
from tests.services.inference.routes.test_http import PROMPT, events_of
from tests.services.inference.server import Server

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "blue", "äöü"]},
        "size": {"type": "integer", "minimum": 1, "maximum": 99},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["colour", "size", "tags"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "thing", "strict": True, "schema": SCHEMA}}
VALID = validator_for(SCHEMA)
LONG = {"max_tokens": 200}


def thing(text: str) -> Any:
    """The answer's value, which must be of the schema."""
    value = json.loads(text)
    assert VALID.is_valid(value), value
    return value


def test_an_answer_follows_its_schema(server: Server, adapters: list[str]) -> None:
    """A random model says what it must, whatever the temperature and whoever's adapter."""
    seen = set()
    for seed in range(6):
        for model in ("tiny", adapters[seed % 4]):
            answer = chat(server, model=model, response_format=FORMAT, seed=seed, temperature=1.5, **LONG)
            assert answer["choices"][0]["finish_reason"] == "stop"
            seen.add(thing(texts(answer)[0])["colour"])
    assert len(seen) > 1
    greedy = chat(server, response_format=FORMAT, temperature=0, **LONG)
    assert thing(texts(greedy)[0]) == thing(texts(chat(server, response_format=FORMAT, temperature=0, **LONG))[0])
    assert greedy["choices"][0]["finish_reason"] == "stop"
    # The order of properties is the schema's.
    assert list(json.loads(texts(greedy)[0])) == ["colour", "size", "tags"]


def test_json_object_is_an_object(server: Server) -> None:
    for seed in range(20):
        answer = chat(server, response_format={"type": "json_object"}, seed=seed, **LONG)["choices"][0]
        text = answer["message"]["content"]
        assert text.startswith("{")
        if answer["finish_reason"] == "stop":
            assert isinstance(json.loads(text), dict)
    small = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "maxProperties": 1}
    answer = chat(server, response_format={"type": "json_object", "schema": small}, **LONG)
    assert list(json.loads(texts(answer)[0])) == ["a"]


def test_text_is_free(server: Server) -> None:
    free = texts(chat(server, temperature=0))
    assert texts(chat(server, temperature=0, response_format={"type": "text"})) == free
    assert texts(chat(server, temperature=0, response_format=None)) == free


@pytest.mark.parametrize("value", [SCHEMA, json.dumps(SCHEMA), {"name": "thing", "schema": SCHEMA}])
def test_tgis_grammar(server: Server, adapters: list[str], value: Any) -> None:
    kind = "json_schema" if isinstance(value, dict) and "schema" in value else "json"
    grammar = {"type": kind, "value": value}
    parameters = {"grammar": grammar, "max_new_tokens": 200, "details": True, "adapter_id": adapters[2]}
    answer = server.generate(inputs=PROMPT, parameters=parameters).json()
    assert thing(answer["generated_text"])
    assert answer["details"]["finish_reason"] == "eos_token"
    events = events_of(server.http.post("/generate_stream", json={"inputs": PROMPT, "parameters": parameters}).text)
    assert events[-1]["generated_text"] == answer["generated_text"]
    assert "".join(event["token"]["text"] for event in events) == answer["generated_text"]


def test_tgis_regular_expression(server: Server) -> None:
    pattern = "((25[0-5]|2[0-4]\\d|[01]?\\d\\d?)\\.){3}(25[0-5]|2[0-4]\\d|[01]?\\d\\d?)"
    for seed in range(5):
        parameters = {
            "grammar": {"type": "regex", "value": pattern},
            "max_new_tokens": 40,
            "do_sample": True,
            "seed": seed,
        }
        text = server.generate(inputs=PROMPT, parameters=parameters).json()["generated_text"]
        assert re.fullmatch(pattern, text)


def test_streams_choices_stops_and_penalties_keep_to_it(server: Server, adapters: list[str]) -> None:
    body = {"response_format": FORMAT, "n": 3, "seed": 5, "model": adapters[0], "frequency_penalty": 1.0, **LONG}
    whole = chat(server, **body)
    assert len({json.dumps(thing(text)) for text in texts(whole)}) > 1
    sent = {"messages": [{"role": "user", "content": "hello"}], **body, "stream": True, "logprobs": True}
    chunks = events_of(server.http.post("/v1/chat/completions", json=sent).text)
    for place, text in enumerate(texts(whole)):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == place]
        assert "".join(each["delta"].get("content", "") for each in own) == text
        assert own[-1]["finish_reason"] == "stop"
    stopped = chat(server, **body | {"n": 1, "stop": ['"size"']})["choices"][0]
    assert texts(whole)[0].startswith(stopped["message"]["content"])
    assert '"size"' not in stopped["message"]["content"]
    cut = chat(server, **body | {"n": 1, "max_tokens": 3})["choices"][0]
    assert cut["finish_reason"] == "length"
    forced = chat(server, **body | {"logit_bias": {str(server.serving.tokenizer.eos_id): 100}, "ignore_eos": True})
    assert all(thing(text) for text in texts(forced))


def test_rows_beside_a_grammar_say_what_they_say_alone(server: Server, adapters: list[str]) -> None:
    free = {"model": adapters[1], "prompt": PROMPT, "temperature": 0, "max_tokens": 60, "ignore_eos": True}
    sampled = {"prompt": "a", "temperature": 1.2, "seed": 4, "max_tokens": 60, "ignore_eos": True}
    bound = {"response_format": FORMAT, "seed": 7, **LONG}
    alone = texts(complete(server, **free)), texts(complete(server, **sampled)), texts(chat(server, **bound))
    over = threading.Event()

    def crowd() -> int:
        count = 0
        while not over.is_set():
            assert texts(chat(server, **bound)) == alone[2]
            count += 1
        return count

    with ThreadPoolExecutor(2) as pool:
        others = [pool.submit(crowd) for _ in range(2)]
        try:
            for _ in range(5):
                assert (texts(complete(server, **free)), texts(complete(server, **sampled))) == alone[:2]
        finally:
            over.set()
        assert all(other.result() for other in others)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "strin"},
        {"$ref": "file:///etc/passwd"},
        {"type": "string", "minLength": 5, "maxLength": 2},
        {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}, "required": ["a"]},
        {"enum": ["x" * 70_000]},
    ],
)
def test_a_bad_schema_fails_its_own_request_and_names_the_field(server: Server, schema: Any) -> None:
    strict = {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": schema}}
    for stream in (False, True):
        body = {"messages": [{"role": "user", "content": "x"}], "response_format": strict, "stream": stream}
        answer = server.http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 400, answer.text
        assert (answer.json()["error"]["param"], answer.json()["error"]["code"]) == (
            "response_format",
            "invalid_grammar",
        )
        grammar = {"type": "json", "value": schema}
        answer = server.generate(inputs="a", parameters={"grammar": grammar}, stream=stream)
        assert answer.status_code == 422
        assert answer.json()["error"].startswith("parameters.grammar: the grammar ")
    server.wait_until_idle()
    assert thing(texts(chat(server, response_format=FORMAT, **LONG))[0])


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"type": "xml"}, "response_format.type"),
        ({"type": "json_schema"}, "response_format"),
        ({"type": "json_schema", "json_schema": {"name": "a", "schema": []}}, "response_format.json_schema.schema"),
        ({"type": "json_schema", "json_schema": {"name": 5}}, "response_format.json_schema.name"),
        ("json", "response_format"),
    ],
)
def test_what_is_no_response_format_is_refused(server: Server, asked: Any, field: str) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "response_format": asked}
    answer = server.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field


@pytest.mark.parametrize(
    "asked", [{"type": "regex", "value": {}}, {"type": "json"}, {"type": "bnf", "value": "a"}, "a"]
)
def test_what_is_no_grammar_is_refused(server: Server, asked: Any) -> None:
    answer = server.generate(inputs="a", parameters={"grammar": asked})
    assert answer.status_code == 422
    assert "parameters.grammar" in answer.json()["error"]
