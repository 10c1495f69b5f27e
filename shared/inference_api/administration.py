"""What an inference process says of itself, and the adapters it holds.

The gateway reads these of processes of another version too, during an upgrade: what is added has a default.
"""

from typing import Any, Literal
from urllib.parse import quote

from pydantic import BaseModel

INFO = "/info"
ADAPTERS = "/adapters"
# Query parameters of a load: seconds within which an adapter was used that is not evicted for it. The older name is
# read until the release after 0.2.
PROTECT_RECENT_SECONDS, PROTECT_RECENT_SECONDS_OLD = "protect_recent_seconds", "gently"
MAX_PROTECT_RECENT_SECONDS = 86_400


def adapter_path(adapter_id: str, *, protect_recent_seconds: float = 0) -> str:
    """Path and query of an adapter."""
    query = f"?{PROTECT_RECENT_SECONDS}={protect_recent_seconds:g}" if protect_recent_seconds else ""
    return f"{ADAPTERS}/{quote(adapter_id, safe='')}{query}"


class InfoJson(BaseModel):
    """Ours first, then text-generation-inference's names for the same things.

    Attributes:
        precision: what the base's weights are held in.
        runner: `llama` (our forward pass) or `transformers`.
        measured: with precision `auto`, what the probe at start saw of each candidate.
        slots: sequences that are generated at once.
        context: most tokens of one sequence, prompt and new.
    """

    base: str
    aliases: list[str]
    revision: str
    base_sha256: str
    precision: str
    runner: str
    measured: list[dict[str, Any]]
    slots: int
    context: int
    adapter_slots: int
    adapter_bytes: int
    max_rank: int
    model_id: str
    model_sha: str
    model_dtype: str
    model_device_type: str
    model_pipeline_tag: str
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_tokens: int
    max_input_length: int
    max_total_tokens: int
    validation_workers: int
    max_client_batch_size: int
    router: str
    version: str


Residency = Literal["loading", "resident", "draining"]


class ResidentAdapterJson(BaseModel):
    """An adapter that an inference process holds.

    Attributes:
        bytes: what it takes in the engine; 0 while it is being read.
        ms: how long its load took, from reading the folder to residency.
        in_flight: requests that use it or wait for it.
        template: id of its prompt format.
    """

    id: str
    state: Residency
    rank: int
    bytes: int
    step: int | None
    ms: float
    pinned: bool
    in_flight: int
    template: str | None


class ResidentAdapterListJson(BaseModel):
    data: list[ResidentAdapterJson]
    resident_bytes: int
    budget_bytes: int
    slots: int


class UnloadedJson(BaseModel):
    """`unloaded` is false if the adapter was not in memory."""

    id: str
    unloaded: bool


class ServedModelJson(BaseModel):
    """The base (`parent` is null), or an adapter in memory."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "tunesmith"
    parent: str | None


class ServedModelListJson(BaseModel):
    object: Literal["list"] = "list"
    data: list[ServedModelJson]
