"""Bounded fields that several bodies share. Null and empty values are unsaid, known fields or not.

A field that is not known is refused if it says something. What a dialect knows and this system does not do is a field
too, so that it is refused by name (`Only`) or named in a header (`Ignored`) instead of being passed over.
"""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from shared.http.validation import UNKNOWN_FIELD, named
from shared.inference_api.ignored import UNSAID, Ignored, Only

MAX_TEXT = 262_144
MAX_NEW_TOKENS = 1 << 31
MAX_MODEL_NAME = 256
MAX_STOP_STRINGS = 256
# Scores are divided by temperature and penalty in fp32: far smaller ones make them infinite.
MIN_DIVISOR = 1e-6


def _closed(schema: dict[str, Any]) -> None:
    schema["additionalProperties"] = {"enum": list(UNSAID)}


class Body(BaseModel):
    """A part of a request."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False, json_schema_extra=_closed)

    @model_validator(mode="after")
    def _known_fields_only(self) -> Self:
        if self.__pydantic_extra__:
            for name, value in self.__pydantic_extra__.items():
                if value not in UNSAID:
                    raise PydanticCustomError(UNKNOWN_FIELD, "unknown field", named(name))
            self.__pydantic_fields_set__.difference_update(self.__pydantic_extra__)
            self.__pydantic_extra__.clear()
        return self


def _no_bool(value: Any) -> Any:
    """Pydantic would take true for 1."""
    if isinstance(value, bool):
        raise PydanticCustomError("number", "Input should be a number")
    return value


def _no_bools(values: Any) -> Any:
    # By types: a prompt has up to a quarter of a million ids.
    if isinstance(values, list) and bool in set(map(type, values)):
        raise PydanticCustomError("number", "Input should be a list of numbers")
    return values


# Marks a number, behind its bounds: before them pydantic would no longer write those into the document.
NO_BOOL, NO_BOOLS = BeforeValidator(_no_bool), BeforeValidator(_no_bools)
NotBuilt = Annotated[Any, Only()]
Text = Annotated[str, Field(max_length=MAX_TEXT)]
# Empty ones stop nothing.
StopString = Annotated[str, Field(max_length=1024)]
StopStrings = Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)]
Count = Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS), NO_BOOL]
# 0 and -1 are other servers' words for every token, as null is.
TopK = Annotated[int | None, Field(ge=-1, le=1 << 20), AfterValidator(lambda k: k if k and k > 0 else None), NO_BOOL]
# 0 leaves the most likely token alone.
TopP = Annotated[float, Field(ge=0, le=1), NO_BOOL]
FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
TokenIds = Annotated[
    list[Annotated[int, Field(ge=0, lt=1 << 31)]],
    Field(min_length=1, max_length=MAX_TEXT),
    NO_BOOLS,
]
ModelName = Annotated[str, Field(max_length=MAX_MODEL_NAME)]
# Sequences that one prompt may become, and one request altogether: each takes a row of the engine.
MAX_CANDIDATES, MAX_PROMPTS, MAX_SEQUENCES = 16, 64, 128
Candidates = Annotated[int, Field(ge=1, le=MAX_CANDIDATES), NO_BOOL]
Penalty = Annotated[float, Field(ge=-2, le=2), NO_BOOL]
Probability = Annotated[float, Field(gt=0, le=1), NO_BOOL]
LogitBias = Annotated[
    dict[Annotated[int, Field(ge=0, lt=1 << 31)], Annotated[float, Field(ge=-100, le=100), NO_BOOL]],
    Field(max_length=300),
]


def stops_of(stop: str | list[str] | None) -> tuple[str, ...]:
    """The stop strings that stop something, each once."""
    given = [stop] if isinstance(stop, str) else stop or []
    return tuple(dict.fromkeys(each for each in given if each))


_OTHER_PARTS = frozenset({"image_url", "input_audio", "audio_url", "video_url", "file", "image", "input_image"})


def _text_part(kind: Any) -> Any:
    if isinstance(kind, str) and kind in _OTHER_PARTS:
        raise PydanticCustomError("not_built", "{refusal}", {"refusal": f"'{kind}' parts are not supported; send text"})
    return kind


class ChatPart(Body):
    """A part of a message's content; a refusal is text that the model wrote in place of an answer."""

    type: Annotated[Literal["text", "refusal"], BeforeValidator(_text_part)]
    text: Text | None = None
    refusal: Text | None = None
    annotations: Annotated[Any, Ignored("sources of a text are not part of it")] = None
    cache_control: Annotated[Any, Ignored("prompts are not cached by mark")] = None
    prompt_cache_breakpoint: Annotated[Any, Ignored("prompts are not cached by mark")] = None

    @model_validator(mode="after")
    def _says_its_text(self) -> Self:
        if getattr(self, self.type) is None:
            raise PydanticCustomError("missing", "Field required", named(self.type))
        return self


def _an_object(arguments: str) -> str:
    try:
        if isinstance(json.loads(arguments or "{}"), dict):
            return arguments
    except (ValueError, RecursionError):
        pass
    raise ValueError("the arguments must be a JSON object, as text")


Arguments = Annotated[Text, AfterValidator(_an_object)]


class CalledFunction(Body):
    """A call as it comes back in history.

    Attributes:
        arguments: a JSON object, as text.
    """

    name: FunctionName
    arguments: Arguments
    parsed_arguments: Annotated[Any, Ignored("it says again what arguments says")] = None


class ToolCallBody(Body):
    """A call that the assistant made."""

    id: Annotated[str, Field(max_length=128)] | None = None
    type: Literal["function"] | None = None
    function: CalledFunction
    index: Annotated[Any, Ignored("calls come in their order")] = None


class ChatMessage(Body):
    """One message of a conversation; `developer` is OpenAI's later word for `system`.

    Answers come back as history with everything that the API, an SDK or a front end has put into them.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[ChatPart], Field(max_length=256)] | None = None
    refusal: Annotated[Text | None, Field(description="The assistant's words if it has no content.")] = None
    tool_calls: Annotated[list[ToolCallBody], Field(max_length=128)] | None = None
    function_call: NotBuilt = None
    tool_call_id: Annotated[str, Field(max_length=128)] | None = None
    parsed: Annotated[Any, Ignored("it says again what content says")] = None
    audio: NotBuilt = None
    prefix: Annotated[Any, Ignored("an assistant's last message is continued")] = None
    name: Annotated[Any, Ignored("prompts have no names of speakers")] = None
    annotations: Annotated[Any, Ignored("sources of an answer are not part of its text")] = None
    reasoning: Annotated[Any, Ignored("earlier thoughts are left out of prompts")] = None
    reasoning_content: Annotated[Any, Ignored("earlier thoughts are left out of prompts")] = None
    reasoning_details: Annotated[Any, Ignored("earlier thoughts are left out of prompts")] = None
    thinking: Annotated[Any, Ignored("earlier thoughts are left out of prompts")] = None
    thinking_blocks: Annotated[Any, Ignored("earlier thoughts are left out of prompts")] = None
    weight: Annotated[Any, Ignored("a weight is for training")] = None
    cache_control: Annotated[Any, Ignored("prompts are not cached by mark")] = None
    id: Annotated[Any, Ignored("front ends number their messages")] = None
    opts: Annotated[Any, Ignored("front ends keep their settings there")] = None
    metadata: Annotated[Any, Ignored("front ends keep their notes there")] = None
    provider_specific_fields: Annotated[Any, Ignored("SDKs keep their notes there")] = None
    model: Annotated[Any, Ignored("who wrote an answer does not change it")] = None
    created: Annotated[Any, Ignored("a date is not part of the text")] = None
    created_at: Annotated[Any, Ignored("a date is not part of the text")] = None
    createdAt: Annotated[Any, Ignored("a date is not part of the text")] = None
    timestamp: Annotated[Any, Ignored("a date is not part of the text")] = None

    @property
    def text(self) -> str:
        """Content, or the refusal that stands in its place; empty if an assistant said neither."""
        if isinstance(self.content, str):
            return self.content or self.refusal or ""
        return "".join(part.text or part.refusal or "" for part in self.content or []) or self.refusal or ""

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.tool_calls and self.role != "assistant":
            raise PydanticCustomError("calls", "only the assistant calls functions", named("tool_calls"))
        if self.role not in ("assistant", "tool") and self.content in (None, []):
            raise PydanticCustomError("missing", "a text or a list of text parts is required", named("content"))
        return self


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=1024)]
