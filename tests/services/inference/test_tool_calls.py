"""Calls in the forms in which templates write them: found, bound by a grammar, and told apart from other text."""

import asyncio
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema_rs import validator_for

from services.inference.engine.grammar import Grammars
from services.inference.tool_calls import ANY, CallForm, CallParser, CallPiece, Tools, call_form
from shared.datasets.chat_template import ChatTemplate
from shared.datasets.examples import Message, ToolCall
from shared.datasets.templates import InstructionTemplate, Template
from shared.datasets.tokens import Tokenizer
from tests.services.inference.engine.test_grammar import drawn
from tests.shared.datasets.family_templates import FAMILIES
from tests.shared.datasets.family_tokenizers import write

WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Oslo", "Bergen", 'a "b" {c}']},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
NOW = {"type": "object", "properties": {}, "additionalProperties": False}


def offered(name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "description": "", "parameters": parameters}}


BOTH = [offered("weather", WEATHER), offered("now", NOW)]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    """Of every family, with its template; those without a tool branch write calls in our own format."""
    made = {}
    for name, family in FAMILIES.items():
        names = {"eos_token": family.eos} | ({"bos_token": family.bos} if family.bos else {}) | family.special
        folder = tmp_path_factory.mktemp("families") / name
        made[name] = Tokenizer(Path(write(folder, family.tokenizer(), template=family.template, **names)))
    return made


def template_of(tokenizer: Tokenizer) -> Template:
    assert tokenizer.chat is not None
    return tokenizer.chat


def parsed(form: CallForm, pieces: Iterable[str]) -> tuple[str, list[tuple[str, Any]]]:
    """The text, and the calls with their arguments as a value."""
    parser = CallParser(form)
    found = [each for piece in pieces for each in parser.push(piece)] + parser.flush()
    calls: list[list[str]] = []
    for each in found:
        if isinstance(each, CallPiece):
            if each.name:
                assert each.index == len(calls)
                calls.append([each.name, ""])
            calls[each.index][1] += each.arguments
    text = "".join(each for each in found if isinstance(each, str))
    assert parser.called == bool(calls)
    return text, [(name, json.loads(arguments)) for name, arguments in calls]


def split(text: str, seed: int) -> list[str]:
    chance, pieces = random.Random(seed), []
    while text:
        size = chance.randint(1, 7)
        pieces.append(text[:size])
        text = text[size:]
    return pieces


ARGUMENTS = st.dictionaries(
    st.text(max_size=5), st.text(max_size=9) | st.integers() | st.lists(st.booleans()), max_size=3
)


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=20)
@given(arguments=ARGUMENTS, seed=st.integers(0, 999))
def test_what_a_template_writes_is_read_back(
    tokenizers: dict[str, Tokenizer], name: str, arguments: dict[str, Any], seed: int
) -> None:
    tokenizer = tokenizers[name]
    template = template_of(tokenizer)
    form = call_form(template, tokenizer)
    asked = Message("user", "a")
    called = Message("assistant", "", tool_calls=(ToolCall("weather", arguments, "call00001"),))
    whole = template.chat([asked, called, asked], tools=BOTH).whole_text
    reply = whole[whole.rindex(form.before) :]
    assert isinstance(template, ChatTemplate)
    reply = reply.partition(template.end)[0] if template.end else reply
    visible = form.visible(reply)
    assert parsed(form, split(visible, seed))[1][0] == ("weather", arguments)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("must", [ANY, "weather", "now"])
def test_calls_that_must_come_are_valid(tokenizers: dict[str, Tokenizer], name: str, must: str) -> None:
    tokenizer = tokenizers[name]
    form = call_form(template_of(tokenizer), tokenizer)
    grammar = form.grammar(Tools(BOTH, must=must))
    assert grammar is not None
    own = asyncio.run(Grammars(tokenizer, tokenizer.vocabulary).compiled(grammar))
    for seed in range(5):
        text = form.visible(drawn(own, tokenizer, seed))
        said, calls = parsed(form, split(text, seed))
        assert not said.strip()
        assert calls
        for called, arguments in calls:
            assert must in (ANY, called)
            assert validator_for({"weather": WEATHER, "now": NOW}[called]).is_valid(arguments), text


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "llama-3"])
def test_what_begins_as_a_call_becomes_one(tokenizers: dict[str, Tokenizer], name: str) -> None:
    """The model may say anything; once it has written the mark of a call, the call is valid."""
    tokenizer = tokenizers[name]
    form = call_form(template_of(tokenizer), tokenizer)
    grammar = form.grammar(Tools(BOTH))
    assert grammar is not None
    own = asyncio.run(Grammars(tokenizer, tokenizer.vocabulary).compiled(grammar))
    state = own.begin()
    mark = next((token for text, token in form.added.items() if form.before.startswith(text)), None)
    ids = tokenizer.encode("Let me see. ", add_special_tokens=False)
    ids += [mark] if mark is not None else tokenizer.encode(form.before.partition("\n")[0], add_special_tokens=False)
    for token in ids:
        assert state.allowed()[token], tokenizer.decode([token], skip_special_tokens=False)
        state.take(token)
    chance = random.Random(3)
    for _ in range(300):
        allowed = state.allowed()
        if allowed[tokenizer.eos_id]:
            break
        token = chance.choice([int(each) for each in allowed.nonzero()[0]])
        state.take(token)
        ids.append(token)
    text, [(called, arguments)] = parsed(form, split(tokenizer.decode(ids), 1))
    assert text.strip() == "Let me see."
    assert validator_for({"weather": WEATHER, "now": NOW}[called]).is_valid(arguments)


@given(text=st.text('<tool_cal>\n ab{}"', max_size=60), seed=st.integers(0, 99))
def test_text_that_is_no_call_stays_as_it_is(tokenizers: dict[str, Tokenizer], text: str, seed: int) -> None:
    form = call_form(InstructionTemplate(), tokenizers["no-end"])
    if '<tool_call>\n{"name": "' in text:
        return
    assert parsed(form, split(text, seed)) == (text, [])


def test_a_call_that_is_cut_in_its_mark_is_no_text(tokenizers: dict[str, Tokenizer]) -> None:
    """After calls only: alone, what begins like one is what the model said."""
    form = call_form(InstructionTemplate(), tokenizers["no-end"])
    call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    assert parsed(form, split(f"{call}\n<tool_c", 1)) == ("", [("now", {})])
    assert parsed(form, split(f"{call}\nSo it is <", 1))[0].strip() == "So it is"
    assert parsed(form, split("<tool_c", 1)) == ("<tool_c", [])
