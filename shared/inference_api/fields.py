"""Bounded fields that several bodies share. Unknown keys are refused; null means unset.

What a dialect knows and this system does not do is a field that must stay unset, so that it is refused by name instead
of being ignored.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

MAX_TEXT = 262_144
MAX_NEW_TOKENS = 1 << 20
MAX_MODEL_NAME = 256
# Scores are divided by temperature and penalty in fp32: far smaller ones make them infinite.
MIN_DIVISOR = 1e-6


class Body(BaseModel):
    """A part of a request."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


def _unset(value: Any) -> Any:
    if value not in (None, False, 0, "", [], {}):
        raise ValueError("not supported by this server")
    return value


NotBuilt = Annotated[Any, AfterValidator(_unset), Field(description="Not supported; must be unset.")]
Text = Annotated[str, Field(max_length=MAX_TEXT)]
StopString = Annotated[str, Field(min_length=1, max_length=1024)]
Count = Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS)]
ModelName = Annotated[str, Field(max_length=MAX_MODEL_NAME)]


class ChatPart(Body):
    type: Literal["text"]
    text: Text


class ChatMessage(Body):
    """One message of a conversation; `developer` is OpenAI's later word for `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[ChatPart], Field(min_length=1, max_length=256)]
    name: Annotated[str, Field(max_length=64)] | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


def _awaits_an_answer(messages: list[ChatMessage]) -> list[ChatMessage]:
    if messages[-1].role == "assistant":
        raise ValueError("the last message must not be the assistant's")
    return messages


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=1024), AfterValidator(_awaits_an_answer)]
