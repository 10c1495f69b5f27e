"""The job's vocabulary: what may become what, and the JSON that crosses from gateway to worker."""

import json
from typing import Any

import pytest
from openai.types.fine_tuning import FineTuningJob
from pydantic import ValidationError

from shared.jobs.spec import (
    PRESETS,
    TRANSITIONS,
    Hyperparameters,
    JobSpec,
    LoraSpec,
    Progress,
    State,
    TrainingReport,
    may_become,
)


def test_the_legal_moves_are_these_and_no_others() -> None:
    assert {state.value: sorted(to.value for to in targets) for state, targets in TRANSITIONS.items()} == {
        "validating": ["cancelled", "failed", "queued"],
        "queued": ["cancelled", "paused", "running"],
        "running": ["cancelling", "failed", "pausing", "queued", "succeeded"],
        "pausing": ["cancelling", "failed", "paused", "succeeded"],
        "cancelling": ["cancelled", "failed", "succeeded"],
        "paused": ["cancelled", "queued"],
        "succeeded": [],
        "failed": [],
        "cancelled": [],
    }
    assert set(TRANSITIONS) == set(State)


def test_every_state_is_reached_and_every_job_can_end() -> None:
    reached, frontier = {State.VALIDATING}, {State.VALIDATING}
    while frontier:
        frontier = {target for state in frontier for target in TRANSITIONS[state]} - reached
        reached |= frontier
    assert reached == set(State)
    for state in State:
        ends, seen = {state}, {state}
        while not any(s.final for s in ends):
            ends = {target for s in ends for target in TRANSITIONS[s]} - seen
            assert ends, f"{state} never ends"
            seen |= ends


def test_may_become_is_the_inverse() -> None:
    for target in State:
        assert set(may_become(target)) == {state for state in State if target in TRANSITIONS[state]}


def test_public_statuses_are_openais() -> None:
    allowed = set(FineTuningJob.model_fields["status"].annotation.__args__)  # type: ignore[union-attr]
    assert {state.status for state in State} <= allowed
    assert {state for state in State if state.leased} == {State.RUNNING, State.PAUSING, State.CANCELLING}
    assert {state for state in State if state.final} == {State.SUCCEEDED, State.FAILED, State.CANCELLED}
    assert all(state.status == state.value for state in State if state.final)


def test_the_specification_as_json_is_a_contract() -> None:
    """Rows written by an older gateway are read by a newer worker: a change here needs a migration."""
    spec = JobSpec(base="tiny", base_revision="r1", training_file="file-1", training_sha256="0" * 64)
    assert spec.model_dump(mode="json") == {
        "base": "tiny",
        "base_revision": "r1",
        "training_file": "file-1",
        "training_sha256": "0" * 64,
        "validation_file": None,
        "validation_sha256": None,
        "suffix": None,
        "seed": 42,
        "preset": "reference",
        "hyperparameters": {
            "n_epochs": 3,
            "batch_size": 8,
            "learning_rate": 2e-4,
            "max_length": 512,
            "max_steps": None,
            "warmup_ratio": 0,
            "scheduler": "linear",
            "weight_decay": 0,
            "max_grad_norm": 1.0,
            "adam_beta1": 0.9,
            "adam_beta2": 0.999,
            "adam_epsilon": 1e-8,
            "train_on_prompt": False,
            "truncation": "cut_end",
            "checkpoint_steps": None,
            "metrics_steps": 5,
            "validation_split": 0.0,
            "early_stopping_patience": None,
        },
        "lora": {
            "r": 8,
            "alpha": 32,
            "dropout": 0.05,
            "target_modules": ["q_proj", "v_proj"],
            "use_rslora": False,
        },
        "base_precision": "int8",
        "compute_dtype": "auto",
        "keep_checkpoints": 3,
        "initial_adapter": None,
        "further_training_files": [],
    }
    assert JobSpec.model_validate(json.loads(spec.model_dump_json())) == spec


def test_presets() -> None:
    assert PRESETS["reference"].hyperparameters == Hyperparameters()
    recommended = PRESETS["recommended"]
    assert (recommended.lora.r, recommended.lora.alpha, len(recommended.lora.target_modules)) == (16, 32, 7)


@pytest.mark.parametrize(
    ("model", "field", "value"),
    [
        (Hyperparameters, "n_epochs", 0),
        (Hyperparameters, "n_epochs", 51),
        (Hyperparameters, "batch_size", 0),
        (Hyperparameters, "batch_size", 257),
        (Hyperparameters, "learning_rate", 0),
        (Hyperparameters, "learning_rate", float("nan")),
        (Hyperparameters, "learning_rate", float("inf")),
        (Hyperparameters, "max_length", 7),
        (Hyperparameters, "warmup_ratio", 1),
        (Hyperparameters, "scheduler", "cubic"),
        (Hyperparameters, "unknown", 1),
        (LoraSpec, "r", 0),
        (LoraSpec, "alpha", 0),
        (LoraSpec, "dropout", 1),
        (LoraSpec, "target_modules", ()),
        (LoraSpec, "target_modules", (".*proj",)),
        (LoraSpec, "target_modules", ("q_proj\n",)),
        (Progress, "loss", float("nan")),
    ],
)
def test_what_is_out_of_bounds_does_not_cross(model: Any, field: str, value: object) -> None:
    with pytest.raises(ValidationError):
        model.model_validate({field: value})


def test_values_are_immutable() -> None:
    with pytest.raises(ValidationError):
        Progress().step = 3  # type: ignore[misc]
    with pytest.raises(ValidationError):
        TrainingReport.model_validate({"trainable_params": 1})
