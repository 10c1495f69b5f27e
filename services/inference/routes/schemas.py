"""Request bodies of the generate and chat routes: every number bounded, unknown keys refused, nulls taken as unset.

What the dialects know and this engine does not do is listed here too, as a field that must stay unset, so that it is
refused by name instead of being ignored.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from shared.datasets.examples import Message
from shared.errors import InvalidRequest

MAX_TEXT = 262_144
MAX_NEW_TOKENS = 1 << 20
# Scores are divided by temperature and penalty in fp32: far smaller ones make them infinite.
MIN_DIVISOR = 1e-6


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


def _unset(value: Any) -> Any:
    if value not in (None, False, 0, "", [], {}):
        raise ValueError("not supported by this server")
    return value


NotBuilt = Annotated[Any, AfterValidator(_unset), Field(description="Not supported; must be unset.")]
Text = Annotated[str, Field(max_length=MAX_TEXT)]
StopString = Annotated[str, Field(min_length=1, max_length=1024)]
Count = Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS)]


class ChatPart(Body):
    type: Literal["text"]
    text: Text


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[ChatPart], Field(min_length=1, max_length=256)]
    name: Annotated[str, Field(max_length=64)] | None = None

    def plain(self) -> Message:
        """The message as templates know it; `developer` is OpenAI's later word for `system`."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message("system" if self.role == "developer" else self.role, content)


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=1024)]


class Parameters(Body):
    """text-generation-inference's parameters, with LoRAX's.

    Attributes:
        do_sample: false is greedy. Unset is greedy too, unless temperature, top_k or top_p ask for something else.
        truncate: keep only so many of the prompt's last tokens.
        details: add what was generated token by token.
        decoder_input_details: add the prompt's tokens with their log probabilities.
    """

    adapter_id: Annotated[str, Field(max_length=128)] | None = None
    max_new_tokens: Count | None = 100
    do_sample: bool | None = None
    temperature: Annotated[float, Field(ge=MIN_DIVISOR, le=100)] | None = None
    top_k: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=MIN_DIVISOR, le=100)] | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] | None = None
    stop: Annotated[list[StopString], Field(max_length=4)] | None = None
    ignore_eos_token: bool | None = None
    return_full_text: bool | None = None
    truncate: Count | None = None
    details: bool | None = None
    decoder_input_details: bool | None = None
    top_n_tokens: Annotated[int, Field(ge=0, le=5)] | None = None
    best_of: Annotated[int, Field(ge=1, le=1, description="Only 1 is supported.")] | None = None
    adapter_source: Annotated[Literal["local"], Field(description="Adapters come from this installation.")] | None = (
        None
    )
    frequency_penalty: NotBuilt = None
    typical_p: NotBuilt = None
    watermark: NotBuilt = None
    grammar: NotBuilt = None
    response_format: NotBuilt = None
    merged_adapters: NotBuilt = None
    return_k_alternatives: NotBuilt = None
    api_token: NotBuilt = None

    @property
    def sampled(self) -> bool:
        if self.do_sample is not None:
            return self.do_sample
        return self.temperature not in (None, 1.0) or self.top_k is not None or self.top_p not in (None, 1.0)


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

    @model_validator(mode="after")
    def _one_prompt(self) -> Self:
        given = [n for n in ("inputs", "instruction", "messages") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError("give exactly one of inputs, instruction and messages")
        if self.input is not None and self.instruction is None:
            raise ValueError("input goes with instruction")
        if self.inputs == "":
            raise ValueError("inputs must not be empty")
        return self


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class _OpenAIBody(Body):
    """What OpenAI's two generation routes share; ours are `top_k`, `repetition_penalty` and `ignore_eos`."""

    model: Annotated[str, Field(max_length=256)] = ""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    repetition_penalty: Annotated[float, Field(ge=MIN_DIVISOR, le=100)] | None = None
    ignore_eos: bool | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=4)] | None = None
    max_tokens: Count | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=1, description="Only 1 is supported.")] | None = None
    user: Annotated[str, Field(max_length=512)] | None = None
    frequency_penalty: NotBuilt = None
    presence_penalty: NotBuilt = None
    logit_bias: NotBuilt = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class TextFormat(Body):
    type: Literal["text"]


class ChatCompletionBody(_OpenAIBody):
    """`max_tokens` unset: up to 512 new tokens, as far as the context goes."""

    messages: Messages
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: TextFormat | None = None
    metadata: Annotated[dict[str, Any], Field(max_length=16)] | None = None
    store: NotBuilt = None
    tools: NotBuilt = None
    tool_choice: NotBuilt = None
    tool_prompt: NotBuilt = None
    functions: NotBuilt = None
    function_call: NotBuilt = None
    parallel_tool_calls: NotBuilt = None
    modalities: NotBuilt = None
    audio: NotBuilt = None
    reasoning_effort: NotBuilt = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens are two names for one thing")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs")
        return self


TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=1 << 31)]], Field(min_length=1, max_length=MAX_TEXT)]


class CompletionBody(_OpenAIBody):
    """`prompt` is one text, as it stands, or its token ids; `max_tokens` is 16 if unset, as OpenAI's."""

    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=1)] | TokenIds
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    echo: NotBuilt = None
    suffix: NotBuilt = None


def plain(messages: list[ChatMessage]) -> list[Message]:
    """The messages as templates know them.

    Raises:
        InvalidRequest: the last one is the assistant's: there is nothing to answer.
    """
    if messages[-1].role == "assistant":
        raise InvalidRequest("the last message must not be the assistant's", param="messages")
    return [message.plain() for message in messages]
