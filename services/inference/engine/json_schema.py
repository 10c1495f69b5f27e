"""A JSON schema as the grammar library takes it, objects closed where nobody says that they are open."""

from collections.abc import Mapping
from typing import Any

# One space, or a line with its indentation: without a bound a small model may go on with spaces until the end.
_WHITESPACE = r"\x20|\x0A\x20{0,32}|\x0A\x09{0,16}"
# With these, what an object may hold is said in several places, none of which may close it for the others.
_DIVIDED = ("allOf", "not", "if", "patternProperties", "unevaluatedProperties", "dependentSchemas", "$dynamicRef")
_BESIDE_PROPERTIES = ("anyOf", "oneOf", "$ref")
_OF_ONE, _OF_MANY = ("items", "additionalProperties"), ("anyOf", "oneOf", "allOf", "prefixItems")
_BY_NAME = ("properties", "$defs", "definitions")


def for_grammar(schema: Mapping[str, Any], *, lenient: bool) -> dict[str, Any]:
    """The schema with the library's options in it.

    Args:
        lenient: keywords that the library does not know are passed over, of `oneOf` several may hold, and objects that
            list their properties have no others. JSON Schema leaves them open, yet most who write one mean it closed,
            and a small model that may go on does.
    """
    options = {
        "whitespace_flexible": True,
        "whitespace_pattern": _WHITESPACE,
        "lenient": lenient,
        "coerce_one_of": lenient,
    }
    return {**(_closed(schema) if lenient else schema), "x-guidance": options}


def _closed(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    return _closed_object(schema) if all(map(_can_close, _schemas_in(schema))) else schema


def _schemas_in(schema: Any) -> list[Mapping[str, Any]]:
    """A schema and all that are in it, but not what only looks like one (`const`, `default`)."""
    found, left = [], [schema]
    while left:
        each = left.pop()
        if isinstance(each, Mapping):
            found.append(each)
            left += [each.get(key) for key in _OF_ONE]
            left += [inner for key in _OF_MANY if isinstance(each.get(key), list) for inner in each[key]]
            left += [inner for key in _BY_NAME if isinstance(each.get(key), Mapping) for inner in each[key].values()]
    return found


def _can_close(schema: Mapping[str, Any]) -> bool:
    # Generators wrap a reference to which they add a description in an `allOf` of its own.
    divided = {key for key in _DIVIDED if key in schema and not (key == "allOf" and _is_single(schema[key]))}
    return not divided and not ("properties" in schema and any(key in schema for key in (*_BESIDE_PROPERTIES, "allOf")))


def _is_single(schemas: Any) -> bool:
    return isinstance(schemas, list) and len(schemas) == 1


def _closed_object(schema: Any) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    made = dict(schema)
    for key in _OF_ONE:
        if key in made:
            made[key] = _closed_object(made[key])
    for key in _OF_MANY:
        if isinstance(made.get(key), list):
            made[key] = [_closed_object(inner) for inner in made[key]]
    for key in _BY_NAME:
        if isinstance(made.get(key), Mapping):
            made[key] = {name: _closed_object(inner) for name, inner in made[key].items()}
    names = made.get("properties")
    if isinstance(names, Mapping) and "additionalProperties" not in made and _all_listed(made, names):
        made["additionalProperties"] = False
    return made


def _all_listed(schema: Mapping[str, Any], names: Mapping[str, Any]) -> bool:
    """Whether an object can be of this schema with the properties that it lists."""
    required, fewest = schema.get("required", []), schema.get("minProperties", 0)
    # A list or number that is none is refused elsewhere, with its reason.
    if not isinstance(required, list) or not isinstance(fewest, int | float):
        return False
    return all(name in names for name in map(str, required)) and fewest <= len(names)
