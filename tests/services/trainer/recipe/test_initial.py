"""Continuing from an adapter: it starts where that one ended, and refuses what does not fit."""

from typing import Any

import pytest

from services.trainer.contract import Stopped
from shared.errors import JobFailed
from shared.jobs.spec import LoraSpec
from shared.storage.artifacts import LocalArtifactStore
from tests.services.trainer.harness import RecordingSession, TinyJob, instruction_rows, weights_of

HELD_OUT = instruction_rows(5, start=40)


def test_it_starts_where_the_first_job_ended_and_resumes_exactly(tiny: TinyJob) -> None:
    spec = tiny.spec(validation=HELD_OUT)
    first = tiny.finish(spec)
    spec = spec.model_copy(update={"initial_adapter": first.adapter_id})
    second = tiny.finish(spec, job="ftjob-two")
    assert second.report.eval_loss_before == first.report.eval_loss_after
    assert second.report.eval_loss_after is not None
    assert first.report.eval_loss_after is not None
    assert second.report.eval_loss_after < first.report.eval_loss_after
    session = RecordingSession(stop=lambda steps: steps == 2)
    assert isinstance(tiny.run(spec, session, job="ftjob-three"), Stopped)
    found = [tiny.store.checkpoint("ftjob-three", 1, commit.step) for commit in reversed(session.commits)]
    resumed = tiny.finish(spec, job="ftjob-three", token=2, candidates=found)
    assert weights_of(resumed) == weights_of(second)

    session = RecordingSession(stop=lambda steps: steps == 2)
    assert isinstance(tiny.run(spec, session, job="ftjob-four"), Stopped)
    found = [tiny.store.checkpoint("ftjob-four", 1, commit.step) for commit in reversed(session.commits)]
    tiny.store.remove(tiny.store.adapter(first.adapter_id))
    without_parent = tiny.finish(spec, job="ftjob-four", token=2, candidates=found)
    assert weights_of(without_parent) == weights_of(second)


def test_what_does_not_fit_is_refused(tiny: TinyJob) -> None:
    first = tiny.finish(tiny.spec())
    start: dict[str, Any] = {"initial_adapter": first.adapter_id}
    with pytest.raises(JobFailed, match="another LoRA shape"):
        tiny.run(tiny.spec(lora=LoraSpec(r=4), **start), job="ftjob-two")
    store: LocalArtifactStore = tiny.store
    store.remove(store.adapter(first.adapter_id))
    with pytest.raises(JobFailed, match="cannot be used") as failure:
        tiny.run(tiny.spec(**start), job="ftjob-two")
    assert failure.value.code == "initial_adapter"
