"""What a request says to the chat template: variables, how much to think, and whether its last message is continued."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from shared.http.validation import named
from shared.inference_api.fields import Body, ChatMessage

Scalar = Annotated[str, Field(max_length=4096)] | bool | int | float | None
VariableName = Annotated[str, Field(max_length=64, pattern="^[A-Za-z_][A-Za-z0-9_]*$")]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class PromptingFields(Body):
    """Fields of vLLM's and OpenAI's chat completions.

    Attributes:
        chat_template_kwargs: scalars for the template, which gets those that it names.
        continue_final_message: unset, an assistant's last message is continued.
        add_generation_prompt: true begins another answer after an assistant's last message.
        reasoning_effort: goes to the template's switch for it, or for thinking at all, if it has one.
    """

    chat_template_kwargs: Annotated[dict[VariableName, Scalar], Field(max_length=32)] | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    reasoning_effort: Effort | None = None

    @property
    def variables(self) -> dict[str, Any]:
        return {name: value for name, value in (self.chat_template_kwargs or {}).items() if value is not None}

    @property
    def continues(self) -> bool:
        """Whether an assistant's last message is to be continued."""
        return not self.add_generation_prompt if self.continue_final_message is None else self.continue_final_message

    @model_validator(mode="after")
    def _one_continuation(self) -> Self:
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message and add_generation_prompt exclude one another")
        messages: list[ChatMessage] = getattr(self, "messages", [])
        if messages and messages[-1].role == "assistant":
            return self
        for field, value in (("continue_final_message", True), ("add_generation_prompt", False)):
            if getattr(self, field) is value:
                refusal = "the last message is not the assistant's, so there is nothing to continue"
                raise PydanticCustomError("not_built", "{refusal}", {"refusal": refusal, **named(field)})
        return self
