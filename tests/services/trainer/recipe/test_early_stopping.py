"""Held-out rows without a file, the best checkpoint, and the end of a run that no longer learns."""

from typing import Any

import numpy as np
import pytest

from services.trainer.contract import Stopped
from services.trainer.data.dataset import prepare_data
from services.trainer.data.split import hold_out
from services.trainer.recipe.metrics import History
from shared.errors import JobFailed
from tests.services.trainer.harness import RecordingSession, TinyJob, ignore, instruction_rows, weights_of

FAST = {"n_epochs": 5, "learning_rate": 0.3, "early_stopping_patience": 2}
# What is learnt from the training rows makes these less likely.
CONTRARY = [{"instruction": f"What is {i}?", "output": "ZQXJ KVWY äöü 你好 " * 3} for i in range(3)]


def test_a_split_is_disjoint_complete_and_keeps_copies_together(tiny: TinyJob) -> None:
    rows = instruction_rows(20) + instruction_rows(20)
    spec = tiny.spec(rows)
    whole = prepare_data(spec, tiny.store, tiny.bases.tokenizer(spec), ignore).training
    split = hold_out(whole, 0.2, 42, ignore)
    assert split.validation is not None
    texts = [{part[row][0].tobytes() for row in range(len(part))} for part in (split.training, split.validation)]
    assert not texts[0] & texts[1]
    assert len(split.training) + len(split.validation) == len(whole) == 40
    assert len(split.validation) == 8
    for part in (split.training, split.validation):
        assert part.lengths.tolist() == [len(part[row][0]) for row in range(len(part))]
        assert part.supervised.tolist() == [int(part[row][1].sum()) for row in range(len(part))]
    again, other = hold_out(whole, 0.2, 42, ignore), hold_out(whole, 0.2, 43, ignore)
    assert again.training.key == split.training.key != other.training.key
    assert np.array_equal(again.training.lengths, split.training.lengths)
    assert len({whole.key, split.training.key, split.validation.key}) == 3


def test_a_split_that_leaves_nothing_is_the_users_error(tiny: TinyJob) -> None:
    with pytest.raises(JobFailed, match="leaves none to train on") as failure:
        tiny.run(tiny.spec(instruction_rows(1), hyper={"validation_split": 0.5}))
    assert failure.value.code == "invalid_training_file"


def test_the_best_is_the_first_of_the_lowest_and_the_untrained_adapter_does_not_count() -> None:
    history = History(valid_losses=[(0, 1.0), (3, 2.0), (6, 1.5), (9, 1.5), (12, 1.7)])
    assert history.best == (6, 1.5)
    assert history.evaluations_since_best == 2
    assert History(valid_losses=[(0, 1.0)]).best is None
    assert History().evaluations_since_best == 0


def test_it_stops_once_patience_is_over_and_names_the_best(tiny: TinyJob) -> None:
    session = RecordingSession()
    outcome = tiny.finish(tiny.spec(instruction_rows(9), validation=CONTRARY, hyper=FAST), session)
    losses = {commit.step: commit.metrics["valid_loss"] for commit in session.commits}
    best = min(losses, key=lambda step: losses[step])
    report = outcome.report
    assert report.stopped_early
    assert (report.best_step, report.best_eval_loss) == (best, losses[best])
    assert report.steps == best + 2 * 3 == max(losses)
    assert report.rows == 9
    assert any(f"lowest at step {best}" in message for _, message, _ in session.events)


@pytest.mark.slow
def test_a_stopped_run_gives_up_where_an_uninterrupted_one_does(tiny: TinyJob) -> None:
    spec = tiny.spec(instruction_rows(9), validation=CONTRARY, hyper=FAST)
    whole = tiny.finish(spec, job="ftjob-whole")
    for steps in range(1, whole.report.steps + 1):
        first = RecordingSession(stop=lambda done, at=steps: done == at)  # type: ignore[misc]
        job: Any = f"ftjob-{steps}"
        outcome = tiny.run(spec, first, job=job)
        if not isinstance(outcome, Stopped):
            # Asked for after the last step, a stop comes too late.
            assert weights_of(outcome) == weights_of(whole)
            continue
        found = [tiny.store.checkpoint(job, 1, commit.step) for commit in reversed(first.commits)]
        resumed = tiny.finish(spec, job=job, token=2, candidates=found)
        assert weights_of(resumed) == weights_of(whole)
        assert resumed.report.steps == whole.report.steps


def test_a_split_is_evaluated_on_and_not_trained_on(tiny: TinyJob) -> None:
    session = RecordingSession()
    report = tiny.finish(tiny.spec(instruction_rows(12), hyper={"validation_split": 0.25}), session).report
    assert report.rows == 9
    assert report.eval_loss_before is not None
    assert all("valid_loss" in commit.metrics for commit in session.commits)


def test_without_patience_it_goes_on_and_still_names_the_best(tiny: TinyJob) -> None:
    hyper = FAST | {"early_stopping_patience": None, "n_epochs": 3}
    report = tiny.finish(tiny.spec(validation=instruction_rows(4, start=40), hyper=hyper)).report
    assert not report.stopped_early
    assert report.steps == 9
    assert report.best_step in (3, 6, 9)
