"""text-generation-inference's dialect, with LoRAX's additions: bodies and answers of `/generate` and its kin.

In what the gateway's clients send `adapter_id` is any name of a model; in what the gateway sends it is an adapter's id.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, RootModel, model_validator

from shared.inference_api.fields import (
    MIN_DIVISOR,
    NO_BOOL,
    Body,
    Candidates,
    Count,
    Messages,
    ModelName,
    Penalty,
    Probability,
    StopStrings,
    Text,
    TopK,
    TopP,
    stops_of,
)
from shared.inference_api.ignored import Ignored
from shared.inference_api.other_servers import TgiFields
from shared.inference_api.structured import GrammarBody, ResponseFormat

GENERATE, GENERATE_STREAM, COMPAT = "/generate", "/generate_stream", "/"


class Parameters(TgiFields):
    """text-generation-inference's parameters, with LoRAX's.

    Attributes:
        do_sample: false is greedy. Unset is greedy too, unless temperature, top_k, top_p or typical_p ask for something
            else.
        best_of: so many are generated, and the likeliest is returned, by the mean log probability of its tokens.
        truncate: keep only so many of the prompt's last tokens.
        details: add what was generated token by token.
        decoder_input_details: add the prompt's tokens with their log probabilities.
    """

    adapter_id: ModelName | None = None
    max_new_tokens: Count | None = 100
    do_sample: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=100), NO_BOOL] | None = None
    top_k: TopK = None
    top_p: TopP | None = None
    repetition_penalty: Annotated[float, Field(ge=MIN_DIVISOR, le=100), NO_BOOL] | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 63), NO_BOOL] | None = None
    stop: StopStrings | None = None
    stop_sequences: Annotated[StopStrings | None, Field(description="An older name of stop.")] = None
    ignore_eos_token: bool | None = None
    return_full_text: bool | None = None
    truncate: Count | None = None
    details: bool | None = None
    decoder_input_details: bool | None = None
    top_n_tokens: Annotated[int, Field(ge=0, le=5), NO_BOOL] | None = None
    best_of: Candidates | None = None
    frequency_penalty: Penalty | None = None
    typical_p: Probability | None = None
    adapter_source: Annotated[Literal["local"] | None, Field(description="Adapters come from this installation.")] = (
        None
    )
    grammar: GrammarBody | None = None
    response_format: Annotated[ResponseFormat | None, Field(description="LoRAX's.")] = None

    @property
    def stops(self) -> tuple[str, ...]:
        return stops_of([*(self.stop or ()), *(self.stop_sequences or ())])

    @property
    def sampled(self) -> bool:
        # What leaves the most likely token alone is greedy, whatever else is said.
        if self.top_p == 0 or (self.temperature is not None and self.temperature < MIN_DIVISOR):
            return False
        if self.do_sample is not None:
            return self.do_sample
        cut = self.top_k is not None or self.top_p not in (None, 1.0) or self.typical_p not in (None, 1.0)
        return cut or self.temperature not in (None, 1.0)


class GenerateBody(Body):
    """Exactly one of `inputs` (raw text), `instruction` (with `input`, if any) and `messages`.

    The latter two are formatted with the adapter's own prompt template.
    """

    inputs: Text | None = None
    instruction: Text | None = None
    input: Text | None = None
    messages: Messages | None = None
    parameters: Parameters | None = None
    stream: bool | None = None
    options: Annotated[Any, Ignored("a request always waits, and answers are not cached")] = None

    @model_validator(mode="after")
    def _one_prompt(self) -> Self:
        given = [n for n in ("inputs", "instruction", "messages") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError("give exactly one of inputs, instruction and messages")
        if self.input is not None and self.instruction is None:
            raise ValueError("input goes with instruction")
        return self


class TokenJson(BaseModel):
    """One token. `logprob` is natural, of the model's own distribution; special tokens have empty text."""

    id: int
    text: str
    logprob: float
    special: bool
    skipped: bool


class PromptTokenJson(BaseModel):
    """One token of the prompt; the first has no log probability."""

    id: int
    text: str
    logprob: float | None


class SummaryJson(BaseModel):
    """`details` of a stream's last event: the names of text-generation-inference and of LoRAX.

    Attributes:
        seed: of a sampled answer; with it and the same prompt the text is the same.
        adapter_load_ms: how long the request waited for its adapter; null if that was in memory.
        precision: what the base's weights are held in.
    """

    finish_reason: Literal["length", "eos_token", "stop_sequence"]
    generated_tokens: int
    seed: int | None
    input_length: int
    prompt_tokens: int
    skipped_tokens: int
    model_id: str
    adapter_id: str | None
    adapter_load_ms: float | None
    precision: str


class BestOfSequenceJson(BaseModel):
    """One of `best_of` sequences that was not the best."""

    generated_text: str
    finish_reason: Literal["length", "eos_token", "stop_sequence"]
    generated_tokens: int
    seed: int | None
    prefill: list[PromptTokenJson]
    tokens: list[TokenJson]
    top_tokens: list[list[TokenJson]] = []


class DetailsJson(SummaryJson):
    """`prefill` is empty unless `decoder_input_details` asks for it.

    `top_tokens` are left out unless `top_n_tokens` asks for them, `best_of_sequences` unless `best_of` does.
    """

    prefill: list[PromptTokenJson]
    tokens: list[TokenJson]
    top_tokens: list[list[TokenJson]] = []
    best_of_sequences: list[BestOfSequenceJson] = []


class GenerateJson(BaseModel):
    """A generated text; `details` if they were asked for."""

    generated_text: str
    details: DetailsJson | None = None


class GenerateListJson(RootModel[list[GenerateJson]]):
    """The same in a list of one, as `POST /` answers."""


class TokenEventJson(BaseModel):
    """One event of a stream; `generated_text` (and `details`, if asked for) come with the last one only."""

    index: int
    token: TokenJson
    generated_text: str | None
    details: SummaryJson | None
    top_tokens: list[TokenJson] = []
