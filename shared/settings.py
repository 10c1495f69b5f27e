"""The settings that all processes share. Owns names and defaults; built by each process's entry, never at import."""

from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict


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
    reserve_bytes: int = Field(1 << 30, ge=0)
    umask: str = Field("077", pattern=r"^[0-7]{3,4}$")
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @property
    def sql_url(self) -> str:
        return self.database_url or f"sqlite:///{self.home.absolute() / 'tunesmith.db'}"

    @property
    def artifacts_root(self) -> Path:
        return (self.artifacts or self.home / "artifacts").absolute()
