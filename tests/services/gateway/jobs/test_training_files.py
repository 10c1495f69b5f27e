"""A job on several files is as one on the file that they make together, wherever files are looked at."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from services.gateway.files.store import FileStore
from services.gateway.jobs.request_schema import JobRequest
from services.gateway.jobs.sources import JobSources
from shared.adapters.store import AdapterStore
from shared.errors import InvalidRequest
from shared.jobs.store import JobStore
from tests.services.gateway.conftest import ROWS, Gateway
from tests.services.gateway.tiny_gateway import running_on_tiny

PATH = "/v1/fine_tuning/jobs"
ESTIMATES = "/v1/fine_tuning/estimates"
CHAT = [{"messages": [{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": "b"}]} for n in range(60)]
# Ragged, so that what is cut and how long the longest is differ between files.
RAGGED = [{"instruction": f"{n}?", "output": "7 " * (n * 3 % 50 + 1)} for n in range(120)]


@pytest.fixture
def gateway(tmp_path: Path, redis_url: str) -> Iterator[Gateway]:
    with running_on_tiny(tmp_path, redis_url) as running:
        yield running


def created(gateway: Gateway, **body: Any) -> dict[str, Any]:
    answer = gateway.http.post(PATH, json={"model": "tiny"} | body)
    assert answer.is_success, answer.text
    job: dict[str, Any] = answer.json()
    return job


def refused(gateway: Gateway, **body: Any) -> tuple[str | None, str | None, str]:
    """(param, code, message), the same of a job and of an estimate."""
    found = []
    for path in (PATH, ESTIMATES):
        answer = gateway.http.post(path, json={"model": "tiny"} | body)
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        found.append((error["param"], error["code"], error["message"]))
    assert found[0] == found[1]
    return found[0]


def test_files_are_named_by_either_field_or_both(gateway: Gateway) -> None:
    a, b = (gateway.uploaded(ROWS[place::2]) for place in range(2))
    bodies: list[dict[str, Any]] = [{"training_files": [a, b]}, {"training_files": [a, b], "training_file": a}]
    for body in bodies:
        job = created(gateway, **body)
        assert (job["training_file"], job["training_files"]) == (a, [a, b])
        assert gateway.http.get(f"{PATH}/{job['id']}").json()["training_files"] == [a, b]
    bodies = [{"training_files": [a]}, {"training_file": a}, {"training_file": a, "training_files": None}]
    for body in bodies:
        job = created(gateway, **body)
        assert (job["training_file"], job["training_files"]) == (a, [a])
    spec = gateway.jobs.get("default", job["id"]).spec
    assert (spec.further_training_files, spec.data_sha256) == ((), spec.training_sha256)


def test_what_is_wrong_with_the_list_is_refused_by_name(gateway: Gateway) -> None:
    a, b, chat = gateway.uploaded(ROWS), gateway.uploaded(ROWS[:5]), gateway.uploaded(CHAT)
    message = "training_file: it must be the first of training_files, if both are given"
    for order in ([b, a], [b]):
        assert refused(gateway, training_file=a, training_files=order) == ("training_file", "invalid_request", message)
    assert refused(gateway)[0] == refused(gateway, training_file=None, training_files=None)[0] == "training_file"
    assert refused(gateway, training_files=[a, b, a]) == (
        "training_files",
        "invalid_request",
        "training_files: a file is named twice",
    )
    lists: list[Any] = [[], [f"file-{n}" for n in range(17)], a, {}]
    for wrong in lists:
        assert refused(gateway, training_files=wrong)[0] == "training_files"
    assert refused(gateway, training_files=[a, 1])[0] == "training_files.1"
    assert refused(gateway, training_files=[a, "../b"])[0] == "training_files.1"
    assert refused(gateway, training_files=[a, "file-none"])[:2] == ("training_files.1", "file_not_found")
    assert refused(gateway, training_files=[a, b, chat]) == (
        "training_files.2",
        "invalid_request",
        f"{chat} has chat rows, {a} instruction rows; all must have one form",
    )
    assert refused(gateway, training_files=[a, b], validation_file=chat)[0] == "validation_file"
    assert gateway.http.get(PATH).json()["data"] == []


def test_none_of_the_files_can_be_deleted_while_the_job_has_not_ended(gateway: Gateway) -> None:
    named = [gateway.uploaded(ROWS[place::3]) for place in range(3)]
    job = created(gateway, training_files=named)
    for file in named:
        answer = gateway.http.delete(f"/v1/files/{file}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "file_in_use")
        assert job["id"] in answer.json()["error"]["message"]
    gateway.http.post(f"{PATH}/{job['id']}/cancel")
    spec = gateway.jobs.get("default", job["id"]).spec
    for file in (named[2], named[0]):
        assert gateway.http.delete(f"/v1/files/{file}").is_success
    # As if one had been deleted after the request was looked at: locked in the order of ids, so the least is told.
    sources = JobSources(FileStore(), JobStore(), AdapterStore())
    with gateway.jobs.database.write() as tx, pytest.raises(InvalidRequest) as gone:
        sources.lock(tx, "default", spec)
    least = min(named[0], named[2])
    assert (gone.value.code, gone.value.param) == ("file_not_found", f"training_files.{named.index(least)}")


def test_an_estimate_and_max_length_are_those_of_the_one_file(gateway: Gateway) -> None:
    parts = [gateway.uploaded(RAGGED[:20]), gateway.uploaded(RAGGED[20:90]), gateway.uploaded(RAGGED[90:])]
    whole = gateway.uploaded(RAGGED)
    for hyper in ({"max_length": 64}, {"max_length": "auto"}, {"max_length": 64, "validation_split": 0.2}):
        of_parts, of_whole = (
            gateway.http.post(ESTIMATES, json={"model": "tiny", "hyperparameters": hyper} | files).json()
            for files in ({"training_files": parts}, {"training_file": whole})
        )
        assert of_parts.pop("warnings") is not of_whole.pop("warnings")
        assert of_parts == of_whole
    auto = {"hyperparameters": {"max_length": "auto"}}
    job, alone = created(gateway, training_files=parts, **auto), created(gateway, training_file=parts[0], **auto)
    assert job["hyperparameters"] == created(gateway, training_file=whole, **auto)["hyperparameters"]
    assert job["hyperparameters"]["max_length"] > alone["hyperparameters"]["max_length"]


def test_advice_counts_all_rows_and_says_of_which_file_it_speaks(gateway: Gateway) -> None:
    parts = [gateway.uploaded(RAGGED[:60]), gateway.uploaded([row | {"id": 1} for row in RAGGED[60:]])]
    enough = created(gateway, training_files=parts, hyperparameters={"max_length": 64})["warnings"]
    assert not any("fewer than" in text for text in enough)
    assert any(text.startswith("training file 2: keys that are not learnt from: 'id' (60 rows)") for text in enough)
    cut = [text for text in enough if "max_length 64" in text]
    assert [text.split(":")[0] for text in cut] == ["training file 1", "training file 2"]
    again = gateway.uploaded(RAGGED[:60])
    few = created(gateway, training_files=[gateway.uploaded(RAGGED[:3]), gateway.uploaded(RAGGED[3:9])])["warnings"]
    assert "a model learns little from fewer than 50 rows; all files have 9" in few
    assert not any("this file has" in text for text in few)
    same = created(gateway, training_files=[*parts, again], validation_file=again)["warnings"]
    assert "training file 3 has the bytes of training file 1: its rows count twice" in same
    assert "the validation file is a training file: its loss will not show overfitting" in same


def test_a_request_is_the_same_however_its_files_are_named(gateway: Gateway) -> None:
    def print_of(**body: Any) -> str:
        return JobRequest.model_validate({"model": "tiny"} | body).fingerprint()

    one = [
        print_of(training_file="a"),
        print_of(training_files=["a"]),
        print_of(training_file="a", training_files=["a"]),
    ]
    two = [print_of(training_files=["a", "b"]), print_of(training_file="a", training_files=["a", "b"])]
    assert (len(set(one)), len(set(two)), len({one[0], two[0], print_of(training_files=["a", "c"])})) == (1, 1, 3)
    # What was answered before there were several: its key still fits.
    assert one[0] == "bae2959986bf4e6c0a76f128d017fb02e8745794b6ed38af38fa144cd74fbcd2"

    a, b = gateway.uploaded(ROWS[:30]), gateway.uploaded(ROWS[30:])
    key = {"idempotency-key": "k"}
    first = gateway.http.post(PATH, json={"model": "tiny", "training_files": [a, b]}, headers=key)
    body = {"model": "tiny", "training_file": a, "training_files": [a, b]}
    assert gateway.http.post(PATH, json=body, headers=key).json() == first.json()
    other = gateway.http.post(PATH, json={"model": "tiny", "training_files": [b, a]}, headers=key)
    assert other.json()["error"]["code"] == "idempotency_key_reused"


def test_the_file_of_another_project_is_not_found(gateway: Gateway) -> None:
    mine, theirs = gateway.uploaded(ROWS[:30]), gateway.uploaded(ROWS[30:])
    request = JobRequest.model_validate({"model": "tiny", "training_files": [mine, theirs]})
    sources = JobSources(FileStore(), JobStore(), AdapterStore())
    with gateway.jobs.database.read() as tx, pytest.raises(InvalidRequest) as refused:
        sources.load(tx, "another", request)
    assert (refused.value.code, refused.value.param) == ("file_not_found", "training_files.0")
