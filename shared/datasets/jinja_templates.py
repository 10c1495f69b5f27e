"""A base's chat templates as Jinja: compiled in a sandbox and rendered as transformers renders them.

Knows no conversation and no tokens.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

from jinja2 import TemplateError, meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from shared.errors import InvalidRequest

MAX_TEMPLATE_CHARACTERS = 100_000
TEMPLATE_ERROR = "template_error"


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


class JinjaTemplates:
    """Templates by name. One that does not compile is refused when it is first used.

    Args:
        sources: the texts by name: `default`, and `tool_use` for requests with tools.
        special_tokens: the texts of `bos_token`, `eos_token` and so on, which templates name.
        clock: local time, for templates that write the date.
    """

    def __init__(
        self, sources: Mapping[str, str], special_tokens: Mapping[str, str], clock: Callable[[], datetime]
    ) -> None:
        self.sources, self.special_tokens = dict(sources), dict(special_tokens)
        self._clock = clock

    @cached_property
    def names(self) -> frozenset[str]:
        """The variables that the template reads and does not set itself.

        Raises:
            InvalidRequest: it does not compile.
        """
        assert self._compiled
        parsed = [self._environment.parse(source) for source in self.sources.values()]
        return frozenset().union(*map(meta.find_undeclared_variables, parsed))

    @cached_property
    def characters(self) -> frozenset[str]:
        """Every character that the templates themselves are written with."""
        return frozenset("".join(self.sources.values()))

    @cached_property
    def given(self) -> frozenset[str]:
        """Names that are never a request's to set: special tokens, and what the environment has."""
        return frozenset({*self.special_tokens, *self._environment.globals})

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
        if any(len(source) > MAX_TEMPLATE_CHARACTERS for source in self.sources.values()):
            raise InvalidRequest("the chat template is too long", code=TEMPLATE_ERROR)
        try:
            return {name: self._environment.from_string(source) for name, source in self.sources.items()}
        except TemplateError as error:
            raise InvalidRequest(f"the chat template does not compile: {error}", code=TEMPLATE_ERROR) from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        prompt: bool,
        variables: Mapping[str, Any] | None = None,
        marks: tuple[str, str] = ("", ""),
    ) -> str:
        """The text of some messages, as data.

        Args:
            prompt: end with what begins a reply.
            marks: put before and after what templates say is generated.

        Raises:
            InvalidRequest: `template_error`: it does not compile, or refuses the messages.
        """
        template = self._compiled.get("tool_use" if tools and "tool_use" in self._compiled else "default")
        if template is None:
            raise InvalidRequest(
                f"the base has chat templates named {', '.join(sorted(self.sources))}, and none named default",
                code=TEMPLATE_ERROR,
            )
        # Templates ask whether `tools` is none, and would take an undefined name for some.
        context = {**(variables or {}), **self.special_tokens, "tools": tools or None, "documents": None}
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
                f"the chat template refused the messages: {error}", param="messages", code=TEMPLATE_ERROR
            ) from error
        return text
