"""How functions and calls are written where a format has no place of its own for them; docs/templates.md describes it.

It is the form that Hermes models made common (NousResearch/Hermes-Function-Calling): JSON between tags, functions in
the system message, what a function answered in a user's. Knows no template and no tokens.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from shared.datasets.examples import Message, ToolCall

TAGS = ("<tools>", "</tools>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
_OFFER = """You may call these functions:
<tools>
{tools}
</tools>
To call one, write its name and its arguments as JSON:
<tool_call>
{{"name": "…", "arguments": {{…}}}}
</tool_call>"""
_THOUGHT = "<think>\n{reasoning}\n</think>\n\n{content}"


def as_plain_messages(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], *, system: bool = True
) -> list[Message]:
    """The conversation in messages of a role and a content.

    Args:
        system: whether there may be a system message; else its text stands before the first user's.
    """
    plain: list[Message] = []
    answers: list[str] = []
    for message in messages:
        if message.role == "tool":
            answers.append(f"<tool_response>\n{message.content}\n</tool_response>")
            continue
        if answers:
            plain.append(Message("user", "\n".join(answers)))
            answers = []
        plain.append(replace(message, content=_said(message), tool_calls=()) if message.tool_calls else message)
    if answers:
        plain.append(Message("user", "\n".join(answers)))
    return _with_offer(plain, tools, system=system) if tools else plain


def with_thoughts_in_content(message: Message) -> Message:
    """The message with what was thought written before what was said."""
    if not message.reasoning_content:
        return message
    content = _THOUGHT.format(reasoning=message.reasoning_content.strip("\n"), content=message.content)
    return replace(message, content=content, reasoning_content="")


def _said(message: Message) -> str:
    return "\n".join(filter(None, [message.content, *map(_call, message.tool_calls)]))


def _call(call: ToolCall) -> str:
    written = json.dumps({"name": call.name, "arguments": call.arguments}, ensure_ascii=False)
    return f"<tool_call>\n{written}\n</tool_call>"


def _with_offer(messages: list[Message], tools: Sequence[Mapping[str, Any]], *, system: bool) -> list[Message]:
    offer = _OFFER.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
    role = "system" if system else "user"
    place = next((index for index, message in enumerate(messages) if message.role == role), None)
    if place is None:
        return [Message("system" if system else "user", offer), *messages]
    first = messages[place]
    # A system message explains first; before a question stands what it is about.
    text = f"{first.content}\n\n{offer}" if system else f"{offer}\n\n{first.content}"
    return [*messages[:place], replace(first, content=text), *messages[place + 1 :]]
