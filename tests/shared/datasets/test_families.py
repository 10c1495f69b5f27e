"""A dozen families' templates: prompts, masks and ends, token for token as transformers has them."""

import itertools
import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from services.gateway.bases.tokenised import tokenised_rows
from shared.bases.base_model import prepare_base
from shared.datasets.chat_template import ChatTemplate
from shared.datasets.examples import Chat, Instruction, Message, ToolCall
from shared.datasets.loss_mask import MaskedTokens, masked_tokens
from shared.datasets.templates import InstructionTemplate, Lesson, template_for
from shared.datasets.tokens import Tokenizer, chat_templates
from shared.errors import InvalidRequest
from shared.jobs.spec import Hyperparameters
from shared.storage.artifacts import LocalArtifactStore
from tests.shared.datasets.family_templates import FAMILIES, Family
from tests.shared.datasets.family_tokenizers import write
from tests.tiny import CHAT_TEMPLATE, tiny_catalogue, write_tiny_model


@dataclass(frozen=True)
class Case:
    name: str
    family: Family
    ours: Tokenizer
    theirs: Any

    @property
    def chat(self) -> ChatTemplate:
        assert self.ours.chat is not None
        return self.ours.chat

    def lesson(self, messages: list[Message], **more: Any) -> Lesson:
        return self.chat.lesson(Chat(tuple(messages), **more))

    def tokens(self, messages: list[Message], **more: Any) -> MaskedTokens:
        tokens = masked_tokens(self.ours, self.lesson(messages, **more), max_length=10_000)
        assert tokens is not None
        return tokens

    def expected(self, messages: list[Message], **options: Any) -> Any:
        options = {"return_dict": False, **options} if options.get("tokenize", True) else options
        return self.theirs.apply_chat_template([as_data(message) for message in messages], **options)

    def learnt(self, tokens: MaskedTokens) -> list[str]:
        """The texts of the supervised runs."""
        marked = itertools.groupby(zip(tokens.ids, tokens.supervised, strict=True), key=lambda token: token[1])
        runs = [[id for id, _ in run] for supervised, run in marked if supervised]
        return [self.ours.decode(run, skip_special_tokens=False) for run in runs]


def as_data(message: Message) -> dict[str, Any]:
    data: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning_content:
        data["reasoning_content"] = message.reasoning_content
    if message.tool_calls:
        data["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    if message.tool_call_id:
        data |= {"tool_call_id": message.tool_call_id, "name": message.name}
    return data


@pytest.fixture(scope="module", params=list(FAMILIES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    family = FAMILIES[request.param]
    names = {"eos_token": family.eos} | ({"bos_token": family.bos} if family.bos else {})
    folder = tmp_path_factory.mktemp("family") / request.param
    write(folder, family.tokenizer(), template=family.template, **names)
    return Case(request.param, family, Tokenizer(folder), AutoTokenizer.from_pretrained(folder))


WORDS = st.sampled_from(["the quick", "fox", " ", "\n", "12345", "<", ">", "é🎉", "\n\n", "\t", "/s>", "im_end"])
TEXTS = st.lists(WORDS, max_size=4).map("".join).filter(lambda text: "</s>" not in text)


def conversation(texts: list[str], *, system: str | None = None, case: Case | None = None) -> list[Message]:
    told = [] if system is None or (case and not case.family.system) else [Message("system", system)]
    roles = itertools.cycle(("user", "assistant"))
    return [*told, *(Message(role, text) for role, text in zip(roles, texts, strict=False))]  # type: ignore[arg-type]


TALK = ["How many?", "Two of them.", "And now?", "Three.", "Are you sure?", "Quite."]


@given(texts=st.lists(TEXTS, min_size=1, max_size=5), system=st.none() | TEXTS)
def test_prompts_are_transformers(case: Case, texts: list[str], system: str | None) -> None:
    messages = conversation(texts, system=system, case=case)
    if len(texts) % 2 == 0:
        messages.pop()
    prompt = case.chat.chat(messages)
    assert prompt.text == case.expected(messages, add_generation_prompt=True, tokenize=False)
    assert case.ours.encode_prompt(prompt) == case.expected(messages, add_generation_prompt=True)


def test_every_reply_is_learnt_with_the_templates_own_end(case: Case) -> None:
    messages = conversation(TALK, system="Count.", case=case)
    tokens, lesson = case.tokens(messages), case.lesson(messages)
    assert lesson.last_turn_only == case.family.rewrites
    if case.family.rewrites:
        assert len(case.learnt(tokens)) == 1
        assert case.learnt(tokens)[0].endswith("Quite." + (case.family.end or case.family.eos))
        return
    end = case.family.end
    if case.name == "smollm-3":
        # Its marks take in what comes before and after.
        expected = [f"<|im_start|>assistant\n{text}{end}\n\n" for text in TALK[1::2]]
    else:
        expected = [text + str(end) for text in TALK[1::2]]
    assert [text.lstrip(" ") for text in case.learnt(tokens)] == expected


def test_rows_are_tokenised_as_transformers_does(case: Case) -> None:
    for count in (2, 6):
        messages = conversation(TALK[:count], system="Count.", case=case)
        tokens, whole = case.tokens(messages), case.expected(messages)
        if (count > 2 and case.family.rewrites) or case.name in ("no-end", "deepseek"):
            continue
        assert tokens.ids == whole[: len(tokens.ids)]
        # What comes after the last end is not learnt, and not there.
        assert case.ours.decode(whole[len(tokens.ids) :]).strip() == ""


@given(texts=st.lists(TEXTS, min_size=2, max_size=6))
def test_what_stands_before_a_reply_is_what_a_request_for_it_starts_from(case: Case, texts: list[str]) -> None:
    messages = conversation(texts if len(texts) % 2 == 0 else texts[1:], case=case)
    tokens = case.tokens(messages)
    replies = range(1, len(messages), 2)
    if case.lesson(messages).last_turn_only:
        replies = replies[-1:]
    elif any(text[:1].isspace() for text in texts):
        # It is one token with what stands before it, in the next request and not in its own: its own counts.
        replies = replies[:1]
    for place in replies:
        served = case.ours.encode_prompt(case.chat.chat(messages[:place]))
        assert tokens.ids[: len(served)] == served
        if place == replies[0] and case.name != "smollm-3":
            assert not any(tokens.supervised[: len(served)])
            assert tokens.supervised[len(served)]


@pytest.mark.parametrize("name", ["smollm-3", "generation"])
def test_marked_generations_are_the_mask_of_transformers(case: Case, name: str) -> None:
    if case.name != name:
        return
    messages = conversation(TALK, system="Count.")
    expected = case.expected(messages, return_dict=True, return_assistant_tokens_mask=True)
    tokens = case.tokens(messages)
    assert tokens.ids == expected["input_ids"][: len(tokens.ids)]
    assert [int(mark) for mark in tokens.supervised] == expected["assistant_masks"][: len(tokens.ids)]
    assert sum(expected["assistant_masks"]) == tokens.supervised_count


def test_serving_stops_at_the_templates_own_end(case: Case) -> None:
    eos, end = (case.ours.fast.token_to_id(text) for text in (case.family.eos, case.family.end or case.family.eos))
    assert case.chat.end == case.family.end
    assert case.ours.stop_ids == {eos, end}


def test_replies_of_weight_zero_are_there_and_not_learnt(case: Case) -> None:
    messages = conversation(TALK[:4])
    messages[1] = Message("assistant", TALK[1], 0)
    assert not case.lesson(messages).last_turn_only
    (learnt,) = case.learnt(case.tokens(messages))
    assert TALK[3] in learnt
    assert TALK[1] not in learnt


def test_an_end_that_the_author_wrote_is_not_doubled(case: Case) -> None:
    """Trial T49."""
    end = case.family.end or case.family.eos
    messages = conversation(TALK[:2])
    for text in (f"{TALK[1]}{end}", f"{TALK[1]}{case.family.eos}\n"):
        assert case.tokens([messages[0], Message("assistant", text)]) == case.tokens(messages)
    assert case.learnt(case.tokens(messages))[0].count(end) == 1


def test_nobodys_text_writes_control_tokens(case: Case) -> None:
    control = {case.ours.fast.token_to_id(text) for text in case.ours.control.special}
    forged = "".join(sorted(case.ours.control.special)) * 2
    for roles in ("user", "assistant"):
        messages = conversation(TALK[:4])
        written = [Message(m.role, f"{m.content} {forged}.") if m.role == roles else m for m in messages]
        expected, tokens = case.tokens(messages), case.tokens(written)
        assert sum(id in control for id in tokens.ids) == sum(id in control for id in expected.ids)
        assert tokens.supervised_count >= expected.supervised_count


TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Degrees in <b>a</b> city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    },
)
CALLS = [
    Message("user", "Weather in Malmö?"),
    Message("assistant", "", tool_calls=(ToolCall("weather", {"city": "Malmö & <Lund>"}, "call00001"),)),
    Message("tool", "4", tool_call_id="call00001", name="weather"),
    Message("assistant", "4 degrees."),
]


def test_tool_calls_are_learnt_through_the_templates_own_branch_or_in_ours(case: Case) -> None:
    """Trial T08."""
    assert case.chat.has_place_for_tools == case.family.tools
    lesson = case.lesson(CALLS, tools=TOOLS)
    learnt = case.learnt(case.tokens(CALLS, tools=TOOLS))
    if not case.family.rewrites:
        assert len(learnt) == 2
        assert '"weather"' in learnt[0]
        assert "Malmö & <Lund>" in learnt[0]
    assert "4 degrees." in learnt[-1]
    prompt = case.chat.chat(CALLS[:3], tools=TOOLS)
    assert all(text in prompt.text for text in ("Degrees in <b>a</b> city.", "Malmö & <Lund>", "4"))
    if case.family.tools:
        for messages in (CALLS[:1], CALLS[:3]):
            options = {"tools": list(TOOLS), "add_generation_prompt": True}
            prompt = case.chat.chat(messages, tools=TOOLS)
            assert prompt.text == case.expected(messages, tokenize=False, **options)
            assert case.ours.encode_prompt(prompt) == case.expected(messages, **options)
        whole = case.expected(CALLS, tools=list(TOOLS))
        assert case.tokens(CALLS, tools=TOOLS).ids == whole[: len(case.tokens(CALLS, tools=TOOLS).ids)]
    elif not case.family.rewrites:
        texts = "".join(turn.response.text for turn in lesson.turns)
        call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Malmö & <Lund>"}}\n</tool_call>'
        assert call in texts
        assert "<tool_response>\n4\n</tool_response>" in prompt.text


def test_a_begun_answer_is_continued(case: Case) -> None:
    """Trial T31."""
    messages = [Message("user", "List two colours as JSON"), Message("assistant", '{"colours":[')]
    if case.name == "deepseek":
        return
    prompt = case.chat.chat(messages, continue_final=True)
    assert prompt.text == case.expected(messages, tokenize=False, continue_final_message=True)
    assert case.ours.encode_prompt(prompt) == case.expected(messages, continue_final_message=True)
    assert prompt.text.endswith('{"colours":[')


def test_the_preview_shows_what_is_learnt(case: Case, tmp_path: Path) -> None:
    rows = [[as_data(message) for message in conversation(TALK[:count])] for count in (2, 4)]
    file = tmp_path / "data"
    file.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in rows))
    one, two = tokenised_rows(file, case.ours, Hyperparameters(), lambda: None)
    assert one.tokens is not None
    assert two.tokens is not None
    assert (one.tokens.last_turn_only, two.tokens.last_turn_only) == (False, case.family.rewrites)
    assert TALK[1] in case.learnt(one.tokens)[0]
    assert len(case.learnt(two.tokens)) == (1 if case.family.rewrites else 2)


def test_what_was_thought_is_learnt(case: Case) -> None:
    """Trial T33."""
    messages = [Message("user", "2+2?"), Message("assistant", "4", reasoning_content="add them")]
    tokens = case.tokens(messages)
    (learnt,) = case.learnt(tokens)
    assert "add them" in learnt
    assert learnt.index("add them") < learnt.index("4")
    if case.name == "qwen-3":
        assert tokens.ids == case.expected(messages)[: len(tokens.ids)]
        assert learnt == "<think>\nadd them\n</think>\n\n4<|im_end|>"
    if case.name == "deepseek":
        assert learnt == "add them\n</think>\n\n4<|end|>"


def test_variables_reach_the_templates_that_name_them(case: Case) -> None:
    messages = [Message("user", "hi")]
    given = {"enable_thinking": False, "bos_token": "<bad>", "messages": [], "add_generation_prompt": False, "tools": 1}
    assert ("enable_thinking" in case.chat.names) == (case.name in ("qwen-3", "smollm-3"))
    prompt = case.chat.chat(messages, variables=given)
    named = {"enable_thinking": False} if "enable_thinking" in case.chat.names else {}
    assert prompt.text == case.expected(messages, tokenize=False, add_generation_prompt=True, **named)
    assert (prompt.text == case.chat.chat(messages).text) == (not named)
    assert case.chat.effort("low") == ({"enable_thinking": True} if named else {})
    assert case.chat.effort("none") == named


def test_refusals_of_a_template_name_it(tmp_path: Path) -> None:
    family = FAMILIES["gemma"]
    folder = write(tmp_path, family.tokenizer(), template=family.template, eos_token=family.eos, bos_token=family.bos)
    chat = Tokenizer(folder).chat
    assert chat is not None
    with pytest.raises(InvalidRequest, match="no system messages here") as refused:
        chat.chat([Message("system", "x"), Message("user", "y")])
    assert refused.value.code == "template_error"


@pytest.mark.parametrize("source", ["{% if %}", "{{ x", "{% generation %}"])
def test_a_template_that_does_not_compile_spoils_nothing_else(tmp_path: Path, source: str) -> None:
    """Trial T17: jobs of instruction rows need no chat template."""
    family = FAMILIES["qwen-2.5"]
    ours = Tokenizer(write(tmp_path, family.tokenizer(), template=source, eos_token=family.eos))
    assert ours.stop_ids == {ours.eos_id}
    row = Instruction("Say 7 twice.", "7 7")
    assert masked_tokens(ours, InstructionTemplate().lesson(row), max_length=100) is not None
    assert ours.chat is not None
    with pytest.raises(InvalidRequest, match="does not compile") as refused:
        ours.chat.chat([Message("user", "x")])
    assert refused.value.code == "template_error"


def test_templates_in_files_come_first(tmp_path: Path) -> None:
    family = FAMILIES["hermes"]
    named = write(tmp_path / "named", family.tokenizer(), template=family.template, eos_token=family.eos)
    assert sorted(chat_templates(named)) == ["default", "tool_use"]
    (named / "chat_template.jinja").write_text("file")
    assert chat_templates(named) == {"default": "file"}
    (named / "additional_chat_templates").mkdir()
    (named / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    assert (
        chat_templates(named)
        == {"default": "file", "tool_use": "tools"}
        == AutoTokenizer.from_pretrained(named).chat_template
    )
    none = write(tmp_path / "none", family.tokenizer(), eos_token=family.eos)
    assert chat_templates(none) == {}
    assert Tokenizer(none).chat is None


def test_several_templates_are_prepared_with_the_base(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    store = LocalArtifactStore(tmp_path / "artifacts")
    prepare_base(tiny_catalogue(folder).get("tiny"), store)
    assert chat_templates(store.base("tiny")) == {"default": CHAT_TEMPLATE, "tool_use": "{{ tools }}"}


def test_no_default_among_several_is_named(tmp_path: Path) -> None:
    family = FAMILIES["hermes"]
    template = [{"name": "rag", "template": "x"}]
    chat = Tokenizer(write(tmp_path, family.tokenizer(), template=template, eos_token=family.eos)).chat
    assert chat is not None
    with pytest.raises(InvalidRequest, match="named rag, and none named default"):
        chat.chat([Message("user", "x")])


def test_the_date_of_rows_is_their_files(tmp_path: Path) -> None:
    family = FAMILIES["smollm-3"]
    ours = Tokenizer(write(tmp_path, family.tokenizer(), template=family.template, eos_token=family.eos))
    assert ours.chat is not None
    moment = datetime(2024, 2, 29, 12).timestamp()
    dated = template_for("chat", ours.chat, moment)
    assert "Date: 29 February 2024" in dated.lesson(Chat(tuple(conversation(TALK[:2])))).turns[0].prompt.text
    assert dated.id == ours.chat.id
    assert f"Date: {datetime.now():%d %B %Y}" in ours.chat.chat([Message("user", "x")]).text
