"""Prompt formats: to the character what was trained, what is served, and what transformers would render."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from shared.datasets.chat_template import ChatTemplate
from shared.datasets.control_tokens import ControlTokens
from shared.datasets.examples import Chat, Completion, Example, Instruction, Message
from shared.datasets.jinja_templates import MAX_TEMPLATE_CHARACTERS
from shared.datasets.templates import (
    CompletionTemplate,
    InstructionTemplate,
    Lesson,
    Prompt,
    Template,
    Turn,
    template_by_id,
    template_for,
)
from shared.errors import InvalidRequest
from tests.tiny import CHAT_TEMPLATE, write_tiny_model

EOS = "<|im_end|>"
TEXT = st.text(max_size=20)
# Like several models' own: a default system text, roles checked, loops left early.
STRICT = """{%- if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{{ messages[0]['content'] }}
{% else %}{% set rest = messages %}Be brief.
{% endif %}
{%- if tools is not none %}{{ tools[0].name }}{% endif %}
{%- for message in rest %}
    {%- if message['role'] not in ['user', 'assistant'] %}{{ raise_exception('unknown role') }}{% endif %}
    {%- if loop.index > 50 %}{% break %}{% endif %}
{{ bos_token }}{{ message['role'] | upper }}: {{ message['content'] | trim }}{{ eos_token }}
{% endfor %}
{%- if add_generation_prompt %}{{ bos_token }}ASSISTANT: {% endif %}"""


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = write_tiny_model(tmp_path_factory.mktemp("templates") / "model")
    return AutoTokenizer.from_pretrained(folder)


def chat(source: str = CHAT_TEMPLATE) -> ChatTemplate:
    control = ControlTokens({"<|im_start|>": True, EOS: True, "<|endoftext|>": True})
    return ChatTemplate(source, {"bos_token": "<|im_start|>", "eos_token": EOS}, control)


conversations = st.builds(
    lambda system, questions: [
        *([{"role": "system", "content": system}] if system is not None else []),
        *({"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(questions)),
    ],
    st.none() | TEXT,
    st.lists(TEXT, min_size=1, max_size=6),
)


@pytest.mark.parametrize("source", [CHAT_TEMPLATE, STRICT])
@given(conversation=conversations)
def test_chat_prompts_are_what_transformers_renders(
    oracle: Any, source: str, conversation: list[dict[str, str]]
) -> None:
    messages = [Message(m["role"], m["content"]) for m in conversation]  # type: ignore[arg-type]
    expected = oracle.apply_chat_template(
        conversation, chat_template=source, tokenize=False, add_generation_prompt=True
    )
    assert chat(source).chat(messages) == Prompt(expected, False, "template")


@given(conversation=conversations, answer=TEXT)
def test_chat_turns_join_to_the_conversation(oracle: Any, conversation: list[dict[str, str]], answer: str) -> None:
    if conversation[-1]["role"] != "assistant":
        conversation = [*conversation, {"role": "assistant", "content": answer}]
    example = Chat(tuple(Message(m["role"], m["content"]) for m in conversation))  # type: ignore[arg-type]
    turns = chat().lesson(example).turns
    joined = "".join(turn.prompt.text + turn.response.text for turn in turns)
    whole = oracle.apply_chat_template(conversation, tokenize=False)
    # The template writes a line break after EOS, which belongs to the next turn.
    assert joined + "\n" == whole
    assert [turn.response.text for turn in turns] == [
        m["content"] + EOS for m in conversation if m["role"] == "assistant"
    ]
    assert all(turn.ended for turn in turns)


def test_messages_of_weight_zero_are_not_supervised() -> None:
    example = Chat(
        (Message("user", "a"), Message("assistant", "b", 0), Message("user", "c"), Message("assistant", "d"))
    )
    assert [turn.supervised for turn in chat().lesson(example).turns] == [False, True]


def test_a_template_that_rewrites_history_learns_the_last_answer_only() -> None:
    source = "{% for m in messages %}{{ m['content'] if loop.last or m['role'] == 'user' else '-' }}|{% endfor %}"
    example = Chat((Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d")))
    turn = Turn(Prompt("a|-|c|", False, "template"), Prompt("d", False, "template"))
    assert chat(source).lesson(example) == Lesson((turn,), joined=True, last_turn_only=True)
    alone = Chat((*example.messages[:1], Message("assistant", "b", 0), *example.messages[2:]))
    assert chat(source).lesson(alone) == Lesson((turn,), joined=True)


def test_instruction_texts_to_the_character() -> None:
    template = InstructionTemplate()
    assert template.instruction("Do it").text == "### Instruction:\nDo it\n\n### Response:\n"
    with_input = "### Instruction:\nDo it\n\n### Input:\nx\n\n### Response:\n"
    assert template.instruction("Do it", "x").text == with_input
    turn = Turn(Prompt(with_input, source="user"), Prompt("done", False, "assistant"))
    assert template.lesson(Instruction("Do it", "done", "x")) == Lesson((turn,))
    assert template.chat([Message("user", "Do it")]) == template.instruction("Do it")
    assert template.chat([Message("system", "S"), Message("user", "Do it")]) == template.instruction("S\n\nDo it")


def test_completion_texts_stand_as_they_are() -> None:
    template = CompletionTemplate()
    assert template.lesson(Completion("a ", "b")) == Lesson((Turn(Prompt("a "), Prompt("b", False)),))
    assert template.instruction("a").text == "a"
    assert template.chat([Message("user", "a")]).text == "a"


@pytest.mark.parametrize(
    ("template", "asked"),
    [
        (InstructionTemplate(), "### Instruction:\n{}\n\n### Response:\n"),
        (CompletionTemplate(), "{}"),
    ],
    ids=["instruction", "completion"],
)
def test_formats_without_roles_lay_turns_out_one_after_another(template: Template, asked: str) -> None:
    prompt = template.chat(
        [Message("system", "S"), Message("user", "a"), Message("assistant", "b"), Message("user", "c")]
    )
    first = Turn(Prompt(asked.format("S\n\na"), source="user"), Prompt("b", False, "assistant"))
    assert prompt == Prompt("\n\n" + asked.format("c"), False, "user", before=(first,))
    assert prompt.whole_text == asked.format("S\n\na") + "b\n\n" + asked.format("c")


def test_a_greeting_and_several_questions_at_once_have_a_place() -> None:
    template = InstructionTemplate()
    prompt = template.chat([Message("assistant", "Hello"), Message("user", "a"), Message("user", "b")])
    assert prompt.text == "\n\n### Instruction:\na\n\nb\n\n### Response:\n"
    assert [turn.response.text for turn in prompt.before] == ["Hello"]


def test_a_begun_answer_is_continued_and_not_ended() -> None:
    template = InstructionTemplate()
    prompt = template.chat([Message("user", "a"), Message("assistant", "It is")], continue_final=True)
    assert prompt.whole_text == template.instruction("a").text + "It is"
    assert [turn.ended for turn in prompt.before] == [True]
    answered = template.chat([Message("user", "a"), Message("assistant", "It is")])
    assert [turn.ended for turn in answered.before] == [False]


@pytest.mark.parametrize("template", [InstructionTemplate(), CompletionTemplate()])
def test_formats_without_roles_need_a_question(template: Template) -> None:
    for messages in ([Message("system", "a")], [Message("assistant", "a")], []):
        with pytest.raises(InvalidRequest, match="needs a user message") as refused:
            template.chat(messages)
        assert refused.value.param == "messages"


def test_rows_of_another_form_are_refused() -> None:
    cases: list[tuple[Template, Example]] = [
        (InstructionTemplate(), Completion("a", "b")),
        (CompletionTemplate(), Instruction("a", "b")),
        (chat(), Instruction("a", "b")),
    ]
    for template, row in cases:
        with pytest.raises(
            InvalidRequest, match=f"{type(row).__name__.lower()} rows do not fit the template {template.id}"
        ):
            template.lesson(row)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('no') }}",
        "{% for i in range(10000000000) %}x{% endfor %}",
        "{{ messages[0]['content'] + 1 }}",
        "{{ undefined_thing.attribute }}",
        "{{ 'x' % {} % 1 }}",
        "{% include 'file' %}",
        "{{ 1 / 0 }}",
        "{{ messages['content'] }}{{ messages[99].content.more }}",
    ],
)
def test_hostile_or_broken_templates_are_the_requests_error(source: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        chat(source).chat([Message("user", "x")])
    assert refused.value.code == "template_error"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% if %}", "does not compile: Expected an expression"),
        ("{{ x", "does not compile: unexpected end of template"),
        ("x" * (MAX_TEMPLATE_CHARACTERS + 1), "is too long"),
    ],
    ids=["no condition", "not closed", "too long"],
)
def test_templates_that_cannot_be_compiled_are_refused(source: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=f"the chat template {message}") as refused:
        chat(source).chat([Message("user", "x")])
    assert refused.value.code == "template_error"


def test_templates_by_form_and_by_id() -> None:
    own = chat()
    assert own.id == chat().id != chat(STRICT).id
    assert template_for("chat", own, 0) is own
    assert template_for("instruction", None, 0).id == "instruction-v1"
    assert template_for("completion", own, 0).id == "completion-v1"
    for template in (own, InstructionTemplate(), CompletionTemplate()):
        assert template_by_id(template.id, own).id == template.id
    with pytest.raises(InvalidRequest, match="has no chat template; use instruction rows") as refused:
        template_for("chat", None, 0)
    assert refused.value.param == "model"
    with pytest.raises(InvalidRequest, match=f"unknown template '{own.id}'") as refused:
        template_by_id(own.id, None)
    assert refused.value.code == "template_error"
