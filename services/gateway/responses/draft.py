"""A chat completion told as a response: its JSON, and the events of its stream in OpenAI's order. No HTTP, no SQL."""

import json
import secrets
import time
from collections.abc import Iterator
from typing import Any

from services.gateway.responses.request_schema import ResponseBody

_RENAMED = {"max_tokens": "max_output_tokens", "messages": "input", "response_format": "text.format"}


class ResponseDraft:
    """One response while it is made.

    Args:
        body: the request.
        messages: what the model was asked, in chat's form, without the request's own instructions.
        kept: whether it will be kept.
    """

    def __init__(self, body: ResponseBody, messages: list[dict[str, str]], *, kept: bool) -> None:
        self.id, self.item = f"resp_{secrets.token_hex(16)}", f"msg_{secrets.token_hex(16)}"
        self._messages, self._body, self.kept = messages, body, kept
        self._created, self._model = time.time(), body.model or ""
        self._text, self._length, self._usage = "", False, None
        self._number = 0

    def take(self, completion: dict[str, Any]) -> str:
        """Take a chat completion or a chunk of one over. Returns the text that it adds."""
        self._model = completion.get("model", self._model)
        if completion.get("usage"):
            self._usage = completion["usage"]
        added = ""
        for choice in completion.get("choices", []):
            said = choice.get("message") or choice.get("delta") or {}
            added += said.get("content") or ""
            self._length = self._length or choice.get("finish_reason") == "length"
        self._text += added
        return added

    def items(self) -> dict[str, dict[str, Any]]:
        """What is kept of the finished response, by id."""
        answered = {"role": "assistant", "content": self._text}
        return {
            self.id: {"messages": [*self._messages, answered], "response": self.response()},
            self.item: {"messages": [answered]},
        }

    def response(self, status: str = "", error: dict[str, Any] | None = None) -> dict[str, Any]:
        """The response as it stands: finished, unless `status` says otherwise."""
        body, over = self._body, not status
        status = status or ("incomplete" if self._length else "completed")
        return {
            "id": self.id,
            "object": "response",
            "created_at": int(self._created),
            "status": status,
            "error": error,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": self._model,
            "output": [self._message("incomplete" if self._length else "completed")] if over else [],
            "parallel_tool_calls": True,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": None, "summary": None},
            "store": self.kept,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": self._format()},
            "tool_choice": "auto",
            "tools": [],
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": self._counts() if over else None,
            "user": None,
            "metadata": body.metadata or {},
        }

    def beginning(self) -> Iterator[str]:
        """The events before the first text."""
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self.response("in_progress"))
        message = self._message("in_progress") | {"content": []}
        yield self._event("response.output_item.added", output_index=0, item=message)
        yield self._event("response.content_part.added", **self._place(), part=self._part(""))

    def delta(self, added: str) -> str:
        return self._event("response.output_text.delta", **self._place(), delta=added, logprobs=[])

    def end(self) -> Iterator[str]:
        """The events after the last text."""
        yield self._event("response.output_text.done", **self._place(), text=self._text, logprobs=[])
        yield self._event("response.content_part.done", **self._place(), part=self._part(self._text))
        response = self.response()
        yield self._event("response.output_item.done", output_index=0, item=response["output"][0])
        yield self._event(f"response.{response['status']}", response=response)

    def failed(self, error: dict[str, Any]) -> str:
        """The event of a stream that broke."""
        known = {"code": "server_error", "message": error.get("message") or "the answer broke off"}
        return self._event("response.failed", response=self.response("failed", known))

    def _event(self, kind: str, **fields: Any) -> str:
        event = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return json.dumps(event, ensure_ascii=False)

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.item, "output_index": 0, "content_index": 0}

    def _part(self, text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def _message(self, status: str) -> dict[str, Any]:
        content = [self._part(self._text)]
        return {"id": self.item, "type": "message", "role": "assistant", "status": status, "content": content}

    def _format(self) -> dict[str, Any]:
        asked = self._body.text.format if self._body.text else None
        return asked.model_dump(exclude_none=True) if asked else {"type": "text"}

    def _counts(self) -> dict[str, Any]:
        usage = self._usage or {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }


def chat_body(body: ResponseBody, messages: list[dict[str, str]]) -> dict[str, Any]:
    """The chat completion that a response is: its instructions first, which are not handed on to the next one."""
    system = [{"role": "system", "content": body.instructions}] if body.instructions else []
    chat: dict[str, Any] = {
        "messages": [*system, *messages],
        "model": body.model,
        "max_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "stream": bool(body.stream),
        "stream_options": {"include_usage": True} if body.stream else None,
    }
    asked = body.text.format if body.text else None
    if asked and asked.type != "text":
        schema = {"name": asked.name, "schema": asked.json_schema, "strict": asked.strict}
        chat["response_format"] = {"type": asked.type} | (
            {"json_schema": schema} if asked.type == "json_schema" else {}
        )
    return {name: value for name, value in chat.items() if value is not None}


def renamed(param: str | None) -> str | None:
    """A field of chat completions as a response calls it."""
    head, dot, rest = (param or "").partition(".")
    return _RENAMED.get(head, head) + dot + rest if param else None
