"""Fields that are taken and not acted on, and how a client is told: by one header that names them.

Owns the mark of such a field, and the one of a field that may hold its neutral value only. Which fields there are is
said by the bodies, each with its reason (`shared.inference_api.other_servers` has most of them).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import BaseModel, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

# On an answer: the fields of its request that were taken and not acted on, separated by commas.
IGNORED_PARAMETERS = "x-ignored-parameters"
# What says nothing, whatever field it is in.
UNSAID: tuple[Any, ...] = (None, "", [], {})


@dataclass(frozen=True, slots=True)
class Ignored:
    """Marks a field whose value changes nothing here: it is taken, whatever it holds, and named in the header.

    Attributes:
        reason: why nothing is lost by that.
    """

    reason: str

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return handler(schema) | {"description": f"Taken and ignored: {self.reason}."}


class Only:
    """Marks a field that asks for what is not built: refused by its name, unless it holds a neutral value or none.

    Args:
        neutral: values that ask for what is done anyway; without any, those that are false.
        unsaid: values that ask for nothing at all.
        instead: what the refusal says to do.
    """

    def __init__(self, *neutral: Any, unsaid: tuple[Any, ...] = UNSAID, instead: str = "") -> None:
        self.neutral = (*unsaid, *(neutral or (False, 0)))
        self.instead = instead
        self._refusal = "not supported by this server" + (f"; {instead}" if instead else "")

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._checked, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {
            "enum": list(self.neutral),
            "description": "Not supported; only a value that asks for nothing is taken.",
        }

    def _checked(self, value: Any) -> Any:
        if value not in self.neutral:
            raise PydanticCustomError("not_built", "{refusal}", {"refusal": self._refusal})
        return value


def take_ignored(body: BaseModel) -> list[str]:
    """Names of the fields, dotted, that say something and are not acted on; each is unset, so that it goes no further.

    Of lists the index is left out: `messages.reasoning` stands for any number of messages.
    """
    return list(dict.fromkeys(_taken(body, "")))


def _taken(body: BaseModel, prefix: str) -> Iterator[str]:
    for name in sorted(body.model_fields_set):
        value = getattr(body, name)
        if name in _ignored_fields(type(body)):
            body.model_fields_set.discard(name)
            if value not in UNSAID:
                yield prefix + name
        elif isinstance(value, BaseModel):
            yield from _taken(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            for each in value:
                if not isinstance(each, BaseModel):
                    break
                yield from _taken(each, f"{prefix}{name}.")


@cache
def _ignored_fields(body: type[BaseModel]) -> frozenset[str]:
    fields = body.model_fields.items()
    return frozenset(name for name, field in fields if any(isinstance(mark, Ignored) for mark in field.metadata))
