"""OpenAI's dialect: bodies and answers of chat completions and completions.

In what the gateway's clients send `model` is any name of a model; in what the gateway sends it is a base's or an
adapter's id, or empty for the base that is served.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, model_validator
from pydantic_core import PydanticCustomError

from shared.http.validation import named
from shared.inference_api.fields import (
    MAX_NEW_TOKENS,
    MAX_PROMPTS,
    MAX_SEQUENCES,
    MIN_DIVISOR,
    NO_BOOL,
    Body,
    Candidates,
    Count,
    LogitBias,
    Messages,
    ModelName,
    NotBuilt,
    Penalty,
    Probability,
    StopString,
    StopStrings,
    Text,
    TokenIds,
    TopK,
    TopP,
    stops_of,
)
from shared.inference_api.ignored import Ignored, Only
from shared.inference_api.other_servers import (
    LlamaCppFields,
    OllamaFields,
    OpenAIFields,
    VllmChatFields,
    VllmCompletionFields,
)
from shared.inference_api.prompting import PromptingFields
from shared.inference_api.structured import ResponseFormat
from shared.inference_api.tools import (
    AllowedTools,
    NamedTool,
    ToolBody,
    ToolCallDeltaJson,
    ToolCallJson,
    ToolChoice,
    Tools,
)

CHAT_COMPLETIONS, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
# What clients send as `model` when they mean whatever the server has (huggingface_hub, text-generation-inference).
NO_MODEL_IN_PARTICULAR = frozenset({"", "dummy", "tgi"})


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: Annotated[Any, Ignored("nothing is added to chunks")] = None
    continuous_usage_stats: Annotated[Any, Ignored("the usage comes once, at the end")] = None


class _OpenAIBody(OpenAIFields, LlamaCppFields, OllamaFields):
    """What OpenAI's two generation routes share.

    `top_k`, `min_p`, `typical_p`, `repetition_penalty` and `ignore_eos` are not OpenAI's; vLLM and llama.cpp have them.

    Attributes:
        n: so many choices for each prompt, each with a seed of its own, which follows from `seed`.
        frequency_penalty, presence_penalty: of what has been generated, not of the prompt.
    """

    model: ModelName | None = None
    temperature: Annotated[float, Field(ge=0, le=2), NO_BOOL] | None = None
    top_p: TopP | None = None
    top_k: TopK = None
    repetition_penalty: Annotated[float, Field(ge=MIN_DIVISOR, le=100), NO_BOOL] | None = None
    repeat_penalty: Annotated[
        Annotated[float, Field(ge=MIN_DIVISOR, le=100), NO_BOOL] | None,
        Field(description="llama.cpp's word for repetition_penalty."),
    ] = None
    ignore_eos: bool | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63), NO_BOOL] | None = None
    stop: StopString | StopStrings | None = None
    include_stop_str_in_output: bool | None = None
    max_tokens: Count | None = None
    truncate_prompt_tokens: Annotated[
        Count | None, Field(description="Keep only so many of the prompt's last tokens.")
    ] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Candidates | None = None
    min_p: Annotated[float, Field(ge=0, le=1), NO_BOOL] | None = None
    typical_p: Probability | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: LogitBias | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return stops_of(self.stop)

    @property
    def includes_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @model_validator(mode="after")
    def _one_penalty(self) -> Self:
        if self.repeat_penalty is not None:
            if self.repetition_penalty not in (None, self.repeat_penalty):
                raise ValueError("repeat_penalty and repetition_penalty are two names for one thing")
            self.repetition_penalty = self.repeat_penalty
        if self.repetition_penalty not in (None, 1.0) and self.repeat_last_n not in (None, -1):
            refusal = "a repetition penalty counts the whole text here; leave it out, or send -1"
            raise PydanticCustomError("not_built", "{refusal}", {"refusal": refusal, **named("repeat_last_n")})
        return self


class ChatCompletionBody(_OpenAIBody, VllmChatFields, PromptingFields):
    """`max_tokens` unset: up to 512 new tokens, as far as the context goes."""

    messages: Messages
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20), NO_BOOL] | None = None
    response_format: ResponseFormat | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    tool_prompt: Annotated[Any, Ignored("it counts with tools only")] = None
    parallel_tool_calls: bool | None = None
    functions: NotBuilt = None
    function_call: Annotated[Any, Only("none", "auto")] = None

    @property
    def chosen_function(self) -> str | None:
        """The one function that must be called, if it is named."""
        if isinstance(self.tool_choice, NamedTool):
            return self.tool_choice.function.name
        if isinstance(self.tool_choice, AllowedTools) or self.tool_choice in (None, "none", "auto", "required"):
            return None
        return self.tool_choice

    @property
    def must_call(self) -> bool:
        """Whether a call must come, of whichever function."""
        if isinstance(self.tool_choice, AllowedTools):
            return self.tool_choice.allowed_tools.mode == "required"
        return self.tool_choice == "required"

    @property
    def offered_tools(self) -> list[ToolBody]:
        """The tools that may be called."""
        tools = self.tools or []
        if isinstance(self.tool_choice, AllowedTools):
            return [tool for tool in tools if tool.function.name in self.tool_choice.names]
        return [] if self.tool_choice == "none" else tools

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens are two names for one thing")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs")
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise PydanticCustomError("no_tools", "there are no tools to choose from", named("tool_choice"))
        names = [tool.function.name for tool in self.tools or []]
        if len(set(names)) < len(names):
            raise PydanticCustomError("same_name", "two functions have one name", named("tools"))
        chosen = {self.chosen_function} - {None}
        if isinstance(self.tool_choice, AllowedTools):
            chosen = {*self.tool_choice.names}
        if not chosen <= set(names):
            raise PydanticCustomError("no_such_tool", "there is no such function in tools", named("tool_choice"))
        return self


class CompletionBody(_OpenAIBody, VllmCompletionFields):
    """`prompt` is a text, as it stands, or its token ids, or several of either.

    Attributes:
        max_tokens: 16 if unset, as OpenAI's; 0 only reads the prompt.
        best_of: so many are generated for each prompt, and the `n` likeliest of them are returned, by the mean log
            probability of their tokens.
        echo: the text begins with the prompt, and `logprobs` with those of the prompt's tokens.
    """

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    max_tokens: Annotated[int, Field(ge=0, le=MAX_NEW_TOKENS), NO_BOOL] | None = None
    logprobs: Annotated[int, Field(ge=0, le=5), NO_BOOL] | None = None
    best_of: Candidates | None = None
    echo: bool | None = None
    suffix: NotBuilt = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one by one."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        texts = [each for each in self.prompt if not isinstance(each, int)]
        return list(texts) if texts else [[each for each in self.prompt if isinstance(each, int)]]

    @property
    def candidates(self) -> int:
        """How many sequences are generated for each prompt."""
        return self.best_of or self.n or 1

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise ValueError("best_of must not be less than n")
        if self.stream and self.candidates > (self.n or 1):
            raise ValueError("best_of cannot be streamed: the best is known at the end")
        if len(self.prompts) * self.candidates > MAX_SEQUENCES:
            raise ValueError(f"at most {MAX_SEQUENCES} sequences, prompts times n or best_of, are generated at once")
        return self


FinishReason = Literal["stop", "length", "tool_calls"]


class UsageJson(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TopLogprobJson(BaseModel):
    """A token that could have been chosen; `logprob` is natural, of the model's own distribution.

    The `bytes` of an answer's tokens, joined, are its text in UTF-8; control tokens have none.
    """

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprobJson(TopLogprobJson):
    top_logprobs: list[TopLogprobJson]


class ChatLogprobsJson(BaseModel):
    content: list[ChatLogprobJson]
    refusal: None


class CompletionLogprobsJson(BaseModel):
    """`text_offset` is where in `text` a token begins; what is no UTF-8 alone is written as `bytes:\\xf0\\x9f`.

    The first token of a prompt has no log probability.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class AssistantMessageJson(BaseModel):
    """`content` is null where there are calls and nothing beside them."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCallJson] | None = None


class DeltaJson(BaseModel):
    """What a chunk adds; `role` comes with the first one."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallDeltaJson] | None = None


class ChatChoiceJson(BaseModel):
    index: int
    finish_reason: FinishReason
    logprobs: ChatLogprobsJson | None
    message: AssistantMessageJson


class ChatChunkChoiceJson(BaseModel):
    index: int
    finish_reason: FinishReason | None
    logprobs: ChatLogprobsJson | None
    delta: DeltaJson


class CompletionChoiceJson(BaseModel):
    """`finish_reason` is null in all chunks of a stream but the last."""

    index: int
    finish_reason: FinishReason | None
    logprobs: CompletionLogprobsJson | None
    text: str


class _AnswerJson(BaseModel):
    """`model` is what the client called it; `system_fingerprint` names the base's revision and precision."""

    id: str
    created: int
    model: str
    system_fingerprint: str


class ChatCompletionJson(_AnswerJson):
    object: Literal["chat.completion"]
    choices: list[ChatChoiceJson]
    usage: UsageJson


class ChatCompletionChunkJson(_AnswerJson):
    """One event of a stream. With `include_usage` a last one has no choices, and `usage`."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoiceJson]
    usage: UsageJson | None = None


class CompletionJson(_AnswerJson):
    """A whole completion, with `usage`; or one event of a stream, as with chat completions."""

    object: Literal["text_completion"]
    choices: list[CompletionChoiceJson]
    usage: UsageJson | None = None
