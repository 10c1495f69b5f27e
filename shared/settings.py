"""The settings that processes share. Owns names and defaults; built by each process's entry, never at import."""

import sys
from pathlib import Path
from typing import Literal, Self, TypeVar

from pydantic import Field, SecretStr, ValidationError, model_validator
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, SettingsConfigDict

DeviceChoice = Literal["auto", "cpu", "cuda"]


class Settings(BaseSettings):
    """Settings all services share, read from `TUNESMITH_*`.

    Attributes:
        home: folder of everything a one-machine installation keeps.
        database_url: SQLAlchemy URL; a SQLite file under `home` if empty.
        redis_url: any server that speaks the Redis protocol; only notifications go through it.
        artifacts: folder shared by gateway, trainer and inference; `home/artifacts` if empty.
        catalogue: TOML file with the base models; the built-in list if empty.
        internal_token: bearer token between gateway and inference.
        reserve_bytes: so much of the artifacts' disk stays free: uploads and checkpoints beyond it are refused.
        device: what training and inference compute on; `auto` takes a GPU if torch sees one, and `cuda` refuses to
            start without.
        gpu_share: of a GPU's memory, what training and inference each may take: 1 is all that is free.
        umask: of what is written, octal; 007 for a folder that several users of one group share.
        installation: the id that the artifacts folder must carry; for inference, which cannot ask the database.
    """

    model_config = SettingsConfigDict(env_prefix="TUNESMITH_", extra="ignore")

    home: Path = Path(".tunesmith")
    database_url: str = ""
    redis_url: str = "redis://127.0.0.1:6379/0"
    artifacts: Path | None = None
    catalogue: Path | None = None
    internal_token: SecretStr = SecretStr("")
    installation: str = ""
    device: DeviceChoice = "auto"
    gpu_share: float = Field(1.0, gt=0, le=1)
    reserve_bytes: int = Field(1 << 30, ge=0)
    umask: str = Field("077", pattern=r"^[0-7]{3,4}$")
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @property
    def sql_url(self) -> str:
        return self.database_url or f"sqlite:///{self.home.absolute() / 'tunesmith.db'}"

    @property
    def artifacts_root(self) -> Path:
        return (self.artifacts or self.home / "artifacts").absolute()


Chosen = TypeVar("Chosen", bound=Settings)


def read_settings(kind: type[Chosen]) -> Chosen:
    """The settings of this process's environment.

    Raises:
        SystemExit: one is wrong, or two contradict each other; with a sentence for each.
    """
    try:
        return kind()
    except ValidationError as error:
        sys.exit("\n".join(f"settings: {_sentence(fault)}" for fault in error.errors()))


def _sentence(fault: ErrorDetails) -> str:
    message = fault["msg"].removeprefix("Value error, ")
    if not fault["loc"]:
        return message
    name = str(fault["loc"][0])
    return f"{name if name.isupper() else f'TUNESMITH_{name.upper()}'}: {message}, not {fault['input']!r}"


# A worker that the database keeps waiting once must not lose its job.
RENEWALS_IN_A_LEASE = 3


class LeaseSettings(Settings):
    """What gateways and workers must agree on; each reads both, so that either notices what contradicts the other.

    Attributes:
        lease_seconds: a worker that has not renewed its lease for so long loses its job to another (the gateway's).
        renew_seconds: how often a worker renews the lease on its job (the worker's).
    """

    lease_seconds: float = Field(15, gt=0)
    renew_seconds: float = Field(5.0, gt=0)

    @model_validator(mode="after")
    def _healthy_workers_keep_their_jobs(self) -> Self:
        if self.lease_seconds < RENEWALS_IN_A_LEASE * self.renew_seconds:
            raise ValueError(
                f"TUNESMITH_LEASE_SECONDS ({self.lease_seconds:g}) is less than {RENEWALS_IN_A_LEASE} times "
                f"TUNESMITH_RENEW_SECONDS ({self.renew_seconds:g}): healthy workers would lose their jobs; set both "
                "for the gateway and for every worker"
            )
        return self
