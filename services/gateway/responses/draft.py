"""A chat completion told as a response: its JSON, and the events of its stream in OpenAI's order. No HTTP, no SQL."""

import json
import secrets
import time
from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import BaseModel

from services.gateway.responses.conversation import Chat, joined
from services.gateway.responses.output_items import CallItem, Event, TextItem
from services.gateway.responses.request_schema import ResponseBody


class ResponseDraft:
    """One response while it is made.

    Args:
        body: the request.
        messages: what the model was asked, in chat's form, without the request's own instructions.
        kept: whether it will be kept.
    """

    def __init__(self, body: ResponseBody, messages: Chat, *, kept: bool) -> None:
        self.id = f"resp_{secrets.token_hex(16)}"
        self._messages, self._body, self.kept = messages, body, kept
        self._created, self._model = time.time(), body.model or ""
        self._output: list[TextItem | CallItem] = []
        self._length, self._usage = False, None
        self._number = 0

    def take(self, completion: dict[str, Any]) -> Iterable[str]:
        """Take a chat completion or a chunk of one over. Returns the events of what it adds."""
        self._model = completion.get("model", self._model)
        if completion.get("usage"):
            self._usage = completion["usage"]
        events: list[str] = []
        for choice in completion.get("choices", []):
            said = choice.get("message") or choice.get("delta") or {}
            if said.get("content"):
                events += self._add_text(said["content"])
            for call in said.get("tool_calls") or ():
                events += self._add_call(call)
            self._length = self._length or choice.get("finish_reason") == "length"
        return events

    def finish(self) -> Iterable[str]:
        """Take no more. Returns the events of that but the last; an answer that says nothing is an empty text."""
        begun = [] if self._output else self._begin(TextItem())
        return [*begun, *self._close(self._last_status)]

    def items(self) -> dict[str, dict[str, Any]]:
        """What is kept of the finished response, by id."""
        answered = [item.message for item in self._output]
        whole = {"messages": [*self._messages, *joined(answered)], "response": self.response()}
        return {self.id: whole} | {item.id: {"messages": [item.message]} for item in self._output}

    def response(self, status: str = "", error: dict[str, Any] | None = None) -> dict[str, Any]:
        """The response as it stands: finished, unless `status` says otherwise."""
        body, over = self._body, not status
        status = status or self._last_status
        choice = body.tool_choice
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
            "output": self._output_json() if over else [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": body.reasoning and body.reasoning.effort, "summary": None},
            "store": self.kept,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": self._format()},
            "tool_choice": choice.model_dump() if isinstance(choice, BaseModel) else choice or "auto",
            "tools": [tool.as_offered for tool in body.tools or []],
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": self._counts() if over else None,
            "user": None,
            "metadata": body.metadata or {},
        }

    def beginning(self) -> Iterator[str]:
        """The events before the first text or call."""
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self.response("in_progress"))

    def end(self) -> str:
        """The last event."""
        response = self.response()
        return self._event(f"response.{response['status']}", response=response)

    def failed(self, error: dict[str, Any]) -> str:
        """The event of a stream that broke."""
        known = {"code": "server_error", "message": error.get("message") or "the answer broke off"}
        return self._event("response.failed", response=self.response("failed", known))

    def _add_text(self, text: str) -> Iterator[str]:
        if not (self._output and isinstance(self._output[-1], TextItem)):
            yield from self._begin(TextItem())
        yield from self._told([self._output[-1].added(text)])

    def _add_call(self, call: dict[str, Any]) -> Iterator[str]:
        """A call whole, or what a chunk adds to one: its id comes first, and its arguments before the next call."""
        function = call["function"]
        if call.get("id"):
            yield from self._begin(CallItem(call["id"], function["name"]))
        if function.get("arguments"):
            yield from self._told([self._output[-1].added(function["arguments"])])

    def _begin(self, item: TextItem | CallItem) -> Iterator[str]:
        if self._output:
            yield from self._close("completed")
        self._output.append(item)
        yield from self._told(item.opened())

    def _close(self, status: str) -> Iterator[str]:
        yield from self._told(self._output[-1].closed(status))

    @property
    def _last_status(self) -> str:
        return "incomplete" if self._length else "completed"

    def _told(self, events: Iterable[Event]) -> Iterator[str]:
        """Events about the item that is being made."""
        for kind, fields in events:
            yield self._event(kind, output_index=len(self._output) - 1, **fields)

    def _event(self, kind: str, **fields: Any) -> str:
        event = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return json.dumps(event, ensure_ascii=False)

    def _output_json(self) -> list[dict[str, Any]]:
        *earlier, last = self._output
        return [*(item.as_json("completed") for item in earlier), last.as_json(self._last_status)]

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
