"""Functions in a request to `POST /v1/responses`: flat where chat completions have them within `function`."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from shared.http.validation import named
from shared.inference_api.fields import Body, FunctionName
from shared.inference_api.ignored import Ignored, Only
from shared.inference_api.tools import MAX_TOOLS, FunctionBody

Mode = Literal["none", "auto", "required"]


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
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": {**function, "strict": self.strict}}

    @property
    def told(self) -> dict[str, Any]:
        """As a response says what was offered."""
        given = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", **given, "strict": bool(self.strict)}


class ChosenFunction(_Typed):
    """The one function that must be called."""

    name: FunctionName


class AllowedTools(Body):
    """Some of the tools, of which one may be called or must be."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[ChosenFunction], Field(min_length=1, max_length=MAX_TOOLS)]


ToolChoice = Mode | ChosenFunction | AllowedTools


def offered(tools: list[ResponseTool] | None, choice: ToolChoice | None) -> tuple[list[dict[str, Any]], Any]:
    """The tools and the choice of a chat completion that offers the same; those not allowed are not offered.

    Raises:
        PydanticCustomError: two functions have one name, or the choice is of what is not there.
    """
    names = [tool.name for tool in tools or []]
    if len(set(names)) < len(names):
        raise PydanticCustomError("same_name", "two functions have one name", named("tools"))
    if choice not in (None, "none", "auto") and not names:
        raise PydanticCustomError("no_tools", "there are no tools to choose from", named("tool_choice"))
    if choice is None or isinstance(choice, str):
        return [tool.as_chat for tool in tools or []], choice
    chosen = [each.name for each in choice.tools] if isinstance(choice, AllowedTools) else [choice.name]
    if not set(chosen) <= set(names):
        raise PydanticCustomError("no_such_tool", "there is no such function in tools", named("tool_choice"))
    if isinstance(choice, AllowedTools):
        return [tool.as_chat for tool in tools or [] if tool.name in chosen], choice.mode
    return [tool.as_chat for tool in tools or []], {"type": "function", "function": {"name": choice.name}}
