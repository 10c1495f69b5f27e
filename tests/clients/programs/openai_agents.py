"""OpenAI's Agents SDK over responses, its default, and over chat completions: two turns; tools over the latter."""

import asyncio
import os
from typing import Literal

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI
from pydantic import BaseModel


class Verdict(BaseModel, extra="forbid"):
    """A form that ends: this SDK takes no answer that was cut off, and a random model would not end by itself."""

    yes: bool


set_tracing_disabled(True)
client = AsyncOpenAI(base_url=f"{os.environ['URL']}/v1", api_key=os.environ["KEY"], max_retries=0)
for kind in (OpenAIResponsesModel, OpenAIChatCompletionsModel):
    agent = Agent(
        name="Assistant",
        instructions="Be brief.",
        model=kind(model=os.environ["BASE"], openai_client=client),
        model_settings=ModelSettings(max_tokens=200, temperature=0),
        output_type=Verdict,
    )
    first = Runner.run_sync(agent, "Hello")
    second = Runner.run_sync(agent, [*first.to_input_list(), {"role": "user", "content": "And again?"}])
    assert isinstance(second.final_output, Verdict)


@function_tool
def weather(city: Literal["Oslo", "Rome"], days: Literal[1, 2]) -> str:
    """The weather of a city.

    Args:
        city: where
        days: from now on
    """
    return f"{days} degrees in {city}"


LOOP = ["tool_call_item", "tool_call_output_item", "message_output_item"]


async def loops() -> None:
    """Whole, continued, and with streams; the SDK lets the model say something once it has called."""
    # Connections belong to one event loop.
    own = AsyncOpenAI(base_url=f"{os.environ['URL']}/v1", api_key=os.environ["KEY"], max_retries=0)
    agent = Agent(
        name="Assistant",
        model=OpenAIChatCompletionsModel(model=os.environ["BASE"], openai_client=own),
        model_settings=ModelSettings(max_tokens=200, temperature=0, tool_choice="required", parallel_tool_calls=False),
        tools=[weather],
    )
    run = await Runner.run(agent, "How is it?")
    assert [item.type for item in run.new_items] == LOOP
    further = await Runner.run(agent, [*run.to_input_list(), {"role": "user", "content": "And again?"}])
    assert [item.type for item in further.new_items] == LOOP
    streamed = Runner.run_streamed(agent, "How is it?")
    assert [event.type async for event in streamed.stream_events()]
    assert [item.type for item in streamed.new_items] == LOOP
    assert streamed.new_items[0].raw_item.arguments == run.new_items[0].raw_item.arguments


asyncio.run(loops())
