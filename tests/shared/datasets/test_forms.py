"""Rows as people have them: learnt as they say, or refused by the key that cannot be learnt; what is unused is told."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.datasets.examples import Chat, Completion, Example, Instruction, Message, Text, ToolCall
from shared.datasets.forms import parse_row
from shared.datasets.reader import RowError

USER = {"role": "user", "content": "a"}
ASSISTANT = {"role": "assistant", "content": "b"}
BOTH = (Message("user", "a"), Message("assistant", "b"))
TOOL = {"type": "function", "function": {"name": "w", "parameters": {"type": "object"}}}
CALL = ToolCall("w", {"c": "Oslo"}, "c1")
# How one call is written.
ARGUMENTS = '{"c": "Oslo"}'
CALLS: list[dict[str, Any]] = [
    {"tool_calls": [{"id": "c1", "type": "function", "function": {"name": "w", "arguments": ARGUMENTS}}]},
    {"tool_calls": [{"id": "c1", "function": {"name": "w", "arguments": {"c": "Oslo", "d": None}}}]},
    {"tool_calls": [{"id": "c1", "name": "w", "arguments": {"c": "Oslo"}}]},
    {"tool_calls": json.dumps([{"id": "c1", "name": "w", "arguments": ARGUMENTS}])},
]


def chat(*messages: object, **keys: object) -> dict[str, Any]:
    return {"messages": list(messages), **keys}


def calling(said: dict[str, Any]) -> dict[str, Any]:
    return chat(USER, {"role": "assistant", "content": None} | said)


ROWS: list[tuple[dict[str, Any], Example]] = [
    ({"instruction": "a", "output": "b", "text": 1, "id": None}, Instruction("a", "b")),
    ({"instruction": "a", "input": "", "output": "b"}, Instruction("a", "b")),
    ({"instruction": "a", "input": None, "output": "b"}, Instruction("a", "b")),
    ({"instruction": "a", "input": "c", "output": "b"}, Instruction("a", "b", "c")),
    # Exports that know no instruction write an empty one, or none.
    ({"instruction": "", "input": "c", "output": "b"}, Instruction("c", "b")),
    ({"instruction": None, "input": "c", "output": "b"}, Instruction("c", "b")),
    (
        {
            "instruction": "Translate",
            "input": "cat",
            "output": "Katze",
            "system": "German only.",
            "history": [["dog", "Hund"]],
        },
        Instruction("Translate", "Katze", "cat", "German only.", (("dog", "Hund"),)),
    ),
    ({"instruction": "a", "output": "b", "system": "", "history": []}, Instruction("a", "b")),
    ({"instruction": "a", "output": "b", "system": None, "history": None}, Instruction("a", "b")),
    # A table of several forms: the columns that are filled tell which.
    (
        {"messages": None, "conversations": None, "instruction": "a", "output": "b", "prompt": None},
        Instruction("a", "b"),
    ),
    ({"prompt": "", "completion": " b"}, Completion("", " b")),
    ({"text": "### Human: a ### Assistant: b"}, Text("### Human: a ### Assistant: b")),
    (chat(USER, ASSISTANT | {"weight": 1}), Chat(BOTH)),
    (chat(USER, ASSISTANT | {"weight": 1.0}), Chat(BOTH)),
    (
        chat(
            {"role": "system", "content": "s"},
            {"role": "assistant", "content": "a", "weight": 0},
            {"role": "assistant", "content": "b", "tool_calls": None},
            tools=[],
        ),
        Chat((Message("system", "s"), Message("assistant", "a", 0), Message("assistant", "b"))),
    ),
    # Arrow fills what is missing with null.
    (
        chat(
            USER | {"weight": None, "name": None, "tool_calls": None},
            ASSISTANT | {"weight": 0, "name": None, "tool_calls": None},
            {"role": "user", "content": "c", "weight": None},
            {"role": "assistant", "content": "d", "weight": None, "reasoning_content": None},
            tools=None,
        ),
        Chat((Message("user", "a"), Message("assistant", "b", 0), Message("user", "c"), Message("assistant", "d"))),
    ),
    (chat(USER, ASSISTANT, system="You are Ada."), Chat((Message("system", "You are Ada."), *BOTH))),
    (chat({"role": "developer", "content": "s"}, USER, ASSISTANT), Chat((Message("system", "s"), *BOTH))),
    (
        chat(
            {"role": "user", "content": [{"type": "text", "text": "Say "}, {"type": "text", "text": "7."}]},
            {"role": "assistant", "content": [{"type": "output_text", "text": "7", "image_url": None}]},
        ),
        Chat((Message("user", "Say 7."), Message("assistant", "7"))),
    ),
    (
        chat(USER, ASSISTANT | {"reasoning_content": "add them"}),
        Chat((Message("user", "a"), Message("assistant", "b", reasoning_content="add them"))),
    ),
    (
        chat(USER, ASSISTANT | {"thinking": "add them", "reasoning": "add them"}),
        Chat((Message("user", "a"), Message("assistant", "b", reasoning_content="add them"))),
    ),
    *((calling(said), Chat((Message("user", "a"), Message("assistant", "", tool_calls=(CALL,))))) for said in CALLS),
    (
        calling({"content": "", "function_call": {"name": "w", "arguments": ARGUMENTS}}),
        Chat((Message("user", "a"), Message("assistant", "", tool_calls=(ToolCall("w", {"c": "Oslo"}),)))),
    ),
    (
        chat(
            USER,
            {"role": "assistant", "content": None} | CALLS[0],
            {"role": "tool", "tool_call_id": "c1", "name": "w", "content": "4"},
            {"role": "assistant", "content": "4 degrees"},
            tools=[TOOL],
            parallel_tool_calls=False,
        ),
        Chat(
            (
                Message("user", "a"),
                Message("assistant", "", tool_calls=(CALL,)),
                Message("tool", "4", tool_call_id="c1", name="w"),
                Message("assistant", "4 degrees"),
            ),
            (TOOL,),
        ),
    ),
    (chat(USER, ASSISTANT, functions=[TOOL["function"]]), Chat(BOTH, (TOOL,))),
    (chat(USER, ASSISTANT, tools=json.dumps([TOOL])), Chat(BOTH, (TOOL,))),
    (
        {
            "id": "1",
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "hi"},
                {"from": "gpt", "value": "hello", "weight": None},
            ],
        },
        Chat((Message("system", "Be brief."), Message("user", "hi"), Message("assistant", "hello"))),
    ),
    ({"conversations": [USER, ASSISTANT], "system": ""}, Chat(BOTH)),
    (
        {
            "conversations": [
                {"from": "user", "value": "a"},
                {"from": "function_call", "value": '{"name": "w", "arguments": {"c": "Oslo"}}'},
                {"from": "observation", "value": "4"},
                {"from": "gpt", "value": "b"},
            ],
            "tools": json.dumps([TOOL["function"]]),
        },
        Chat(
            (
                Message("user", "a"),
                Message("assistant", "", tool_calls=(ToolCall("w", {"c": "Oslo"}),)),
                Message("tool", "4"),
                Message("assistant", "b"),
            ),
            (TOOL,),
        ),
    ),
    # TRL's conversational prompt and completion: the prompt's answers are not learnt.
    (
        {"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]},
        Chat((Message("user", "a"), Message("assistant", "b", 0), *BOTH)),
    ),
]


@pytest.mark.parametrize(("row", "example"), ROWS, ids=range(len(ROWS)))
def test_rows_that_are_understood(row: object, example: object) -> None:
    assert parse_row(row) == example


@pytest.mark.parametrize("switch", [{"weight": 0}, {"train": False}, {"training": False}, {"loss": False}, {"loss": 0}])
@pytest.mark.parametrize("form", ["messages", "conversations"])
def test_every_tools_switch_leaves_a_message_out_of_the_loss(switch: dict[str, Any], form: str) -> None:
    row = {form: [USER, {"role": "assistant", "content": "BAD"} | switch, USER, ASSISTANT | {"train": True}]}
    example = parse_row(row)
    assert isinstance(example, Chat)
    assert [message.weight for message in example.messages if message.role == "assistant"] == [0, 1]


REFUSED: list[tuple[object, str, str]] = [
    (None, "", "not_an_object"),
    (1, "", "not_an_object"),
    ("a", "", "not_an_object"),
    ([], "", "not_an_object"),
    ({}, "", "unknown_form"),
    ({"Instruction": "a", "Output": "b"}, "", "unknown_form"),
    ({"instruction": "a"}, "output", "missing"),
    ({"instruction": "a", "output": None}, "output", "missing"),
    ({"instruction": "a", "output": ""}, "output", "blank"),
    ({"instruction": "a", "output": " \n\u2003"}, "output", "blank"),
    ({"instruction": " ", "output": "b"}, "instruction", "blank"),
    ({"instruction": "", "input": " ", "output": "b"}, "instruction", "blank"),
    ({"instruction": None, "output": "b"}, "instruction", "missing"),
    ({"instruction": 1, "output": "b"}, "instruction", "wrong_type"),
    ({"instruction": "a", "output": ["b"]}, "output", "wrong_type"),
    ({"instruction": "a", "output": True}, "output", "wrong_type"),
    ({"instruction": "a", "output": "b", "input": {}}, "input", "wrong_type"),
    ({"instruction": "a\x00", "output": "b"}, "instruction", "invalid_text"),
    ({"instruction": "a", "output": "\ud800"}, "output", "invalid_text"),
    ({"instruction": "a", "output": "b", "system": ["c"]}, "system", "wrong_type"),
    ({"instruction": "a", "output": "b", "history": "c"}, "history", "wrong_type"),
    ({"instruction": "a", "output": "b", "history": [["c"]]}, "history[0]", "wrong_type"),
    ({"instruction": "a", "output": "b", "history": [["c", ""]]}, "history[0]", "blank"),
    ({"instruction": "a", "output": "b", "history": [["c", "d"]] * 257}, "history", "too_many_messages"),
    ({"instruction": "a", "output": "b", "tools": [TOOL]}, "tools", "unsupported_key"),
    ({"instruction": "a", "output": "b", "images": ["a.png"]}, "images", "unsupported_key"),
    ({"instruction": "a", "output": "b", "context": "c"}, "context", "unsupported_key"),
    ({"instruction": "a", "response": "b"}, "response", "unsupported_key"),
    ({"prompt": "a"}, "completion", "missing"),
    ({"prompt": "a", "completion": "  "}, "completion", "blank"),
    ({"prompt": None, "completion": "b"}, "prompt", "missing"),
    ({"prompt": "a", "completion": "b", "system": "c"}, "system", "unsupported_key"),
    ({"prompt": "a", "completion": "b", "history": [["c", "d"]]}, "history", "unsupported_key"),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, "chosen", "unsupported_key"),
    ({"prompt": [USER], "completion": "b"}, "completion", "wrong_type"),
    ({"prompt": [USER], "completion": [USER, ASSISTANT]}, "completion", "wrong_value"),
    ({"text": " "}, "text", "blank"),
    ({"text": ["a"]}, "text", "wrong_type"),
    ({"text": "a", "system": "b"}, "system", "unsupported_key"),
    (chat(*[USER] * 513), "messages", "too_many_messages"),
    (chat(), "messages", "wrong_type"),
    ({"messages": "a"}, "messages", "wrong_type"),
    ({"messages": {"role": "user"}}, "messages", "wrong_type"),
    (chat("a"), "messages[0]", "wrong_type"),
    (chat({"content": "a"}), "messages[0].role", "unknown_role"),
    (chat(USER, {"role": "Assistant", "content": "b"}), "messages[1].role", "unknown_role"),
    (chat({"role": ["user"], "content": "b"}), "messages[0].role", "unknown_role"),
    (chat({"role": "human", "content": "b"}), "messages[0].role", "unknown_role"),
    ({"conversations": [{"from": "narrator", "value": "b"}]}, "conversations[0].from", "unknown_role"),
    ({"conversations": [{"from": "gpt"}]}, "conversations[0].value", "missing"),
    (chat({"role": "tool", "content": "b"}), "messages", "nothing_to_learn"),
    (chat(USER), "messages", "nothing_to_learn"),
    (chat(USER, ASSISTANT | {"weight": 0}), "messages", "nothing_to_learn"),
    (chat(USER, ASSISTANT | {"train": False}), "messages", "nothing_to_learn"),
    (chat(USER, ASSISTANT | {"weight": 0.5}), "messages[1].weight", "wrong_value"),
    (chat(USER, ASSISTANT | {"weight": True}), "messages[1].weight", "wrong_value"),
    (chat(USER, ASSISTANT | {"weight": [1]}), "messages[1].weight", "wrong_value"),
    (chat(USER, ASSISTANT | {"train": "yes"}), "messages[1].train", "wrong_value"),
    (chat(USER, ASSISTANT | {"loss": 0.7}), "messages[1].loss", "wrong_value"),
    (chat(USER, ASSISTANT | {"weight": 1, "train": False}), "messages[1]", "wrong_value"),
    (chat(USER | {"train": True}, ASSISTANT), "messages[0].train", "unsupported_key"),
    (chat(USER, ASSISTANT | {"train_detail": [{"begin_offset": 0}]}), "messages[1].train_detail", "unsupported_key"),
    (chat(USER, ASSISTANT, system="c", history=[["d", "e"]]), "history", "unsupported_key"),
    (chat({"role": "system", "content": "c"}, USER, ASSISTANT, system="c"), "system", "wrong_value"),
    (chat(USER, ASSISTANT, system_prompt="c"), "system_prompt", "unsupported_key"),
    (chat(USER, {"role": "assistant", "content": None}), "messages[1].content", "missing"),
    (chat(USER, {"role": "assistant", "content": ""}), "messages[1].content", "blank"),
    (chat(USER, {"role": "assistant", "content": None, "refusal": "No."}), "messages[1].refusal", "unsupported_key"),
    (chat(USER, {"role": "assistant", "content": [{"type": "text"}]}), "messages[1].content[0].text", "missing"),
    (chat(USER, {"role": "assistant", "content": ["b"]}), "messages[1].content[0]", "wrong_type"),
    (
        chat({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, ASSISTANT),
        "messages[0].content[0].type",
        "unsupported_part",
    ),
    (chat(USER | {"images": ["a.png"]}, ASSISTANT), "messages[0].images", "unsupported_key"),
    (chat(USER | {"reasoning_content": "c"}, ASSISTANT), "messages[0]", "wrong_value"),
    (chat(USER | CALLS[0], ASSISTANT), "messages[0]", "wrong_value"),
    (chat(USER, ASSISTANT | {"reasoning": "c", "thinking": "d"}), "messages[1]", "wrong_value"),
    (calling({"tool_calls": [{}]}), "messages[1].tool_calls[0].name", "missing"),
    (calling({"tool_calls": {}, "content": ""}), "messages[1].content", "blank"),
    (calling({"tool_calls": "["}), "messages[1].tool_calls", "wrong_value"),
    (calling({"tool_calls": [{"type": "custom"}]}), "messages[1].tool_calls[0].type", "unsupported_key"),
    (
        calling({"tool_calls": [{"function": {"name": "w", "arguments": "{"}}]}),
        "messages[1].tool_calls[0].function.arguments",
        "wrong_value",
    ),
    (
        calling({"tool_calls": [{"function": {"name": "w", "arguments": "[1]"}}]}),
        "messages[1].tool_calls[0].function.arguments",
        "wrong_type",
    ),
    (calling(CALLS[0] | {"function_call": {"name": "w"}}), "messages[1]", "wrong_value"),
    (chat(USER, ASSISTANT, tools=[{}]), "tools[0].function.name", "missing"),
    (chat(USER, ASSISTANT, tools={"a": 1}), "tools", "wrong_type"),
    (chat(USER, ASSISTANT, tools=[{"type": "web_search", "function": {}}]), "tools[0]", "unsupported_key"),
    (chat(USER, ASSISTANT, tools=[TOOL], functions=[TOOL["function"]]), "functions", "wrong_value"),
    (chat(USER, ASSISTANT, tools=[{"name": "\ud800"}]), "tools", "invalid_text"),
]


@pytest.mark.parametrize(("row", "path", "code"), REFUSED, ids=range(len(REFUSED)))
def test_rows_that_are_refused(row: object, path: str, code: str) -> None:
    with pytest.raises(RowError) as refused:
        parse_row(row)
    assert (refused.value.path, refused.value.code) == (path, code)


@pytest.mark.parametrize(
    ("row", "hint"),
    [
        ({"Instruction": "a", "Output": "b"}, "rename 'Instruction' to 'instruction' and 'Output' to 'output'"),
        ({"question": "a", "answer": "b"}, "rename 'question' to 'instruction' and 'answer' to 'output'"),
        ({"input": "a", "output": "b"}, "rename 'input' to 'instruction'"),
        ({"chosen": "a", "rejected": "b"}, "preferences are not learnt"),
        ({"instruction": "a", "response": "b"}, "rename it to 'output'"),
    ],
)
def test_a_refusal_says_how_to_rename(row: object, hint: str) -> None:
    with pytest.raises(RowError) as refused:
        parse_row(row)
    assert hint in refused.value.message


def test_keys_that_are_not_learnt_from_are_told_and_those_that_say_nothing_are_not() -> None:
    unused: list[str] = []
    alpaca = {"id": 7, "instruction": "a", "input": "", "output": "b", "text": "a b", "meta": {}, "tags": []}
    parse_row(alpaca | {"messages": None}, unused.append)
    assert unused == ["id", "text"]
    unused.clear()
    row = chat(USER | {"name": "Ada", "id": "m1"}, ASSISTANT | {"annotations": [], "audio": None, "ts": 0}, prompt="a")
    parse_row(row, unused.append)
    assert unused == ["prompt", "messages[].name", "messages[].id", "messages[].ts"]
    unused.clear()
    parse_row({"prompt": [USER | {"id": 1}], "completion": [ASSISTANT], "source": "x"}, unused.append)
    assert unused == ["source", "prompt[].id"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*"ab", "role", "content"]), inner, max_size=3)
    ),
    max_leaves=8,
)
KEYS = st.sampled_from(
    [
        "instruction",
        "input",
        "output",
        "system",
        "history",
        "prompt",
        "completion",
        "text",
        "messages",
        "conversations",
        "tools",
        "functions",
    ]
)
MESSAGE_KEYS = st.sampled_from(
    ["role", "content", "from", "value", "weight", "train", "loss", "tool_calls", "function_call", "reasoning", "name"]
)
ROLE_NAMES = st.sampled_from(["user", "assistant", "tool", "gpt", "human", "function_call", "system"])
MESSAGES = st.lists(
    st.builds(
        lambda keys, role: keys | {"role": role}, st.dictionaries(MESSAGE_KEYS, JSON, max_size=4), JSON | ROLE_NAMES
    ),
    max_size=3,
)


@settings(max_examples=60)
@given(st.dictionaries(KEYS, JSON | MESSAGES, max_size=4))
def test_any_row_is_an_example_or_a_row_error(row: dict[str, Any]) -> None:
    try:
        example = parse_row(row)
    except RowError:
        return
    # The same row, filled up with nulls as tables do it, says the same.
    assert parse_row(row | {key: None for key in ("messages", "text", "tools", "x") if key not in row}) == example
