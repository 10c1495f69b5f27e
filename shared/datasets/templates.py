"""Prompt formats: how an example becomes text to learn, and a request becomes text to complete.

Training and serving both come here, so that a served prompt is the trained prompt to the character. Owns the texts and
where a response begins and ends; tokens are `shared.datasets.tokens`.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from shared.datasets.examples import (
    Chat,
    Completion,
    Example,
    Format,
    Instruction,
    Message,
    Text,
    needs_of,
)
from shared.errors import InvalidRequest

MAX_TEMPLATE_CHARACTERS = 100_000


@dataclass(frozen=True, slots=True)
class Prompt:
    """Text the model continues. `add_special_tokens` is False where the template writes BOS itself."""

    text: str
    add_special_tokens: bool = True


@dataclass(frozen=True, slots=True)
class Turn:
    """A prompt, the response to it, and whether the response is supervised. EOS follows every response."""

    prompt: Prompt
    response: str
    supervised: bool = True


class Template(Protocol):
    """One prompt format. `id` names it in manifests: an adapter is served with the format it was trained with."""

    @property
    def id(self) -> str: ...

    def turns(self, example: Example) -> list[Turn]:
        """What to train on. Raises InvalidRequest if the example does not fit the format."""
        ...

    def instruction(self, instruction: str, input: str = "") -> Prompt:
        """The prompt for one instruction."""
        ...

    def chat(self, messages: Sequence[Message]) -> Prompt:
        """The prompt for a conversation. Raises InvalidRequest if the format cannot express it."""
        ...


def _wrong_form(template: str, example: Example) -> InvalidRequest:
    return InvalidRequest(f"{type(example).__name__.lower()} rows do not fit the template {template}")


def _single_question(template: str, messages: Sequence[Message]) -> tuple[str, str]:
    """(system, question) of a conversation of one question; formats without roles cannot express more."""
    roles = [message.role for message in messages]
    if roles == ["user"]:
        return "", messages[0].content
    if roles == ["system", "user"]:
        return messages[0].content, messages[1].content
    raise InvalidRequest(
        f"this model was trained with the template {template}: send one user message, optionally after a system one",
        param="messages",
    )


class InstructionTemplate:
    """The tutorial's Alpaca-like format."""

    id = "instruction-v1"

    def turns(self, example: Example) -> list[Turn]:
        if not isinstance(example, Instruction):
            raise _wrong_form(self.id, example)
        # Earlier questions and answers stand one after another, in the same format; a system text before the first.
        questions = [(question, "", answer) for question, answer in example.history]
        turns: list[Turn] = []
        for question, asked, answer in [*questions, (example.instruction, example.input, example.output)]:
            if not turns and example.system:
                question = f"{example.system}\n\n{question}"
            prompt = self.instruction(question, asked)
            turns.append(Turn(Prompt(f"\n\n{prompt.text}", False) if turns else prompt, answer))
        return turns

    def instruction(self, instruction: str, input: str = "") -> Prompt:
        middle = f"### Input:\n{input}\n\n" if input else ""
        return Prompt(f"### Instruction:\n{instruction}\n\n{middle}### Response:\n")

    def chat(self, messages: Sequence[Message]) -> Prompt:
        system, question = _single_question(self.id, messages)
        return self.instruction(f"{system}\n\n{question}" if system else question)


class CompletionTemplate:
    """No format at all: the prompt as it stands, then the completion. Text has no prompt."""

    id = "completion-v1"

    def turns(self, example: Example) -> list[Turn]:
        if isinstance(example, Text):
            return [Turn(Prompt(""), example.text)]
        if not isinstance(example, Completion):
            raise _wrong_form(self.id, example)
        return [Turn(Prompt(example.prompt), example.completion)]

    def instruction(self, instruction: str, input: str = "") -> Prompt:
        return Prompt(f"{instruction}\n{input}" if input else instruction)

    def chat(self, messages: Sequence[Message]) -> Prompt:
        system, question = _single_question(self.id, messages)
        return Prompt(f"{system}\n\n{question}" if system else question)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


class ChatTemplate:
    """A base model's own Jinja chat template, sandboxed.

    Args:
        source: the template's text, as in `chat_template.jinja`.
        bos: the text of the begin token, which many templates write themselves.
        eos: the text of the token that ends a response.

    Raises:
        InvalidRequest: the template is over-long or does not compile.
    """

    def __init__(self, source: str, bos: str, eos: str) -> None:
        if len(source) > MAX_TEMPLATE_CHARACTERS:
            raise InvalidRequest("the chat template is too long", code="template_error")
        # The same environment as transformers' apply_chat_template, so that both render the same text; less the clock
        # (`strftime_now`): a served prompt must be the trained one on any day.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _raise_exception
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise InvalidRequest(f"the chat template does not compile: {error}", code="template_error") from error
        # Templates ask whether `tools` is none, and would take an undefined name for some.
        self._context: dict[str, Any] = {"bos_token": bos, "eos_token": eos, "tools": None, "documents": None}
        self._eos = eos
        self.id = "chat-" + hashlib.sha256(source.encode()).hexdigest()[:16]

    def turns(self, example: Example) -> list[Turn]:
        """One turn per assistant message, its prompt being what the template writes since the previous response.

        Where a template does not render a conversation's beginning as the beginning of the whole (some strip earlier
        reasoning), only the last assistant message is supervised.
        """
        if not isinstance(example, Chat):
            raise _wrong_form(self.id, example)
        if lacking := sorted(needs_of(example)):
            raise InvalidRequest(
                f"this base's chat template has no place for {lacking[0]}, which the rows have", code="template_error"
            )
        messages = example.messages
        replies = [index for index, message in enumerate(messages) if message.role == "assistant"]
        turns, done = [], ""
        for index in replies:
            before = self._render(messages[:index], prompt=True)
            if not before.startswith(done):
                return self._last_turn(messages, replies)
            message = messages[index]
            turns.append(Turn(Prompt(before[len(done) :], False), message.content, bool(message.weight)))
            done = before + message.content + self._eos
        return turns

    def _last_turn(self, messages: Sequence[Message], replies: list[int]) -> list[Turn]:
        last = next((index for index in reversed(replies) if messages[index].weight), replies[-1])
        prompt = Prompt(self._render(messages[:last], prompt=True), False)
        return [Turn(prompt, messages[last].content, bool(messages[last].weight))]

    def instruction(self, instruction: str, input: str = "") -> Prompt:
        return self.chat([Message("user", f"{instruction}\n\n{input}" if input else instruction)])

    def chat(self, messages: Sequence[Message]) -> Prompt:
        return Prompt(self._render(messages, prompt=True), False)

    def _render(self, messages: Sequence[Message], *, prompt: bool) -> str:
        turns: list[dict[str, Any]] = [{"role": m.role, "content": m.content} for m in messages]
        try:
            return self._template.render(messages=turns, add_generation_prompt=prompt, **self._context)
        except Exception as error:  # a template can raise whatever Python's operators raise
            raise InvalidRequest(
                f"the chat template refused the messages: {error}", param="messages", code="template_error"
            ) from error


def template_for(form: Format, chat: ChatTemplate | None) -> Template:
    """The template that a dataset of this form is trained with.

    Raises:
        InvalidRequest: chat rows for a base without a chat template.
    """
    if form == "instruction":
        return InstructionTemplate()
    if form in ("completion", "text"):
        return CompletionTemplate()
    if chat is None:
        raise InvalidRequest("this base model has no chat template; use instruction rows", param="model")
    return chat


def template_by_id(template_id: str, chat: ChatTemplate | None) -> Template:
    """The template of an adapter's manifest.

    Raises:
        InvalidRequest: this base has no template of that id (it has changed since the adapter was trained).
    """
    candidates: list[Template] = [InstructionTemplate(), CompletionTemplate(), *([chat] if chat else [])]
    for template in candidates:
        if template.id == template_id:
            return template
    raise InvalidRequest(f"unknown template {template_id!r}", code="template_error")
