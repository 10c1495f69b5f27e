"""pydantic-ai's OpenAI chat model: text, history, and an output that the server's grammar makes valid."""

import os

from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
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
structured = Agent(model, output_type=NativeOutput(Verdict), model_settings=settings).run_sync("Is it so?")
assert isinstance(structured.output, Verdict)
