"""Messages on their way through a chat template, so that none of them can write what only the template may.

A control token in a message goes through the template as one character that is in no message, and is told from the
template's own afterwards. Owns what of a rendered conversation is prompt and what is reply.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from shared.datasets.control_tokens import ControlTokens, Span
from shared.datasets.examples import Message, ToolCall
from shared.datasets.jinja_templates import TEMPLATE_ERROR, JinjaTemplates
from shared.datasets.templates import Prompt, Turn
from shared.errors import InvalidRequest

_PRIVATE_USE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
_ANY_PRIVATE_USE = re.compile("[\ue000-\uf8ff\U000f0000-\U000ffffd\U00100000-\U0010fffd]")


def _as_data(message: Message) -> dict[str, Any]:
    data: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning_content:
        data |= thoughts(message.reasoning_content)
    if message.tool_calls:
        data["tool_calls"] = [_call(call) for call in message.tool_calls]
    return data | {name: text for name in ("tool_call_id", "name") if (text := getattr(message, name))}


def thoughts(text: str) -> dict[str, str]:
    """What was thought, by the names that templates know."""
    return {"reasoning_content": text, "thinking": text}


def _call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {**({"id": call.id} if call.id else {}), "type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class Reply:
    """What is learnt of an assistant's message.

    Attributes:
        early: characters of the prompt before it that its template marks as generated too.
        ended: it has the template's own end.
    """

    text: str
    ended: bool
    early: int = 0


class GuardedConversation:
    """Messages on their way through a template.

    Each control token that is only text is one character of private use here, in all that is rendered.

    Args:
        end: gives the control token that the template writes after a reply, if it writes one.
    """

    def __init__(
        self,
        templates: JinjaTemplates,
        control: ControlTokens,
        end: Callable[[], str | None],
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        self._templates, self._control, self._template_end = templates, control, end
        given = ([_as_data(message) for message in messages], list(tools), dict(variables or {}))
        self._free = _free_characters(chain(_strings(given)), templates.characters)
        self._stands_for: dict[str, str] = {}
        self._whole = False
        guarded = (
            [self._guarded_message(message) for message in given[0]],
            self._guarded(given[1], answer=False),
            self._guarded(given[2], answer=False),
        )
        self._messages, self._tools, self._variables = guarded
        if self._stands_for and not self._whole:
            self._keep_if_needed(guarded, given)
        self._begin, self._end = next(self._free), next(self._free)

    def _keep_if_needed(self, guarded: Any, given: Any) -> None:
        """Take the messages as they are if no parts of control tokens in them meet to make one."""
        texts = []
        for self._messages, self._tools, self._variables in (guarded, given):
            texts.append(self.render(prompt=True))
        if len(self._control.spans(texts[0])) == len(self._control.spans(texts[1])):
            self._stands_for = {}
        else:
            self._messages, self._tools, self._variables = guarded

    def _guarded_message(self, message: dict[str, Any]) -> dict[str, Any]:
        # Some templates make a control token of the role.
        role = message["role"]
        guarded: dict[str, Any] = self._guarded(message, answer=role == "assistant")
        return guarded | {"role": role}

    def _guarded(self, value: Any, *, answer: bool) -> Any:
        if isinstance(value, str):
            return self._guarded_text(value, answer=answer)
        if isinstance(value, Mapping):
            return {
                self._guarded(name, answer=answer): self._guarded(each, answer=answer) for name, each in value.items()
            }
        if isinstance(value, list | tuple):
            return [self._guarded(each, answer=answer) for each in value]
        return value

    def _guarded_text(self, text: str, *, answer: bool) -> str:
        written = self._control.spans(text)
        spans = self._control.spans(text, special_only=True) if answer else written
        self._whole = self._whole or bool(spans)
        edges = [edge for edge in self._control.fragments(text) if not any(_overlap(edge, each) for each in written)]
        if not spans and not edges:
            return text
        pieces, done = [], 0
        for start, end in sorted([*spans, *edges]):
            pieces += [text[done:start], self._character_for(text[start:end])]
            done = end
        return "".join([*pieces, text[done:]])

    def _character_for(self, text: str) -> str:
        known = next((character for character, meant in self._stands_for.items() if meant == text), None)
        if known is None:
            known = next(self._free)
            self._stands_for[known] = text
        return known

    def render(self, count: int | None = None, *, prompt: bool) -> str:
        """The first messages, or all."""
        return self._templates.render(self._messages[:count], self._tools, prompt=prompt, variables=self._variables)

    def reply(self, index: int, before: str) -> Reply:
        """What the template writes for an assistant's message after the prompt for it."""
        marked = self._templates.render(
            self._messages[: index + 1],
            self._tools,
            prompt=False,
            variables=self._variables,
            marks=(self._begin, self._end),
        )
        whole = marked.replace(self._begin, "").replace(self._end, "")
        content: str = self._messages[index]["content"]
        end = self._template_end()
        if not whole.startswith(before):
            begun = before[next(place for place in range(len(before)) if before[place] != whole[place : place + 1]) :]
            return Reply(_going_on(content, begun) + (end or ""), end is not None)
        generated = _marked_spans(marked, self._begin, self._end)
        if generated and generated[-1][1] > len(before):
            start, stop = generated[-1]
            return Reply(whole[len(before) : stop], True, max(0, len(before) - start))
        text = whole[len(before) :]
        if end is not None and end in text:
            return Reply(text[: text.index(end) + len(end)], True)
        others = self._control.spans(text, special_only=True)
        if others:
            return Reply(text[: others[-1][1]], True)
        return Reply(content if text.startswith(content) else text.rstrip(), False)

    def turns(self, prompt: str, reply: Reply, *, supervised: bool) -> Iterator[Turn]:
        """The turn, after a first one of what is generated before the prompt ends."""
        early = min(reply.early, len(prompt))
        if early:
            yield Turn(self.prompt(prompt[:-early]), self.prompt(prompt[-early:]), supervised, ended=True)
            prompt = ""
        yield Turn(self.prompt(prompt), self.prompt(reply.text), supervised, reply.ended)

    def begun_reply(self) -> str:
        """The conversation up to where its last message breaks off, as transformers' `continue_final_message`."""
        last = self._messages[-1]
        if last.get("tool_calls"):
            raise InvalidRequest("a message that calls tools cannot be continued", param="messages")
        # A blank after the mark tells whether the template trims.
        tagged = {**last, "content": f"{last['content']}{self._end} "}
        whole = self._templates.render(
            [*self._messages[:-1], tagged], self._tools, prompt=False, variables=self._variables
        )
        place = whole.rfind(self._end)
        if place < 0 or last["content"].strip() not in whole:
            raise InvalidRequest(
                "the chat template does not let the last message be continued", param="messages", code=TEMPLATE_ERROR
            )
        return whole[:place] if whole.startswith(f"{self._end} ", place) else whole[:place].rstrip()

    def prompt(self, text: str) -> Prompt:
        """A rendered text as it will be read: characters of private use give way to what they stand for."""
        if not self._stands_for:
            return Prompt(text, False, "template")
        meant = {_escaped(character): each for character, each in self._stands_for.items()} | self._stands_for
        pieces, literal, size = [], [], 0
        for piece in re.split(f"({'|'.join(map(re.escape, meant))})", text):
            written = meant.get(piece, piece)
            if piece in meant:
                literal.append((size, size + len(written)))
            pieces.append(written)
            size += len(written)
        return Prompt("".join(pieces), False, "template", tuple(literal))


def _going_on(content: str, begun: str) -> str:
    """What is left of a reply whose beginning the prompt has: some end with the tag that opens what is thought."""
    start = content.lstrip()
    return (
        start.removeprefix(begun.strip()).lstrip("\n") if begun.strip() and start.startswith(begun.strip()) else content
    )


def _overlap(one: Span, other: Span) -> bool:
    return one[0] < other[1] and other[0] < one[1]


def _marked_spans(text: str, begin: str, end: str) -> list[Span]:
    """Where marked parts stand once the marks are gone."""
    spans, size, start = [], 0, 0
    for piece in re.split(f"([{begin}{end}])", text):
        if piece == begin:
            start = size
        elif piece == end:
            spans.append((start, size))
        else:
            size += len(piece)
    return spans


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, each in value.items():
            yield from _strings(name)
            yield from _strings(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _strings(each)


def _escaped(character: str) -> str:
    """The character as a template writes it that asks for JSON in ASCII."""
    return json.dumps(character)[1:-1]


def _free_characters(texts: Iterator[str], taken: frozenset[str]) -> Iterator[str]:
    """Characters of private use that occur nowhere, in neither of the forms in which they may come back.

    Raises:
        InvalidRequest: there are no more.
    """
    whole = "\n".join(texts)
    taken = taken.union(_ANY_PRIVATE_USE.findall(whole))
    for character in map(chr, chain(*_PRIVATE_USE)):
        if character not in taken and _escaped(character) not in whole:
            yield character
    raise InvalidRequest("the messages use up all characters of private use", param="messages", code=TEMPLATE_ERROR)
