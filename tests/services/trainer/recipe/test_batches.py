"""Micro-batches made ahead by a thread are those made at their step.

The thread is a GPU's; here it works for a CPU, which is told to have one.
"""

import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from services.trainer.contract import Finished, Stopped
from services.trainer.data.dataset import Rows
from services.trainer.data.layout import Layout, plan_layout
from services.trainer.model.forward import Packed
from services.trainer.recipe.batches import Batches
from shared.errors import LeaseLost
from shared.jobs.spec import Hyperparameters, LoraSpec
from tests.services.trainer.harness import RecordingSession, TinyJob, instruction_rows, weights_of

CPU = torch.device("cpu")
LENGTHS = (5, 2, 9, 3, 3, 8, 2, 6, 4, 7, 5)


def rows_of(lengths: tuple[int, ...] = LENGTHS) -> Rows:
    """Rows of different tokens, all but the first of each supervised."""
    starts = np.cumsum([0, *lengths])
    content = {
        "ids": [list(range(start, start + length)) for start, length in zip(starts, lengths, strict=False)],
        "supervised": [[False] + [True] * (length - 1) for length in lengths],
    }
    counts = np.asarray(lengths, np.int64)
    return Rows("key", "template", Dataset.from_dict(content), counts, counts - 1, 0, 0)


def layout_of(rows: Rows) -> Layout:
    return plan_layout(rows.lengths, Hyperparameters(batch_size=4, n_epochs=2), 42, "cpu")


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("batches")]


def content(packs: list[Packed]) -> list[tuple[Any, ...]]:
    return [
        (
            packed.lengths,
            *((t.dtype, t.shape, t.tolist()) for t in (packed.ids, packed.positions, packed.predictors, packed.labels)),
        )
        for packed in packs
    ]


@given(asked=st.lists(st.tuples(st.integers(0, 5), st.sampled_from([1, 9, 1024])), min_size=1, max_size=12))
def test_whatever_is_asked_for_is_what_is_made_at_the_step(asked: list[tuple[int, int]]) -> None:
    rows = rows_of()
    with (
        Batches(rows, layout_of(rows), CPU) as plain,
        Batches(rows, layout_of(rows), CPU, ahead=True) as ahead,
    ):
        for step, budget in asked:
            assert content(ahead.take(step, budget)) == content(plain.take(step, budget))
    assert not threads()


def test_a_cpu_has_no_thread_and_a_gpu_has_one_for_as_long_as_there_are_steps() -> None:
    rows = rows_of()
    with Batches(rows, layout_of(rows), CPU) as batches:
        batches.take(0, 1024)
        assert not threads()
    # Nothing is put on the device before it is asked for.
    with Batches(rows, layout_of(rows), torch.device("cuda")) as batches:
        assert batches._thread is not None
    with Batches(rows, layout_of(rows), CPU, ahead=True) as batches:
        batches.take(0, 1024)
        assert len(threads()) == 1
    assert not threads()


class Recorded(Rows):
    """Rows that tell which were read, and in which thread; reading one of them fails."""

    read: list[tuple[int, str]]
    bad: int

    def __getitem__(self, row: int) -> Any:
        self.read.append((row, threading.current_thread().name.split("_")[0]))
        if row == self.bad:
            raise OSError("the disk is gone")
        return super().__getitem__(row)


def recorded(bad: int = -1) -> Recorded:
    rows = rows_of()
    found = Recorded(**{name: getattr(rows, name) for name in rows.__dataclass_fields__})
    # Rows are frozen.
    object.__setattr__(found, "read", [])
    object.__setattr__(found, "bad", bad)
    return found


def test_every_row_is_read_once_by_the_thread_in_the_order_of_the_steps() -> None:
    rows = recorded()
    layout = layout_of(rows)
    with Batches(rows, layout, CPU, ahead=True) as batches:
        for step in range(layout.total_steps):
            batches.take(step, 1024)
    assert rows.read == [
        (row, "batches") for step in range(layout.total_steps) for of in layout.micro_batches(step) for row in of
    ]


def test_the_next_steps_rows_are_read_before_it_is_asked_for() -> None:
    rows = recorded()
    layout = layout_of(rows)
    of_first, of_second = ({row for of in layout.micro_batches(step) for row in of} for step in (0, 1))
    with Batches(rows, layout, CPU, ahead=True) as batches:
        batches.take(0, 1024)
        deadline = time.monotonic() + 60
        while len(rows.read) < len(of_first) + len(of_second) and time.monotonic() < deadline:
            time.sleep(0.001)
        assert {row for row, _ in rows.read} == of_first | of_second


@pytest.mark.parametrize("ahead", [False, True])
def test_rows_that_cannot_be_read_fail_the_step_that_needs_them(ahead: bool) -> None:
    layout = layout_of(rows_of())
    rows = recorded(bad=layout.rows(1)[0])
    with Batches(rows, layout, CPU, ahead=ahead) as batches:
        batches.take(0, 1024)
        with pytest.raises(OSError, match="the disk is gone"):
            batches.take(1, 1024)
        # The fault is of the rows, and not the thread's end.
        batches.take(2, 1024)
    assert not threads()


@pytest.fixture
def one_row_per_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.trainer.data.layout.CPU_TOKEN_BUDGET", 1)


@pytest.mark.slow
@pytest.mark.usefixtures("one_row_per_micro_batch")
@pytest.mark.parametrize("asks", [5, 9, 13, 21, 30])
def test_a_job_stopped_and_resumed_with_a_thread_has_the_bytes_of_one_without(tiny: TinyJob, asks: int) -> None:
    held_out = instruction_rows(3, start=40)
    spec = tiny.spec(validation=held_out, lora=LoraSpec(dropout=0.3), hyper={"checkpoint_steps": 2})
    plain = tiny.finish(spec, job="ftjob-whole")
    left: Iterator[bool] = iter([False] * asks)
    first, second = RecordingSession(stop=lambda _steps: next(left, True)), RecordingSession()
    assert isinstance(tiny.run(spec, first, ahead=True), Stopped)
    assert not threads()
    found = [tiny.store.checkpoint("ftjob-one", 1, commit.step) for commit in reversed(first.commits)]
    resumed = tiny.run(spec, second, token=2, candidates=found, ahead=True)
    assert isinstance(resumed, Finished)
    assert weights_of(resumed) == weights_of(plain)
    assert resumed.report.train_loss == plain.report.train_loss
    assert [p.step for p in [*first.steps, *second.steps]] == list(range(1, 7))
    assert not threads()


@pytest.mark.slow
def test_a_lost_lease_ends_the_thread(tiny: TinyJob) -> None:
    def lose(steps: int) -> bool:
        if steps == 2:
            assert threads()
            raise LeaseLost("lost")
        return False

    with pytest.raises(LeaseLost):
        tiny.run(tiny.spec(), RecordingSession(stop=lose), ahead=True)
    assert not threads()
