"""What a job is said to take beforehand, against what the recipe then does."""

from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.gateway.bases.tokenised import count_tokens, tokenised_rows
from services.gateway.jobs.estimate import EstimateJson, estimate
from shared.jobs.spec import JobSpec
from shared.storage.artifacts import new_id
from tests.services.trainer.harness import RecordingSession, TinyJob, instruction_rows


def estimated(tiny: TinyJob, spec: JobSpec) -> EstimateJson:
    tokenizer, hyper = tiny.bases.tokenizer(spec), spec.hyperparameters

    def counts(file_id: str, rows: int) -> Any:
        return count_tokens(tokenised_rows(tiny.store.file(file_id) / "data", tokenizer, hyper, lambda: None), rows)

    file = tiny.store.file(spec.training_file) / "data"
    training = counts(spec.training_file, len(file.read_text().splitlines()))
    return estimate(spec, training, None, None, [])


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(2, 12),
    epochs=st.integers(1, 3),
    batch=st.integers(2, 6),
    most=st.none() | st.integers(1, 9),
    every=st.none() | st.integers(1, 7),
    split=st.sampled_from([0, 0, 0.1, 0.3]),
)
def test_steps_checkpoints_and_tokens_are_those_of_the_run(
    tiny: TinyJob, rows: int, epochs: int, batch: int, most: int | None, every: int | None, split: float
) -> None:
    hyper = {"n_epochs": epochs, "batch_size": batch, "max_steps": most, "checkpoint_steps": every}
    spec = tiny.spec(instruction_rows(rows), hyper=hyper | {"validation_split": split}, base_precision="fp32")
    session = RecordingSession()
    report = tiny.finish(spec, session, job=new_id("ftjob")).report
    before = estimated(tiny, spec)
    assert (before.total_steps, before.checkpoints) == (report.steps, len(session.commits))
    if not split and report.steps * batch % rows == 0 and rows % batch == 0:
        assert (before.tokens, before.supervised_tokens) == (report.total_tokens, report.trained_tokens)
