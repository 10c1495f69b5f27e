"""LlamaIndex's OpenAI-like model: complete, chat, stream; functions, an agent that calls one, a program by one."""

import asyncio
import os
from typing import Literal

from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.llms import ChatMessage
from llama_index.core.program import FunctionCallingProgram
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel

settings = {
    "model": os.environ["BASE"],
    "api_base": f"{os.environ['URL']}/v1",
    "api_key": os.environ["KEY"],
    "is_chat_model": True,
    "context_window": 4096,
    "temperature": 0,
    "max_retries": 0,
}
llm = OpenAILike(max_tokens=8, **settings)
assert llm.complete("Hello").text is not None
message = ChatMessage(role="user", content="Hello")
reply = llm.chat([message])
assert "".join(piece.delta or "" for piece in llm.stream_chat([message])) == reply.message.content
assert llm.chat([message, reply.message, message]).message.role == "assistant"


class Verdict(BaseModel, extra="forbid"):
    """What is asked for."""

    yes: bool


called = []


def weather(city: Literal["Oslo", "Rome"], days: Literal[1, 2]) -> str:
    """The weather of a city."""
    called.append((city, days))
    return f"{days} degrees in {city}"


calling = OpenAILike(max_tokens=200, is_function_calling_model=True, **settings)
tool = FunctionTool.from_defaults(weather)
first = calling.chat_with_tools([tool], user_msg="How is it?", tool_required=True)
calls = calling.get_tool_calls_from_response(first)
assert {call.tool_name for call in calls} == {"weather"}
*_, last = calling.stream_chat_with_tools([tool], user_msg="How is it?", tool_required=True)
streamed = calling.get_tool_calls_from_response(last)
assert [call.tool_kwargs for call in streamed] == [call.tool_kwargs for call in calls]
assert isinstance(calling.structured_predict(Verdict, PromptTemplate("Is it so?")), Verdict)
program = FunctionCallingProgram.from_defaults(
    output_cls=Verdict, prompt_template_str="Is it so?", llm=calling, tool_required=True
)
assert isinstance(program(), Verdict)


async def ask() -> None:
    """An agent calls, and then says something; it keeps its connections, which belong to one loop."""
    for streaming in (False, True):
        called.clear()
        agent = FunctionAgent(tools=[tool], llm=calling, initial_tool_choice="weather", streaming=streaming)
        assert (await agent.run("How is it?")).response.role == "assistant"
        assert called


asyncio.run(ask())
