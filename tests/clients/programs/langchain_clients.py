"""LangChain's OpenAI classes and its Hugging Face endpoint, with their defaults; tools, and a loop of calls."""

import os
from typing import Literal

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_huggingface import HuggingFaceEndpoint
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel

URL, KEY, BASE = os.environ["URL"], os.environ["KEY"], os.environ["BASE"]


class Verdict(BaseModel, extra="forbid"):
    """What is asked for."""

    yes: bool


class Place(BaseModel, extra="forbid"):
    """Closed: a random model would add arguments without end."""

    city: Literal["Oslo", "Rome"]
    days: Literal[1, 2]


@tool(args_schema=Place)
def weather(city: str, days: int) -> str:
    """The weather of a city."""
    return f"{days} degrees in {city}"


chat = ChatOpenAI(base_url=f"{URL}/v1", api_key=KEY, model=BASE, max_tokens=200, temperature=0, max_retries=0)
reply = chat.invoke("Hello")
assert "".join(piece.text for piece in chat.stream("Hello")) == reply.text
again = chat.invoke([("user", "Hello"), reply, ("user", "And again?")])
assert again.usage_metadata["input_tokens"] > reply.usage_metadata["input_tokens"]
for more in ({}, {"method": "function_calling"}, {"method": "function_calling", "strict": True}, {"include_raw": True}):
    found = chat.with_structured_output(Verdict, **more).invoke("Is it so?")
    assert isinstance(found["parsed"] if "include_raw" in more else found, Verdict), more

# The loop of every agent: the model calls, the function answers, the model goes on.
for choice in ("weather", "any"):
    calling = chat.bind_tools([weather], tool_choice=choice, parallel_tool_calls=False)
    messages = [HumanMessage("How is it?")]
    called = calling.invoke(messages)
    assert [call["name"] for call in called.tool_calls] == ["weather"], called
    whole = None
    for piece in calling.stream(messages):
        whole = piece if whole is None else whole + piece
    assert [call["args"] for call in whole.tool_calls] == [call["args"] for call in called.tool_calls]
    messages += [called, *(weather.invoke(call) for call in called.tool_calls)]
    assert isinstance(messages[-1], ToolMessage)
    said = chat.bind_tools([weather]).invoke(messages)
    assert said.usage_metadata["input_tokens"] > called.usage_metadata["input_tokens"]

plain = OpenAI(base_url=f"{URL}/v1", api_key=KEY, model=BASE, max_tokens=4, temperature=0, max_retries=0)
assert len(plain.batch(["a", "b", "c"])) == 3

# To a server of one's own it sends no token of the hub.
headers = {"Authorization": f"Bearer {KEY}"}
endpoint = HuggingFaceEndpoint(endpoint_url=URL, server_kwargs={"headers": headers}, max_new_tokens=4)
assert isinstance(endpoint.invoke("a"), str)
