"""The chat completion that a response is, and how what it refuses is called in the response's own fields."""

import re
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from services.gateway.responses.conversation import Chat
from services.gateway.responses.request_schema import ResponseBody
from shared.errors import InvalidRequest
from shared.http.validation import validation_error
from shared.inference_api.openai import ChatCompletionBody

_RENAMED = {
    "max_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
}


def chat_request(body: ResponseBody, messages: Chat) -> ChatCompletionBody:
    """Its instructions come first, and are not handed on to the next response.

    Raises:
        InvalidRequest: the tools or the choice among them do not fit, or the conversation is too long or has what
            cannot come back, as arguments that were cut off.
    """
    system = [{"role": "system", "content": body.instructions}] if body.instructions else []
    tools, choice = [tool.as_chat for tool in body.tools or []], body.tool_choice
    chat: dict[str, Any] = {
        "messages": [*system, *messages],
        "model": body.model,
        "max_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "stream": bool(body.stream),
        "stream_options": {"include_usage": True} if body.stream else None,
        "reasoning_effort": body.reasoning and body.reasoning.effort,
        "tools": tools or None,
        "tool_choice": choice if choice is None or isinstance(choice, str) else choice.as_chat,
        "parallel_tool_calls": body.parallel_tool_calls if tools else None,
    }
    asked = body.text.format if body.text else None
    if asked and asked.type != "text":
        schema = {"name": asked.name, "schema": asked.json_schema, "strict": asked.strict}
        chat["response_format"] = {"type": asked.type} | (
            {"json_schema": schema} if asked.type == "json_schema" else {}
        )
    chat = {name: value for name, value in chat.items() if value is not None}
    try:
        return ChatCompletionBody.model_validate(chat)
    except ValidationError as error:
        errors = [each | {"loc": ("body", *each["loc"])} for each in error.errors()]
        refusal = validation_error(RequestValidationError(errors, body=chat))
        param = renamed(refusal.param)
        message = refusal.message.removeprefix(f"{refusal.param}: ")
        raise InvalidRequest(f"{param}: {message}", param=param) from error


def renamed(param: str | None) -> str | None:
    """A field of chat completions as a response calls it; a message by `input`, from which it may have come."""
    if not param or param.split(".")[0] == "messages":
        return param and "input"
    for name, own in _RENAMED.items():
        if param == name or param.startswith(f"{name}."):
            return own + param[len(name) :]
    return re.sub(r"^(tools\.\d+|tool_choice)\.function\b", r"\1", param)
