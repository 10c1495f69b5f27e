"""`python -m shared.bases.prepare` as a process: which base it takes, what it says, and that a second time is free."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shared.storage.artifacts import LocalArtifactStore
from tests.tiny import write_catalogue, write_tiny_model

ELSEWHERE = '[[base]]\nid = "elsewhere"\nsource = "package:no_such_package/model.gguf"\n\n'


def prepare(home: Path, name: str, catalogue: Path) -> subprocess.CompletedProcess[str]:
    environ = os.environ | {"TUNESMITH_HOME": str(home), "TUNESMITH_CATALOGUE": str(catalogue)}
    command = [sys.executable, "-m", "shared.bases.prepare", name]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base, after one that cannot be had here."""
    folder = tmp_path_factory.mktemp("catalogue")
    path = write_catalogue(folder / "catalogue.toml", write_tiny_model(folder / "model"))
    path.write_text(ELSEWHERE + path.read_text())
    return path


@pytest.mark.slow
def test_auto_takes_the_first_that_can_be_had_and_says_why_not_the_others(tmp_path: Path, catalogue: Path) -> None:
    done = prepare(tmp_path, "auto", catalogue)
    assert (done.returncode, done.stdout) == (0, "tiny\n")
    assert done.stderr.startswith("elsewhere: the Python package no_such_package that ships it is not installed\n")
    store = LocalArtifactStore(tmp_path / "artifacts")
    before = store.verify(store.base("tiny"), "base")
    again = prepare(tmp_path, "test/tiny-llama", catalogue)
    assert (again.returncode, again.stdout, again.stderr) == (0, "tiny\n", "")
    assert store.verify(store.base("tiny"), "base") == before


@pytest.mark.slow
def test_what_cannot_be_had_is_an_error(tmp_path: Path, catalogue: Path) -> None:
    done = prepare(tmp_path, "elsewhere", catalogue)
    assert (done.returncode, done.stdout) == (1, "")
    assert "no base model could be prepared: elsewhere" in done.stderr
    unknown = prepare(tmp_path, "gpt-9", catalogue)
    assert (unknown.returncode, unknown.stdout) == (1, "")
    assert "there are: elsewhere, tiny" in unknown.stderr
    assert "Traceback" not in done.stderr + unknown.stderr
