import shutil
from pathlib import Path

import pytest

from services.trainer.contract import StopRequested
from services.trainer.data import dataset
from services.trainer.data.dataset import Rows, prepare_data
from shared.datasets.tokens import Tokenizer
from shared.errors import JobFailed, Unavailable
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
    with pytest.raises(JobFailed, match="in all 1 rows") as failure:
        prepare(tiny, [hopeless], max_length=8)
    assert failure.value.code == "invalid_training_file"


def test_equal_content_is_tokenised_once(tiny: TinyJob, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(tiny, instruction_rows(5))

    def unexpected(*_: object, **__: object) -> None:
        raise AssertionError("tokenised again")

    with monkeypatch.context() as patch:
        patch.setattr(dataset, "masked_tokens", unexpected)
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
