"""What is said when the hub says no. The hub itself is a MOCK here: tests do not reach the network."""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import huggingface_hub
import pytest
from huggingface_hub import errors

from shared.bases.base_model import prepare_base
from shared.bases.catalogue import Base
from shared.bases.hub import check_access, commit_of, download
from shared.errors import TunesmithError
from shared.storage.artifacts import LocalArtifactStore
from tests.tiny import write_tiny_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ANSWER = httpx2.Response(403, request=httpx2.Request("GET", "https://huggingface.co/meta/secret"))
REFUSALS: list[tuple[Exception, str, str]] = [
    (errors.GatedRepoError("no", response=ANSWER), "model_gated", "accept its terms at https://huggingface.co/a/b"),
    (errors.GatedRepoError("no", response=ANSWER), "model_gated", "set HF_TOKEN"),
    (errors.RepositoryNotFoundError("no", response=ANSWER), "model_missing", "set HF_TOKEN to a token that may read"),
    (errors.RevisionNotFoundError("no", response=ANSWER), "revision_missing", "take a commit from https://"),
    (errors.LocalEntryNotFoundError("offline"), "hub_unreachable", "name it as folder:"),
    (errors.OfflineModeIsEnabled("offline"), "hub_unreachable", "try again later"),
    (httpx2.ConnectError("no route"), "hub_unreachable", "no route"),
    (OSError(errno.ENOSPC, "full"), "storage_full", "the disk is full"),
]


def raising(error: Exception) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        raise error

    return call


@pytest.mark.parametrize(("error", "code", "advice"), REFUSALS)
def test_every_refusal_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, error: Exception, code: str, advice: str
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", raising(error))
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", raising(error))
    monkeypatch.setattr(huggingface_hub.HfApi, "get_hf_file_metadata", raising(error))
    calls = (
        lambda: download("a/b", COMMIT),
        lambda: commit_of("a/b", None),
        lambda: check_access("a/b", COMMIT, 1.0),
    )
    for call in calls:
        with pytest.raises(TunesmithError) as refused:
            call()
        assert refused.value.code == code
        assert advice in refused.value.message


def test_a_download_becomes_a_prepared_base(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cache = write_tiny_model(tmp_path / "cache")
    asked: list[tuple[str, dict[str, Any]]] = []

    def snapshot_download(repo: str, **options: Any) -> str:
        asked.append((repo, options))
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    store = LocalArtifactStore(tmp_path / "artifacts")
    base = Base(id="b", source=f"hub:a/b@{COMMIT}")
    assert prepare_base(base, store).base_revision == COMMIT
    # Pinned, and nothing that could hold code or a pickle.
    patterns = ["*.safetensors", "*.json", "chat_template.jinja", "additional_chat_templates/*.jinja"]
    assert asked == [("a/b", {"revision": COMMIT, "allow_patterns": patterns})]
    store.verify(store.base("b"), "base")
    prepare_base(base, store)
    assert len(asked) == 1
