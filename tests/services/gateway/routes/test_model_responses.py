"""`/v1/responses` by OpenAI's own client, strict: text whole and streamed, turns by id, what is kept and what not."""

import json
from collections.abc import Callable, Iterator
from typing import Any, get_type_hints

import openai
import pytest
from openai import OpenAI
from openai.types.responses.response_create_params import ResponseCreateParamsStreaming
from sqlalchemy import insert, update

from services.gateway.http.keys import Keys, read_or_make_secret
from services.gateway.responses.request_schema import ResponseBody
from services.gateway.responses.store import MAX_BYTES, ResponseStore
from services.gateway.settings import GatewaySettings
from shared.inference_api.ignored import IGNORED_PARAMETERS
from shared.storage.database import Database
from shared.storage.tables import api_keys, kept_items
from tests.services.gateway.conftest import Gateway, running_gateway
from tests.services.gateway.inference_stand_in import StandIn, standing_in

BASE = "smollm2-135m-instruct"
PATH = "/v1/responses"
Settings = Callable[..., GatewaySettings]
HI = {"role": "user", "content": "hi"}
FOUR = {"role": "assistant", "content": "4"}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
ADD: Any = {"type": "function", "name": "add", "parameters": SCHEMA, "strict": True, "description": "adds"}
CALL = ("call00001", "add", '{"a": 4}')


@pytest.fixture
def inference() -> Iterator[StandIn]:
    with standing_in(BASE) as stand_in:
        yield stand_in


@pytest.fixture
def gateway(settings: Settings, inference: StandIn) -> Iterator[Gateway]:
    with running_gateway(settings(inference_urls=(inference.url,))) as running:
        yield running


@pytest.fixture
def client(gateway: Gateway) -> Iterator[OpenAI]:
    with gateway.openai() as made:
        yield made


def asked(inference: StandIn) -> list[dict[str, Any]]:
    """The conversation that inference was asked last."""
    path, body, _ = inference.sent[-1]
    assert path == "POST /v1/chat/completions"
    messages: list[dict[str, Any]] = body["messages"]
    return messages


def test_a_text_is_answered(client: OpenAI, inference: StandIn) -> None:
    answer = client.responses.create(
        model=BASE, input="hi", instructions="Be brief.", max_output_tokens=5, temperature=0, metadata={"a": "b"}
    )
    assert (answer.output_text, answer.status, answer.model) == ("4", "completed", BASE)
    assert (answer.instructions, answer.metadata, answer.max_output_tokens) == ("Be brief.", {"a": "b"}, 5)
    assert answer.error is None
    assert answer.id.startswith("resp_")
    assert answer.output[0].id
    assert asked(inference) == [{"role": "system", "content": "Be brief."}, HI]
    assert (inference.sent[-1][1]["max_tokens"], inference.sent[-1][1]["temperature"]) == (5, 0)


def test_turns_by_id(client: OpenAI, inference: StandIn) -> None:
    first = client.responses.create(model=BASE, input="hi", instructions="Be brief.")
    second = client.responses.create(model=BASE, input="and 8?", previous_response_id=first.id)
    # As OpenAI has it, instructions are of one response only.
    assert asked(inference) == [HI, FOUR, {"role": "user", "content": "and 8?"}]
    assert second.previous_response_id == first.id
    client.responses.create(model=BASE, input="and 9?", previous_response_id=second.id)
    assert len(asked(inference)) == 5
    # The AI SDK's way: what was answered is named by its item's id.
    reference: Any = {"type": "item_reference", "id": first.output[0].id}
    items: list[Any] = [HI, reference, {"role": "user", "content": [{"type": "input_text", "text": "again"}]}]
    client.responses.create(model=BASE, input=items)
    assert asked(inference) == [HI, FOUR, {"role": "user", "content": "again"}]
    # And the Agents SDK's: the answer's own items come back.
    returned: list[Any] = [HI, *[item.model_dump() for item in first.output], {"role": "user", "content": "again"}]
    client.responses.create(model=BASE, input=returned)
    assert asked(inference) == [HI, FOUR, {"role": "user", "content": "again"}]


def test_a_response_is_kept_until_it_is_deleted(client: OpenAI, gateway: Gateway) -> None:
    made = client.responses.create(model=BASE, input="hi")
    assert client.responses.retrieve(made.id).output_text == "4"
    item = made.output[0].id
    for unknown in (item, "resp_0", "%00", "x" * 300):
        assert gateway.http.get(f"{PATH}/{unknown}").status_code == 404
    client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)
    again = gateway.http.post(PATH, json={"input": "a", "previous_response_id": made.id})
    assert (again.status_code, again.json()["error"]["param"]) == (404, "previous_response_id")
    again = gateway.http.post(PATH, json={"input": [{"type": "item_reference", "id": item}, HI]})
    assert (again.status_code, again.json()["error"]["param"]) == (404, "input.0.id")


def test_nothing_is_kept_that_was_not_to_be(client: OpenAI, gateway: Gateway, settings: Settings) -> None:
    made = client.responses.create(model=BASE, input="hi", store=False)
    assert made.model_dump()["store"] is False
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)
    large = gateway.http.post(PATH, json={"input": [{"role": "user", "content": "x" * 200_000}] * 6, "store": True})
    assert large.is_success
    assert len(large.request.content) > MAX_BYTES
    assert large.json()["store"] is False
    with gateway.services.database.read() as tx:
        assert tx.execute(kept_items.select()).all() == []


def test_another_projects_responses_are_unknown(client: OpenAI, gateway: Gateway) -> None:
    made = client.responses.create(model=BASE, input="hi")
    keys = Keys(gateway.services.database, read_or_make_secret(gateway.settings.key_secret_path))
    row = {"id": "key-other", "project": "other", "digest": keys._digest("ts-" + "o" * 40), "created_at": 0}
    with gateway.services.database.write() as connection:
        connection.execute(insert(api_keys).values(row))
    theirs = {"authorization": "Bearer ts-" + "o" * 40}
    for method, path, body in (
        ("GET", f"{PATH}/{made.id}", None),
        ("DELETE", f"{PATH}/{made.id}", None),
        ("POST", PATH, {"input": "a", "previous_response_id": made.id}),
        ("POST", PATH, {"input": [{"type": "item_reference", "id": made.output[0].id}, HI]}),
    ):
        assert gateway.http.request(method, path, json=body, headers=theirs).status_code == 404
    assert client.responses.retrieve(made.id).id == made.id


def test_what_was_kept_long_enough_is_unknown_and_then_gone(client: OpenAI, gateway: Gateway) -> None:
    made = client.responses.create(model=BASE, input="hi")
    fresh = client.responses.create(model=BASE, input="hi")
    database: Database = gateway.services.database
    with database.write() as tx:
        tx.execute(update(kept_items).where(kept_items.c.response == made.id).values(created_at=1000))
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)
    with database.write() as tx:
        assert gateway.services.responses.forget(tx) == 2
        assert ResponseStore(3600).find(tx, "default", fresh.id, "id")["response"]["id"] == fresh.id


def test_a_stream_has_openais_events_in_order(client: OpenAI, inference: StandIn) -> None:
    inference.words = ["The ", "answer", " is 4."]
    events = list(client.responses.create(model=BASE, input="hi", stream=True))
    kinds = [event.type for event in events]
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * 3,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    last: Any = events[-1]
    assert last.response.output_text == "The answer is 4."
    assert last.response.usage.total_tokens == 5
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "The answer is 4."
    assert client.responses.retrieve(last.response.id).output_text == "The answer is 4."
    with client.responses.stream(model=BASE, input="hi") as stream:
        assert stream.get_final_response().output_text == "The answer is 4."


def test_a_stream_names_its_events_and_is_not_held_back(gateway: Gateway, inference: StandIn) -> None:
    inference.words = ["4"]
    body = {"input": "hi", "stream": True, "prompt_cache_key": "k", "include": ["reasoning.encrypted_content"]}
    answer = gateway.http.post(PATH, json=body)
    assert answer.headers["x-accel-buffering"] == "no"
    assert answer.headers[IGNORED_PARAMETERS] == "include,prompt_cache_key"
    for block in answer.text.strip().split("\n\n"):
        name, data = block.split("\n")
        assert name.removeprefix("event: ") == json.loads(data.removeprefix("data: "))["type"]


def test_an_answer_that_was_cut_is_incomplete(client: OpenAI, inference: StandIn) -> None:
    inference.words, inference.reason = ["4"], "length"
    *_, last = client.responses.create(model=BASE, input="hi", stream=True, max_output_tokens=1)
    assert last.type == "response.incomplete"
    assert last.response.incomplete_details is not None
    assert last.response.incomplete_details.reason == "max_output_tokens"


def test_a_stream_that_breaks_fails(client: OpenAI, inference: StandIn) -> None:
    inference.words, inference.broken = ["4"], True
    *_, last = client.responses.create(model=BASE, input="hi", stream=True)
    assert last.type == "response.failed"
    assert last.response.error is not None


def test_a_schema_is_handed_on(client: OpenAI, inference: StandIn) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    text: Any = {"format": {"type": "json_schema", "name": "n", "schema": schema, "strict": True}}
    answer = client.responses.create(model=BASE, input="hi", text=text)
    given = inference.sent[-1][1]["response_format"]
    assert given == {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
    assert answer.text is not None
    assert answer.text.format is not None
    assert answer.text.format.type == "json_schema"


def call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    """As chat completions write it."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def test_a_call_comes_back_with_what_it_gave(client: OpenAI, inference: StandIn) -> None:
    inference.calls = [CALL, ("call00002", "add", '{"a": 5}')]
    first = client.responses.create(model=BASE, input="hi", tools=[ADD], tool_choice="required")
    sent = inference.sent[-1][1]
    function = {"name": "add", "description": "adds", "parameters": SCHEMA, "strict": True}
    assert (sent["tools"], sent["tool_choice"]) == ([{"type": "function", "function": function}], "required")
    assert [(item.type, item.status) for item in first.output if item.type == "function_call"] == [
        ("function_call", "completed")
    ] * 2
    items: list[Any] = first.output
    assert (items[0].call_id, items[0].name, items[0].arguments) == CALL
    assert (first.tool_choice, first.status, len(first.tools)) == ("required", "completed", 1)
    inference.calls = []
    outputs: list[Any] = [
        {"type": "function_call_output", "call_id": item.call_id, "output": output}
        for item, output in zip(items, ("8", [{"type": "input_text", "text": "9"}]), strict=True)
    ]
    called = {"role": "assistant", "content": None, "tool_calls": [call(*CALL), call("call00002", "add", '{"a": 5}')]}
    gave = [{"role": "tool", "tool_call_id": f"call0000{n}", "content": text} for n, text in ((1, "8"), (2, "9"))]
    # By the response's id, by the items' ids, and by the items themselves.
    references: list[Any] = [{"type": "item_reference", "id": item.id} for item in items]
    returned: list[Any] = [item.model_dump() for item in items]
    ways: list[tuple[list[Any], dict[str, Any]]] = [
        (outputs, {"previous_response_id": first.id}),
        ([HI, *references, *outputs], {}),
        ([HI, *returned, *outputs], {}),
    ]
    for given, more in ways:
        answer = client.responses.create(model=BASE, input=given, tools=[ADD], **more)
        assert asked(inference) == [HI, called, *gave]
        assert answer.output_text == "4"


def test_a_stream_tells_text_and_calls_apart(client: OpenAI, inference: StandIn) -> None:
    inference.words, inference.calls = ["Well"], [CALL]
    events: list[Any] = list(client.responses.create(model=BASE, input="hi", tools=[ADD], stream=True))
    assert [event.type for event in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.output_item.added",
        *["response.function_call_arguments.delta"] * 2,
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.output_index for event in events if hasattr(event, "output_index")] == [0] * 6 + [1] * 5
    text, called = events[-1].response.output
    assert (text.content[0].text, called.arguments) == ("Well", CALL[2])
    assert "".join(event.delta for event in events if "arguments.delta" in event.type) == CALL[2]
    with client.responses.stream(model=BASE, input="hi", tools=[ADD]) as stream:
        parsed: Any = stream.get_final_response().output[1]
    assert parsed.parsed_arguments == {"a": 4}
    # Text and call were one message, and are one when they come back.
    outputs: Any = [{"type": "function_call_output", "call_id": CALL[0], "output": "8"}]
    client.responses.create(model=BASE, input=outputs, previous_response_id=events[-1].response.id)
    assert asked(inference)[1] == {"role": "assistant", "content": "Well", "tool_calls": [call(*CALL)]}


def test_a_choice_is_made_among_the_functions(client: OpenAI, inference: StandIn) -> None:
    named: Any = {"type": "function", "name": "add"}
    answer = client.responses.create(model=BASE, input="hi", tools=[ADD], tool_choice=named, parallel_tool_calls=False)
    sent = inference.sent[-1][1]
    assert sent["tool_choice"] == {"type": "function", "function": {"name": "add"}}
    assert (sent["parallel_tool_calls"], answer.parallel_tool_calls) == (False, False)
    some: Any = {"type": "allowed_tools", "mode": "required", "tools": [named]}
    client.responses.create(model=BASE, input="hi", tools=[ADD | {"name": "sub"}, ADD], tool_choice=some)
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "add"}}]}
    assert inference.sent[-1][1]["tool_choice"] == {"type": "allowed_tools", "allowed_tools": allowed}
    # Which of them are offered, inference says.
    assert len(inference.sent[-1][1]["tools"]) == 2


def test_a_call_that_was_cut_off_cannot_come_back(client: OpenAI, inference: StandIn) -> None:
    inference.calls, inference.reason = [("call00001", "add", '{"a": ')], "length"
    *_, last = client.responses.create(model=BASE, input="hi", tools=[ADD], stream=True)
    assert (last.type, last.response.output[-1].status) == ("response.incomplete", "incomplete")  # type: ignore[union-attr]
    outputs: Any = [{"type": "function_call_output", "call_id": "call00001", "output": "8"}]
    with pytest.raises(openai.BadRequestError, match="JSON object") as refusal:
        client.responses.create(model=BASE, input=outputs, previous_response_id=last.response.id)  # type: ignore[union-attr]
    assert refusal.value.param == "input"


def test_effort_goes_to_the_template(client: OpenAI, inference: StandIn) -> None:
    answer = client.responses.create(model=BASE, input="hi", reasoning={"effort": "low", "summary": "auto"})
    assert inference.sent[-1][1]["reasoning_effort"] == "low"
    assert answer.reasoning is not None
    assert answer.reasoning.effort == "low"


def test_a_conversation_that_became_too_long_is_refused(gateway: Gateway, inference: StandIn) -> None:
    many = [HI, FOUR] * 511 + [HI]
    first = gateway.http.post(PATH, json={"input": many}).json()
    again = gateway.http.post(PATH, json={"input": "a", "previous_response_id": first["id"]})
    assert (again.status_code, again.json()["error"]["param"]) == (400, "input"), again.text


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": [{"role": "root", "content": "a"}]}, "input.0.role"),
        ({"input": [{"role": "user"}]}, "input.0.content"),
        ({"input": [HI, {"type": "function_call_output", "call_id": "c", "output": "x"}]}, "input.1.call_id"),
        ({"input": [HI, {"type": "function_call_output", "call_id": "c"}]}, "input.1.output"),
        ({"input": [HI, {"type": "function_call", "call_id": "c", "arguments": "{}"}]}, "input.1.name"),
        (
            {"input": [HI, {"type": "function_call", "call_id": "c", "name": "f", "arguments": "[]"}]},
            "input.1.arguments",
        ),
        ({"input": [HI, {"type": "web_search_call", "id": "w"}]}, "input.1.type"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input.0.content.0.type",
        ),
        ({"input": [HI, FOUR]}, "input"),
        ({"input": [{"type": "item_reference"}]}, "input.0.id"),
        ({"input": "a", "tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"input": "a", "tools": [{"type": "function"}]}, "tools.0.name"),
        ({"input": "a", "tools": [ADD, ADD]}, "tools"),
        ({"input": "a", "tools": [ADD | {"defer_loading": True}]}, "tools.0.defer_loading"),
        ({"input": "a", "tool_choice": "required"}, "tool_choice"),
        ({"input": "a", "tools": [ADD], "tool_choice": {"type": "function", "name": "sub"}}, "tool_choice"),
        (
            {
                "input": "a",
                "tools": [ADD],
                "tool_choice": {
                    "type": "allowed_tools",
                    "mode": "auto",
                    "tools": [{"type": "function", "name": "sub"}],
                },
            },
            "tool_choice",
        ),
        ({"input": "a", "reasoning": {"effort": "boundless"}}, "reasoning.effort"),
        ({"input": "a", "conversation": "conv_1"}, "conversation"),
        ({"input": "a", "background": True}, "background"),
        ({"input": "a", "truncation": "auto"}, "truncation"),
        ({"input": "a", "temperature": 9}, "temperature"),
        ({"input": "a", "surprise": 1}, "surprise"),
    ],
)
def test_what_is_refused_is_named(gateway: Gateway, inference: StandIn, body: dict[str, Any], param: str) -> None:
    answer = gateway.http.post(PATH, json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
    assert inference.sent == []
    assert gateway.http.post(PATH, json={"input": "a"}).is_success


def test_refusals_of_inference_pass(gateway: Gateway, inference: StandIn) -> None:
    inference.status = 429
    for stream in (False, True):
        answer = gateway.http.post(PATH, json={"input": "a", "stream": stream})
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "overloaded")
        assert answer.headers["retry-after"] == "7"
    unknown = gateway.http.post(PATH, json={"input": "a", "model": "gpt-4o"})
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")


def test_every_field_of_openais_client_is_known() -> None:
    assert set(get_type_hints(ResponseCreateParamsStreaming)) <= set(ResponseBody.model_fields)
