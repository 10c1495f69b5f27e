import hashlib
import json
import shutil
from pathlib import Path

import pytest

from services.trainer.contract import StopRequested
from services.trainer.data import dataset
from services.trainer.data.dataset import Rows, prepare_data
from shared.datasets.tokens import Tokenizer
from shared.errors import JobFailed, Unavailable
from shared.storage.artifacts import derived_name, sha256_of
from tests.services.trainer.harness import Row, TinyJob, ignore, instruction_rows


def prepare(tiny: TinyJob, rows: list[Row], **hyper: object) -> Rows:
    spec = tiny.spec(rows, hyper=dict(hyper))
    return prepare_data(spec, tiny.store, tiny.bases.tokenizer(spec), ignore).training


def test_rows_are_prompt_response_and_eos_with_only_the_response_supervised(tiny: TinyJob) -> None:
    rows = prepare(tiny, [{"instruction": "Hi", "input": "there", "output": "Yes"}])
    tokenizer = Tokenizer(tiny.store.base("tiny"))
    prompt = tokenizer.encode("### Instruction:\nHi\n\n### Input:\nthere\n\n### Response:\n", add_special_tokens=True)
    response = [*tokenizer.encode("Yes", add_special_tokens=False), tokenizer.eos_id]
    ids, supervised = rows[0]
    assert ids.tolist() == prompt + response
    assert supervised.tolist() == [False] * len(prompt) + [True] * len(response)
    assert (rows.template, rows.supervised.tolist()) == ("instruction-v1", [len(response)])


def test_eos_counts_although_pad_is_eos_and_masks_follow_lengths(tiny: TinyJob) -> None:
    eos = "<|im_end|>"
    rows = prepare(tiny, [{"prompt": f"a{eos}b", "completion": f"c{eos}d"}])
    ids, supervised = rows[0]
    eos_id = Tokenizer(tiny.store.base("tiny")).eos_id
    # In the prompt unsupervised, inside the response and at its end supervised: by place, not by id.
    assert [bool(flag) for token, flag in zip(ids, supervised, strict=True) if token == eos_id] == [False, True, True]
    assert ids[-1] == eos_id


def test_train_on_prompt_supervises_all_but_the_first_token(tiny: TinyJob) -> None:
    rows = prepare(tiny, instruction_rows(3), train_on_prompt=True)
    for row in range(3):
        _, supervised = rows[row]
        assert supervised.tolist() == [False] + [True] * (int(rows.lengths[row]) - 1)
    assert rows.supervised.tolist() == (rows.lengths - 1).tolist()


def test_truncation_cuts_counts_and_drops_what_has_nothing_left(tiny: TinyJob) -> None:
    kept, cut, hopeless = (
        {"prompt": "a", "completion": "b"},
        {"prompt": "a", "completion": "b c d e f g h i j k l m n o p"},
        {"prompt": "a b c d e f g h i j k l m n o p", "completion": "q"},
    )
    rows = prepare(tiny, [kept, cut, hopeless], max_length=8)
    assert (len(rows), rows.truncated, rows.dropped) == (2, 1, 1)
    assert rows.lengths.tolist() == [3, 8]
    with pytest.raises(JobFailed, match="all 1 rows are longer than max_length 8") as failure:
        prepare(tiny, [hopeless], max_length=8)
    assert failure.value.code == "invalid_training_file"


def test_equal_content_is_tokenised_once(tiny: TinyJob, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(tiny, instruction_rows(5))

    def unexpected(*_: object, **__: object) -> None:
        raise AssertionError("tokenised again")

    with monkeypatch.context() as patch:
        patch.setattr(dataset, "training_rows", unexpected)
        assert prepare(tiny, instruction_rows(5)).key == first.key
    others = [
        prepare(tiny, instruction_rows(6)).key,
        prepare(tiny, instruction_rows(5), max_length=100).key,
        prepare(tiny, instruction_rows(5), train_on_prompt=True).key,
    ]
    assert len({first.key, *others}) == 4


def test_a_damaged_cache_is_made_again(tiny: TinyJob) -> None:
    first = prepare(tiny, instruction_rows(5))
    expected = [first[row][0].tolist() for row in range(5)]
    (cached,) = tiny.store.root.glob(f"cache/*/{first.key}")
    shutil.rmtree(cached / "rows")
    again = prepare(tiny, instruction_rows(5))
    assert [again[row][0].tolist() for row in range(5)] == expected


def test_a_file_that_is_not_here_is_the_machines_fault(tiny: TinyJob) -> None:
    spec = tiny.spec(validation=instruction_rows(2, start=50))
    (tiny.store.file("file-validation") / "data").unlink()
    with pytest.raises(Unavailable, match="validation file file-validation is not in its artifacts folder") as failure:
        prepare_data(spec, tiny.store, tiny.bases.tokenizer(spec), ignore)
    assert failure.value.code == "file_not_here"


def test_a_file_that_is_not_what_the_job_was_created_with(tiny: TinyJob) -> None:
    spec = tiny.spec(validation=instruction_rows(2, start=50))
    data: Path = tiny.store.file("file-validation") / "data"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(JobFailed, match="validation file") as failure:
        prepare_data(spec, tiny.store, tiny.bases.tokenizer(spec), ignore)
    assert failure.value.code == "invalid_validation_file"


def test_a_bad_file_fails_before_any_model_is_loaded(tiny: TinyJob, monkeypatch: pytest.MonkeyPatch) -> None:
    def unexpected(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("services.trainer.model.bases.load_base", unexpected)
    spec = tiny.spec([{"prompt": "a b c d e f g h i j k l", "completion": "m"}], hyper={"max_length": 8})
    with pytest.raises(JobFailed, match="there is nothing to learn") as failure:
        tiny.run(spec)
    assert failure.value.code == "invalid_training_file"


def test_a_stop_is_seen_while_tokenising(tiny: TinyJob) -> None:
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise StopRequested

    spec = tiny.spec(instruction_rows(200))
    with pytest.raises(StopRequested):
        prepare_data(spec, tiny.store, tiny.bases.tokenizer(spec), check)
    assert not list((tiny.store.root / "staging").iterdir())


def test_rows_made_of_a_file_are_learnt_in_its_stead_if_they_are_whole(tiny: TinyJob) -> None:
    own = prepare(tiny, instruction_rows(5))
    spec = tiny.spec(instruction_rows(5))
    rows = b'{"instruction": "a", "output": "b"}\n'
    path = tiny.store.file("file-training") / derived_name(hashlib.sha256(rows).hexdigest())
    path.write_bytes(rows)
    made = prepare_data(spec, tiny.store, tiny.bases.tokenizer(spec), ignore).training
    assert (len(own), len(made)) == (5, 1)
    # Both are under the hash of the file, with which they go.
    assert all(list(tiny.store.cached(spec.training_sha256).glob(key)) for key in (own.key, made.key))
    path.write_bytes(rows + rows)
    with pytest.raises(JobFailed, match="rows that were made of the training file file-training have changed"):
        prepare_data(spec, tiny.store, tiny.bases.tokenizer(spec), ignore)


def test_texts_become_as_many_rows_as_they_fill(tiny: TinyJob) -> None:
    rows = prepare(tiny, [{"text": "a b c d e f g h"}, {"text": "i"}], max_length=8)
    assert (rows.template, rows.dropped, rows.truncated) == ("completion-v1", 0, 0)
    assert rows.lengths.tolist()[:-1] == [8] * (len(rows) - 2) + [rows.lengths[-2]]
    assert rows.supervised.tolist() == (rows.lengths - 1).tolist()


@pytest.mark.parametrize(
    ("truncation", "counts"), [("cut_end", (2, 1, 1)), ("cut_start", (3, 2, 0)), ("drop_row", (1, 0, 2))]
)
def test_what_is_too_long_is_cut_as_the_job_says(tiny: TinyJob, truncation: str, counts: tuple[int, int, int]) -> None:
    letters = "a b c d e f g h i j k l m n o p"
    whole, end, start = (
        {"prompt": "a", "completion": "b"},
        {"prompt": "a", "completion": letters},
        {"prompt": letters, "completion": "q"},
    )
    rows = prepare(tiny, [whole, end, start], max_length=8, truncation=truncation)
    assert (len(rows), rows.truncated, rows.dropped) == counts
    ends = [int(rows[row][0][-1]) == tiny.bases.tokenizer(tiny.spec()).eos_id for row in range(len(rows))]
    assert ends == [True, False] if truncation == "cut_end" else all(ends)


@pytest.mark.parametrize(
    ("more", "other"),
    [
        ({}, False),
        ({"note": 'a "system": b'}, False),
        ({"system": None}, True),
        ({"history": []}, True),
        ({"turns": [{"train": False}]}, True),
    ],
)
def test_tokens_of_the_first_version_are_taken_only_of_rows_that_it_read_alike(
    tiny: TinyJob, monkeypatch: pytest.MonkeyPatch, more: Row, other: bool
) -> None:
    """It passed over keys that are learnt from now: a job that began with it must not go on with other rows."""
    file = tiny.store.file(tiny.put("training", [row | more for row in instruction_rows(4000)])) / "data"
    template = Tokenizer(tiny.store.base("tiny"))
    content = [1, sha256_of(file), hashlib.sha256(template.fast.to_str().encode()).hexdigest()]
    content += [template.eos_id, "instruction-v1", 8, False]
    first = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    spec = tiny.spec([row | more for row in instruction_rows(4000)], hyper={"max_length": 8, "truncation": "cut_end"})
    asked: list[str] = []

    def stop(sha256: str, name: str) -> Path:
        asked.append(name)
        raise StopRequested

    monkeypatch.setattr(tiny.store, "cache", stop)
    with pytest.raises(StopRequested):
        prepare_data(spec, tiny.store, tiny.bases.tokenizer(spec), ignore)
    assert (asked == [first]) is not other


def test_what_is_learnt_as_before_keeps_its_key(tiny: TinyJob) -> None:
    """A job that an older version began goes on; where tokens have changed since, they are made anew."""
    plain, written = ({"instruction": "Hi", "output": text} for text in ("Yes", "The end is <|im_end|>."))
    chats: list[Row] = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    tokenizer = Tokenizer(tiny.store.base("tiny"))
    for rows, differences in (([plain], []), (chats, []), ([written], ["control tokens"])):
        spec = tiny.spec(rows)
        file = tiny.store.file_data(spec.training_file)
        template = dataset._template(file, tokenizer)
        assert dataset._differences(file, spec.hyperparameters, tokenizer, template) == differences


def test_rows_of_which_only_the_last_reply_is_learnt_are_counted(tiny: TinyJob, tmp_path: Path) -> None:
    said = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    messages = [{"role": role, "content": content} for role, content in said]
    rows: list[Row] = [{"messages": messages}, {"messages": messages[:2]}]
    assert prepare(tiny, rows).last_turn_only == 0
    folder = shutil.copytree(tiny.store.base("tiny"), tmp_path / "rewriting")
    source = "{% for m in messages %}{{ m.content if loop.last or m.role == 'user' else '-' }}<|im_end|>{% endfor %}"
    (folder / "chat_template.jinja").write_text(source)
    counted = prepare_data(tiny.spec(rows), tiny.store, Tokenizer(folder), ignore).training
    assert (len(counted), counted.last_turn_only) == (2, 1)
