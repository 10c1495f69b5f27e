"""What is wrong with a request, in one sentence and under the name that its client wrote.

Pydantic puts names of its own between those of the client (the branches of a union, types that it has wrapped) and
some into its messages; none of them leaves here. Knows no service and no dialect.
"""

import re
from collections.abc import Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError

from shared.errors import InvalidRequest

# The type of an error that a model raises itself for a field it does not know; `named` says which one.
UNKNOWN_FIELD = "unknown_field"
_UNKNOWN = ("extra_forbidden", UNKNOWN_FIELD)
_PLAIN = re.compile(r"[A-Za-z0-9_\-\[\]]{1,128}")
# Pydantic's messages that name classes.
_WORDS = {
    "model_type": "Input should be an object",
    "model_attributes_type": "Input should be an object",
    "dict_type": "Input should be an object",
    "dataclass_type": "Input should be an object",
    "is_instance_of": "Input is of the wrong type",
}
_SHOULD_BE = "Input should be "
_WITHIN = "within"


def named(*location: str | int) -> dict[str, Any]:
    """Context for an error that a model raises about a part of itself: the part's place within it."""
    return {_WITHIN: list(location)}


def validation_error(error: RequestValidationError) -> InvalidRequest:
    """The first thing wrong with a request, named by its field.

    The offending value is not echoed: it may be NaN, a lone surrogate or a secret.
    """
    first, location, others = _furthest([(each, *_written(each, error.body)) for each in error.errors()])
    if first["type"] == "json_invalid":
        return InvalidRequest("the body is not valid JSON", code="invalid_json")
    if first["type"] in _UNKNOWN:
        return _unknown_field(_plain(location[:-1]), location[-1])
    if isinstance(error.body, bytes) and not location:
        # FastAPI leaves a body that is not said to be JSON as it is; curl says that a body is a form.
        return InvalidRequest("send the header 'Content-Type: application/json' with a JSON body", code="not_json")
    field = ".".join(_plain(location)) or None
    message = _message([first, *others])
    return InvalidRequest(f"{field}: {message}" if field else message, param=field)


def _written(error: Any, body: Any) -> tuple[list[str], tuple[Any, ...] | None]:
    """Of an error's location what the client wrote or should have, and the place of the first union on the way."""
    source, *steps = error["loc"]
    if source != "body":
        return [str(step) for step in steps], None
    written: list[str] = []
    union = None
    for number, step in enumerate(steps, 1):
        in_list = isinstance(body, list) and isinstance(step, int) and 0 <= step < len(body)
        if in_list or (isinstance(body, dict) and step in body):
            body = body[step]
        elif error["type"] != "missing" or number < len(steps):
            union = error["loc"][:number] if union is None else union
            continue
        written.append(str(step))
    return written + [str(step) for step in error.get("ctx", {}).get(_WITHIN, ())], union


def _furthest(
    errors: Sequence[tuple[Any, list[str], tuple[Any, ...] | None]],
) -> tuple[Any, list[str], list[Any]]:
    """The first error, its place, and the others there; of a union, that of the branch that fits furthest."""
    first, location, union = errors[0]
    if union is None or first["type"] in _UNKNOWN:
        return first, location, []
    of_union = [(each, place) for each, place, _ in errors if each["loc"][: len(union)] == union]
    # What is of another type altogether fits least.
    best, location = max(of_union, key=lambda each: (len(each[1]), not each[0]["type"].endswith("_type")))
    return best, location, [each for each, place in of_union if place == location and each is not best]


def _message(errors: Sequence[Any]) -> str:
    """What is wrong in one place; of a union all that it might have been."""
    messages = [_WORDS.get(each["type"]) or str(each["msg"]).removeprefix("Value error, ") for each in errors]
    might = dict.fromkeys(
        message.removeprefix(_SHOULD_BE).partition(", unable to parse")[0]
        for message in messages
        if message.startswith(_SHOULD_BE)
    )
    if len(might) < 2 or not messages[0].startswith(_SHOULD_BE):
        return messages[0]
    return _SHOULD_BE + (", or " if any(" or " in each for each in might) else " or ").join(might)


def _plain(location: Sequence[str]) -> list[str]:
    return [part for part in location if _PLAIN.fullmatch(part)]


def _unknown_field(within: list[str], name: str) -> InvalidRequest:
    if _PLAIN.fullmatch(name):
        field = ".".join([*within, name])
        return InvalidRequest(f"unknown field '{field}'", param=field, code="unknown_field")
    where = ".".join(within) or None
    place = f" in '{where}'" if where else ""
    return InvalidRequest(f"unknown field {name[:60]!r}{place}", param=where, code="unknown_field")
