"""TGI's own Python client: generate, stream, chat."""

import os

from text_generation import Client

client = Client(os.environ["URL"], headers={"Authorization": f"Bearer {os.environ['KEY']}"}, timeout=60)
answer = client.generate("a", max_new_tokens=4)
assert answer.details.generated_tokens == 4
assert "".join(piece.token.text for piece in client.generate_stream("a", max_new_tokens=4)) == answer.generated_text
chat = client.chat(messages=[{"role": "user", "content": "Hello"}], max_tokens=4)
assert chat.choices[0].message.role == "assistant"

parameters = {"type": "object", "properties": {"days": {"enum": [1, 2]}}, "required": ["days"]}
tool = {"type": "function", "function": {"name": "weather", "description": "", "parameters": parameters}}
asked = [{"role": "user", "content": "How is it?"}]
# It names a function by its bare name.
called = client.chat(messages=asked, max_tokens=200, tools=[tool], tool_choice="weather").choices[0].message
assert called.tool_calls[0]["function"]["name"] == "weather"
