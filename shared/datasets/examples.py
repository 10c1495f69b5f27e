"""What a training example is, whatever form its row was written in. Knows neither rows nor tokens nor templates."""

import json
from dataclasses import dataclass
from typing import Any, Literal

Format = Literal["instruction", "completion", "chat", "text"]
Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class Instruction:
    """`history` holds earlier questions with their answers, which are learnt too; `system` stands before all."""

    instruction: str
    output: str
    input: str = ""
    system: str = ""
    history: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Text:
    """Text of which every token is learnt; one that is longer than a training row becomes several."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function that an assistant wants called; `id` is empty if the row names none."""

    name: str
    arguments: dict[str, Any]
    id: str = ""


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation; an empty string or tuple is what was not said.

    Attributes:
        weight: 0 if an assistant's message is not to be learnt.
        reasoning_content: what an assistant thought before it answered.
        tool_call_id, name: of a tool's message: the call that it answers, and the function that was called.
    """

    role: Role
    content: str
    weight: Literal[0, 1] = 1
    reasoning_content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    name: str = ""


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation, and the functions that its assistant may call: `{"type": "function", "function": {…}}` each."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()


Example = Instruction | Completion | Chat | Text


def format_of(example: Example) -> Format:
    forms: dict[type, Format] = {Instruction: "instruction", Completion: "completion", Chat: "chat", Text: "text"}
    return forms[type(example)]


def texts_of(example: Example) -> list[str]:
    """All texts of an example, in order."""
    if isinstance(example, Instruction):
        before = [text for pair in example.history for text in pair]
        return [*filter(None, [example.system]), *before, example.instruction, example.input, example.output]
    if isinstance(example, Completion):
        return [example.prompt, example.completion]
    if isinstance(example, Text):
        return [example.text]
    tools = [json.dumps(example.tools)] if example.tools else []
    return [*tools, *(text for message in example.messages for text in _texts_of(message))]


def _texts_of(message: Message) -> list[str]:
    if not (message.tool_calls or message.reasoning_content):
        return [message.role, message.content]
    calls = [text for call in message.tool_calls for text in (call.name, json.dumps(call.arguments))]
    return [message.role, *filter(None, [message.reasoning_content]), message.content, *calls]
