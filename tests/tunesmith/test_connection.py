import json
import stat
from pathlib import Path

import pytest

from tunesmith.connection import Connection, NoConnection, find, read

URLS = ("http://127.0.0.1:8100", "redis://x", "sqlite:///y")
HERE = Connection("http://127.0.0.1:8000", "ts-key", *URLS, {"gateway": 7})


def written(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    HERE.write(folder / "connection.json")
    return folder / "connection.json"


def test_file_is_private_has_the_agreed_keys_and_reads_back(tmp_path: Path) -> None:
    path = written(tmp_path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert json.loads(path.read_text()) == {
        "url": "http://127.0.0.1:8000",
        "openai_base_url": "http://127.0.0.1:8000/v1",
        "api_key": "ts-key",
        "inference_url": "http://127.0.0.1:8100",
        "redis_url": "redis://x",
        "database_url": "sqlite:///y",
        "pids": {"gateway": 7},
    }
    assert read(path) == HERE
    # Written again over an old file that somebody made readable.
    path.chmod(0o644)
    written(tmp_path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["connection.json"]


def test_nearest_stack_upwards_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / ".tunesmith")
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    assert find(environ={}) == HERE


def test_environment_overrides(tmp_path: Path) -> None:
    written(tmp_path)
    assert find(environ={"TUNESMITH_HOME": str(tmp_path)}) == HERE
    assert find(tmp_path, environ={"TUNESMITH_API_KEY": "ts-other"}).api_key == "ts-other"
    elsewhere = {"TUNESMITH_URL": "https://host/v1/", "TUNESMITH_API_KEY": "ts-other", "TUNESMITH_HOME": str(tmp_path)}
    assert find(environ=elsewhere) == Connection("https://host", "ts-other")
    # A home given by the caller overrides the environment.
    assert find(tmp_path, environ={"TUNESMITH_URL": "https://host"}) == HERE
    assert find(environ={"TUNESMITH_URL": "127.0.0.1:8333/v1"}).url == "http://127.0.0.1:8333"


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"url": "x", "api_key": "y", "stranger": 1}', "\x00"])
def test_no_or_broken_file(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "connection.json").write_text(content)
    with pytest.raises(NoConnection):
        find(tmp_path, environ={})
