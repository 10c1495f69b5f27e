"""Items of responses as messages of chat: calls that follow one another are one message's. No HTTP, no SQL."""

from collections.abc import Iterator, Sequence
from typing import Any

from services.gateway.responses.request_schema import InputItem

Chat = list[dict[str, Any]]


def message_of(item: InputItem) -> dict[str, Any]:
    """A message, a call or the output of one; neither reasoning nor a reference."""
    if item.kind == "function_call":
        return calling(item.call_id or "", item.name or "", item.arguments or "{}")
    if item.kind == "function_call_output":
        return {"role": "tool", "tool_call_id": item.call_id, "content": item.text}
    return {"role": item.role, "content": item.text}


def calling(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    """The assistant's message of one call."""
    call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def joined(messages: Sequence[dict[str, Any]]) -> Chat:
    """The same conversation with calls in the message of the assistant that they follow."""
    chat: Chat = []
    for message in messages:
        calls = message.get("tool_calls")
        if calls and message["content"] is None and chat and chat[-1]["role"] == "assistant":
            chat[-1] = chat[-1] | {"tool_calls": [*chat[-1].get("tool_calls", []), *calls]}
        else:
            chat.append(message)
    return chat


def calls_in(messages: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Ids of the calls of a conversation."""
    return (call["id"] for message in messages for call in message.get("tool_calls") or ())
