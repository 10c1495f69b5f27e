"""Prompt formats: how an example becomes text to learn, and a request becomes text to complete.

Training and serving both come here, so that a served prompt is the trained prompt to the character. Owns the texts,
where a response begins and ends, and which of them are somebody's content; tokens are `shared.datasets.tokens`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, Protocol

from shared.datasets.control_tokens import Span
from shared.datasets.examples import Completion, Example, Format, Instruction, Message, Text
from shared.datasets.tool_format import as_plain_messages
from shared.errors import InvalidRequest

Source = Literal["author", "template", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """Text the model continues, or a part of it.

    Attributes:
        add_special_tokens: False where the template writes BOS itself, and for what does not stand first.
        source: whose text it is. Control tokens of an `author` are what they say; a `user`'s are text; of an
            `assistant`'s the special ones are text. A `template`'s are what they say but where `literal` says not.
        literal: where control tokens are only text; ascending, none overlaps another.
        before: turns that stand before the text, encoded each for itself as in training.
    """

    text: str
    add_special_tokens: bool = True
    source: Source = "author"
    literal: tuple[Span, ...] = ()
    before: tuple["Turn", ...] = ()

    @property
    def whole_text(self) -> str:
        """The text, with those of the turns before it."""
        return "".join(turn.prompt.text + turn.response.text for turn in self.before) + self.text


@dataclass(frozen=True, slots=True)
class Turn:
    """A prompt, the response to it, and whether the response is supervised.

    Attributes:
        ended: the response's text has the template's own end; EOS follows a response that has not.
    """

    prompt: Prompt
    response: Prompt
    supervised: bool = True
    ended: bool = False


@dataclass(frozen=True, slots=True)
class Lesson:
    """What is learnt of one example.

    Attributes:
        joined: the turns are one text, which is encoded at once; else each prompt and response for itself.
        last_turn_only: the example has other supervised replies, which its template does not let be learnt.
    """

    turns: tuple[Turn, ...]
    joined: bool = False
    last_turn_only: bool = False


class Template(Protocol):
    """One prompt format. `id` names it in manifests: an adapter is served with the format it was trained with."""

    @property
    def id(self) -> str: ...

    @property
    def ends(self) -> tuple[str, ...]:
        """Texts that begin another turn: a model that goes on after its answer writes one of them."""
        ...

    def lesson(self, example: Example) -> Lesson:
        """What to train on. Raises InvalidRequest if the example does not fit the format."""
        ...

    def effort(self, level: str) -> Mapping[str, Any]:
        """A `reasoning_effort` as variables for `chat`; empty if the format has no switch for it."""
        ...

    def instruction(self, instruction: str, input: str = "") -> Prompt:
        """The prompt for one instruction."""
        ...

    def chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] | None = None,
        continue_final: bool = False,
    ) -> Prompt:
        """The prompt for a conversation.

        Args:
            tools: functions that may be called: `{"type": "function", "function": {…}}` each.
            variables: scalars for the template; it gets those that it names.
            continue_final: the last message is an assistant's, and is to be continued.

        Raises:
            InvalidRequest: the format cannot express the conversation.
        """
        ...


def wrong_form(template: str, example: Example) -> InvalidRequest:
    return InvalidRequest(f"{type(example).__name__.lower()} rows do not fit the template {template}")


def _answer(text: str) -> Prompt:
    return Prompt(text, add_special_tokens=False, source="assistant")


class _WithoutRoles(ABC):
    """What formats share that know no roles and no variables: turns stand one after another."""

    id: str
    ends: tuple[str, ...] = ()

    @abstractmethod
    def lesson(self, example: Example) -> Lesson: ...

    @abstractmethod
    def instruction(self, instruction: str, input: str = "") -> Prompt: ...

    def effort(self, level: str) -> Mapping[str, Any]:
        return {}

    def chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] | None = None,
        continue_final: bool = False,
    ) -> Prompt:
        return _laid_out(self, as_plain_messages(messages, tools), continue_final)


class InstructionTemplate(_WithoutRoles):
    """The tutorial's Alpaca-like format. Several turns stand one after another, each as it was trained."""

    id = "instruction-v1"
    ends = ("\n\n### Instruction:",)

    def lesson(self, example: Example) -> Lesson:
        if not isinstance(example, Instruction):
            raise wrong_form(self.id, example)
        turns: list[Turn] = []
        question = example.system
        for asked, answer in example.history:
            turns.append(Turn(_asked(self, [question, asked], first=not turns), _answer(answer)))
            question = ""
        last = _asked(self, [question, example.instruction], example.input, first=not turns)
        return Lesson((*turns, Turn(last, _answer(example.output))))

    def instruction(self, instruction: str, input: str = "") -> Prompt:
        middle = f"### Input:\n{input}\n\n" if input else ""
        return Prompt(f"### Instruction:\n{instruction}\n\n{middle}### Response:\n", source="user")


class CompletionTemplate(_WithoutRoles):
    """No format at all: the prompt as it stands, then the completion. Text has no prompt."""

    id = "completion-v1"

    def lesson(self, example: Example) -> Lesson:
        if isinstance(example, Text):
            return Lesson((Turn(Prompt(""), Prompt(example.text, add_special_tokens=False)),))
        if not isinstance(example, Completion):
            raise wrong_form(self.id, example)
        return Lesson((Turn(Prompt(example.prompt), Prompt(example.completion, add_special_tokens=False)),))

    def instruction(self, instruction: str, input: str = "") -> Prompt:
        return Prompt(f"{instruction}\n{input}" if input else instruction, source="user")


_BETWEEN_TURNS = "\n\n"


def _laid_out(template: Template, messages: Sequence[Message], continue_final: bool) -> Prompt:
    """A conversation in a format without roles: its turns one after another, each as a row of one turn is trained.

    What is said between two answers is one question; system messages stand before what follows them.
    """
    turns: list[Turn] = []
    question: list[str] = []
    last = messages[-1] if messages else None
    begun = last.content if last and last.role == "assistant" and continue_final else None
    if not any(message.role == "user" for message in messages):
        raise InvalidRequest(
            f"this model was trained with the template {template.id}, which needs a user message", param="messages"
        )
    for message in messages[:-1] if begun is not None else messages:
        if message.role == "assistant":
            turns.append(Turn(_asked(template, question, first=not turns), _answer(message.content)))
            question = []
        else:
            question.append(message.content)
    prompt = _asked(template, question, first=not turns)
    if begun is not None:
        turns.append(Turn(prompt, _answer(begun), ended=True))
        prompt = Prompt("", add_special_tokens=False)
    return Prompt(prompt.text, prompt.add_special_tokens, prompt.source, before=tuple(turns))


def _asked(template: Template, question: Sequence[str], input: str = "", *, first: bool) -> Prompt:
    prompt = template.instruction("\n\n".join(filter(None, question)), input)
    return prompt if first else Prompt(_BETWEEN_TURNS + prompt.text, False, prompt.source)


class DatedTemplate(Template, Protocol):
    """A template that may write the date."""

    @property
    def writes_the_date(self) -> bool: ...

    def at(self, moment: datetime) -> Template:
        """The same template, to which it is always that moment."""
        ...


def template_for(form: Format, chat: DatedTemplate | None, uploaded: float) -> Template:
    """The template that a dataset of this form is trained with.

    Args:
        chat: the base's chat template.
        uploaded: when the dataset came, in seconds since 1970: the date that its rows are given, whenever they are
            tokenised.

    Raises:
        InvalidRequest: chat rows for a base without a chat template.
    """
    if form == "instruction":
        return InstructionTemplate()
    if form in ("completion", "text"):
        return CompletionTemplate()
    if chat is None:
        raise InvalidRequest("this base model has no chat template; use instruction rows", param="model")
    return chat.at(datetime.fromtimestamp(uploaded)) if chat.writes_the_date else chat


def template_by_id(template_id: str, chat: Template | None) -> Template:
    """The template of an adapter's manifest.

    Raises:
        InvalidRequest: this base has no template of that id (it has changed since the adapter was trained).
    """
    candidates: list[Template] = [InstructionTemplate(), CompletionTemplate(), *([chat] if chat else [])]
    for template in candidates:
        if template.id == template_id:
            return template
    raise InvalidRequest(f"unknown template {template_id!r}", code="template_error")
