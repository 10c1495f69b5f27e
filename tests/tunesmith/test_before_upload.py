"""What `train` learns from a real gateway before it sends a file; and the messages with the least behind them."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.services.gateway.conftest import Gateway
from tests.services.gateway.tiny_gateway import running_on_tiny
from tests.stack_processes import running_redis
from tests.tunesmith.fake_gateway import FakeGateway
from tests.tunesmith.test_cli import run

pytestmark = pytest.mark.servers


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with running_redis() as redis, running_on_tiny(tmp_path_factory.mktemp("home"), redis) as running:
        yield running


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"instruction": f"What is {n}?", "output": f"{n}"}) + "\n" for n in range(60)))
    return path


def on(gateway: Gateway, *arguments: str) -> tuple[int, str, str]:
    return run(gateway, *arguments, key=gateway.key)


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--model", "gpt-4o"), 4, "model"),
        (("--epochs", "0"), 1, "n_epochs"),
        (("--precision", "int4"), 1, "base_precision"),
        (("--suffix", "???"), 1, "suffix"),
        (("--preset", "best"), 1, "preset"),
        (("--learning-rate", "-1"), 1, "learning_rate"),
    ],
)
def test_a_refused_option_leaves_no_file(
    gateway: Gateway, rows: Path, options: tuple[str, ...], code: int, said: str
) -> None:
    before = gateway.http.get("/v1/files").json()["data"]
    ended, out, err = on(gateway, "train", str(rows), "--model", "tiny", *options)
    assert (ended, out) == (code, "")
    assert err.startswith("error: ")
    assert said in err
    assert gateway.http.get("/v1/files").json()["data"] == before


def test_the_same_file_is_stored_once_and_each_warning_said_once(gateway: Gateway, rows: Path) -> None:
    code, job, err = on(gateway, "train", str(rows), "--model", "tiny", "--suffix", "once")
    assert code == 0
    assert "nobody serves tiny now" in err
    lines = err.splitlines()
    assert len(lines) == len(set(lines))
    assert sum("try that first" in line for line in lines) == 1
    stored = gateway.http.get("/v1/files").json()["data"]
    other = rows.with_name("renamed.jsonl")
    rows.rename(other)
    assert on(gateway, "train", str(other), "--model", "tiny")[0] == 0
    assert gateway.http.get("/v1/files").json()["data"] == stored
    # The ending of a name says how its bytes are read.
    named = other.with_name("renamed.json")
    other.rename(named)
    on(gateway, "upload", str(named))
    assert len(gateway.http.get("/v1/files").json()["data"]) == len(stored) + 1
    assert on(gateway, "jobs", "show", "once")[1].splitlines()[0].split() == ["job", job.strip()]


def test_rows_that_were_left_out_are_not_left_out_of_a_job_that_refuses_them(gateway: Gateway, rows: Path) -> None:
    rows.write_text(rows.read_text() + "{}\n")
    skip = ("--on-bad-rows", "skip")
    code, first, _ = on(gateway, "upload", str(rows), *skip)
    assert code == 0
    assert on(gateway, "upload", str(rows))[0] == 1
    assert on(gateway, "upload", str(rows), *skip)[1] == first


def test_a_missing_key_is_explained_where_the_url_was_given() -> None:
    with FakeGateway({}) as fake:
        code, _, err = run(fake, "jobs", "list", key="")
    assert code == 4
    assert err.splitlines()[1].endswith("set TUNESMITH_API_KEY, too")
