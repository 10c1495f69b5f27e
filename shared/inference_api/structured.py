"""What an answer must look like: OpenAI's `response_format`, and text-generation-inference's `grammar`.

Owns the bodies only; whether a schema can be followed, the engine's grammar library says.
"""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from shared.inference_api.fields import Body

Kind = Literal["json_schema", "lenient_json_schema", "regex"]
Schema = dict[str, Any]


class JsonSchemaFormat(Body):
    """A named JSON schema.

    Attributes:
        strict: every keyword of the schema is followed, or the request is refused; else those that cannot be followed
            are passed over.
    """

    # The name `schema` is pydantic's own.
    model_config = ConfigDict(serialize_by_alias=True)

    name: Annotated[str, Field(max_length=64)] | None = None
    description: Annotated[str, Field(max_length=4096)] | None = None
    json_schema: Annotated[Schema | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Body):
    """OpenAI's forms; and what other servers' clients send in their place: a schema beside `json_object`.

    Attributes:
        json_schema: OpenAI's, of type `json_schema`.
        own_schema: LoRAX's and llama.cpp's, of type `json_object`.
    """

    model_config = ConfigDict(serialize_by_alias=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None
    own_schema: Annotated[Schema | None, Field(alias="schema")] = None

    @property
    def grammar(self) -> tuple[Kind, str] | None:
        """The kind and the source of what the text must follow; None if it is free."""
        if self.type == "text":
            return None
        named = self.json_schema
        kind: Kind = "json_schema" if named and named.strict else "lenient_json_schema"
        return kind, _written((named and named.json_schema) or self.own_schema or {"type": "object"})

    @model_validator(mode="after")
    def _says_what(self) -> Self:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("a response_format of type json_schema needs json_schema")
        return self


class GrammarBody(Body):
    """text-generation-inference's: a JSON schema (an object or its JSON), one with a name, or a regular expression."""

    type: Literal["json", "json_object", "json_schema", "regex"]
    value: Schema | Annotated[str, Field(max_length=65_536)]

    @property
    def grammar(self) -> tuple[Kind, str]:
        """The kind and the source of what the text must follow."""
        if self.type == "regex" and isinstance(self.value, str):
            return "regex", self.value
        value = self.value
        if self.type == "json_schema" and isinstance(value, dict):
            value = value.get("schema", value)
        return "json_schema", value if isinstance(value, str) else _written(value)

    @model_validator(mode="after")
    def _pattern_is_text(self) -> Self:
        if self.type == "regex" and not isinstance(self.value, str):
            raise ValueError("a grammar of type regex needs a pattern")
        return self


def _written(schema: Schema) -> str:
    # The order of properties is the order in which they are generated.
    return json.dumps(schema, separators=(",", ":"))
