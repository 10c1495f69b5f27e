"""Conversations in rows: the messages of OpenAI's form and of ShareGPT's, their switches, parts and tool calls."""

from typing import Any, Literal

from shared.datasets.examples import Chat, Message, Role, ToolCall
from shared.datasets.fields import MEDIA, Unused, json_field, kind_of, refuse_keys, said, text_field
from shared.datasets.reader import RowError

# A chat template renders a conversation once for each of its replies: time grows with the square of their number.
MAX_MESSAGES = 512
ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
# What ShareGPT's exports and the tools that read them write in `from`, beside the roles.
SPEAKERS: dict[str, Role] = ROLES | {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
PARTS = ("text", "input_text", "output_text")
# axolotl's two, and ms-swift's.
SWITCHES = ("train", "training", "loss")
REASONING = ("reasoning_content", "reasoning", "thinking")
_MEANT = {"role", "content", "from", "value", "weight", "tool_calls", "function_call", "tool_call_id"}
_PLAIN = {"role", "content"}
_KNOWN = _MEANT | {*SWITCHES, *REASONING}


def parse_chat(row: dict[str, Any], key: Literal["messages", "conversations"], unused: Unused) -> Chat:
    """The conversation under `key`, after the row's `system`, with its `tools` or `functions`.

    Raises:
        RowError: a message or a tool does not fit, or there is nothing to learn.
    """
    refuse_keys(row, ("history",), f"is not supported beside '{key}': write its turns as messages")
    messages = parse_messages(row[key], key, unused)
    system = text_field(row, "system", optional=True)
    if system:
        if any(message.role == "system" for message in messages):
            raise RowError("system", "wrong_value", f"'system' stands beside a system message in '{key}': keep one")
        messages = (Message("system", system), *messages)
    if not any(message.role == "assistant" and message.weight for message in messages):
        raise RowError(key, "nothing_to_learn", "no assistant message to learn from")
    return Chat(messages, _tools(row))


def parse_messages(value: object, key: str, unused: Unused) -> tuple[Message, ...]:
    """The messages of a list, each an object with `role` and `content`, or `from` and `value`.

    Args:
        key: what the list is called.

    Raises:
        RowError: one does not fit, or there are none, or too many.
    """
    if not isinstance(value, list) or not value:
        raise RowError(key, "wrong_type", f"'{key}' must be a list of at least one message")
    if len(value) > MAX_MESSAGES:
        raise RowError(
            key, "too_many_messages", f"a row has at most {MAX_MESSAGES} messages, this one has {len(value)}"
        )
    messages = []
    for index, item in enumerate(value):
        path = f"{key}[{index}]"
        if not isinstance(item, dict):
            raise RowError(path, "wrong_type", f"a message must be an object, not {kind_of(item)}")
        messages.append(_message(item, f"{path}.", f"{key}[].", unused))
    return tuple(messages)


def _message(item: dict[str, Any], path: str, any_path: str, unused: Unused) -> Message:
    plain = ROLES.get(item["role"]) if item.keys() == _PLAIN and isinstance(item["role"], str) else None
    if plain is not None and isinstance(item["content"], str):
        # Most messages say nothing else, and there may be millions.
        return Message(plain, text_field(item, "content", path=path, blank=plain in ("system", "tool")))
    sharegpt = item.get("role") is None and item.get("from") is not None
    role_key, content_key = ("from", "value") if sharegpt else ("role", "content")
    roles, speaker = SPEAKERS if sharegpt else ROLES, item.get(role_key)
    role = roles.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise RowError(path + role_key, "unknown_role", f"'{role_key}' must be one of {', '.join(roles)}")
    refuse_keys(item, (*MEDIA, "refusal", "train_detail", "training_detail"), "is not supported", path)
    known = _KNOWN | ({"name"} if role == "tool" else set())
    for key, value in item.items():
        if key not in known and said(value):
            unused(any_path + key)
    if speaker == "function_call":
        written = json_field(item.get(content_key), path + content_key)
        calls = tuple(_call(call, path + content_key) for call in (written if isinstance(written, list) else [written]))
        content = ""
    else:
        calls = _calls(item, path)
        content = _content(item, content_key, path, blank=role in ("system", "tool") or bool(calls))
    reasoning = _reasoning(item, path)
    if role != "assistant" and (calls or reasoning):
        raise RowError(path[:-1], "wrong_value", f"only an assistant thinks and calls tools, not a {role}")
    return Message(
        role,
        content,
        _weight(item, role, path),
        reasoning,
        calls,
        text_field(item, "tool_call_id", path=path, optional=True),
        text_field(item, "name", path=path, optional=True) if role == "tool" else "",
    )


def _content(item: dict[str, Any], key: str, path: str, *, blank: bool) -> str:
    value = item.get(key)
    if value is None and blank:
        return ""
    if not isinstance(value, list):
        return text_field(item, key, path=path, blank=blank)
    texts = []
    for index, part in enumerate(value):
        place = f"{path}{key}[{index}]"
        if not isinstance(part, dict):
            raise RowError(place, "wrong_type", f"a part of '{key}' must be an object, not {kind_of(part)}")
        if part.get("type") not in PARTS:
            shown = str(part.get("type"))[:40]
            raise RowError(f"{place}.type", "unsupported_part", f"parts of type {shown!r} are not supported, only text")
        texts.append(text_field(part, "text", path=f"{place}.", blank=True))
    return text_field({key: "".join(texts)}, key, path=path, blank=blank)


def _weight(item: dict[str, Any], role: Role, path: str) -> Literal[0, 1]:
    weights: dict[str, bool] = {}
    for key in ("weight", *SWITCHES):
        value = item.get(key)
        if value is None:
            continue
        if value not in (0, 1) or (key == "weight" and isinstance(value, bool)):
            allowed = "0 or 1" if key == "weight" else "true or false"
            raise RowError(path + key, "wrong_value", f"'{key}' must be {allowed}")
        if key != "weight" and value and role != "assistant":
            raise RowError(
                path + key,
                "unsupported_key",
                f"'{key}' of a {role} message: of single messages only the assistant's are learnt",
            )
        weights[key] = bool(value)
    if len(set(weights.values())) > 1:
        raise RowError(path[:-1], "wrong_value", f"{' and '.join(map(repr, weights))} contradict each other")
    return 0 if False in weights.values() else 1


def _reasoning(item: dict[str, Any], path: str) -> str:
    texts = {key: text_field(item, key, path=path, optional=True) for key in REASONING}
    different = sorted({text for text in texts.values() if text})
    if len(different) > 1:
        named = " and ".join(repr(key) for key, text in texts.items() if text)
        raise RowError(path[:-1], "wrong_value", f"{named} contradict each other")
    return different[0] if different else ""


def _calls(item: dict[str, Any], path: str) -> tuple[ToolCall, ...]:
    old, new = item.get("function_call"), item.get("tool_calls")
    if said(old) and said(new):
        raise RowError(path[:-1], "wrong_value", "give 'tool_calls' or 'function_call', not both")
    if said(old):
        return (_call(json_field(old, path + "function_call"), path + "function_call"),)
    if not said(new):
        return ()
    calls = json_field(new, path + "tool_calls")
    if not isinstance(calls, list):
        raise RowError(path + "tool_calls", "wrong_type", f"'tool_calls' must be a list, not {kind_of(calls)}")
    return tuple(_call(call, f"{path}tool_calls[{index}]") for index, call in enumerate(calls))


def _call(call: object, path: str) -> ToolCall:
    if not isinstance(call, dict):
        raise RowError(path, "wrong_type", f"a tool call must be an object, not {kind_of(call)}")
    if call.get("type", "function") != "function":
        raise RowError(f"{path}.type", "unsupported_key", "only functions can be called")
    function = call.get("function", call)
    if not isinstance(function, dict):
        raise RowError(f"{path}.function", "wrong_type", f"'function' must be an object, not {kind_of(function)}")
    place = f"{path}.function." if "function" in call else f"{path}."
    written = function.get("arguments")
    arguments = json_field(written, place + "arguments") if said(written) else {}
    if not isinstance(arguments, dict):
        raise RowError(
            place + "arguments", "wrong_type", f"'arguments' must be an object or one as JSON, not {kind_of(arguments)}"
        )
    return ToolCall(
        text_field(function, "name", path=place), arguments, text_field(call, "id", path=f"{path}.", optional=True)
    )


def _tools(row: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    if said(row.get("tools")) and said(row.get("functions")):
        raise RowError("functions", "wrong_value", "give 'tools' or 'functions', not both")
    key = "tools" if said(row.get("tools")) else "functions"
    if not said(row.get(key)):
        return ()
    tools = json_field(row[key], key)
    if not isinstance(tools, list):
        raise RowError(key, "wrong_type", f"'{key}' must be a list, not {kind_of(tools)}")
    return tuple(_tool(tool, f"{key}[{index}]") for index, tool in enumerate(tools))


def _tool(tool: object, path: str) -> dict[str, Any]:
    if not isinstance(tool, dict):
        raise RowError(path, "wrong_type", f"a tool must be an object, not {kind_of(tool)}")
    if "function" not in tool:
        # OpenAI's older `functions`, and what other tools write.
        tool = {"function": {key: value for key, value in tool.items() if key != "type"}}
    function = tool["function"]
    if tool.get("type", "function") != "function" or not isinstance(function, dict):
        raise RowError(path, "unsupported_key", "only functions can be tools")
    text_field(function, "name", path=f"{path}.function." if path.startswith("tools") else f"{path}.")
    return {"type": "function"} | tool
