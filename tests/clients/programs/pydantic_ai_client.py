"""pydantic-ai's OpenAI chat model: text, history, tools, and output by a tool (its default) and by a schema."""

import os
from typing import Literal

from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, RunContext, ToolOutput
from pydantic_ai.messages import ToolReturnPart
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


class Verdict(BaseModel):
    yes: bool


provider = OpenAIProvider(base_url=f"{os.environ['URL']}/v1", api_key=os.environ["KEY"])
model = OpenAIChatModel(os.environ["BASE"], provider=provider)
settings = {"max_tokens": 200, "temperature": 0.0}
agent = Agent(model, instructions="Be brief.", model_settings=settings)
first = agent.run_sync("Hello")
second = agent.run_sync("And again?", message_history=first.all_messages())
assert isinstance(second.output, str)
for form in (Verdict, ToolOutput(Verdict, strict=True), NativeOutput(Verdict)):
    structured = Agent(model, output_type=form, model_settings=settings)
    assert isinstance(structured.run_sync("Is it so?").output, Verdict), form
    with_stream = structured.run_stream_sync("Is it so?")
    assert isinstance(with_stream.get_output(), Verdict), form


def settings_of_step(context: RunContext[None]) -> dict[str, object]:
    """The first request of a run must call; what comes after may say something."""
    return settings | ({"tool_choice": "required"} if context.run_step == 1 else {})


asked_for = []
tooled = Agent(model, model_settings=settings_of_step)


@tooled.tool_plain
def weather(city: Literal["Oslo", "Rome"], days: Literal[1, 2]) -> str:
    """The weather of a city."""
    asked_for.append((city, days))
    return "4 degrees"


whole = tooled.run_sync("How is it?")
assert asked_for
assert isinstance(whole.output, str)
parts = [part for message in whole.all_messages() for part in message.parts]
assert any(isinstance(part, ToolReturnPart) for part in parts)
with_stream = tooled.run_stream_sync("How is it?")
assert "".join(with_stream.stream_text(delta=True)) == whole.output
further = tooled.run_sync("And again?", message_history=whole.all_messages())
assert further.usage.input_tokens > whole.usage.input_tokens
