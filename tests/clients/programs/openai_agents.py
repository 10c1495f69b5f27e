"""OpenAI's Agents SDK over chat completions: two turns."""

import os

from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, Runner, set_tracing_disabled
from openai import AsyncOpenAI

set_tracing_disabled(True)
client = AsyncOpenAI(base_url=f"{os.environ['URL']}/v1", api_key=os.environ["KEY"], max_retries=0)
agent = Agent(
    name="Assistant",
    instructions="Be brief.",
    model=OpenAIChatCompletionsModel(model=os.environ["BASE"], openai_client=client),
    model_settings=ModelSettings(max_tokens=8, temperature=0),
)
first = Runner.run_sync(agent, "Hello")
second = Runner.run_sync(agent, [*first.to_input_list(), {"role": "user", "content": "And again?"}])
assert isinstance(second.final_output, str)
