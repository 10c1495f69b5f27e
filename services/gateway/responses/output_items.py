"""What an answer consists of: texts and calls of functions, each as JSON, as events and as a message of chat."""

import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from services.gateway.responses.conversation import calling

# The type of an event, and its fields but those that every event has and `output_index`.
Event = tuple[str, dict[str, Any]]


@dataclass
class TextItem:
    """A message of the assistant."""

    text: str = ""
    id: str = field(default_factory=lambda: f"msg_{secrets.token_hex(16)}")

    @property
    def message(self) -> dict[str, Any]:
        return {"role": "assistant", "content": self.text}

    def as_json(self, status: str) -> dict[str, Any]:
        content = [] if status == "in_progress" else [self._part()]
        return {"id": self.id, "type": "message", "role": "assistant", "status": status, "content": content}

    def opened(self) -> Iterator[Event]:
        yield "response.output_item.added", {"item": self.as_json("in_progress")}
        yield "response.content_part.added", {**self._place, "part": self._part()}

    def added(self, text: str) -> Event:
        self.text += text
        return "response.output_text.delta", {**self._place, "delta": text, "logprobs": []}

    def closed(self, status: str) -> Iterator[Event]:
        yield "response.output_text.done", {**self._place, "text": self.text, "logprobs": []}
        yield "response.content_part.done", {**self._place, "part": self._part()}
        yield "response.output_item.done", {"item": self.as_json(status)}

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self.id, "content_index": 0}

    def _part(self) -> dict[str, Any]:
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": []}


@dataclass
class CallItem:
    """A call of a function.

    Attributes:
        call_id: what the output of the function will name.
        arguments: JSON, as text; an object once it is whole.
    """

    call_id: str
    name: str
    arguments: str = ""
    id: str = field(default_factory=lambda: f"fc_{secrets.token_hex(16)}")

    @property
    def message(self) -> dict[str, Any]:
        return calling(self.call_id, self.name, self.arguments)

    def as_json(self, status: str) -> dict[str, Any]:
        call = {"call_id": self.call_id, "name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function_call", "status": status, **call}

    def opened(self) -> Iterator[Event]:
        yield "response.output_item.added", {"item": self.as_json("in_progress")}

    def added(self, text: str) -> Event:
        self.arguments += text
        return "response.function_call_arguments.delta", {"item_id": self.id, "delta": text}

    def closed(self, status: str) -> Iterator[Event]:
        done = {"item_id": self.id, "name": self.name, "arguments": self.arguments}
        yield "response.function_call_arguments.done", done
        yield "response.output_item.done", {"item": self.as_json(status)}
