"""The prompt of a request, and the token ids it becomes through the right template.

The template is the adapter's own, from its manifest. Without an adapter it is the base's chat template, if it has one.
"""

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from services.inference.engine.admission import prompt_too_long
from shared.datasets.examples import Message, ToolCall
from shared.datasets.templates import InstructionTemplate, Prompt, Template
from shared.datasets.tokens import Tokenizer
from shared.inference_api.fields import ChatMessage

# Up to this many characters, encoding takes less time than handing it to a thread.
_SHORT = 4096


@dataclass(frozen=True, slots=True)
class RawText:
    """Text as it stands."""

    text: str

    @property
    def size_hint(self) -> int:
        return len(self.text) // 4 + 1


@dataclass(frozen=True, slots=True)
class RawIds:
    """Token ids as they stand."""

    ids: Sequence[int]

    @property
    def size_hint(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class InstructionSource:
    instruction: str
    input: str = ""

    @property
    def size_hint(self) -> int:
        return (len(self.instruction) + len(self.input)) // 4 + 1


@dataclass(frozen=True, slots=True)
class ChatSource:
    """A conversation.

    Attributes:
        tools: functions that may be called, as in `Template.chat`.
        variables: for the chat template; see there.
        effort: `reasoning_effort`, for templates that have a switch for it; `variables` go before it.
        continue_final: whether an assistant's last message is to be continued; else it is history like the others.
    """

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)
    effort: str | None = None
    continue_final: bool = True

    @property
    def size_hint(self) -> int:
        offered = sum(len(json.dumps(tool)) for tool in self.tools)
        return (offered + sum(len(message.content) for message in self.messages)) // 4 + 1


def template_of(template: Template | None, tokenizer: Tokenizer) -> Template:
    """The template that questions are laid out with: the adapter's, the base's own, or the plain one."""
    return template or tokenizer.chat or InstructionTemplate()


PromptSource = RawText | RawIds | InstructionSource | ChatSource
"""`size_hint` estimates the prompt's tokens (about four characters each) before its template is known."""


def plain(messages: Sequence[ChatMessage]) -> list[Message]:
    """The messages as templates know them; what a function answered names the function that its call named."""
    called: dict[str, str] = {}
    made: list[Message] = []
    for each in messages:
        calls = tuple(
            ToolCall(call.function.name, json.loads(call.function.arguments or "{}"), call.id or "")
            for call in each.tool_calls or []
        )
        called |= {call.id: call.name for call in calls}
        answers = each.tool_call_id or ""
        made.append(
            Message(
                "system" if each.role == "developer" else each.role,
                each.text,
                tool_calls=calls,
                tool_call_id=answers,
                name=called.get(answers, ""),
            )
        )
    return made


async def ids_of(
    source: PromptSource, tokenizer: Tokenizer, template: Template | None, *, most_tokens: int | None = None
) -> tuple[str, list[int]]:
    """The prompt's text and token ids.

    Args:
        template: the adapter's; None for the base or an adapter that names none.
        most_tokens: a text that must have more than these is refused before it is encoded.

    Raises:
        InvalidRequest: the template cannot express the request, or it is far too long.
    """
    if isinstance(source, RawIds):
        return "", list(source.ids)
    prompt = _prompt(source, template_of(template, tokenizer))
    text = prompt.whole_text
    if most_tokens is not None and (fewest := tokenizer.fewest_tokens(text)) > most_tokens:
        raise prompt_too_long(f"at least {fewest}", most_tokens)
    if len(text) <= _SHORT:
        return text, tokenizer.encode_prompt(prompt)
    return text, await asyncio.to_thread(tokenizer.encode_prompt, prompt)


def _prompt(source: RawText | InstructionSource | ChatSource, template: Template) -> Prompt:
    if isinstance(source, RawText):
        return Prompt(source.text)
    if isinstance(source, InstructionSource):
        return template.instruction(source.instruction, source.input)
    variables = {**(template.effort(source.effort) if source.effort else {}), **source.variables}
    return template.chat(source.messages, tools=source.tools, variables=variables, continue_final=source.continue_final)
