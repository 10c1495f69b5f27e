"""A base model's own chat template: what it has a place for, its prompts, and what may be learnt of what it writes."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from functools import cached_property
from typing import Any

from shared.datasets.control_tokens import ControlTokens
from shared.datasets.examples import Chat, Example, Message
from shared.datasets.guarded_conversation import GuardedConversation, thoughts
from shared.datasets.jinja_templates import JinjaTemplates
from shared.datasets.templates import Lesson, Prompt, Turn, wrong_form
from shared.datasets.tool_format import as_plain_messages, with_thoughts_in_content
from shared.errors import InvalidRequest

# What a template does is seen by what it makes of these. The last character of private use is the last to be taken.
_MARK = chr(0x10FFFD)
_ASKED = {"role": "user", "content": "a"}


class ChatTemplate:
    """A base model's own Jinja chat template, sandboxed.

    A template that does not compile is refused when it is first used: other formats do not need it.

    Args:
        source: the template's text, or several by name: `default`, and `tool_use` for requests with tools.
        special_tokens: the texts of `bos_token`, `eos_token` and so on, which templates name.
        control: the tokenizer's control tokens.
        clock: local time, for templates that write the date.
    """

    # Its turns end by tokens of the tokenizer's.
    ends: tuple[str, ...] = ()

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
        self._templates = JinjaTemplates(sources, special_tokens, clock)
        self._control = control

    @property
    def writes_the_date(self) -> bool:
        """Whether what it renders depends on the day."""
        return any("strftime_now" in source for source in self._templates.sources.values())

    @property
    def writes_as_it_was_learnt_once(self) -> bool:
        """Whether replies are learnt as they were before templates' own ends were: as they stand, then EOS."""
        changed = re.compile(r"generation\s*-?%|trim\b|strip\(")
        ends_by_eos = self.end is not None and self.end == self._templates.special_tokens.get("eos_token")
        return ends_by_eos and not any(changed.search(source) for source in self._templates.sources.values())

    def at(self, moment: datetime) -> "ChatTemplate":
        """The same template at a moment: rows that are tokenised again on another day must come out the same."""
        return ChatTemplate(self._templates.sources, self._templates.special_tokens, self._control, lambda: moment)

    @property
    def names(self) -> frozenset[str]:
        """The variables that the template reads and does not set itself.

        Raises:
            InvalidRequest: it does not compile.
        """
        return self._templates.names

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
        return _MARK in self._tried([_ASKED, {"role": "assistant", "content": "b", **thoughts(_MARK)}])

    @cached_property
    def _has_system_messages(self) -> bool:
        return _MARK in self._tried([{"role": "system", "content": _MARK}, _ASKED])

    def _tried(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """What the template writes of some messages; nothing if it refuses them."""
        try:
            return self._templates.render(messages, tools, prompt=False)
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
        conversation = self._conversation(messages, tools)
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

    def _last_turn(self, conversation: GuardedConversation, index: int, *, alone: bool) -> Lesson:
        before = conversation.render(index, prompt=True)
        turns = conversation.turns(before, conversation.reply(index, before), supervised=True)
        return Lesson(tuple(turns), joined=True, last_turn_only=not alone)

    def _unended(self, message: Message) -> Message:
        """The message without the end of a turn, if its author has written one: the template will."""
        ends = [end for end in (self.end, self._templates.special_tokens.get("eos_token")) if end]
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
        conversation = self._conversation(*self._placed(messages, tools), self._named(variables))
        if continue_final and messages and messages[-1].role == "assistant":
            return conversation.prompt(conversation.begun_reply())
        return conversation.prompt(conversation.render(prompt=True))

    def _conversation(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any] | None = None,
    ) -> GuardedConversation:
        return GuardedConversation(self._templates, self._control, lambda: self.end, messages, tools, variables)

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
        theirs = self.names - ours - self._templates.given
        return {name: value for name, value in variables.items() if name in theirs}
