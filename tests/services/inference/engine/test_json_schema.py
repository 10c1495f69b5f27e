"""Which objects are closed, and that whatever is drawn is still of the schema that was asked for."""

import json
from typing import Any

import pytest
from jsonschema_rs import validator_for

from services.inference.engine.grammar import Grammars
from services.inference.engine.json_schema import for_grammar
from shared.datasets.tokens import Tokenizer
from tests.services.inference.engine.test_grammar import compiled, drawn
from tests.services.inference.harness import Tiny

A = {"a": {"type": "boolean"}}
OPEN = {"type": "object", "properties": A, "required": ["a"]}
CLOSED = {**OPEN, "additionalProperties": False}
# As generators of schemas write nested models.
NESTED = {
    "type": "object",
    "properties": {"one": {"$ref": "#/$defs/A"}, "some": {"type": "array", "items": OPEN}},
    "$defs": {"A": OPEN},
}
NESTED_CLOSED = {
    "type": "object",
    "properties": {"one": {"$ref": "#/$defs/A"}, "some": {"type": "array", "items": CLOSED}},
    "$defs": {"A": CLOSED},
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer(tiny: Tiny) -> Tokenizer:
    return tiny.load().tokenizer


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer, tokenizer.vocabulary)


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    made = for_grammar(schema, lenient=True)
    assert made.pop("x-guidance")["lenient"]
    return made


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        (OPEN, CLOSED),
        ({"type": "object", "properties": {}}, {"type": "object", "properties": {}, "additionalProperties": False}),
        (NESTED, NESTED_CLOSED),
        ({"anyOf": [OPEN, {"type": "null"}]}, {"anyOf": [CLOSED, {"type": "null"}]}),
        (
            {"additionalProperties": OPEN, "prefixItems": [OPEN]},
            {"additionalProperties": CLOSED, "prefixItems": [CLOSED]},
        ),
        (
            {"properties": {"b": {"allOf": [OPEN]}}},
            {"properties": {"b": {"allOf": [CLOSED]}}, "additionalProperties": False},
        ),
    ],
)
def test_objects_that_list_their_properties_are_closed(schema: dict[str, Any], expected: dict[str, Any]) -> None:
    before = json.dumps(schema)
    assert closed(schema) == expected
    assert json.dumps(schema) == before


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object"},
        {**OPEN, "additionalProperties": True},
        {**OPEN, "additionalProperties": {"type": "integer"}},
        {**OPEN, "required": ["a", "b"]},
        {**OPEN, "minProperties": 2},
        {**OPEN, "patternProperties": {"^x": {"type": "integer"}}},
        {"allOf": [OPEN, {"properties": {"b": {"type": "integer"}}}]},
        {**OPEN, "anyOf": [{"properties": {"b": {"type": "integer"}}}, {"required": ["c"]}]},
        {"$defs": {"b": OPEN}, "$ref": "#/$defs/b", "properties": {"c": {"type": "null"}}},
        {"const": OPEN},
        {"type": "array", "items": {"enum": [OPEN]}, "default": [OPEN]},
    ],
)
def test_what_says_otherwise_stays_as_it_is(schema: dict[str, Any]) -> None:
    assert closed(schema) == schema


@pytest.mark.parametrize("schema", [{"properties": [1]}, {**OPEN, "required": "a"}, {"allOf": 3}, {"anyOf": {"a": 1}}])
def test_what_is_no_schema_is_left_to_the_library(schema: dict[str, Any]) -> None:
    assert closed(schema) == schema


def test_who_insists_gets_the_schema_to_the_letter() -> None:
    assert for_grammar(NESTED, lenient=False) == {**NESTED, "x-guidance": for_grammar({}, lenient=False)["x-guidance"]}


@pytest.mark.parametrize("schema", [OPEN, NESTED])
def test_nothing_is_added_that_was_not_listed(grammars: Grammars, tokenizer: Tokenizer, schema: dict[str, Any]) -> None:
    """A model that draws at random would go on with names of its own."""
    own = compiled(grammars, "lenient_json_schema", schema)
    for seed in range(10):
        value = json.loads(drawn(own, tokenizer, seed))
        assert validator_for(schema).is_valid(value)
        assert set(value) <= set(schema["properties"])
