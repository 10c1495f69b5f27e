"""Where a running stack is and how to reach it: `.tunesmith/connection.json`, and what the environment overrides.

Owns the file's form. Does not know how a stack is started, nor whether what the file names still runs.
"""

import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

FILE_NAME = "connection.json"
HOME_NAME = ".tunesmith"
PROCESSES = ("redis", "gateway", "trainer", "inference")


class NoConnection(Exception):
    """No running stack was found and none was named."""


@dataclass(frozen=True, slots=True)
class Connection:
    """How to reach a stack.

    Attributes:
        url: the gateway, without a slash at the end.
        pids: process ids by name (`PROCESSES`, and `vllm` if one generates; `trainer` is the Celery parent); empty for
            a stack on another machine.
    """

    url: str
    api_key: str
    inference_url: str = ""
    redis_url: str = ""
    database_url: str = ""
    pids: dict[str, int] = field(default_factory=dict)

    @property
    def openai_base_url(self) -> str:
        """What the `openai` client takes as `base_url`."""
        return self.url + "/v1"

    def as_json(self) -> dict[str, Any]:
        fields = asdict(self)
        return {"url": fields.pop("url"), "openai_base_url": self.openai_base_url, **fields}

    def write(self, path: Path) -> None:
        """Put the file there whole or not at all, readable by its owner only: it holds keys and passwords."""
        staged = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
        descriptor = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(json.dumps(self.as_json(), indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(staged, path)


def read(path: Path) -> Connection:
    """Read a connection file.

    Raises:
        NoConnection: it is not there or not readable as one.
    """
    try:
        fields = json.loads(path.read_text())
        fields.pop("openai_base_url", None)
        return Connection(**fields)
    except FileNotFoundError:
        raise NoConnection(f"no running stack: {path} is not there; start one with 'tunesmith up'") from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise NoConnection(f"{path} is not a connection file: {error}") from error


def find(home: Path | None = None, environ: Mapping[str, str] = os.environ) -> Connection:
    """The stack to speak to.

    `TUNESMITH_URL` names one anywhere, with `http://` before it if it has no scheme.

    Else the file under `home`, else under `TUNESMITH_HOME`, else under the nearest
    `.tunesmith` from the working directory upwards. `TUNESMITH_API_KEY` overrides the key in each case.

    Raises:
        NoConnection: there is none.
    """
    key = environ.get("TUNESMITH_API_KEY", "")
    if home is None and (url := environ.get("TUNESMITH_URL")):
        whole = url if "://" in url else f"http://{url}"
        return Connection(url=whole.rstrip("/").removesuffix("/v1"), api_key=key)
    found = read(_home(home, environ) / FILE_NAME)
    return replace(found, api_key=key) if key else found


def _home(home: Path | None, environ: Mapping[str, str]) -> Path:
    if home is not None:
        return home
    if named := environ.get("TUNESMITH_HOME"):
        return Path(named)
    here = Path.cwd()
    nearest = (folder / HOME_NAME for folder in (here, *here.parents))
    return next((folder for folder in nearest if (folder / FILE_NAME).is_file()), here / HOME_NAME)
