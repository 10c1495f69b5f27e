"""Files as users of other tools have them, from the upload to the preview of what is learnt of them."""

import io
from collections.abc import Iterator
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest

from tests.services.gateway.conftest import Gateway, as_jsonl
from tests.services.gateway.tiny_gateway import running_on_tiny

EOS = "<|im_end|>"


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, redis_server: str) -> Iterator[Gateway]:
    with running_on_tiny(tmp_path_factory.mktemp("home"), redis_server) as running:
        yield running


def previewed(gateway: Gateway, data: bytes | list[dict[str, Any]], name: str = "data.jsonl") -> tuple[str, list[str]]:
    """(all text, what of it is learnt) of a file's first row."""
    made = gateway.upload(data, name)
    assert made.is_success, made.text
    shown = gateway.http.get(f"/v1/files/{made.json()['id']}/preview", params={"model": "tiny"})
    assert shown.is_success, shown.text
    pieces = shown.json()["data"][0]["pieces"]
    return "".join(piece["text"] for piece in pieces), [piece["text"] for piece in pieces if piece["supervised"]]


def turn(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}{EOS}\n"


def learns(pieces: list[str], *answers: str) -> bool:
    """Whether these answers are learnt, each to its end, and nothing else but the line break behind an end."""
    return "".join(pieces).replace("\n", "") == "".join(answer + EOS for answer in answers)


def test_system_and_history_beside_an_instruction(gateway: Gateway) -> None:
    row = {"instruction": "Translate", "input": "cat", "output": "Katze", "system": "You answer in German only."}
    text, learnt = previewed(gateway, [row | {"history": [["Translate dog", "Hund"]]}] * 40)
    for said in ("You answer in German only.", "Translate dog", "Translate\n", "cat"):
        assert text.count(said) == 1
    assert learns(learnt, "Hund", "Katze")


def test_system_beside_messages(gateway: Gateway) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Arr"}]
    text, learnt = previewed(gateway, [{"system": "You are Ada, a pirate.", "messages": messages}] * 40)
    assert text.startswith(turn("system", "You are Ada, a pirate.") + turn("user", "hi"))
    assert learns(learnt, "Arr")


def test_null_filled_keys_of_an_export(gateway: Gateway) -> None:
    filled: dict[str, Any] = {"weight": None, "name": None, "tool_calls": None}
    messages = [
        {"role": "user", "content": "a"} | filled,
        {"role": "assistant", "content": "b"} | filled | {"weight": 0},
        {"role": "user", "content": "c", "weight": None},
        {"role": "assistant", "content": "d", "weight": None},
    ]
    assert learns(previewed(gateway, [{"messages": messages, "tools": None}])[1], "d")
    written = io.BytesIO()
    pq.write_table(pa.table({"messages": [messages], "tools": [None]}), written)
    assert learns(previewed(gateway, written.getvalue(), "export.parquet")[1], "d")


@pytest.mark.parametrize("keys", [("from", "value", "human", "gpt"), ("role", "content", "user", "assistant")])
def test_sharegpt(gateway: Gateway, keys: tuple[str, str, str, str]) -> None:
    role, content, user, assistant = keys
    turns = [(role, "system", "Be brief."), (role, user, "hi"), (role, assistant, "hello")]
    rows = [{"id": "1", "conversations": [{key: who, content: text} for key, who, text in turns]}]
    text, learnt = previewed(gateway, rows)
    assert text.startswith(turn("system", "Be brief.") + turn("user", "hi"))
    assert learns(learnt, "hello")


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_what_was_thought_is_learnt_before_the_answer(gateway: Gateway, key: str) -> None:
    answer = {"role": "assistant", key: "add them", "content": "4"}
    _, learnt = previewed(gateway, [{"messages": [{"role": "user", "content": "2+2?"}, answer]}])
    assert learns(learnt, "<think>add them</think>4")


def test_text(gateway: Gateway) -> None:
    text, learnt = previewed(gateway, [{"text": "### Human: a ### Assistant: b"}])
    assert text == "### Human: a ### Assistant: b" + EOS
    # All but the first token, which nothing comes before.
    assert "".join(learnt) == text[len(text) - len("".join(learnt)) :]
    assert len(text) - len("".join(learnt)) <= 3


def test_content_as_text_parts_and_a_developer(gateway: Gateway) -> None:
    messages: list[dict[str, Any]] = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Say "}, {"type": "text", "text": "7."}]},
        {"role": "assistant", "content": [{"type": "text", "text": "7"}]},
    ]
    text, learnt = previewed(gateway, [{"messages": messages}])
    assert text.startswith(turn("system", "Be brief.") + turn("user", "Say 7."))
    assert learns(learnt, "7")
    picture = {"type": "image_url", "image_url": {"url": "a.png"}}
    refused = gateway.upload([{"messages": [{"role": "user", "content": [picture]}, *messages]}]).json()["error"]
    assert "'image_url'" in refused["message"]


def test_an_empty_instruction_and_a_null_input(gateway: Gateway) -> None:
    for row in ({"instruction": "", "input": "Say 7."}, {"instruction": "Say 7.", "input": None}):
        text, learnt = previewed(gateway, [row | {"output": "7"}])
        assert text == f"### Instruction:\nSay 7.\n\n### Response:\n7{EOS}"
        assert learns(learnt, "7")


@pytest.mark.parametrize("switch", ["train", "training", "loss"])
def test_a_bad_answer_that_is_switched_off(gateway: Gateway, switch: str) -> None:
    bad = {"role": "assistant", "content": "BAD", switch: False}
    messages = [{"role": "user", "content": "a"}, bad, {"role": "user", "content": "no"}]
    text, learnt = previewed(gateway, [{"messages": [*messages, {"role": "assistant", "content": "GOOD"}]}])
    assert "BAD" in text
    assert learns(learnt, "GOOD")


def test_a_preview_has_the_lengths_in_the_bases_tokens(gateway: Gateway) -> None:
    rows = [{"instruction": f"{n}?", "output": "7 " * (1 if n < 40 else 100)} for n in range(50)]
    file = gateway.uploaded(rows)

    def lengths(file: str, max_length: int) -> dict[str, Any]:
        query: dict[str, Any] = {"model": "tiny", "limit": 1, "max_length": max_length}
        found: dict[str, Any] = gateway.http.get(f"/v1/files/{file}/preview", params=query).json()["lengths"]
        return found

    found = lengths(file, 100)
    assert (found["rows"], found["cut"], found["dropped"]) == (50, 10, 0)
    assert found["histogram"][0] == {"up_to": 64, "rows": 40}
    assert sum(each["rows"] for each in found["histogram"]) == 50
    assert lengths(file, found["longest"]) | {"cut": 10} == found
    assert lengths(file, found["longest"] - 1)["cut"] >= 1
    text = lengths(gateway.uploaded([{"text": "a b c " * 500}]), 100)
    assert (text["rows"], text["cut"], text["dropped"]) == (1, 0, 0)
    assert text["longest"] > 1000


def test_rows_that_are_too_long_are_told_before_training_by_openais_client(gateway: Gateway) -> None:
    client = gateway.openai()
    rows = [{"instruction": f"{n}?", "output": "on and on " * 300} for n in range(60)]
    file = client.files.create(file=("long.jsonl", as_jsonl(rows)), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file.id)
    (warning,) = [text for text in job.model_dump()["warnings"] if "max_length" in text]
    assert warning.startswith("60 of 60 rows have more tokens than max_length 512: 60 lose their end")
