"""No inner name of pydantic's leaves in a message or a `param`: every body of both services, spoilt at every place."""

import json
import re
from functools import cache
from typing import Any

import pytest
from fastapi.exceptions import RequestValidationError
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from services import openapi
from services.gateway.jobs.request_schema import JobRequest
from services.gateway.responses.request_schema import ResponseBody
from shared.http.validation import validation_error
from shared.inference_api.openai import ChatCompletionBody, CompletionBody
from shared.inference_api.tgi import GenerateBody, Parameters

MODELS: list[type[BaseModel]] = [ChatCompletionBody, CompletionBody, GenerateBody, JobRequest, ResponseBody]
# What a client could have written: names of fields, indexes and keys, one after another.
PARAM = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
INNER = re.compile(
    r"constrained|function-|nullable|\w+\[|Annotated|Union|Optional|pydantic|model_type|instance of|Body\b|Json\b"
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=4),
    st.just("auto"),
    st.just("text"),
)
KEYS = st.sampled_from(["type", "text", "role", "content", "str", "int", "n_epochs", "r", "0", "name", "x y", "\u00e4"])
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=6
)
GOOD: dict[str, Any] = {
    "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "user", "content": "a"}],
    "prompt": "a",
    "inputs": "a",
    "model": "tiny",
    "training_file": "file-1",
    "parameters": {},
    "stream_options": {},
    "hyperparameters": {},
    "lora": {},
    "method": {"type": "supervised", "supervised": {"hyperparameters": {}}},
}


def good(model: type[BaseModel]) -> dict[str, Any]:
    """A body that is taken."""
    if model is ResponseBody:
        return {"input": [{"role": "user", "content": "a"}], "model": "tiny"}
    of_another = "messages" if model is GenerateBody else ""
    return {name: value for name, value in GOOD.items() if name in model.model_fields and name != of_another}


def sentence(model: type[BaseModel], body: Any) -> tuple[str, str | None] | None:
    """(message, param) of the refusal; None if the body is taken."""
    try:
        model.model_validate(body)
    except ValidationError as error:
        errors = [each | {"loc": ("body", *each["loc"])} for each in error.errors()]
        refusal = validation_error(RequestValidationError(errors, body=body))
        return refusal.message, refusal.param
    return None


def written(body: Any) -> set[str]:
    """All words that stand in a body as keys or indexes."""
    if isinstance(body, dict):
        return set(body) | {word for value in body.values() for word in written(value)}
    if isinstance(body, list):
        return {str(n) for n in range(len(body))} | {word for value in body for word in written(value)}
    return set()


@cache
def required(model: type[BaseModel]) -> set[str]:
    """Fields that a client may be told it has left out, in the body or in a part of it, also by its kind."""
    schema = model.model_json_schema()
    parts = [schema, *schema.get("$defs", {}).values()]
    of_items = {"role", "content", "id", "name", "call_id", "arguments", "output", "text", "refusal"}
    return {name for part in parts for name in part.get("required", ())} | of_items | {"training_file"}


def test_all_bodies_are_here() -> None:
    documents = [json.loads(openapi.rendered(name)) for name in openapi.DOCUMENTS]
    operations = [operation for each in documents for item in each["paths"].values() for operation in item.values()]
    contents = [operation["requestBody"]["content"] for operation in operations if "requestBody" in operation]
    named = {
        each["application/json"]["schema"]["$ref"].split("/")[-1] for each in contents if "application/json" in each
    }
    assert named == {model.__name__ for model in MODELS}


@pytest.mark.parametrize("model", MODELS)
def test_the_good_ones_are_taken(model: type[BaseModel]) -> None:
    assert sentence(model, good(model)) is None


@pytest.mark.parametrize("model", MODELS)
@given(data=st.data())
def test_errors_name_what_the_client_wrote(model: type[BaseModel], data: st.DataObject) -> None:
    known = sorted(model.model_fields)
    body = good(model)
    name = data.draw(st.sampled_from(known))
    value = data.draw(ANYTHING)
    if isinstance(GOOD.get(name), dict) and data.draw(st.booleans()):
        inner = data.draw(st.sampled_from(["type", "supervised", "n_epochs", "target_modules", "stop", "x", "top_k"]))
        value = GOOD[name] | {inner: value}
    if name in ("messages", "input") and data.draw(st.booleans()):
        value = [{"role": "user", "content": "a"} | data.draw(st.dictionaries(KEYS, ANYTHING, max_size=2))]
    if name == "messages" and data.draw(st.booleans()):
        value = [{"role": "user", "content": [{"type": "text", "text": "a"}, value]}]
    refused = sentence(model, body | {name: value})
    if refused is None:
        return
    message, param = refused
    assert not INNER.search(message), message
    if param is not None:
        assert PARAM.fullmatch(param), param
        assert set(param.split(".")) <= written(body | {name: value}) | required(model), (param, value)


@pytest.mark.parametrize(
    ("model", "change", "param", "words"),
    [
        (ChatCompletionBody, {"stop": ["1"] * 300}, "stop", "at most 256"),
        (ChatCompletionBody, {"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "string"),
        (ChatCompletionBody, {"messages": [5]}, "messages.0", "should be an object"),
        (ChatCompletionBody, {"stop": {"str": 1}}, None, "stop"),
        (CompletionBody, {"prompt": [[1], "a"]}, None, "prompt"),
        (CompletionBody, {"prompt": {}}, "prompt", "prompt"),
        (GenerateBody, {"parameters": []}, "parameters", "should be an object"),
        (ResponseBody, {"input": [{"role": "user", "content": [5]}]}, "input.0.content.0", "should be an object"),
        (
            ResponseBody,
            {"input": [{"role": "user", "content": [{"type": "text"}]}]},
            "input.0.content.0.text",
            "required",
        ),
        (ChatCompletionBody, {"stop": 5}, "stop", "stop: Input should be a valid string or a valid list"),
        (ChatCompletionBody, {"tool_choice": 5}, "tool_choice", "be 'none', 'auto' or 'required', or an object"),
        (CompletionBody, {"prompt": [1, "b"]}, "prompt.1", "Input should be a valid integer or a valid list"),
        (JobRequest, {"hyperparameters": {"n_epochs": [1]}}, "hyperparameters.n_epochs", "integer"),
        (JobRequest, {"hyperparameters": {"int": 1}}, "hyperparameters.int", "unknown field"),
    ],
)
def test_branches_of_unions_are_left_out(
    model: type[BaseModel], change: dict[str, Any], param: str | None, words: str
) -> None:
    refused = sentence(model, good(model) | change)
    assert refused is not None
    assert words in refused[0]
    assert param is None or refused[1] == param


def numbers(schema: dict[str, Any]) -> bool:
    """Whether a field's schema takes numbers, and neither true nor false."""
    kinds = {each.get("type") for each in [schema, *schema.get("anyOf", [])]}
    return bool(kinds & {"number", "integer"}) and "boolean" not in kinds


@pytest.mark.parametrize("model", [ChatCompletionBody, CompletionBody, Parameters, ResponseBody, JobRequest])
def test_true_and_false_are_no_numbers(model: type[BaseModel]) -> None:
    fields = [name for name, schema in model.model_json_schema()["properties"].items() if numbers(schema)]
    assert fields
    for name in fields:
        for value in (True, False):
            refused = sentence(model, good(model) | {name: value})
            assert refused is not None, name
            assert refused[1] == name


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [1, False]}, "prompt"),
        ({"prompt": [[1], [True]]}, "prompt.1"),
        ({"logit_bias": {"5": True}}, "logit_bias.5"),
    ],
)
def test_nor_are_they_within_others(change: dict[str, Any], param: str) -> None:
    refused = sentence(CompletionBody, good(CompletionBody) | change)
    assert refused is not None
    assert refused[1] is not None
    assert refused[1].startswith(param), refused
