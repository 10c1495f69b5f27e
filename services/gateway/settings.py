"""The gateway's settings, beside those all services share."""

import re
from pathlib import Path
from typing import Annotated

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import NoDecode

from shared.settings import LeaseSettings

DEFAULT_CACHE_BYTES = 10 << 30
_ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://[A-Za-z0-9_.-]+(:[0-9]{1,5})?|https?://\[[0-9a-fA-F:]+\](:[0-9]{1,5})?")


class GatewaySettings(LeaseSettings):
    """Read from `TUNESMITH_*`.

    Attributes:
        inference_urls: base URLs of the inference processes, separated by commas.
        default_base: base that answers a request naming no model; the first one served if empty.
        max_upload_bytes: size of one uploaded file.
        max_body_bytes: size of any other request body.
        key_file: where the first API key is written (0600); `home/api_key` if empty. A key found there is taken over.
        key_secret: what API keys are hashed with; made once in `home/key_secret` (0600) if empty. Several gateways on
            one database need the same.
        cors_origins: whose pages a browser lets call this gateway, separated by commas: `https://chat.example`, or `*`
            for everybody's; none if empty.
        inference_timeout: seconds without a byte from inference before a request is aborted.
        cache_bytes: of tokenised data that stay on disk; the least recently used goes first.
        keep_responses_seconds: how long responses can be named by their ids; 0 keeps none.
        keep_events_days: events of jobs that ended longer ago are dropped, their metric series with them; empty: never.
    """

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    inference_urls: Annotated[tuple[str, ...], NoDecode] = ()
    default_base: str = ""
    max_upload_bytes: int = Field(2 << 30, ge=1024)
    max_body_bytes: int = Field(4 << 20, ge=1024)
    key_file: Path | None = None
    key_secret: SecretStr = SecretStr("")
    cors_origins: Annotated[tuple[str, ...], NoDecode] = ()
    inference_timeout: float = Field(300, gt=0)
    cache_bytes: int = Field(DEFAULT_CACHE_BYTES, ge=0)
    keep_responses_seconds: int = Field(3600, ge=0, le=31 * 86400)
    keep_events_days: int | None = Field(None, ge=1)

    @field_validator("inference_urls", "cors_origins", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(url.strip().rstrip("/") for url in value.split(",") if url.strip())
        return value

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"{origin!r} is no origin: write https://host or http://host:port, without a path, or *"
                )
        return origins

    @property
    def key_path(self) -> Path:
        return self.key_file or self.home / "api_key"

    @property
    def key_secret_path(self) -> Path:
        return self.home / "key_secret"
