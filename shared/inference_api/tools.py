"""Functions that a model may call, and calls of them: OpenAI's `tools`, `tool_choice` and `tool_calls`."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from shared.inference_api.fields import Body, FunctionName
from shared.inference_api.ignored import Ignored

MAX_TOOLS = 128


class FunctionBody(Body):
    """A function.

    Attributes:
        parameters: a JSON schema of its arguments; none if unset.
        strict: every keyword of the schema is followed, or the request is refused.
    """

    name: FunctionName
    description: Annotated[str, Field(max_length=16_384)] | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolBody(Body):
    """A tool; functions are all there is."""

    type: Literal["function"]
    function: FunctionBody
    cache_control: Annotated[Any, Ignored("prompts are not cached by mark")] = None

    @property
    def written(self) -> dict[str, Any]:
        """As templates take it."""
        function = self.function
        parameters = function.parameters or {"type": "object", "properties": {}}
        written = {"name": function.name, "description": function.description or "", "parameters": parameters}
        return {"type": "function", "function": written}


class NamedFunction(Body):
    """The function of a choice."""

    name: FunctionName


class NamedTool(Body):
    """The one function that must be called; huggingface_hub's own class has no `type`."""

    type: Literal["function"] = "function"
    function: NamedFunction


class SomeTools(Body):
    """Functions of which one may be called or must be."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS)]


class AllowedTools(Body):
    """A choice among some; the others are not offered."""

    type: Literal["allowed_tools"]
    allowed_tools: SomeTools

    @property
    def names(self) -> set[str]:
        return {tool.function.name for tool in self.allowed_tools.tools}


Tools = Annotated[list[ToolBody], Field(max_length=MAX_TOOLS)]
# A bare name is text-generation-inference's form.
ToolChoice = Literal["none", "auto", "required"] | NamedTool | AllowedTools | FunctionName


class CalledFunctionJson(BaseModel):
    """A function's name, and its arguments as JSON."""

    name: str
    arguments: str


class ToolCallJson(BaseModel):
    """A call that the answer asks for."""

    id: str
    type: Literal["function"]
    function: CalledFunctionJson


class CalledFunctionDeltaJson(BaseModel):
    """What a chunk adds: the name comes whole, with the first one of a call."""

    name: str | None = None
    arguments: str


class ToolCallDeltaJson(BaseModel):
    """What a chunk adds to the call of this index; `id` and `type` come with the first one."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunctionDeltaJson
