"""Datasets of the Hugging Face hub, found and downloaded by huggingface_hub; and what to do when the hub says no."""

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.hub_files import HubError, HubName, chosen

PAGE = "https://huggingface.co/datasets/"
TIMEOUT_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Found:
    """What a name stands for: files of one commit (40 hex digits), in the order of their rows."""

    repo: str
    commit: str
    files: tuple[str, ...]


def find(name: HubName) -> Found:
    """Ask the hub which files a name stands for; none is downloaded.

    Raises:
        HubError: there are none, or the hub does not say.
    """
    with _explained(name.repo, name.revision):
        from huggingface_hub import HfApi

        info = HfApi().dataset_info(name.repo, revision=name.revision, timeout=TIMEOUT_SECONDS)
        configs: Any = info.card_data.get("configs") if info.card_data else None
    if not info.sha:
        raise HubError(f"the hub names no commit for {name.repo}")
    files = sorted(each.rfilename for each in info.siblings or ())
    return Found(name.repo, info.sha, chosen(files, configs if isinstance(configs, list) else [], name))


def download(found: Found) -> list[Path]:
    """The files, in the hub's own cache on this machine; what is there already is not downloaded again.

    Raises:
        HubError: the hub does not give one, or the disk is full.
    """
    with _explained(found.repo, found.commit):
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils.tqdm import disable_progress_bars

        if not sys.stderr.isatty():
            disable_progress_bars()
        options: Any = {"repo_type": "dataset", "revision": found.commit}
        return [Path(hf_hub_download(found.repo, file, **options)) for file in found.files]


@contextmanager
def _explained(repo: str, revision: str | None) -> Iterator[None]:
    try:
        from httpx2 import HTTPError
        from huggingface_hub import errors
    except ImportError as error:
        raise HubError("datasets of the hub need huggingface_hub: pip install 'tunesmith[hub]'") from error
    try:
        yield
    except errors.GatedRepoError as error:
        raise HubError(
            f"{repo} is gated: accept its terms at {PAGE}{repo} and set HF_TOKEN to a token of that account",
            denied=True,
        ) from error
    except (errors.RepositoryNotFoundError, errors.DisabledRepoError) as error:
        raise HubError(
            f"the hub has no dataset {repo}, or it is private: check the name at {PAGE}{repo}, or set HF_TOKEN to a "
            "token that may read it",
            denied=True,
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(
            f"{repo} has no revision {revision}: take one from {PAGE}{repo}/commits/main", denied=True
        ) from error
    except errors.OfflineModeIsEnabled as error:
        raise HubError(
            f"the hub is not asked for {repo}, since HF_HUB_OFFLINE is set: unset it, or name a local file"
        ) from error
    except errors.HFValidationError as error:
        raise HubError(f"{repo!r} is no name of a dataset: {_first_line(error)}") from error
    except (HTTPError, OSError, ValueError) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise HubError(f"the disk is full while {repo} was downloaded; HF_HOME says where that goes") from error
        raise HubError(
            f"the hub could not be reached for {repo} ({_first_line(error)}): try again later, or name a local file"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
