"""The inference process's settings, beside those all services share. Built by the entry only."""

from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from services.inference.precision import VLLM_PRECISIONS, ServingPrecision
from shared.settings import Settings

# Of vLLM's adapters and sequences, unless others are set; `vllm_server` tells vLLM the same.
VLLM_MAX_RANK = 64
VLLM_SLOTS = 16
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
            or fp16. With vLLM: fp32, bf16 (None and auto too) or fp16.
        engine: what generates: this process itself (`own`), or a vLLM server beside it (`vllm`).
        vllm_url: of that server, on this machine: it has no key and must not be reached from elsewhere.
        slots: sequences generated at once; None is 16 on a CPU and, on a GPU, up to 64, as many as half of its free
            memory has room for; with vLLM it is 16.
        context: most tokens of one sequence, prompt and new; the model's own limit holds too.
        beyond_context: what becomes of a request for more new tokens than the context has room for: it is given what
            fits (`cut`) or refused (`refuse`).
        prefill_chunk: prompt tokens computed between two decode steps; None is 128 on a CPU and 1,024 on a GPU,
            which takes hardly longer for them.
        queue_requests, queue_tokens: how many requests and prompt tokens may wait; beyond, 429.
        adapter_bytes, adapter_slots: what resident adapters may take together.
        max_rank: adapters of a higher rank are refused. vLLM reserves memory for it: there it is 64 unless set.
        threads: of torch; 0 leaves it to torch.
        drain_seconds: how long requests in flight may go on after SIGTERM.
        body_bytes: largest request body.
    """

    base: Annotated[str, Field(validation_alias=_named("BASE"))] = ""
    host: Annotated[str, Field(validation_alias=_named("HOST"))] = "127.0.0.1"
    port: Annotated[int, Field(validation_alias=_named("PORT"), ge=0, le=65535)] = 8100
    precision: Annotated[ServingPrecision | None, Field(validation_alias=_named("PRECISION"))] = None
    engine: Annotated[Literal["own", "vllm"], Field(validation_alias=_named("ENGINE"))] = "own"
    vllm_url: Annotated[str, Field(validation_alias=_named("VLLM_URL"))] = "http://127.0.0.1:8200"
    slots: Annotated[int | None, Field(validation_alias=_named("SLOTS"), ge=1, le=1024)] = None
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

    @property
    def largest_rank(self) -> int:
        """`max_rank`, or less where it was not set and costs memory."""
        unset = "max_rank" not in self.model_fields_set
        return VLLM_MAX_RANK if self.engine == "vllm" and unset else self.max_rank

    @model_validator(mode="after")
    def _needs_token_beyond_loopback(self) -> Self:
        if self.host not in LOOPBACK and not self.internal_token.get_secret_value():
            raise ValueError(f"refusing to listen on {self.host} without TUNESMITH_INTERNAL_TOKEN")
        return self

    @model_validator(mode="after")
    def _vllm_is_beside_this_process(self) -> Self:
        url = urlsplit(self.vllm_url)
        if url.scheme != "http" or url.hostname not in LOOPBACK:
            raise ValueError("TUNESMITH_INFERENCE_VLLM_URL must be http:// and an address of this machine's loopback")
        return self

    @model_validator(mode="after")
    def _vllm_serves_this_precision(self) -> Self:
        if self.engine == "vllm" and self.precision not in (None, "auto", *VLLM_PRECISIONS):
            raise ValueError(f"vLLM serves fp32, bf16 and fp16, not TUNESMITH_INFERENCE_PRECISION={self.precision}")
        return self
