"""Calls of functions in generated text: the form in which a template writes them, a grammar of it, and a parser.

The form is found by having the template write a call: what stands before the name, between it and the arguments, and
after them. The templates know their own tool branch, and the format that stands in where they have none. Knows no HTTP
and no engine.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from services.inference.engine.interface import GrammarText
from services.inference.engine.json_schema import for_grammar
from shared.datasets.chat_template import ChatTemplate
from shared.datasets.examples import Message, ToolCall
from shared.datasets.templates import Template
from shared.datasets.tokens import Tokenizer
from shared.datasets.tool_format import as_plain_messages
from shared.errors import InvalidRequest

_NAME, _ARGUMENTS = "name_of_a_function", {"argument_of_it": 1}
_ID = "call00001"
_WORD = "zqx"
_MOST_CALLS = 16
# No function can have this name.
ANY = "*"


@dataclass(frozen=True, slots=True)
class Tools:
    """What a request offers.

    Attributes:
        functions: as templates write them, `{"type": "function", "function": {"name", "parameters", …}}`.
        strict: names of those whose schema is followed to the letter or refused.
        must: a call must come: of `ANY` function, or of the one of this name; None leaves it to the model.
        parallel: whether there may be several calls.
        otherwise: a JSON schema of the text that stands in place of calls; None is any text.
    """

    functions: Sequence[Mapping[str, Any]]
    strict: frozenset[str] = frozenset()
    must: str | None = None
    parallel: bool = True
    otherwise: GrammarText | None = None


@dataclass(frozen=True, slots=True)
class CallForm:
    """How a template writes one call.

    Attributes:
        before, between, after: of the name and the arguments; added tokens by their text.
        added: the tokenizer's added tokens: text → id.
        special: those of them that are no part of decoded text.
    """

    before: str
    between: str
    after: str
    added: Mapping[str, int]
    special: frozenset[str]

    @property
    def marked(self) -> bool:
        """Whether a call begins with something that stands nowhere else, so that it may come after other text."""
        return self.before.startswith(("<", *self.added))

    def visible(self, text: str) -> str:
        """A part of the form as it is in decoded text."""
        for each in self.special:
            text = text.replace(each, "")
        return text

    def grammar(self, tools: Tools) -> GrammarText | None:
        """What the answer must follow; None if it is free."""
        # A small model that must call may not know when to stop.
        calls = f"call{{1,{_MOST_CALLS}}}" if tools.parallel and self.marked else "call"
        rules = [self._call(tools)]
        if tools.must:
            rules.append(f"start: {calls}")
        elif tools.otherwise:
            rules += [f"start: {calls} | otherwise", f"otherwise: {_embedded(tools.otherwise)}"]
        elif not self.marked:
            return None
        else:
            rules = self._free(tools)
        return GrammarText("lark", "%llguidance {}\n" + "\n".join(rules) + "\n")

    def _free(self, tools: Tools) -> list[str]:
        """Any text; from the mark of a call on it must be one."""
        mark = next((text for text in self.added if self.before.startswith(text)), None)
        begins = f"marked: TEXT <[{self.added[mark]}]> call" if mark else "marked: mark call"
        rules = [begins, "TEXT: /(.|\\n)*/"]
        if mark is None:
            mark = self.before.partition("\n")[0]
            rules.append(f"mark[lazy]: TEXT {json.dumps(mark)}")
        # Added tokens are no text to the library, but those that are not special may stand in one.
        others = [str(token) for text, token in self.added.items() if text not in self.special and text != mark]
        other = " | other" if others else ""
        if others:
            rules.append(f"other: TEXT <[{','.join(others)}]>")
        if tools.parallel:
            rules.append(f"start: (marked{other})* TEXT")
        else:
            rules.append(f"start: {'other* ' if others else ''}marked? {'other* ' if others else ''}TEXT")
        return [*rules, self._call(tools, self.before.removeprefix(mark))]

    def _call(self, tools: Tools, before: str | None = None) -> str:
        functions = [each["function"] for each in tools.functions]
        if tools.must not in (None, ANY):
            functions = [function for function in functions if function["name"] == tools.must]
        options = []
        for function in functions:
            schema = function.get("parameters") or {"type": "object", "properties": {}, "additionalProperties": False}
            lenient = function["name"] not in tools.strict
            name = self._written(json.dumps(function["name"])[1:-1])
            options.append(f"{name} {self._written(self.between)} {_json(schema, lenient=lenient)}")
        gap = "" if before is not None else '"\\n"? '
        return f"call: {gap}{self._written(self.before if before is None else before)} ({' | '.join(options)}) " + (
            self._written(self.after)
        )

    def _written(self, text: str) -> str:
        """A text in the grammar's own notation."""
        inside = [each for each in self.added if each in text]
        parts = re.split("(" + "|".join(map(re.escape, inside)) + ")", text) if inside else [text]
        return " ".join(f"<[{self.added[part]}]>" if part in inside else json.dumps(part) for part in parts if part)


def call_form(template: Template, tokenizer: Tokenizer) -> CallForm:
    """How a template writes a call.

    Raises:
        InvalidRequest: in a way that is not understood.
    """
    reply = _written_call(template)
    at = reply.find(_NAME)
    begin = reply.find("{", at)
    try:
        arguments, end = json.JSONDecoder().raw_decode(reply, begin)
    except ValueError:
        arguments, end = None, 0
    if at < 0 or begin < 0 or arguments != _ARGUMENTS:
        raise InvalidRequest("the template of this model writes calls in a way that is not understood", param="tools")
    entries = {
        entry.content: (token, entry.special) for token, entry in tokenizer.fast.get_added_tokens_decoder().items()
    }
    after = reply[end:]
    places = [after.find(text) for text, (token, _) in entries.items() if token in tokenizer.stop_ids]
    after = after[: min((place for place in places if place >= 0), default=len(after))].rstrip()
    added = {text: token for text, (token, _) in entries.items() if token not in tokenizer.stop_ids}
    special = frozenset(text for text in added if entries[text][1])
    return CallForm(reply[:at].lstrip(), reply[at + len(_NAME) : begin], after, added, special)


def _written_call(template: Template) -> str:
    """A call, with what a template writes after it."""
    called = Message("assistant", "", tool_calls=(ToolCall(_NAME, _ARGUMENTS, _ID),))
    if not isinstance(template, ChatTemplate) or not template.has_place_for_tools:
        return as_plain_messages([called], ())[0].content
    function = {"name": _NAME, "description": "", "parameters": {"type": "object", "properties": {}}}
    asked, tools = Message("user", "a"), [{"type": "function", "function": function}]
    said, whole = (
        template.chat([asked, reply, asked], tools=tools).whole_text for reply in (Message("assistant", _WORD), called)
    )
    # A call begins where any other answer would.
    return whole[next(at for at, (a, b) in enumerate(zip(said, whole, strict=False)) if a != b) :]


def _json(schema: Mapping[str, Any], *, lenient: bool) -> str:
    return "%json " + json.dumps(for_grammar(schema, lenient=lenient))


def _embedded(text: GrammarText) -> str:
    return _json(json.loads(text.source), lenient=text.kind == "lenient_json_schema")


@dataclass(slots=True)
class CallPiece:
    """A part of a call, as it came: the first has its name, the others what was added to the arguments."""

    index: int
    name: str = ""
    arguments: str = ""


@dataclass(slots=True)
class CallParser:
    """Tells calls from other text while both come in pieces of any size.

    Text that begins like a call and is none is text.
    """

    form: CallForm
    _state: Literal["text", "name", "arguments", "after"] = "text"
    _held: str = ""
    _count: int = 0
    _depth: int = 0
    _in_string: bool = False
    _escaped: bool = False
    _before: str = field(init=False)
    _between: str = field(init=False)
    _after: str = field(init=False)
    _seen_text: bool = False

    def __post_init__(self) -> None:
        form = self.form
        self._before, self._between = form.visible(form.before).lstrip(), form.visible(form.between)
        self._after = form.visible(form.after).strip()

    @property
    def called(self) -> bool:
        """Whether there has been a call."""
        return bool(self._count)

    def push(self, text: str) -> list[str | CallPiece]:
        """What is known to be text or part of a call after `text`."""
        self._held += text
        found: list[str | CallPiece] = []
        while (step := self._step(found)) and self._held:
            assert step
        return found

    def flush(self) -> list[str | CallPiece]:
        """What is left at the end; a call cut before its name is left out, what only looked like one is text."""
        held, self._held = self._held, ""
        # After a call, what begins like one is the next, cut.
        if self._state == "text" and self._count and self._before.startswith(held.strip()):
            return []
        if self._state == "name" and not self.form.marked:
            self._state, held = "text", self._before + held
        return [held] if held and self._state == "text" and (held.strip() or not self._count) else []

    def _step(self, found: list[str | CallPiece]) -> bool:
        """Take what can be taken from what is held; False if more is needed."""
        if self._state == "text":
            return self._text(found)
        if self._state == "name":
            name, sign, rest = self._held.partition(self._between)
            if not sign:
                return False
            found.append(CallPiece(self._count, name=name))
            self._state, self._held, self._count = "arguments", rest, self._count + 1
            self._depth, self._in_string, self._escaped = 0, False, False
            return True
        if self._state == "arguments":
            return self._arguments(found)
        kept = self._held.lstrip()
        if len(kept) < len(self._after) and self._after.startswith(kept):
            return False
        self._state, self._held = "text", kept.removeprefix(self._after)
        return True

    def _text(self, found: list[str | CallPiece]) -> bool:
        place = self._held.find(self._before)
        if place >= 0 and (self.form.marked or not (self._seen_text or self._held[:place].strip())):
            self._say(self._held[:place], found)
            self._state, self._held = "name", self._held[place + len(self._before) :]
            return True
        most = min(len(self._held), len(self._before) - 1)
        open_ = next((n for n in range(most, 0, -1) if self._before.startswith(self._held[-n:])), 0)
        said = self._held[: len(self._held) - open_]
        # White space around calls is part of their form.
        open_ += len(said) - len(said.rstrip())
        said, self._held = self._held[: len(self._held) - open_], self._held[len(self._held) - open_ :]
        self._say(said, found)
        return False

    def _say(self, text: str, found: list[str | CallPiece]) -> None:
        if text.strip():
            self._seen_text = True
            found.append(text)

    def _arguments(self, found: list[str | CallPiece]) -> bool:
        for place, character in enumerate(self._held):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._in_string = False
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    found.append(CallPiece(self._count - 1, arguments=self._held[: place + 1]))
                    self._state, self._held = "after", self._held[place + 1 :]
                    return True
        if self._held:
            found.append(CallPiece(self._count - 1, arguments=self._held))
            self._held = ""
        return False
