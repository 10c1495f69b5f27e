"""What a client may write into `POST /v1/responses`: OpenAI's Responses API, as far as it is text and functions."""

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from services.gateway.responses.tool_schema import ResponseTool, ToolChoice
from shared.http.validation import named
from shared.inference_api.fields import NO_BOOL, Arguments, Body, Count, FunctionName, ModelName, Text, TopP
from shared.inference_api.ignored import Ignored, Only
from shared.inference_api.prompting import Effort
from shared.inference_api.structured import JsonSchemaFormat
from shared.inference_api.tools import MAX_TOOLS

ItemId = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
CallId = Annotated[str, Field(min_length=1, max_length=128)]
ItemType = Literal["message", "item_reference", "reasoning", "function_call", "function_call_output"]
_ITEMS = frozenset(get_args(ItemType))
# What an item of a type must have; a reference its id.
_NEEDED = {
    "message": ("role", "content"),
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
}
_PARTS = frozenset({"input_text", "output_text", "text", "refusal"})
_ACCOUNT = Ignored("it concerns the client's account and does not change the answer")
_CACHE = Ignored("prompts are not cached by name")
_NO_THOUGHTS = Ignored("thoughts are not told apart from the answer")
_KNOWN_OF_ANSWERS = Ignored("it says how an earlier answer came about")


def _item(kind: Any) -> Any:
    if isinstance(kind, str) and kind not in _ITEMS:
        raise PydanticCustomError(
            "not_built", "items of this type are not supported by this server; send messages and calls of functions"
        )
    return kind


def _part(kind: Any) -> Any:
    if isinstance(kind, str) and kind not in _PARTS:
        raise PydanticCustomError("not_built", "parts of this type are not supported by this server; send text")
    return kind


class InputPart(Body):
    """A part of a message's content."""

    type: Annotated[Literal["input_text", "output_text", "text", "refusal"], BeforeValidator(_part)]
    text: Text | None = None
    refusal: Text | None = None
    annotations: Annotated[Any, Ignored("sources of a text are not part of it")] = None
    logprobs: Annotated[Any, _KNOWN_OF_ANSWERS] = None
    prompt_cache_breakpoint: Annotated[Any, _CACHE] = None

    @model_validator(mode="after")
    def _says_its_text(self) -> Self:
        name = "refusal" if self.type == "refusal" else "text"
        if getattr(self, name) is None:
            raise PydanticCustomError("missing", "Field required", named(name))
        return self


Parts = Annotated[list[InputPart], Field(max_length=256)]


class InputItem(Body):
    """A message, a call of a function, what it gave, or the id of an item that an earlier response has written.

    Earlier reasoning is passed over.

    Attributes:
        arguments: a JSON object, as text.
        output: what the function gave, as text.
    """

    type: Annotated[ItemType | None, BeforeValidator(_item)] = None
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: Text | Parts | None = None
    id: ItemId | None = None
    call_id: CallId | None = None
    name: FunctionName | None = None
    arguments: Arguments | None = None
    output: Text | Parts | None = None
    status: Annotated[Any, _KNOWN_OF_ANSWERS] = None
    phase: Annotated[Any, _KNOWN_OF_ANSWERS] = None
    summary: Annotated[Any, _KNOWN_OF_ANSWERS] = None
    encrypted_content: Annotated[Any, _KNOWN_OF_ANSWERS] = None
    parsed_arguments: Annotated[Any, Ignored("it says again what arguments says")] = None
    created_by: Annotated[Any, _KNOWN_OF_ANSWERS] = None
    caller: Annotated[Any, _KNOWN_OF_ANSWERS] = None
    namespace: Annotated[Any, Only()] = None
    async_: Annotated[Any, Field(alias="async"), Only(False)] = None

    @property
    def kind(self) -> ItemType:
        """The type, also of an item that leaves it to be seen by its fields."""
        return self.type or ("message" if self.role else "item_reference")

    @property
    def text(self) -> str:
        """Content, or the output of a function."""
        said = self.output if self.kind == "function_call_output" else self.content
        if isinstance(said, str):
            return said
        return "".join(part.text or part.refusal or "" for part in said or [])

    @model_validator(mode="after")
    def _whole(self) -> Self:
        needed = ("id",) if self.kind == "item_reference" else _NEEDED.get(self.kind, ())
        for name in needed:
            if getattr(self, name) is None:
                raise PydanticCustomError("missing", "Field required", named(name))
        return self


class TextFormat(JsonSchemaFormat):
    """`text`, `json_object`, or `json_schema` with its schema beside it."""

    type: Literal["text", "json_object", "json_schema"]


class ReasoningConfig(Body):
    """How much to think, for templates that have a switch for it; thoughts are not told apart from the answer."""

    effort: Effort | None = None
    summary: Annotated[Any, _NO_THOUGHTS] = None
    generate_summary: Annotated[Any, _NO_THOUGHTS] = None
    context: Annotated[Any, _NO_THOUGHTS] = None
    mode: Annotated[Any, _NO_THOUGHTS] = None


class TextConfig(Body):
    model_config = ConfigDict(serialize_by_alias=True)

    format: TextFormat | None = None
    verbosity: Annotated[Any, Ignored("no model here was trained with it")] = None


def _needs_a_request(items: list[InputItem]) -> list[InputItem]:
    if all(item.type == "reasoning" for item in items):
        raise ValueError("there is no message to answer")
    return items


class ResponseBody(Body):
    """The body of a response's creation; `store` unset keeps it for a time, as OpenAI does."""

    input: Text | Annotated[list[InputItem], Field(min_length=1, max_length=1024), AfterValidator(_needs_a_request)]
    model: ModelName | None = None
    instructions: Text | None = None
    previous_response_id: ItemId | None = None
    store: bool | None = None
    stream: bool | None = None
    max_output_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2), NO_BOOL] | None = None
    top_p: TopP | None = None
    text: TextConfig | None = None
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
        ]
        | None
    ) = None
    tools: Annotated[list[ResponseTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: Annotated[Any, Ignored("it counts calls of tools that a server runs itself")] = None
    truncation: Annotated[Any, Only("disabled")] = None
    top_logprobs: Annotated[Any, Only(0, instead="use /v1/chat/completions")] = None
    background: Annotated[Any, Only(False)] = None
    background_options: Annotated[Any, Only()] = None
    conversation: Annotated[Any, Only(instead="use previous_response_id")] = None
    context_management: Annotated[Any, Only()] = None
    prompt: Annotated[Any, Only(instead="send its text as instructions")] = None
    image: Annotated[Any, Only()] = None
    moderation: Annotated[Any, Only()] = None
    access_programs: Annotated[Any, _ACCOUNT] = None
    include: Annotated[Any, Ignored("there is nothing more to include")] = None
    reasoning: ReasoningConfig | None = None
    stream_options: Annotated[Any, Ignored("nothing is added to events")] = None
    service_tier: Annotated[Any, Ignored("there is one tier")] = None
    user: Annotated[Any, _ACCOUNT] = None
    safety_identifier: Annotated[Any, _ACCOUNT] = None
    prompt_cache_key: Annotated[Any, _CACHE] = None
    prompt_cache_retention: Annotated[Any, _CACHE] = None
    prompt_cache_options: Annotated[Any, _CACHE] = None
