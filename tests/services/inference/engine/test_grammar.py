"""What a grammar allows, what it costs, and that a bad one is refused and nothing else happens."""

import asyncio
import json
import random
import re
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema_rs import validator_for

from services.inference.engine import grammar
from services.inference.engine.grammar import MOST_BYTES, MOST_DEPTH, Grammar, Grammars
from services.inference.engine.interface import GrammarText
from shared.datasets.tokens import Tokenizer
from shared.errors import InvalidRequest
from tests.services.inference.harness import Tiny

T = TypeVar("T")
PADDING = 11


@pytest.fixture(scope="module")
def tokenizer(tiny: Tiny) -> Tokenizer:
    return tiny.load().tokenizer


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer, tokenizer.vocabulary + PADDING)


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


def compiled(grammars: Grammars, kind: Any, source: Any) -> Grammar:
    text = GrammarText(kind, source if isinstance(source, str) else json.dumps(source))
    return run(grammars.compiled(text))


def drawn(own: Grammar, tokenizer: Tokenizer, seed: int, most: int = 2000) -> str:
    """A text that follows the grammar, each token drawn from those allowed; the end is taken wherever it may come."""
    chance, state = random.Random(seed), own.begin()
    ids: list[int] = []
    while not state.complete and len(ids) < most:
        allowed = np.flatnonzero(state.allowed()).tolist()
        token = tokenizer.eos_id if tokenizer.eos_id in allowed else chance.choice(allowed)
        state.take(token)
        if token == tokenizer.eos_id:
            break
        ids.append(token)
    assert len(ids) < most
    return tokenizer.decode(ids, skip_special_tokens=False)


def schemas() -> st.SearchStrategy[dict[str, Any]]:
    """Schemas of the kinds that people ask for, all of them with short texts."""
    leaves = st.one_of(
        st.just({"type": "boolean"}),
        st.just({"type": "null"}),
        st.integers(-50, 50).map(lambda low: {"type": "integer", "minimum": low, "maximum": low + 30}),
        st.lists(st.text('abé🎉"\\', max_size=4), min_size=1, max_size=4, unique=True).map(
            lambda words: {"enum": words}
        ),
        st.integers(0, 5).map(lambda size: {"type": "string", "maxLength": size}),
        st.just({"type": "string", "pattern": "^[a-c]{1,3}$"}),
    )
    names = st.text("abc", min_size=1, max_size=3)

    def wider(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
        objects = st.dictionaries(names, inner, min_size=1, max_size=3).map(
            lambda fields: {
                "type": "object",
                "properties": fields,
                "required": sorted(fields)[:2],
                "additionalProperties": False,
            }
        )
        lists = inner.map(lambda item: {"type": "array", "items": item, "maxItems": 2})
        return objects | lists | st.lists(inner, min_size=1, max_size=2).map(lambda some: {"anyOf": some})

    return st.recursive(leaves, wider, max_leaves=4)


@settings(max_examples=25)
@given(schema=schemas(), seed=st.integers(0, 99))
def test_whatever_is_drawn_is_valid(
    grammars: Grammars, tokenizer: Tokenizer, schema: dict[str, Any], seed: int
) -> None:
    own = grammars._grammar(grammar._followed(GrammarText("json_schema", json.dumps(schema))))
    text = drawn(own, tokenizer, seed)
    assert validator_for(schema).is_valid(json.loads(text)), text


def test_a_regular_expression_is_followed(grammars: Grammars, tokenizer: Tokenizer) -> None:
    own = compiled(grammars, "regex", r"(ja|nein), [0-9]{2} é🎉?")
    texts = {drawn(own, tokenizer, seed) for seed in range(20)}
    assert len(texts) > 5
    assert all(re.fullmatch(r"(ja|nein), [0-9]{2} é🎉?", text) for text in texts)


def test_padding_and_control_tokens_are_never_allowed(grammars: Grammars, tokenizer: Tokenizer) -> None:
    allowed = compiled(grammars, "regex", "(.|\n)*").begin().allowed()
    assert allowed.shape == (tokenizer.vocabulary + PADDING,)
    assert not allowed[tokenizer.vocabulary :].any()
    special = [token for token, each in tokenizer.fast.get_added_tokens_decoder().items() if each.special]
    assert [token for token in special if allowed[token]] == [tokenizer.eos_id]


def test_white_space_has_an_end(grammars: Grammars, tokenizer: Tokenizer) -> None:
    """A small model that likes spaces must not go on with them for ever."""
    state = compiled(grammars, "json_schema", {"type": "object", "maxProperties": 0}).begin()
    blank = [token for token in range(tokenizer.vocabulary) if (text := tokenizer.decode([token])) and not text.strip()]
    taken = 0
    while not state.complete:
        allowed = state.allowed()
        token = next((each for each in blank if allowed[each]), None)
        token = int(np.flatnonzero(allowed)[0]) if token is None else token
        state.take(token)
        taken += 1
        assert taken < 100


@pytest.mark.parametrize(
    ("kind", "source", "words"),
    [
        ("json_schema", "{", "no JSON"),
        ("json_schema", "[" * 100_000, "bytes"),
        ("json_schema", "[" * 10_000, "no JSON"),
        ("json_schema", "[]", "JSON object"),
        ("json_schema", {"type": "strin"}, "strin"),
        ("json_schema", {"$ref": "http://127.0.0.1/x"}, "127.0.0.1"),
        ("json_schema", {"type": "string", "minLength": 5, "maxLength": 2}, "minLength"),
        ("json_schema", {"type": "array", "uniqueItems": True}, "uniqueItems"),
        ("json_schema", {"enum": ["x" * MOST_BYTES]}, "bytes"),
        ("regex", "((", "regex"),
        ("regex", "(?=a)b", "look"),
        ("regex", "a" * (MOST_BYTES + 1), "bytes"),
    ],
)
def test_a_bad_grammar_is_refused_with_the_reason(grammars: Grammars, kind: Any, source: Any, words: str) -> None:
    for _ in range(2):
        with pytest.raises(InvalidRequest, match=re.escape(words)) as refused:
            compiled(grammars, kind, source)
        assert refused.value.code == "invalid_grammar"
        assert len(refused.value.message) < 400
    assert drawn(compiled(grammars, "regex", "a|b"), grammars._tokenizer, 1) in "ab"


def test_too_deep_is_refused(grammars: Grammars) -> None:
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(MOST_DEPTH):
        deep = {"type": "array", "items": deep}
    with pytest.raises(InvalidRequest, match="levels deep"):
        compiled(grammars, "json_schema", deep)
    assert isinstance(compiled(grammars, "json_schema", deep["items"]), Grammar)


def test_what_cannot_be_followed_is_passed_over_where_nobody_insists(grammars: Grammars) -> None:
    unique = {"type": "array", "items": {"type": "boolean"}, "uniqueItems": True}
    assert isinstance(compiled(grammars, "lenient_json_schema", unique), Grammar)
    with pytest.raises(InvalidRequest):
        compiled(grammars, "json_schema", unique)


@pytest.mark.slow
def test_a_grammar_that_takes_minutes_is_ended_and_others_go_on(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An intersection of patterns: 1 kB of schema, minutes of compiling that nothing in the library ends."""
    costly = {"allOf": [{"type": "string", "pattern": f"^.*a.{{{size}}}$"} for size in range(5, 60)]}

    async def both() -> tuple[float, float]:
        began = time.monotonic()
        slow = asyncio.create_task(grammars.compiled(GrammarText("json_schema", json.dumps(costly))))
        await asyncio.sleep(0)
        await grammars.compiled(GrammarText("regex", "other"))
        other = time.monotonic() - began
        with pytest.raises(InvalidRequest, match="too much time or memory"):
            await slow
        return other, time.monotonic() - began

    other, ended = run(both())
    assert other < ended
    assert ended < 60
    monkeypatch.setattr(grammars, "_compile", None)
    with pytest.raises(InvalidRequest):
        compiled(grammars, "json_schema", costly)


def test_a_grammar_is_compiled_once_for_all_and_the_oldest_is_forgotten(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Grammars(tokenizer, tokenizer.vocabulary)
    asked: list[str] = []
    monkeypatch.setattr(grammar, "_check_cost", asked.append)
    monkeypatch.setattr(grammar, "_KEPT", 3)

    async def many() -> None:
        first = GrammarText("regex", "first")
        same = await asyncio.gather(*(own.compiled(first) for _ in range(5)))
        assert len({id(each) for each in same}) == 1
        for number in range(2):
            await own.compiled(GrammarText("regex", f"{number}"))
        await own.compiled(first)
        assert len(asked) == 3
        await own.compiled(GrammarText("regex", "one more"))
        await own.compiled(first)
        assert len(asked) == 4
        await own.compiled(GrammarText("regex", "0"))
        assert len(asked) == 5

    run(many())
    own.close()
