"""The inference process's settings, beside those all services share. Built by the entry only."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from services.inference.precision import ServingPrecision
from shared.settings import Settings

LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})


def _named(name: str) -> str:
    return f"TUNESMITH_INFERENCE_{name}"


class InferenceSettings(Settings, populate_by_name=True):
    """Settings of one inference process, read from `TUNESMITH_INFERENCE_*` besides the shared ones.

    Attributes:
        base: catalogue id or alias of the base served; the catalogue's first if empty.
        precision: what the base is held in; None is fp32 on a CPU and auto on a GPU. On a CPU: fp32; fp16w, bf16w and
            int8w, packed weights with fp32 sums; auto, the fastest of these that this processor has, by a measurement
            at start that keeps the loss within 0.5 %. On a GPU: bf16, fp16, int8 and nf4 (bitsandbytes), auto for bf16
            or fp16.
        slots: sequences generated at once.
        context: most tokens of one sequence, prompt and new; the model's own limit holds too.
        beyond_context: what becomes of a request for more new tokens than the context has room for: it is given what
            fits (`cut`) or refused (`refuse`).
        prefill_chunk: prompt tokens computed between two decode steps; None is 128 on a CPU and 1,024 on a GPU,
            which takes hardly longer for them.
        queue_requests, queue_tokens: how many requests and prompt tokens may wait; beyond, 429.
        adapter_bytes, adapter_slots: what resident adapters may take together.
        max_rank: adapters of a higher rank are refused.
        threads: of torch; 0 leaves it to torch.
        drain_seconds: how long requests in flight may go on after SIGTERM.
        body_bytes: largest request body.
    """

    base: Annotated[str, Field(validation_alias=_named("BASE"))] = ""
    host: Annotated[str, Field(validation_alias=_named("HOST"))] = "127.0.0.1"
    port: Annotated[int, Field(validation_alias=_named("PORT"), ge=0, le=65535)] = 8100
    precision: Annotated[ServingPrecision | None, Field(validation_alias=_named("PRECISION"))] = None
    slots: Annotated[int, Field(validation_alias=_named("SLOTS"), ge=1, le=1024)] = 16
    context: Annotated[int, Field(validation_alias=_named("CONTEXT"), ge=16, le=1 << 20)] = 2048
    beyond_context: Annotated[Literal["cut", "refuse"], Field(validation_alias=_named("BEYOND_CONTEXT"))] = "cut"
    prefill_chunk: Annotated[int | None, Field(validation_alias=_named("PREFILL_CHUNK"), ge=1, le=1 << 16)] = None
    queue_requests: Annotated[int, Field(validation_alias=_named("QUEUE_REQUESTS"), ge=1, le=1 << 20)] = 128
    queue_tokens: Annotated[int, Field(validation_alias=_named("QUEUE_TOKENS"), ge=1, le=1 << 30)] = 65_536
    adapter_bytes: Annotated[int, Field(validation_alias=_named("ADAPTER_BYTES"), ge=1)] = 1 << 30
    adapter_slots: Annotated[int, Field(validation_alias=_named("ADAPTER_SLOTS"), ge=1, le=4096)] = 32
    max_rank: Annotated[int, Field(validation_alias=_named("MAX_RANK"), ge=1, le=1024)] = 256
    threads: Annotated[int, Field(validation_alias=_named("THREADS"), ge=0, le=1024)] = 0
    drain_seconds: Annotated[int, Field(validation_alias=_named("DRAIN_SECONDS"), ge=0, le=3600)] = 30
    body_bytes: Annotated[int, Field(validation_alias=_named("BODY_BYTES"), ge=1024, le=1 << 30)] = 4 << 20

    @model_validator(mode="after")
    def _needs_token_beyond_loopback(self) -> Self:
        if self.host not in LOOPBACK and not self.internal_token.get_secret_value():
            raise ValueError(f"refusing to listen on {self.host} without TUNESMITH_INTERNAL_TOKEN")
        return self
