"""LlamaIndex's OpenAI-like model: complete, chat, stream."""

import os

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

llm = OpenAILike(
    model=os.environ["BASE"],
    api_base=f"{os.environ['URL']}/v1",
    api_key=os.environ["KEY"],
    is_chat_model=True,
    context_window=256,
    max_tokens=8,
    temperature=0,
    max_retries=0,
)
assert llm.complete("Hello").text is not None
message = ChatMessage(role="user", content="Hello")
reply = llm.chat([message])
assert "".join(piece.delta or "" for piece in llm.stream_chat([message])) == reply.message.content
assert llm.chat([message, reply.message, message]).message.role == "assistant"
