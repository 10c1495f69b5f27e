"""OpenAI's own client, as its examples use it: history, streams, batches, parsed answers, tools."""

import os
from typing import Literal

import openai
from openai import OpenAI
from pydantic import BaseModel

client = OpenAI(base_url=f"{os.environ['URL']}/v1", api_key=os.environ["KEY"], max_retries=0)
BASE = os.environ["BASE"]

messages = [{"role": "user", "content": "Hello"}]
first = client.chat.completions.create(model=BASE, messages=messages, max_tokens=8, temperature=0)
messages += [first.choices[0].message, {"role": "user", "content": "And again?"}]
second = client.chat.completions.create(model=BASE, messages=messages, max_tokens=8, store=False, service_tier="auto")
assert second.choices[0].message.role == "assistant"

pieces = client.chat.completions.create(
    model=BASE,
    messages=[messages[0]],
    max_tokens=8,
    temperature=0,
    stream=True,
    stream_options={"include_usage": True},
)
chunks = list(pieces)
text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
assert text == first.choices[0].message.content
assert chunks[-1].usage.completion_tokens == first.usage.completion_tokens

several = client.completions.create(model=BASE, prompt=["a", "b"], n=2, max_tokens=3, seed=1)
assert [choice.index for choice in several.choices] == [0, 1, 2, 3]


class Verdict(BaseModel):
    yes: bool
    colour: Literal["red", "green"]


if int(openai.__version__.split(".")[0]) >= 2:
    parse = client.chat.completions.parse
else:
    parse = client.beta.chat.completions.parse
answer = parse(model=BASE, messages=[messages[0]], response_format=Verdict, max_tokens=200, temperature=0)
assert isinstance(answer.choices[0].message.parsed, Verdict)


class Weather(BaseModel, extra="forbid"):
    """The weather of a city."""

    city: Literal["Oslo", "Rome"]
    days: Literal[1, 2]


offer = {"model": BASE, "max_tokens": 200, "temperature": 0, "tools": [openai.pydantic_function_tool(Weather)]}
must = {"tool_choice": "required", "parallel_tool_calls": False}
calling = parse(messages=[messages[0]], **offer, **must).choices[0].message
assert isinstance(calling.tool_calls[0].function.parsed_arguments, Weather)
streams = client.chat.completions if int(openai.__version__.split(".")[0]) >= 2 else client.beta.chat.completions
with streams.stream(messages=[messages[0]], **offer, **must) as stream:
    kinds = {event.type for event in stream}
    streamed = stream.get_final_completion().choices[0].message
assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds
assert streamed.tool_calls[0].function == calling.tool_calls[0].function
result = {"role": "tool", "tool_call_id": calling.tool_calls[0].id, "content": "4 degrees"}
told = client.chat.completions.create(messages=[messages[0], calling, result], **offer)
assert told.choices[0].message.role == "assistant"

if hasattr(client, "responses"):
    said = client.responses.create(
        model=BASE, input="Hello", instructions="Be brief.", max_output_tokens=8, temperature=0
    )
    more = client.responses.create(
        model=BASE, input="And again?", previous_response_id=said.id, max_output_tokens=8, temperature=0
    )
    assert more.previous_response_id == said.id
    with client.responses.stream(model=BASE, input="Hello", max_output_tokens=8, temperature=0) as stream:
        events = [event.type for event in stream]
    assert events[0] == "response.created"

code = None
try:
    client.chat.completions.create(model="unknown", messages=[messages[0]])
except openai.NotFoundError as error:
    code = error.code
assert code == "model_not_found"
