"""A base model's own chat template, rendered as transformers renders it, and what may be learnt of what it writes.

Owns the Jinja environment, and that no message can write what only the template may: a control token in a message goes
through the template as one character that is in no message, and is told from the template's own afterwards.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from itertools import chain
from typing import Any

from jinja2 import TemplateError, meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from shared.datasets.control_tokens import ControlTokens, Span
from shared.datasets.examples import Chat, Example, Message, ToolCall
from shared.datasets.templates import Lesson, Prompt, Turn, wrong_form
from shared.datasets.tool_format import as_plain_messages, with_thoughts_in_content
from shared.errors import InvalidRequest

MAX_TEMPLATE_CHARACTERS = 100_000
_PRIVATE_USE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
_ANY_PRIVATE_USE = re.compile("[\ue000-\uf8ff\U000f0000-\U000ffffd\U00100000-\U0010fffd]")
_TEMPLATE_ERROR = "template_error"
# What a template does is seen by what it makes of these.
_MARK = chr(_PRIVATE_USE[-1][-1])
_ASKED = {"role": "user", "content": "a"}


class _GenerationTag(Extension):
    """`{% generation %}`: its block is what an assistant generates, put between marks if any are asked for."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        marks: list[nodes.Expr] = [nodes.Name("generation_begins", "load"), nodes.Name("generation_ends", "load")]
        call = nodes.CallBlock(self.call_method("_marked", marks), [], [], body)
        return call.set_lineno(line)

    @staticmethod
    def _marked(begins: str, ends: str, caller: Callable[[], str]) -> str:
        return f"{begins}{caller()}{ends}"


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON for a prompt; Jinja's own filter writes it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class ChatTemplate:
    """A base model's own Jinja chat template, sandboxed.

    A template that does not compile is refused when it is first used: other formats do not need it.

    Args:
        source: the template's text, or several by name: `default`, and `tool_use` for requests with tools.
        special_tokens: the texts of `bos_token`, `eos_token` and so on, which templates name.
        control: the tokenizer's control tokens.
        clock: local time, for templates that write the date.
    """

    def __init__(
        self,
        source: str | Mapping[str, str],
        special_tokens: Mapping[str, str],
        control: ControlTokens,
        clock: Callable[[], datetime] = datetime.now,
    ) -> None:
        sources = {"default": source} if isinstance(source, str) else dict(source)
        named = sources["default"] if list(sources) == ["default"] else json.dumps(sources, sort_keys=True)
        self.id = "chat-" + hashlib.sha256(named.encode()).hexdigest()[:16]
        self._sources = sources
        self._special_tokens = dict(special_tokens)
        self._control = control
        self._clock = clock
        self._private_use = set(_ANY_PRIVATE_USE.findall("".join(sources.values())))

    @property
    def writes_the_date(self) -> bool:
        """Whether what it renders depends on the day."""
        return any("strftime_now" in source for source in self._sources.values())

    @property
    def writes_as_it_was_learnt_once(self) -> bool:
        """Whether replies are learnt as they were before templates' own ends were: as they stand, then EOS."""
        changed = re.compile(r"generation\s*-?%|trim\b|strip\(")
        ends_by_eos = self.end is not None and self.end == self._special_tokens.get("eos_token")
        return ends_by_eos and not any(changed.search(source) for source in self._sources.values())

    def at(self, moment: datetime) -> "ChatTemplate":
        """The same template at a moment: rows that are tokenised again on another day must come out the same."""
        return ChatTemplate(self._sources, self._special_tokens, self._control, lambda: moment)

    @cached_property
    def names(self) -> frozenset[str]:
        """The variables that the template reads and does not set itself.

        Raises:
            InvalidRequest: it does not compile.
        """
        assert self._compiled
        parsed = [self._environment.parse(source) for source in self._sources.values()]
        return frozenset().union(*map(meta.find_undeclared_variables, parsed))

    def effort(self, level: str) -> dict[str, Any]:
        """A `reasoning_effort` as the variables of this template; empty if it has no switch for it."""
        if "reasoning_effort" in self.names:
            return {"reasoning_effort": level}
        return {
            name: level not in ("none", "minimal") for name in ("enable_thinking", "thinking") if name in self.names
        }

    @cached_property
    def end(self) -> str | None:
        """The control token that the template writes after a reply; None if it writes none."""
        whole = self._tried([_ASKED, {"role": "assistant", "content": _MARK}])
        after = whole[whole.rfind(_MARK) + 1 :] if _MARK in whole else ""
        first = self._control.spans(after)[:1]
        return after[slice(*first[0])] if first else None

    @cached_property
    def has_place_for_tools(self) -> bool:
        """Whether the template writes functions, calls of them and their answers, or only passes over them."""
        function = {"name": f"f{_MARK}", "description": "", "parameters": {"type": "object", "properties": {}}}
        call = {"id": "call00001", "type": "function", "function": {"name": f"g{_MARK}", "arguments": {"a": 1}}}
        messages: list[dict[str, Any]] = [
            _ASKED,
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": f"h{_MARK}", "tool_call_id": "call00001", "name": f"g{_MARK}"},
        ]
        whole = self._tried(messages, [{"type": "function", "function": function}])
        return all(f"{letter}{_MARK}" in whole for letter in "fgh")

    @cached_property
    def _has_place_for_thoughts(self) -> bool:
        return _MARK in self._tried([_ASKED, {"role": "assistant", "content": "b", **_thoughts(_MARK)}])

    @cached_property
    def _has_system_messages(self) -> bool:
        return _MARK in self._tried([{"role": "system", "content": _MARK}, _ASKED])

    def _tried(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """What the template writes of some messages; nothing if it refuses them."""
        try:
            return self._render(messages, tools, prompt=False)
        except InvalidRequest:
            return ""

    def lesson(self, example: Example) -> Lesson:
        """A turn per assistant message: its prompt is what the template writes since the reply before it.

        A reply is what the template writes for it, up to and with the template's own end. Where a later prompt does not
        begin as the earlier one went on (some templates strip earlier reasoning), the last supervised reply is learnt.
        """
        if not isinstance(example, Chat):
            raise wrong_form(self.id, example)
        messages, tools = self._placed([self._unended(message) for message in example.messages], example.tools)
        replies = [index for index, message in enumerate(messages) if message.role == "assistant"]
        supervised = [index for index in replies if messages[index].weight]
        conversation = _Conversation(self, messages, tools)
        turns: list[Turn] = []
        done = ""
        for index in replies:
            before = conversation.render(index, prompt=True)
            reply = conversation.reply(index, before)
            if not before.startswith(done) or (not reply.ended and len(replies) > 1):
                return self._last_turn(conversation, (supervised or replies)[-1], alone=len(supervised) < 2)
            turns += conversation.turns(before[len(done) :], reply, supervised=index in supervised)
            done = before + reply.text
        return Lesson(tuple(turns), joined=True)

    def _last_turn(self, conversation: "_Conversation", index: int, *, alone: bool) -> Lesson:
        before = conversation.render(index, prompt=True)
        turns = conversation.turns(before, conversation.reply(index, before), supervised=True)
        return Lesson(tuple(turns), joined=True, last_turn_only=not alone)

    def _unended(self, message: Message) -> Message:
        """The message without the end of a turn, if its author has written one: the template will."""
        ends = [end for end in (self.end, self._special_tokens.get("eos_token")) if end]
        text = message.content
        if message.role != "assistant" or not any(end in text for end in ends):
            return message
        while (kept := text.rstrip()).endswith(tuple(ends)):
            text = next(kept.removesuffix(end) for end in ends if kept.endswith(end))
        return replace(message, content=text)

    def instruction(self, instruction: str, input: str = "") -> Prompt:
        return self.chat([Message("user", f"{instruction}\n\n{input}" if input else instruction)])

    def chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] | None = None,
        continue_final: bool = False,
    ) -> Prompt:
        conversation = _Conversation(self, *self._placed(messages, tools), self._named(variables))
        if continue_final and messages and messages[-1].role == "assistant":
            return conversation.prompt(conversation.begun_reply())
        return conversation.prompt(conversation.render(prompt=True))

    def _placed(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]
    ) -> tuple[Sequence[Message], Sequence[Mapping[str, Any]]]:
        """The messages as the template takes them; what it has no place for is written in our own format."""
        calls = tools or any(message.tool_calls or message.role == "tool" for message in messages)
        if calls and not self.has_place_for_tools:
            messages, tools = as_plain_messages(messages, tools, system=self._has_system_messages), ()
        if any(message.reasoning_content for message in messages) and not self._has_place_for_thoughts:
            messages = [with_thoughts_in_content(message) for message in messages]
        return messages, tools

    def _named(self, variables: Mapping[str, Any] | None) -> dict[str, Any]:
        """Of the variables those that the template names, and that are not its messages or what it is told of them."""
        if not variables:
            return {}
        ours = {"messages", "tools", "documents", "add_generation_prompt", "generation_begins", "generation_ends"}
        theirs = self.names - ours - set(self._special_tokens) - set(self._environment.globals)
        return {name: value for name, value in variables.items() if name in theirs}

    @cached_property
    def _environment(self) -> ImmutableSandboxedEnvironment:
        # As transformers' apply_chat_template has it, so that both render the same text.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: self._clock().strftime(form)
        return environment

    @cached_property
    def _compiled(self) -> dict[str, Any]:
        if any(len(source) > MAX_TEMPLATE_CHARACTERS for source in self._sources.values()):
            raise InvalidRequest("the chat template is too long", code=_TEMPLATE_ERROR)
        try:
            return {name: self._environment.from_string(source) for name, source in self._sources.items()}
        except TemplateError as error:
            raise InvalidRequest(f"the chat template does not compile: {error}", code=_TEMPLATE_ERROR) from error

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        prompt: bool,
        variables: Mapping[str, Any] | None = None,
        marks: tuple[str, str] = ("", ""),
    ) -> str:
        template = self._compiled.get("tool_use" if tools and "tool_use" in self._compiled else "default")
        if template is None:
            raise InvalidRequest(
                f"the base has chat templates named {', '.join(sorted(self._sources))}, and none named default",
                code=_TEMPLATE_ERROR,
            )
        # Templates ask whether `tools` is none, and would take an undefined name for some.
        context = {**(variables or {}), **self._special_tokens, "tools": tools or None, "documents": None}
        try:
            text: str = template.render(
                messages=messages,
                add_generation_prompt=prompt,
                generation_begins=marks[0],
                generation_ends=marks[1],
                **context,
            )
        except Exception as error:  # a template can raise whatever Python's operators raise
            raise InvalidRequest(
                f"the chat template refused the messages: {error}", param="messages", code=_TEMPLATE_ERROR
            ) from error
        return text


def _as_data(message: Message) -> dict[str, Any]:
    data: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning_content:
        data |= _thoughts(message.reasoning_content)
    if message.tool_calls:
        data["tool_calls"] = [_call(call) for call in message.tool_calls]
    return data | {name: text for name in ("tool_call_id", "name") if (text := getattr(message, name))}


def _thoughts(text: str) -> dict[str, str]:
    """What was thought, by the names that templates know."""
    return {"reasoning_content": text, "thinking": text}


def _call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {**({"id": call.id} if call.id else {}), "type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class _Reply:
    """What is learnt of an assistant's message.

    Attributes:
        early: characters of the prompt before it that its template marks as generated too.
        ended: it has the template's own end.
    """

    text: str
    ended: bool
    early: int = 0


class _Conversation:
    """Messages on their way through a template.

    Each control token that is only text is one character of private use here, in all that is rendered.
    """

    def __init__(
        self,
        template: ChatTemplate,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        self._template = template
        self._control = template._control
        given = ([_as_data(message) for message in messages], list(tools), dict(variables or {}))
        self._free = _free_characters(chain(_strings(given)), template._private_use)
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
        return self._template._render(self._messages[:count], self._tools, prompt=prompt, variables=self._variables)

    def reply(self, index: int, before: str) -> _Reply:
        """What the template writes for an assistant's message after the prompt for it."""
        marked = self._template._render(
            self._messages[: index + 1],
            self._tools,
            prompt=False,
            variables=self._variables,
            marks=(self._begin, self._end),
        )
        whole = marked.replace(self._begin, "").replace(self._end, "")
        content: str = self._messages[index]["content"]
        end = self._template.end
        if not whole.startswith(before):
            begun = before[next(place for place in range(len(before)) if before[place] != whole[place : place + 1]) :]
            return _Reply(_going_on(content, begun) + (end or ""), end is not None)
        generated = _marked_spans(marked, self._begin, self._end)
        if generated and generated[-1][1] > len(before):
            start, stop = generated[-1]
            return _Reply(whole[len(before) : stop], True, max(0, len(before) - start))
        text = whole[len(before) :]
        if end is not None and end in text:
            return _Reply(text[: text.index(end) + len(end)], True)
        others = self._control.spans(text, special_only=True)
        if others:
            return _Reply(text[: others[-1][1]], True)
        return _Reply(content if text.startswith(content) else text.rstrip(), False)

    def turns(self, prompt: str, reply: _Reply, *, supervised: bool) -> Iterator[Turn]:
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
        whole = self._template._render(
            [*self._messages[:-1], tagged], self._tools, prompt=False, variables=self._variables
        )
        place = whole.rfind(self._end)
        if place < 0 or last["content"].strip() not in whole:
            raise InvalidRequest(
                "the chat template does not let the last message be continued", param="messages", code=_TEMPLATE_ERROR
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


def _free_characters(texts: Iterator[str], taken: set[str]) -> Iterator[str]:
    """Characters of private use that occur nowhere, in neither of the forms in which they may come back.

    Raises:
        InvalidRequest: there are no more.
    """
    whole = "\n".join(texts)
    taken = taken.union(_ANY_PRIVATE_USE.findall(whole))
    for character in map(chr, chain(*_PRIVATE_USE)):
        if character not in taken and _escaped(character) not in whole:
            yield character
    raise InvalidRequest("the messages use up all characters of private use", param="messages", code=_TEMPLATE_ERROR)
