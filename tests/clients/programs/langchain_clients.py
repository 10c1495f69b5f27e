"""LangChain's OpenAI classes and its Hugging Face endpoint, with their defaults."""

import os

from langchain_huggingface import HuggingFaceEndpoint
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel

URL, KEY, BASE = os.environ["URL"], os.environ["KEY"], os.environ["BASE"]


class Verdict(BaseModel):
    """What is asked for."""

    yes: bool


chat = ChatOpenAI(base_url=f"{URL}/v1", api_key=KEY, model=BASE, max_tokens=200, temperature=0, max_retries=0)
reply = chat.invoke("Hello")
assert "".join(piece.text for piece in chat.stream("Hello")) == reply.text
again = chat.invoke([("user", "Hello"), reply, ("user", "And again?")])
assert again.usage_metadata["input_tokens"] > reply.usage_metadata["input_tokens"]
assert isinstance(chat.with_structured_output(Verdict).invoke("Is it so?"), Verdict)

plain = OpenAI(base_url=f"{URL}/v1", api_key=KEY, model=BASE, max_tokens=4, temperature=0, max_retries=0)
assert len(plain.batch(["a", "b", "c"])) == 3

# To a server of one's own it sends no token of the hub.
headers = {"Authorization": f"Bearer {KEY}"}
endpoint = HuggingFaceEndpoint(endpoint_url=URL, server_kwargs={"headers": headers}, max_new_tokens=4)
assert isinstance(endpoint.invoke("a"), str)
