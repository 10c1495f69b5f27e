"""Single fields of a row: what is said, and the errors of what is not as it must be."""

import json
from collections.abc import Callable
from typing import Any

from shared.datasets.reader import RowError

Unused = Callable[[str], None]
"""Is given the path of each key of a row that says something and is not learnt from."""

# What other tools read beside texts, in rows and in messages: dropped, it would leave another row.
MEDIA = ("image", "images", "audio", "audios", "video", "videos")


def said(value: object) -> bool:
    """Whether a value says anything: exports of tables fill what is missing with null, clients with empty lists."""
    return value is not None and value != "" and value != [] and value != {}


def text_field(row: dict[str, Any], key: str, *, path: str = "", optional: bool = False, blank: bool = False) -> str:
    """A text of a row.

    Args:
        path: of what holds the key, with its dot.
        optional: it may be missing, null or blank.
        blank: it may be blank.

    Raises:
        RowError: `missing`, `wrong_type`, `blank` or `invalid_text`.
    """
    value = row.get(key)
    if value is None and optional:
        return ""
    if value is None:
        raise RowError(path + key, "missing", f"'{key}' is missing")
    if not isinstance(value, str):
        raise RowError(path + key, "wrong_type", f"'{key}' must be a string, not {kind_of(value)}")
    if not (optional or blank) and not value.strip():
        raise RowError(path + key, "blank", f"'{key}' is blank")
    check_text(value, path + key)
    return value


def check_text(text: str, path: str) -> None:
    """Raises RowError: `invalid_text`: what tokenizers cannot encode."""
    if "\x00" in text:
        raise RowError(path, "invalid_text", f"'{_last(path)}' contains a NUL character")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RowError(path, "invalid_text", f"'{_last(path)}' contains a lone surrogate") from None


def json_field(value: object, path: str) -> Any:
    """A value that may have been written as JSON text, as tables must, without the nulls they fill objects with.

    Raises:
        RowError: `wrong_value`: text that is no JSON; `invalid_text`; `too_deep`.
    """
    try:
        if isinstance(value, str):
            value = json.loads(value, parse_constant=_no_constant)
        return _cleaned(value, path)
    except RecursionError:
        raise RowError(path, "too_deep", "nested too deeply") from None
    except json.JSONDecodeError:
        raise RowError(path, "wrong_value", f"'{_last(path)}' is text that is not JSON") from None


def _cleaned(value: Any, path: str) -> Any:
    """A JSON value whose objects lack what was null in them, and whose texts are sound."""
    if isinstance(value, str):
        check_text(value, path)
    if isinstance(value, dict):
        return {_cleaned(key, path): _cleaned(inner, path) for key, inner in value.items() if inner is not None}
    return [_cleaned(inner, path) for inner in value] if isinstance(value, list) else value


def refuse_keys(row: dict[str, Any], keys: tuple[str, ...], why: str, path: str = "") -> None:
    """Raises RowError: `unsupported_key`: one of the keys says something."""
    for key in keys:
        if said(row.get(key)):
            raise RowError(path + key, "unsupported_key", f"'{key}' {why}")


def kind_of(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _last(path: str) -> str:
    return path.rsplit(".", 1)[-1]


def _no_constant(name: str) -> None:
    raise json.JSONDecodeError(f"{name} is not JSON", name, 0)
