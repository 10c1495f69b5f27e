"""What will be cut of a job's rows is told when it is created, with the `max_length` that would cut none."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from services.gateway.bases.tokenised import Tokenizers
from services.gateway.jobs import length_check
from services.gateway.jobs.length_check import LengthCheck, Look
from shared.datasets.loss_mask import MaskedTokens
from shared.errors import InvalidRequest, Overloaded
from shared.jobs.spec import Hyperparameters, JobSpec
from shared.storage.artifacts import LocalArtifactStore
from tests.services.gateway.conftest import ROWS, Gateway, as_jsonl
from tests.services.gateway.tiny_gateway import running_on_tiny

PATH = "/v1/fine_tuning/jobs"


@pytest.fixture
def gateway(tmp_path: Path, redis_url: str) -> Iterator[Gateway]:
    with running_on_tiny(tmp_path, redis_url) as running:
        yield running


def created(gateway: Gateway, rows: list[dict[str, Any]], **body: Any) -> dict[str, Any]:
    answer = gateway.http.post(PATH, json={"model": "tiny", "training_file": gateway.uploaded(rows)} | body)
    assert answer.is_success, answer.text
    job: dict[str, Any] = answer.json()
    return job


def of_cutting(job: dict[str, Any]) -> list[str]:
    return [text for text in job["warnings"] if "max_length" in text]


def test_a_job_says_at_its_creation_what_will_be_cut(gateway: Gateway) -> None:
    rows = [*ROWS[:50], *({"instruction": f"{n}?", "output": f"{n} " * 60} for n in range(10, 20))]
    rows += [{"instruction": "long " * 60, "output": f"{n}"} for n in range(4)]
    short = {"hyperparameters": {"max_length": 100}}
    (warning,) = of_cutting(created(gateway, rows, **short))
    assert warning.startswith(
        "14 of 64 rows have more tokens than max_length 100: 10 lose their end, so that the model is not taught to "
        "stop, 4 are dropped; max_length "
    )
    enough = int(warning.split("; max_length ")[1].split()[0])
    assert warning.endswith(f"; max_length {enough} would cut none")
    assert of_cutting(created(gateway, rows, hyperparameters={"max_length": enough})) == []
    (less,) = of_cutting(created(gateway, rows, hyperparameters={"max_length": enough - 1}))
    assert f"max_length {enough} would cut none" in less
    (start,) = of_cutting(created(gateway, rows, hyperparameters={"max_length": 100, "truncation": "cut_start"}))
    assert ": 14 lose their start; " in start
    (drop,) = of_cutting(created(gateway, rows, hyperparameters={"max_length": 100, "truncation": "drop_row"}))
    assert ": 14 are dropped; " in drop
    # An estimate counts the same.
    body = {"model": "tiny", "training_file": gateway.uploaded(rows)} | short
    estimate = gateway.http.post("/v1/fine_tuning/estimates", json=body).json()
    assert (estimate["dropped_rows"], estimate["truncated_rows"]) == (4, 10)
    assert warning in estimate["warnings"]


def test_the_validation_file_is_looked_at_too(gateway: Gateway) -> None:
    long = gateway.uploaded([{"instruction": "a", "output": "b " * 400}])
    job = created(gateway, ROWS, validation_file=long)
    (warning,) = of_cutting(job)
    assert warning.startswith("validation file: 1 of 1 rows have more tokens than max_length 512: 1 lose their end")
    assert warning.endswith("and 512 is the most that can be trained")


def test_auto_takes_what_cuts_none_and_no_more_than_the_base_does(gateway: Gateway) -> None:
    auto = {"hyperparameters": {"max_length": "auto"}}
    rows = [{"instruction": f"{n}?", "output": "7 " * n} for n in range(1, 60)]
    (warning,) = of_cutting(created(gateway, rows, hyperparameters={"max_length": 8}))
    job = created(gateway, rows, **auto)
    assert warning.endswith(f"max_length {job['hyperparameters']['max_length']} would cut none")
    assert of_cutting(job) == []
    # The validation file counts, the base's context is the most, and a text is divided as it is without.
    assert (
        created(gateway, ROWS, validation_file=gateway.uploaded(rows), **auto)["hyperparameters"]
        == job["hyperparameters"]
    )
    (warning,) = of_cutting(job := created(gateway, [{"instruction": "a", "output": "b " * 600}], **auto))
    assert job["hyperparameters"]["max_length"] == 512
    assert "512 is the most that can be trained" in warning
    assert created(gateway, [{"text": "a b c " * 400}], **auto)["hyperparameters"]["max_length"] == 512


def test_texts_are_divided_and_not_cut(gateway: Gateway) -> None:
    assert of_cutting(created(gateway, [{"text": "a b c " * 400}])) == []


def test_rows_that_the_bases_template_cannot_express_are_refused(gateway: Gateway) -> None:
    """Rows that an older version has taken, of which this one says what is wrong: before anything is queued."""
    made = gateway.upload(as_jsonl(ROWS)).json()
    (path,) = (gateway.settings.artifacts_root / "files" / made["id"]).iterdir()
    path.write_bytes(as_jsonl([{"messages": [{"role": "user", "content": "a"}]}]))
    refused = gateway.http.post(PATH, json={"model": "tiny", "training_file": made["id"]})
    error = refused.json()["error"]
    assert (refused.status_code, error["param"], error["code"]) == (400, "training_file", "invalid_dataset")
    assert error["message"] == "training_file: line 1: no assistant message to learn from"
    assert created(gateway, ROWS)["status"] in ("validating_files", "queued")


def test_a_look_ends_after_its_seconds_and_says_how_far_it_came(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = gateway.uploaded([{"instruction": f"{n}?", "output": "7 " * 100} for n in range(40)])
    with gateway.services.database.read() as tx:
        stored = gateway.services.files.get(tx, "default", file)
    ticks = iter(range(1000))
    store = LocalArtifactStore(gateway.settings.artifacts_root)
    check = LengthCheck(store, Tokenizers(store), seconds=9, clock=lambda: next(ticks))
    spec = JobSpec(
        base="tiny",
        base_revision="",
        training_file=file,
        training_sha256="",
        hyperparameters=Hyperparameters(max_length=64),
    )
    (warning,) = check.warnings(spec, (stored,), None, 512)
    assert warning.startswith("10 of the first 10 (of 40) rows have more tokens than max_length 64")
    # Others look: this job is made without.
    with check._slots, check._slots:
        assert check.warnings(spec, (stored,), None, 512) == []
    assert check.warnings(spec.model_copy(update={"base": "unknown"}), (stored,), None, 512) == []
    with pytest.raises(InvalidRequest) as refused:
        check.longest("unknown", spec.hyperparameters, (stored,), None, 512)
    assert (refused.value.param, refused.value.code) == ("hyperparameters.max_length", "base_not_prepared")
    monkeypatch.setattr(length_check, "WAIT_SECONDS", 0.01)
    with check._slots, check._slots, pytest.raises(Overloaded):
        check.longest("tiny", spec.hyperparameters, (stored,), None, 512)
    store.remove(store.file(file))
    assert check.warnings(spec, (stored,), None, 512) == []


def test_a_look_at_rows_of_every_kind() -> None:
    look = Look(Hyperparameters(max_length=8))
    assert look.warning(0, 512) == ""
    look.add(MaskedTokens([1] * 8, [False] + [True] * 7))
    look.add(None)
    assert look.warning(2, 512) == ""
    look.add(MaskedTokens([1] * 9, [False] * 8 + [True]))
    assert (
        look.warning(3, 512)
        == "1 of 3 rows have more tokens than max_length 8: 1 are dropped; max_length 9 would cut none"
    )
