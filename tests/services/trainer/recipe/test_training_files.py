"""A job on several files gives the very adapter of a job on the one file that they make together."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from services.trainer.contract import Finished
from services.trainer.data.dataset import Rows, prepare_data
from shared.errors import JobFailed, Unavailable
from shared.jobs.spec import JobSpec, TrainingFile
from shared.storage.artifacts import ADAPTER_CONFIG, ADAPTER_WEIGHTS, new_id, sha256_of
from tests.services.trainer.harness import RecordingSession, Row, TinyJob, ignore, instruction_rows

ROWS = instruction_rows(11)
HOPELESS: list[Row] = [{"instruction": "long " * 40, "output": "never seen"}]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyJob:
    return TinyJob(tmp_path_factory.mktemp("tiny"))


def on_several(tiny: TinyJob, parts: Sequence[Sequence[Row]], spec: JobSpec) -> JobSpec:
    """`spec` on the rows of these files, one after the other."""
    ids = [tiny.put(f"part{place}", rows) for place, rows in enumerate(parts)]
    first, *further = (TrainingFile(id=name, sha256=sha256_of(tiny.store.file(name) / "data")) for name in ids)
    return spec.model_copy(
        update={
            "training_file": first.id,
            "training_sha256": first.sha256,
            "further_training_files": tuple(further),
        }
    )


def prepared(tiny: TinyJob, spec: JobSpec) -> Rows:
    return prepare_data(spec, tiny.store, tiny.bases.tokenizer(spec), ignore).training


def rows_or_failure(tiny: TinyJob, spec: JobSpec) -> Rows | str:
    try:
        return prepared(tiny, spec)
    except JobFailed as failure:
        return f"{failure.code}: {failure.message}"


def bytes_of(tiny: TinyJob, finished: Finished) -> list[bytes]:
    folder = tiny.store.adapter(finished.adapter.id)
    return [(folder / name).read_bytes() for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "cuts",
    [
        pytest.param([4], id="two files"),
        pytest.param([1, 2, 10], id="four"),
        pytest.param(range(1, 11), id="a row each"),
    ],
)
@pytest.mark.parametrize("validation_split", [0, 0.3])
def test_the_adapter_has_the_bytes_of_the_one_file_s(
    tiny: TinyJob, cuts: Sequence[int], validation_split: float
) -> None:
    hyper = {"max_length": 32, "validation_split": validation_split, "checkpoint_steps": 2}
    whole = tiny.spec([*ROWS, *HOPELESS], hyper=hyper)
    ends = [0, *cuts, len(ROWS)]
    parts = [ROWS[start:end] for start, end in itertools.pairwise(ends)]
    # Its last file has nothing to learn within max_length, as the last row of the one file.
    several = on_several(tiny, [*parts, HOPELESS], whole)
    one, other = (tiny.finish(spec, job=new_id("ftjob")) for spec in (whole, several))
    assert bytes_of(tiny, one) == bytes_of(tiny, other)
    alike = {"rows", "dropped_rows", "truncated_rows", "steps", "trained_tokens", "total_tokens", "train_loss"}
    alike |= {"eval_loss_before", "eval_loss_after", "best_step"}
    assert one.report.model_dump(include=alike) == other.report.model_dump(include=alike)
    assert other.report.dropped_rows == 1
    assert (one.adapter.data_sha256, other.adapter.data_sha256) == (whole.training_sha256, several.data_sha256)


@examples(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    hopeless=st.sets(st.integers(0, 4)),
    max_length=st.sampled_from([8, 24, 512]),
)
def test_rows_are_those_of_the_one_file(tiny: TinyJob, lengths: list[int], hopeless: set[int], max_length: int) -> None:
    starts = [sum(lengths[:place]) for place in range(len(lengths))]
    parts = [
        HOPELESS if place in hopeless else instruction_rows(count, start=start)
        for place, (start, count) in enumerate(zip(starts, lengths, strict=True))
    ]
    whole = tiny.spec([row for part in parts for row in part], hyper={"max_length": max_length})
    several = on_several(tiny, parts, whole)
    one, other = (rows_or_failure(tiny, spec) for spec in (whole, several))
    if isinstance(one, str) or isinstance(other, str):
        assert one == other
        return
    assert (other.lengths.tolist(), other.supervised.tolist()) == (one.lengths.tolist(), one.supervised.tolist())
    assert (other.dropped, other.truncated, other.template) == (one.dropped, one.truncated, one.template)
    for row in range(len(one)):
        for here, there in zip(other[row], one[row], strict=True):
            assert here.tolist() == there.tolist()


@pytest.mark.slow
def test_a_run_goes_on_with_the_same_files_in_the_same_order_only(tiny: TinyJob) -> None:
    spec = on_several(tiny, [ROWS[:4], ROWS[4:8], ROWS[8:]], tiny.spec(hyper={"checkpoint_steps": 2}))
    whole = tiny.finish(spec, job="ftjob-whole")
    session = RecordingSession(stop=lambda steps: steps >= 2)
    tiny.run(spec, session, job="ftjob-broken")
    (state,) = [folder for folder in sorted(tiny.store.checkpoints("ftjob-broken").glob("*/step-*")) if folder.is_dir()]
    first, second, third = spec.training_files
    swapped = spec.model_copy(update={"further_training_files": (third, second)})
    with pytest.raises(JobFailed, match="training data") as failure:
        tiny.run(swapped, job="ftjob-broken", token=2, candidates=[state])
    assert failure.value.code == "resume_mismatch"
    resumed = tiny.finish(spec, job="ftjob-broken", token=3, candidates=[state])
    assert bytes_of(tiny, resumed) == bytes_of(tiny, whole)
    assert first.id == spec.training_file


def test_the_file_at_fault_is_named(tiny: TinyJob) -> None:
    spec = on_several(tiny, [ROWS[:4], ROWS[4:]], tiny.spec())
    data: Path = tiny.store.file("file-part1") / "data"
    data.write_text('{"instruction": "a", "output": "b"}\n')
    with pytest.raises(JobFailed, match="the training file file-part1 is not the one") as changed:
        prepared(tiny, spec)
    assert changed.value.code == "invalid_training_file"
    data.unlink()
    with pytest.raises(Unavailable, match="the training file file-part1 is not in its artifacts folder"):
        prepared(tiny, spec)


def test_files_of_several_forms_that_came_past_the_gateway_are_refused(tiny: TinyJob) -> None:
    spec = on_several(tiny, [ROWS[:4], [{"prompt": "a", "completion": "b"}]], tiny.spec())
    with pytest.raises(JobFailed, match="several forms") as failure:
        prepared(tiny, spec)
    assert failure.value.code == "invalid_training_file"
