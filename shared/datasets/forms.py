"""What a row may look like: the forms that training data comes in, and the example that each becomes.

A key that means something is used, or the row is refused by that key's name; one that means nothing to us is told to
whoever asks. Null, and an empty text where none is needed, are what was not said. Knows nothing of files and tokens.
"""

from collections.abc import Callable
from typing import Any

from shared.datasets.conversations import SWITCHES, parse_chat, parse_messages
from shared.datasets.examples import Chat, Completion, Example, Instruction, Text
from shared.datasets.fields import MEDIA, Unused, kind_of, refuse_keys, said, text_field
from shared.datasets.reader import RowError

FORMS = "instruction+output, prompt+completion, messages, conversations or text"
MAX_HISTORY = 256
# What the keys of other tools' rows are called here.
RENAMED = {
    "question": "instruction",
    "query": "instruction",
    "system_prompt": "system",
    "context": "input",
    "response": "output",
    "answer": "output",
    "conversation": "messages",
    "dialog": "messages",
    "dialogue": "messages",
    "content": "text",
}


def parse_row(row: object, unused: Unused = lambda key: None) -> Example:
    """Make an example of one decoded JSON value.

    Args:
        unused: told the keys that are not learnt from (Alpaca's `text`, ids, …), each as a path.

    Raises:
        RowError: it is none of the forms, or says what cannot be learnt.
    """
    if not isinstance(row, dict):
        raise RowError("", "not_an_object", f"a row must be a JSON object, not {kind_of(row)}")
    # What a table filled up with nulls is known by the columns it filled.
    form = next((form for key, form in _FORMS.items() if row.get(key) is not None), None)
    form = form or next((form for key, form in _FORMS.items() if key in row), None)
    if form is None:
        raise RowError("", "unknown_form", f"expected keys {FORMS}; got {_names(row)}{_hint(row)}")
    read, used, renamed = form
    if not row.keys() <= used:
        _other_keys(row, used, renamed, unused)
    return read(row, unused)


def _other_keys(row: dict[str, Any], used: frozenset[str], renamed: frozenset[str], unused: Unused) -> None:
    refuse_keys(row, MEDIA, "is not supported: only text is learnt")
    refuse_keys(row, ("chosen", "rejected"), "is not supported: preferences are not learnt")
    for key, value in row.items():
        if key in used or not said(value):
            continue
        name = RENAMED.get(key, "")
        if name in renamed and not said(row.get(name)):
            raise RowError(key, "unsupported_key", f"'{key}' is not a key of these rows; rename it to '{name}'")
        unused(key)


def _instruction(row: dict[str, Any], unused: Unused) -> Example:
    refuse_keys(row, ("tools", "functions"), "is supported in rows of messages only")
    instruction, asked = text_field(row, "instruction", optional=True), text_field(row, "input", optional=True)
    if not instruction.strip():
        if not asked.strip():
            instruction = text_field(row, "instruction")
        instruction, asked = asked, ""
    return Instruction(
        instruction, text_field(row, "output"), asked, text_field(row, "system", optional=True), _history(row)
    )


def _history(row: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    value = row.get("history")
    if not said(value):
        return ()
    if not isinstance(value, list):
        raise RowError("history", "wrong_type", f"'history' must be a list of pairs, not {kind_of(value)}")
    if len(value) > MAX_HISTORY:
        raise RowError("history", "too_many_messages", f"'history' has at most {MAX_HISTORY} pairs")
    pairs = []
    for index, pair in enumerate(value):
        path = f"history[{index}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowError(path, "wrong_type", "each of 'history' must be a pair: a question and its answer")
        question, answer = (text_field({path: text}, path) for text in pair)
        pairs.append((question, answer))
    return tuple(pairs)


def _completion(row: dict[str, Any], unused: Unused) -> Example:
    if isinstance(row.get("prompt"), list):
        return _chat_completion(row, unused)
    refuse_keys(row, ("system", "history", "tools", "functions", "suffix", "input"), "is not supported beside 'prompt'")
    return Completion(text_field(row, "prompt", blank=True), text_field(row, "completion"))


def _chat_completion(row: dict[str, Any], unused: Unused) -> Chat:
    """TRL's conversational form: both are lists of messages, and those of the prompt are not learnt."""
    prompt, completion = row["prompt"], row.get("completion")
    parse_messages(prompt, "prompt", unused)
    answer = parse_messages(completion, "completion", unused)
    if any(message.role not in ("assistant", "tool") for message in answer):
        raise RowError("completion", "wrong_value", "'completion' must begin and end with what the assistant says")
    unlearnt = {"weight": 0, **dict.fromkeys(SWITCHES)}
    before = [message | unlearnt if message.get("role") == "assistant" else message for message in prompt]
    return parse_chat(row | {"messages": [*before, *(completion or [])]}, "messages", lambda key: None)


def _text(row: dict[str, Any], unused: Unused) -> Example:
    refuse_keys(row, ("system", "history", "tools", "functions"), "is not supported beside 'text'")
    return Text(text_field(row, "text"))


_Form = tuple[Callable[[dict[str, Any], Unused], Example], frozenset[str], frozenset[str]]
_TOOLS = {"tools", "functions", "parallel_tool_calls"}
# By the key that tells the form, the first that is there: how it is read, its keys, and those that others rename.
_FORMS: dict[str, _Form] = {
    "messages": (
        lambda row, unused: parse_chat(row, "messages", unused),
        frozenset({"messages", "system", *_TOOLS}),
        frozenset({"system"}),
    ),
    "conversations": (
        lambda row, unused: parse_chat(row, "conversations", unused),
        frozenset({"conversations", "system", *_TOOLS}),
        frozenset({"system"}),
    ),
    "instruction": (
        _instruction,
        frozenset({"instruction", "input", "output", "system", "history"}),
        frozenset({"input", "output", "system"}),
    ),
    "prompt": (_completion, frozenset({"prompt", "completion", "system", *_TOOLS}), frozenset({"system"})),
    "text": (_text, frozenset({"text"}), frozenset({"system"})),
}


def _names(row: dict[str, Any]) -> str:
    return ", ".join(repr(str(key)[:40]) for key in list(row)[:8]) or "none"


def _hint(row: dict[str, Any]) -> str:
    if "chosen" in row:
        return "; preferences are not learnt"
    ours = {name for _, used, _ in _FORMS.values() for name in used}
    renamed = {key: key.strip().lower() for key in row if key not in ours and key.strip().lower() in ours}
    renamed |= {key: RENAMED[key] for key in row if key in RENAMED}
    if not renamed and "input" in row and "output" in row:
        renamed = {"input": "instruction"}
    wanted = [f"'{key}' to '{name}'" for key, name in renamed.items()]
    return f"; rename {' and '.join(wanted)}" if wanted else ""
