"""Functions in a request to `POST /v1/responses`: flat where chat completions have them within `function`."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from shared.http.validation import named
from shared.inference_api.fields import Body, FunctionName
from shared.inference_api.ignored import Ignored, Only
from shared.inference_api.tools import MAX_TOOLS, FunctionBody


class _Typed(Body):
    """Tools that OpenAI runs itself, or that are no functions, are refused by their type, whatever else they have."""

    type: Literal["function"]

    @model_validator(mode="before")
    @classmethod
    def _is_a_function(cls, given: Any) -> Any:
        if isinstance(given, dict) and isinstance(given.get("type"), str) and given["type"] != "function":
            refusal = "tools of this type are not supported by this server; offer functions"
            raise PydanticCustomError("not_built", "{refusal}", {"refusal": refusal, **named("type")})
        return given


class ResponseTool(_Typed, FunctionBody):
    """A function that the model may call."""

    output_schema: Annotated[Any, Ignored("what a function gives is taken as it is")] = None
    allowed_callers: Annotated[Any, Only(["direct"])] = None
    defer_loading: Annotated[Any, Only(False)] = None
    async_: Annotated[Any, Field(alias="async"), Only(False)] = None

    @property
    def as_chat(self) -> dict[str, Any]:
        return {"type": "function", "function": self._function | {"strict": self.strict}}

    @property
    def as_offered(self) -> dict[str, Any]:
        """As a response says what was offered."""
        return {"type": "function", **self._function, "strict": bool(self.strict)}

    @property
    def _function(self) -> dict[str, Any]:
        return {"name": self.name, "description": self.description, "parameters": self.parameters}


class ChosenFunction(_Typed):
    """The one function that must be called."""

    name: FunctionName

    @property
    def as_chat(self) -> dict[str, Any]:
        return {"type": "function", "function": {"name": self.name}}


class AllowedFunctions(Body):
    """Some of the tools, of which one may be called or must be; the others are not offered."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[ChosenFunction], Field(min_length=1, max_length=MAX_TOOLS)]

    @property
    def as_chat(self) -> dict[str, Any]:
        allowed = {"mode": self.mode, "tools": [tool.as_chat for tool in self.tools]}
        return {"type": "allowed_tools", "allowed_tools": allowed}


ToolChoice = Literal["none", "auto", "required"] | ChosenFunction | AllowedFunctions
