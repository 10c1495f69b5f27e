"""OpenAI's Agents SDK over responses, its default, and over chat completions: two turns, and tools."""

import asyncio
import os
from typing import Literal

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    RunHooks,
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


class CallThenAnswer(RunHooks):
    """A random model would go on calling, or say something without end."""

    async def on_agent_start(self, context: object, agent: Agent) -> None:
        agent.model_settings.tool_choice = "required"

    async def on_tool_end(self, context: object, agent: Agent, tool: object, result: object) -> None:
        agent.model_settings.tool_choice = "none"


LOOP = ["tool_call_item", "tool_call_output_item", "message_output_item"]


async def loops(kind: type[OpenAIResponsesModel] | type[OpenAIChatCompletionsModel]) -> None:
    """Whole, continued, and with streams."""
    # Connections belong to one event loop.
    own = AsyncOpenAI(base_url=f"{os.environ['URL']}/v1", api_key=os.environ["KEY"], max_retries=0)
    agent = Agent(
        name="Assistant",
        model=kind(model=os.environ["BASE"], openai_client=own),
        model_settings=ModelSettings(max_tokens=200, temperature=0, parallel_tool_calls=False),
        reset_tool_choice=False,
        tools=[weather],
        output_type=Verdict,
    )
    run = await Runner.run(agent, "How is it?", hooks=CallThenAnswer())
    assert [item.type for item in run.new_items] == LOOP
    further = await Runner.run(
        agent, [*run.to_input_list(), {"role": "user", "content": "And again?"}], hooks=CallThenAnswer()
    )
    assert [item.type for item in further.new_items] == LOOP
    streamed = Runner.run_streamed(agent, "How is it?", hooks=CallThenAnswer())
    assert [event.type async for event in streamed.stream_events()]
    assert [item.type for item in streamed.new_items] == LOOP
    assert streamed.new_items[0].raw_item.arguments == run.new_items[0].raw_item.arguments
    if kind is OpenAIResponsesModel:
        # By the id of what was answered before, with nothing sent twice.
        by_id = await Runner.run(agent, "And again?", hooks=CallThenAnswer(), previous_response_id=run.last_response_id)
        assert [item.type for item in by_id.new_items] == LOOP


for kind in (OpenAIResponsesModel, OpenAIChatCompletionsModel):
    asyncio.run(loops(kind))
