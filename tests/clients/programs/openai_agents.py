"""OpenAI's Agents SDK over responses, its default, and over chat completions: two turns."""

import os

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    set_tracing_disabled,
)
from openai import AsyncOpenAI
from pydantic import BaseModel


class Verdict(BaseModel):
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
