"""Functions offered in chat: called when they must be, valid always, streamed, answered in the next turn."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema_rs import validator_for

from shared.bases.base_model import prepare_base
from shared.storage.artifacts import LocalArtifactStore
from tests.services.inference.adapters_on_disk import Oracle
from tests.services.inference.harness import Tiny
from tests.services.inference.routes.test_choices import chat
from tests.services.inference.routes.test_http import events_of
from tests.services.inference.server import Server, running
from tests.services.inference.test_tool_calls import NOW, offered
from tests.tiny import tiny_catalogue, write_tiny_model

USER = {"role": "user", "content": "How is it?"}
LONG = {"max_tokens": 700}
WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", 'a "b" {c}']}, "days": {"enum": [1, 2]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
BOTH = [offered("weather", WEATHER), offered("now", NOW)]
SCHEMAS = {"weather": WEATHER, "now": NOW}
WEATHER_ONLY = {"type": "function", "function": {"name": "weather"}}


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A tiny base that takes 2,048 tokens: the tools are in the prompt, and its vocabulary is small."""
    root = tmp_path_factory.mktemp("roomy")
    model = write_tiny_model(root / "model", positions=2048)
    store, base = LocalArtifactStore(root / "artifacts"), tiny_catalogue(model).get("tiny")
    return Tiny(store, base, prepare_base(base, store), model, Oracle(store, model))


@pytest.fixture(scope="module")
def adapters(roomy: Tiny) -> list[str]:
    """One of instruction rows, one of chat rows, one that names no template."""
    chat = roomy.load().tokenizer.chat
    assert chat is not None
    return [roomy.adapter(seed=1), roomy.adapter(seed=2, template=chat.id), roomy.adapter(seed=3, template=None)]


@pytest.fixture(scope="module")
def server(roomy: Tiny) -> Iterator[Server]:
    with running(roomy, context=2048) as server:
        yield server


def called(choice: Any) -> list[tuple[str, Any]]:
    """The calls of a choice, each of which must be of its schema."""
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert message["content"] is None
    found = []
    for call in message["tool_calls"]:
        assert (call["type"], len(call["id"])) == ("function", 9)
        name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
        assert validator_for(SCHEMAS[name]).is_valid(arguments)
        found.append((name, arguments))
    assert len({call["id"] for call in message["tool_calls"]}) == len(found) > 0
    return found


def refused(server: Server, **body: Any) -> tuple[str, str]:
    answer = server.http.post("/v1/chat/completions", json={"messages": [USER], "tools": BOTH, **body})
    assert answer.status_code == 400, answer.text
    return answer.json()["error"]["param"], answer.json()["error"]["code"]


def test_a_call_that_must_come_comes(server: Server, adapters: list[str]) -> None:
    """Base and adapters of instruction rows, hot and greedy; one call, or several."""
    names = set()
    for seed in range(6):
        model = ("tiny", *adapters)[seed % 4]
        body = {"model": model, "tools": BOTH, "tool_choice": "required", "seed": seed, "temperature": seed / 4, **LONG}
        [(name, _)] = called(chat(server, **body, parallel_tool_calls=False)["choices"][0])
        names.add(name)
        [(name, _)] = called(chat(server, **body | {"tool_choice": WEATHER_ONLY})["choices"][0])
        assert name == "weather"
    assert names == {"weather", "now"}


def test_a_function_is_named_as_every_client_does(server: Server) -> None:
    """huggingface_hub leaves the type out, text-generation-inference's client sends the bare name; so may `any`."""
    functions = [*BOTH, offered("any", NOW)]
    for name in ("now", "any"):
        for choice in ({"type": "function", "function": {"name": name}}, {"function": {"name": name}}, name):
            answer = chat(server, tools=functions, tool_choice=choice, seed=1, **LONG)["choices"][0]
            [call] = answer["message"]["tool_calls"]
            assert call["function"] == {"name": name, "arguments": call["function"]["arguments"]}
    assert refused(server, tool_choice="weathe") == ("tool_choice", "invalid_request")


def test_some_functions_may_be_allowed(server: Server) -> None:
    """Those that are not are not even in the prompt."""

    def choice(mode: str, *names: str) -> dict[str, Any]:
        tools = [{"type": "function", "function": {"name": name}} for name in names]
        return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}

    for seed in range(3):
        body = {"tools": BOTH, "seed": seed, "temperature": 2, "parallel_tool_calls": False, **LONG}
        answer = chat(server, **body, tool_choice=choice("required", "now"))
        assert called(answer["choices"][0]) == [("now", {})]
    alone = chat(server, tools=[BOTH[1]], tool_choice="required", max_tokens=1)
    assert answer["usage"]["prompt_tokens"] == alone["usage"]["prompt_tokens"]
    both = chat(server, tools=BOTH, temperature=0, max_tokens=5)
    allowed = chat(server, tools=BOTH, tool_choice=choice("auto", "now", "weather"), temperature=0, max_tokens=5)
    assert allowed["usage"] == both["usage"]
    assert refused(server, tool_choice=choice("required", "now", "other"))[0] == "tool_choice"
    assert refused(server, tool_choice=choice("never", "now"))[0] == "tool_choice.allowed_tools.mode"
    assert refused(server, tool_choice=choice("auto"))[0] == "tool_choice.allowed_tools.tools"
    assert refused(server, tools=None, tool_choice=choice("auto", "now"))[0] == "tool_choice"


def test_arguments_are_those_that_the_function_lists(server: Server) -> None:
    """Most clients leave `additionalProperties` out; a random model would then go on with names of its own."""
    place = {name: value for name, value in WEATHER.items() if name != "additionalProperties"}
    for seed in range(4):
        body = {"tools": [offered("weather", place)], "tool_choice": WEATHER_ONLY, "seed": seed, "temperature": 2}
        [(_, arguments)] = called(chat(server, **body, max_tokens=200)["choices"][0])
        assert set(arguments) == {"city", "days"}
    listed = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": listed}}
    for seed in range(4):
        choice = chat(server, response_format=form, seed=seed, temperature=2, max_tokens=200)["choices"][0]
        assert set(json.loads(choice["message"]["content"])) == {"ok"}


def test_the_model_may_call_or_not(server: Server) -> None:
    """A random model says anything; offered tools are in its prompt, and with `none` they are not."""
    plain = chat(server, temperature=0)
    offered = chat(server, tools=BOTH, temperature=0)
    assert offered["usage"]["prompt_tokens"] > plain["usage"]["prompt_tokens"] + 50
    assert offered["choices"][0]["finish_reason"] in ("stop", "length")
    assert isinstance(offered["choices"][0]["message"]["content"], str)
    assert "tool_calls" not in offered["choices"][0]["message"]
    nothing: list[dict[str, Any]] = [{"tools": BOTH, "tool_choice": "none"}, {"tools": []}, {"tool_choice": "auto"}]
    for choice in nothing:
        assert chat(server, temperature=0, **choice)["choices"][0]["message"] == plain["choices"][0]["message"]


def test_there_may_be_several_calls_but_not_without_end(server: Server) -> None:
    """A random model rarely stops by itself."""
    most = 0
    for seed in range(3):
        body = {"tools": BOTH, "tool_choice": "required", "seed": seed, "max_tokens": 1400}
        most = max(most, len(called(chat(server, **body)["choices"][0])))
    assert 1 < most <= 16


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_streamed_calls_join_to_the_whole(server: Server, adapters: list[str], choice: str) -> None:
    body = {"messages": [USER], "model": adapters[2], "tools": BOTH, "tool_choice": choice, "n": 2, "seed": 5, **LONG}
    whole = server.http.post("/v1/chat/completions", json=body).json()
    chunks = events_of(server.http.post("/v1/chat/completions", json=body | {"stream": True}).text)
    for place, expected in enumerate(whole["choices"]):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == place]
        assert own[0]["delta"]["role"] == "assistant"
        assert own[-1]["finish_reason"] == expected["finish_reason"]
        text = "".join(each["delta"].get("content") or "" for each in own)
        assert text == (expected["message"]["content"] or "")
        calls: list[dict[str, str]] = []
        pieces = 0
        for delta in [each["delta"] for each in own]:
            for call in delta.get("tool_calls", []):
                if "id" in call:
                    assert call["index"] == len(calls)
                    calls.append({"name": call["function"]["name"], "arguments": ""})
                calls[call["index"]]["arguments"] += call["function"]["arguments"]
                pieces += 1
        assert calls == [call["function"] for call in expected["message"].get("tool_calls", [])]
        assert pieces > len(calls) or not calls


def test_calls_and_answers_come_back_as_history(server: Server) -> None:
    """The loop of every agent: the answer is appended as it came, then what the function said."""
    first = chat(server, tools=BOTH, tool_choice=WEATHER_ONLY, seed=1, **LONG)["choices"][0]["message"]
    call = first["tool_calls"][0]
    said = {"role": "tool", "tool_call_id": call["id"], "content": "4 degrees"}
    body = {"messages": [USER, first, said], "tools": BOTH, "max_tokens": 5, "temperature": 0}
    answer = server.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    template = server.serving.tokenizer.chat
    assert template is not None
    tokens = answer.json()["usage"]["prompt_tokens"]
    other = body | {"messages": [USER, first, said | {"content": "4 degrees, and much rain in the afternoon"}]}
    assert server.http.post("/v1/chat/completions", json=other).json()["usage"]["prompt_tokens"] > tokens
    for broken in ("{", "[]", "5"):
        wrong = json.loads(json.dumps(first))
        wrong["tool_calls"][0]["function"]["arguments"] = broken
        param, _ = refused(server, messages=[USER, wrong, said])
        assert param == "messages.1.tool_calls.0.function.arguments"
    assert refused(server, messages=[USER | {"tool_calls": first["tool_calls"]}])[0] == "messages.0.tool_calls"


def test_a_form_for_answers_beside_calls(server: Server) -> None:
    """Either a call or an object of the schema: nothing else is left to say."""
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "maxProperties": 1}
    asked = {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": schema}}
    kinds = set()
    for seed in range(12):
        body = {"tools": BOTH, "parallel_tool_calls": False, "response_format": asked, "seed": seed, "temperature": 2}
        choice = chat(server, **body, **LONG)["choices"][0]
        if choice["finish_reason"] == "tool_calls":
            assert called(choice)
        else:
            assert set(json.loads(choice["message"]["content"])) == {"ok"}
        kinds.add(choice["finish_reason"])
    assert kinds == {"stop", "tool_calls"}


def test_what_cannot_be_offered_is_refused_by_name(server: Server) -> None:
    def function(**more: Any) -> list[Any]:
        return [{"type": "function", "function": {"name": "f", **more}}]

    assert refused(server, tools=None, tool_choice="required")[0] == "tool_choice"
    other = {"type": "function", "function": {"name": "other"}}
    assert refused(server, tool_choice=other)[0] == "tool_choice"
    assert refused(server, tool_choice="sometimes")[0].startswith("tool_choice")
    assert refused(server, tools=BOTH * 2)[0] == "tools"
    assert refused(server, tools=function(name="no spaces"))[0] == "tools.0.function.name"
    assert refused(server, tools=[{"type": "web_search"}])[0] == "tools.0.type"
    bad = function(strict=True, parameters={"type": "object", "properties": {"a": {"type": "strin"}}})
    assert refused(server, tools=bad, tool_choice="required") == ("tools", "invalid_grammar")
    assert refused(server, tools=function(parameters=[]))[0] == "tools.0.function.parameters"
    server.wait_until_idle()
    assert called(chat(server, tools=BOTH, tool_choice=WEATHER_ONLY, **LONG)["choices"][0])


def test_an_answer_that_is_cut_keeps_what_it_has(server: Server) -> None:
    body = {"tools": BOTH, "tool_choice": WEATHER_ONLY, "seed": 2}
    whole = chat(server, **body, **LONG)
    tokens = whole["usage"]["completion_tokens"]
    cut = chat(server, **body, max_tokens=tokens - 12)["choices"][0]
    assert cut["finish_reason"] == "length"
    full = whole["choices"][0]["message"]["tool_calls"][0]["function"]
    [call] = cut["message"]["tool_calls"]
    assert full["arguments"].startswith(call["function"]["arguments"])
    assert call["function"]["name"] == "weather"
