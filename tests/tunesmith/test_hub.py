"""Datasets by their name on the Hugging Face hub: the command as a process, the hub a MOCK over real HTTP."""

import errno
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import Cluster
from tests.stack_processes import free_port
from tests.tunesmith.fake_gateway import FakeGateway, job
from tests.tunesmith.mock_hub import COMMIT, REPO, MockHub
from tests.tunesmith.test_cli import run_process, uploads
from tunesmith import hub
from tunesmith.hub_files import HubError, HubName

ROWS = [json.dumps({"instruction": f"What is {n}?", "output": f"{n}"}).encode() + b"\n" for n in range(60)]
FILES = {
    "README.md": b"# Data",
    "data/train-00000-of-00002.jsonl": b"".join(ROWS[:20]),
    "data/train-00001-of-00002.jsonl": b"".join(ROWS[20:50]),
    "data/test-00000-of-00001.jsonl": b"".join(ROWS[50:]),
}
JOBS = "POST /v1/fine_tuning/jobs"
TAKEN = f"{REPO}@{COMMIT}: data/train-00000-of-00002.jsonl, data/train-00001-of-00002.jsonl\n"


@pytest.fixture
def gateway() -> Iterator[FakeGateway]:
    with FakeGateway({}) as fake:
        yield fake


@pytest.fixture
def mock() -> Iterator[MockHub]:
    with MockHub(dict(FILES)) as running:
        yield running


@pytest.fixture
def tool(gateway: FakeGateway, mock: MockHub, tmp_path: Path) -> "Tool":
    return Tool(gateway, {"HF_ENDPOINT": mock.url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": ""})


class Tool:
    """The command, with the hub that it is to ask."""

    def __init__(self, gateway: FakeGateway, environment: dict[str, str]) -> None:
        self.gateway, self.environment = gateway, environment

    def __call__(self, *arguments: str, **environment: str) -> tuple[int, str, str]:
        return run_process(self.gateway, *arguments, **(self.environment | environment))


def test_each_file_of_the_split_is_uploaded_and_one_job_trained_on_all(tool: Tool, mock: MockHub) -> None:
    names = uploads(tool.gateway)
    tool.gateway.answers[JOBS] = (200, job("queued"))
    code, out, err = tool("train", f"hf:{REPO}", "--validation", f"hf:{REPO}@v1:test", HF_TOKEN="hf_mine")
    assert (code, out) == (0, "ftjob-1\n"), err
    assert err.startswith(f"{TAKEN}{REPO}@{COMMIT}: data/test-00000-of-00001.jsonl\n")
    assert names == ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "test-00000-of-00001.jsonl"]
    for form, content in zip(tool.gateway.forms, list(FILES.values())[1:], strict=True):
        assert content in form
    body = tool.gateway.bodies[-1][1]
    assert (body["training_files"], body["validation_file"]) == (["file-1", "file-2"], "file-3")
    # The revision was asked for, and what came is of the commit that was told.
    assert f"GET /api/datasets/{REPO}/revision/v1" in mock.asked
    assert all(f"/resolve/{COMMIT}/" in asked for asked in mock.asked if "/api/" not in asked)
    of_dataset = [token for asked, token in zip(mock.asked, mock.tokens, strict=True) if REPO in asked]
    assert set(of_dataset) == {"Bearer hf_mine"}
    # Its bytes are here now.
    before = len(mock.asked)
    assert tool("train", f"hf:{REPO}", "--validation", f"hf:{REPO}@v1:test")[0] == 0
    assert not any(asked.startswith("GET /datasets/") for asked in mock.asked[before:])


def test_upload_and_the_commands_before_a_job_take_such_names(tool: Tool) -> None:
    uploads(tool.gateway)
    code, out, err = tool("upload", f"hf:{REPO}@{COMMIT}", "--on-bad-rows", "skip")
    assert (code, out) == (0, "file-1\nfile-2\n")
    assert err.splitlines()[0] == TAKEN.strip()
    assert all(b'name="on_bad_rows"' in form for form in tool.gateway.forms)
    code, out, err = tool("upload", f"hf:{REPO}:test", "--json")
    assert [file["id"] for file in json.loads(out)] == ["file-3"]
    tool.gateway.answers["GET /v1/files/file-4/preview"] = (200, {"data": [], "lengths": {}})
    tool("preview", f"hf:{REPO}")
    # Of two, the first only.
    assert len(tool.gateway.forms) == 4
    tool("estimate", f"hf:{REPO}:data/*.jsonl")
    assert tool.gateway.bodies[-1][1]["training_files"] == [f"file-{n}" for n in (5, 6, 7)]


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        ("hf:nobody/none", 4, "the hub has no dataset nobody/none, or it is private: check the name at https://"),
        (f"hf:{REPO}@v9", 4, f"{REPO} has no revision v9: take one from https://"),
        (f"hf:{REPO}:dev", 1, f"{REPO} has no split 'dev'; its files tell these: test, train."),
        (f"hf:{REPO}:README.md", 1, f"{REPO} has no split 'README.md'"),
        ("hf:a/b/c", 1, "'hf:a/b/c' names no dataset of the hub: write hf:owner/name"),
        ("hf:a--b/c", 1, "'a--b/c' is no name of a dataset"),
    ],
)
def test_what_the_hub_does_not_have_is_one_sentence(tool: Tool, name: str, code: int, said: str) -> None:
    for command in (("train", name), ("upload", name), ("train", "file-1", "--validation", name)):
        got, out, err = tool(*command)
        assert (got, out, err.count("\n")) == (code, "", 1), err
        assert err.startswith(f"error: {said}")
    assert tool.gateway.bodies == []


def test_a_gated_dataset_a_hub_that_fails_and_one_that_is_away(tool: Tool, mock: MockHub) -> None:
    mock.refuse = (403, "GatedRepo")
    code, _, err = tool("train", f"hf:{REPO}")
    gated = f"error: {REPO} is gated: accept its terms at https://huggingface.co/datasets/{REPO} and set HF_TOKEN to a"
    assert (code, err.splitlines()[-1].startswith(gated)) == (4, True), err
    away = f"http://127.0.0.1:{free_port()}"
    code, out, err = tool("train", f"hf:{REPO}", HF_ENDPOINT=away)
    assert (code, out, err.count("\n")) == (1, "", 1), err
    assert err.startswith(f"error: the hub could not be reached for {REPO} (")
    assert err.endswith("): try again later, or name a local file\n")
    # What answers there is no hub.
    code, _, err = tool("train", f"hf:{REPO}", HF_ENDPOINT=f"{tool.gateway.url}/nothing")
    assert (code, err.count("\n"), "could not be reached" in err) == (1, 1, True), err
    code, _, err = tool("upload", f"hf:{REPO}", HF_HUB_OFFLINE="1")
    offline = f"error: the hub is not asked for {REPO}, since HF_HUB_OFFLINE is set: unset it, or name a local file\n"
    assert (code, err) == (1, offline)


def test_more_files_than_a_job_takes_are_told_before_any_is_downloaded(tool: Tool, mock: MockHub) -> None:
    mock.files |= {f"data/train-{n:05}-of-00017.jsonl": b"" for n in range(17)}
    code, _, err = tool("train", f"hf:{REPO}:data/*-of-00017.jsonl")
    assert (code, "a job takes at most 16 files, not 17" in err) == (2, True)
    code, _, err = tool("train", "file-1", "--validation", f"hf:{REPO}")
    assert (code, "a job has one validation file, and these are 19: name one of data/train-0" in err) == (1, True)
    assert not any("/resolve/" in asked for asked in mock.asked)


def test_without_huggingface_hub_it_says_what_to_install(tool: Tool, tmp_path: Path) -> None:
    (tmp_path / "huggingface_hub.py").write_text("raise ImportError('not installed')\n")
    path = f"{tmp_path}:{tool.environment.get('PYTHONPATH', '')}{Path.cwd()}"
    code, _, err = tool("train", f"hf:{REPO}", PYTHONPATH=path)
    assert (code, err) == (1, "error: datasets of the hub need huggingface_hub: pip install 'tunesmith[hub]'\n")


def test_a_full_disk_is_no_hub_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", full)
    with pytest.raises(HubError, match="the disk is full while some/data was downloaded; HF_HOME says where") as told:
        hub.find(HubName.parse(f"hf:{REPO}"))
    assert not told.value.denied


def test_a_real_gateway_takes_them(tiny_stack: Cluster, mock: MockHub, tmp_path: Path) -> None:
    """All of it but the hub is real: three shards of Parquet by a card become one job."""
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    mock.files = {"README.md": b""}
    for part in range(3):
        table = pa.Table.from_pylist([json.loads(row) for row in ROWS[part::3]])
        pq.write_table(table, tmp_path / "part.parquet")
        mock.files[f"main/part{part}.parquet"] = (tmp_path / "part.parquet").read_bytes()
    mock.configs = [{"config_name": "main", "data_files": [{"split": "sft", "path": "main/*.parquet"}]}]
    environment = {"HF_ENDPOINT": mock.url, "HF_HOME": str(tmp_path / "hf"), "TUNESMITH_API_KEY": tiny_stack.key}
    environment["TUNESMITH_URL"] = tiny_stack.url
    name = f"hf:{REPO}:main/sft"
    with FakeGateway({}) as unused:
        code, out, err = run_process(unused, "train", name, "--model", "tiny", "--json", **environment)
    assert code == 0, err
    made = json.loads(out)
    assert len(made["training_files"]) == 3
    with tiny_stack.client() as http:
        found = [http.get(f"/v1/files/{file}").json() for file in made["training_files"]]
        assert [file["filename"] for file in found] == [f"part{part}.parquet" for part in range(3)]
        assert sum(file["dataset"]["rows"] for file in found) == len(ROWS)
        http.post(f"/v1/fine_tuning/jobs/{made['id']}/cancel")
