"""The Hugging Face hub: what a revision is, how a model comes here, and what to do when the hub says no."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shared.errors import TunesmithError, Unavailable

PATTERNS = ("*.safetensors", "*.json", "chat_template.jinja", "additional_chat_templates/*.jinja")
PAGE = "https://huggingface.co/"
# What asking again does not change.
REFUSALS = frozenset({"model_gated", "model_missing", "revision_missing"})


def commit_of(repo: str, revision: str | None) -> str:
    """The commit (40 hex digits) a branch or tag stands for now; of the default branch if `revision` is None.

    Raises:
        Unavailable: as `download`.
    """
    from huggingface_hub import HfApi

    with _explained(repo, revision or "main"):
        commit = HfApi().model_info(repo, revision=revision).sha
    if not commit:
        raise Unavailable(f"the hub names no commit for {repo}")
    return commit


def download(repo: str, commit: str) -> Path:
    """Weights, configuration and tokenizer of a model, as a folder in the hub's own cache.

    Raises:
        Unavailable: the hub cannot be reached, or does not give the model; the message says what to do.
    """
    from huggingface_hub import snapshot_download

    with _explained(repo, commit):
        return Path(snapshot_download(repo, revision=commit, allow_patterns=list(PATTERNS)))


def check_access(repo: str, commit: str, timeout: float) -> None:
    """Ask the hub for a file that every model has, and fetch nothing.

    Args:
        timeout: seconds for each step of asking.

    Raises:
        Unavailable: as `download`.
    """
    from huggingface_hub import HfApi, hf_hub_url

    with _explained(repo, commit):
        HfApi().get_hf_file_metadata(url=hf_hub_url(repo, "config.json", revision=commit), timeout=timeout)


@contextmanager
def _explained(repo: str, revision: str) -> Iterator[None]:
    from httpx2 import HTTPError
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        yield
    except GatedRepoError as error:
        raise Unavailable(
            f"{repo} is gated: accept its terms at {PAGE}{repo} and set HF_TOKEN to a token of that account",
            code="model_gated",
        ) from error
    except RepositoryNotFoundError as error:
        raise Unavailable(
            f"the hub has no model {repo}, or it is private: check the name at {PAGE}{repo}, "
            "or set HF_TOKEN to a token that may read it",
            code="model_missing",
        ) from error
    except RevisionNotFoundError as error:
        raise Unavailable(
            f"{repo} has no revision {revision}: take a commit from {PAGE}{repo}/commits/main", code="revision_missing"
        ) from error
    except (HTTPError, OSError) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise TunesmithError(f"the disk is full while {repo} was downloaded", code="storage_full") from error
        raise Unavailable(
            f"the hub could not be reached for {repo} ({error}): try again later, "
            "or copy the model here and name it as folder:/its/path",
            code="hub_unreachable",
        ) from error
