"""Fields of other servers' clients: each is taken and named, or refused by name, and none is passed over in silence."""

import json
from typing import Any, TypeVar, get_type_hints

import pytest
from openai.types.chat import ChatCompletionMessage
from openai.types.chat import completion_create_params as chat_params
from openai.types.chat.chat_completion_stream_options_param import ChatCompletionStreamOptionsParam
from openai.types.completion_create_params import CompletionCreateParamsStreaming
from pydantic import BaseModel, ValidationError

from shared.inference_api.fields import Body, ChatMessage, ChatPart
from shared.inference_api.ignored import Ignored, Only, take_ignored
from shared.inference_api.openai import ChatCompletionBody, CompletionBody, StreamOptions
from shared.inference_api.tgi import GenerateBody, Parameters

T = TypeVar("T")
USER = {"role": "user", "content": "a"}
# A smallest request of each kind.
SMALLEST: dict[type[Body], dict[str, Any]] = {
    ChatCompletionBody: {"messages": [USER]},
    CompletionBody: {"prompt": "a"},
    GenerateBody: {"inputs": "a"},
    Parameters: {},
    StreamOptions: {},
    ChatMessage: USER,
    ChatPart: {"type": "text", "text": "a"},
}
ASKING: list[Any] = [7, -0.5, "surprise", ["surprise"], {"surprise": 1}]


def label(body: type[Body]) -> str:
    return body.__name__


def marked(body: type[Body], kind: type[T]) -> list[tuple[str, T]]:
    fields = body.model_fields.items()
    return [(name, mark) for name, field in fields for mark in field.metadata if isinstance(mark, kind)]


@pytest.mark.parametrize("body", SMALLEST, ids=label)
def test_an_ignored_field_takes_anything_is_named_and_goes_no_further(body: type[Body]) -> None:
    for name, mark in marked(body, Ignored):
        assert mark.reason
        for value in [True, "x\ud800", {"a": [float("nan")]}, *ASKING]:
            made = body.model_validate(SMALLEST[body] | {name: value})
            assert take_ignored(made) == [name]
            assert name not in json.loads(made.model_dump_json(exclude_unset=True))
            assert take_ignored(made) == []
        for value in (None, "", [], {}):
            assert take_ignored(body.model_validate(SMALLEST[body] | {name: value})) == [], name


@pytest.mark.parametrize("body", SMALLEST, ids=label)
def test_what_would_change_the_answer_is_refused_by_name_unless_it_asks_for_nothing(body: type[Body]) -> None:
    for name, mark in marked(body, Only):
        for value in mark.neutral:
            assert take_ignored(body.model_validate(SMALLEST[body] | {name: value})) == [], name
        for value in ASKING:
            with pytest.raises(ValidationError) as refused:
                body.model_validate(SMALLEST[body] | {name: value})
            [error] = refused.value.errors()
            assert error["loc"] == (name,)
            assert "not supported by this server" in error["msg"]


def test_there_are_such_fields() -> None:
    assert len(marked(ChatCompletionBody, Ignored)) > 25
    assert len(marked(ChatCompletionBody, Only)) > 40


@pytest.mark.parametrize("body", SMALLEST, ids=label)
def test_null_and_empty_are_unsaid_and_invented_fields_refused(body: type[Body]) -> None:
    required = {name for name, field in body.model_fields.items() if field.is_required()}
    nulls: dict[str, Any] = {name: None for name in body.model_fields if name not in SMALLEST[body]}
    unsaid: dict[str, Any] = {"invented": None, "empty": "", "no_list": [], "nothing": {}}
    made = body.model_validate(SMALLEST[body] | {name: None for name in nulls if name not in required} | unsaid)
    assert not set(unsaid) & set(made.model_dump(exclude_unset=True))
    for value in ASKING:
        with pytest.raises(ValidationError, match="unknown field"):
            body.model_validate(SMALLEST[body] | {"invented": value})


def test_names_are_dotted_without_indexes_and_stand_once() -> None:
    thinking = {"role": "assistant", "content": [{"type": "text", "text": "b", "cache_control": {"type": "x"}}]}
    thinking |= {"reasoning": "because", "id": "msg-1"}
    asked = {
        "messages": [USER, thinking, USER, thinking, USER],
        "user": "me",
        "stream_options": {"include_usage": True},
    }
    body = ChatCompletionBody.model_validate(asked | {"seed": 3, "prompt_cache_key": "k"})
    body.stream_options = StreamOptions(include_usage=True, include_obfuscation=False)
    assert take_ignored(body) == [
        "messages.content.cache_control",
        "messages.id",
        "messages.reasoning",
        "prompt_cache_key",
        "stream_options.include_obfuscation",
        "user",
    ]
    sent = body.model_dump(exclude_unset=True)
    assert sent["messages"][1] == {"role": "assistant", "content": [{"type": "text", "text": "b"}]}
    assert (sent["seed"], sent["stream_options"]) == (3, {"include_usage": True})


def fields(model: type[BaseModel]) -> set[str]:
    return set(model.model_fields)


def test_every_field_of_openais_client_is_known() -> None:
    """The newest client's own types: what OpenAI adds shows up here when the client is upgraded."""
    assert set(get_type_hints(chat_params.CompletionCreateParamsStreaming)) <= fields(ChatCompletionBody)
    assert set(get_type_hints(CompletionCreateParamsStreaming)) <= fields(CompletionBody)
    assert set(get_type_hints(ChatCompletionStreamOptionsParam)) <= fields(StreamOptions)
    assert set(ChatCompletionMessage.model_fields) <= fields(ChatMessage)
